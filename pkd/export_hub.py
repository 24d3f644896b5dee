"""A folder in the layout of the Hugging Face hub; nothing is uploaded.

One student lies at the top: README.md (the model card), config.json, preprocessor_config.json, model.safetensors. Of an
ensemble each student has a folder of its name with the latter three, and the config.json at the top lists them.
"""

from pathlib import Path

from pkd.errors import UserError
from pkd.evaluate import recipe_of
from pkd.export import PREDICTION
from pkd.files import read_json, write_bytes, write_json
from pkd.model_card import model_card
from pkd.models import Network
from pkd.objective import constants
from pkd.recipe_file import difference, identity
from pkd.run_folder import RunFolder
from pkd.study.results import as_of_now, stored_recipe
from pkd.weights_file import Weights, write_weights

COMPARED = ("data", "views", "students", "distill")  # what is equal in all arms of a study
CONFIG, WEIGHTS = "config", "model"  # stems of the files


def export_hub(run: RunFolder, students: list[tuple[Network, dict]], folder: Path, study: Path | None = None) -> None:
    """Write the folder. Raises UserError for a run that was not evaluated, for the model card states its figures, and for
    what is no study.
    """
    arms = arm = None
    if study is not None:
        if not (study / "study.json").exists():
            raise UserError(f"--study {study} has no study.json: give the folder of a study, or run pkd study first")
        arms, name = read_json(study / "study.json"), recipe_of(run, []).name
        if arms.get("recipe") != name:
            raise UserError(f"--study {study} is of recipe {arms.get('recipe')}, but run {run.path} of {name}: give the "
                            "folder of its own study")
        if not arms.get("study"):
            raise UserError(f"--study {study} has no result yet, which the model card could state: wait for one, or leave "
                            "--study out")
        _refuse_other(study, arms, run)
        arm = _arm_of(study, run)
    if not (run.path / "summary.json").exists():
        raise UserError(f"run {run.path} has no summary.json, whose figures the model card states: run pkd evaluate first")
    summary = read_json(run.path / "summary.json")
    if summary["evaluated"] < run.state("distill")["time"] or "calibration_error" not in summary["ensemble"]:
        raise UserError(f"{run.path / 'summary.json'} does not speak of the students that are there: run pkd evaluate "
                        "again")
    names = [facts["name"] for _, facts in students]
    alone = len(names) == 1
    for network, facts in students:
        _student(folder if alone else folder / facts["name"], network, facts)
    if not alone:
        write_json(folder / f"{CONFIG}.json", {"students": names, "prediction": PREDICTION,
                                               **_labels(students[0][1]["classes"])})
    card = model_card(recipe_of(run, []), summary, [facts for _, facts in students], arms, arm)
    write_bytes(folder / "README.md", card.encode())


def _refuse_other(study: Path, arms: dict, run: RunFolder) -> None:
    """Raises UserError where a run's students are none of those that a study compares."""
    both = read_json(run.path / "run.json")["recipe"], arms.get("study") or {}
    asked, found = ({key: as_of_now(tree).get(key) for key in COMPARED} for tree in both)
    if asked != found:
        raise UserError(f"--study {study} is of other students than run {run.path}: {difference(asked, found)}; give the "
                        "folder of its own study")
    if arms.get("fingerprint") != read_json(run.students / "students.json").get("fingerprint"):
        raise UserError(f"--study {study} is of other images or another split than run {run.path}: give the folder of its "
                        "own study")


def _arm_of(study: Path, run: RunFolder) -> str | None:
    """The arm of a study that is made as this run is, but for its seed; None where no result is of such a one."""
    mine = _effect(read_json(run.path / "run.json"))
    for path in sorted(study.glob("results/*.json")):
        result = read_json(path)
        if mine is not None and _effect(result) == mine:
            return result.get("arm")
    return None


def _effect(made: dict) -> dict | None:
    """What made the students, whichever way its recipe writes it: constants spelt out, without teachers that nobody asks.

    made: what holds the recipe as it was recorded; None where that cannot be read any more.
    """
    recipe = stored_recipe(made)
    if recipe is None:
        return None
    levels = {"alone": 0, "top": 1}.get(recipe.objective.kind, len(recipe.pyramid))
    settings = {"objective": constants(recipe, len(recipe.pyramid)), "pyramid": recipe.pyramid[:levels],
                "teachers": recipe.teachers if levels else None}
    return {**identity(recipe), **settings, "dtypes": made["recipe"].get("dtypes"), "seed": 0}


def _student(folder: Path, network: Network, facts: dict) -> None:
    weights = Weights(write_weights(folder / WEIGHTS, network.backbone.state_dict()))
    write_json(folder / "preprocessor_config.json", _preprocessing(facts))
    write_json(folder / f"{CONFIG}.json", {**facts, "sha256": weights.sha256(), **_labels(facts["classes"])})


def _labels(classes: list[str]) -> dict:
    return {"num_labels": len(classes), "id2label": {str(index): name for index, name in enumerate(classes)},
            "label2id": {name: index for index, name in enumerate(classes)}}


def _preprocessing(facts: dict) -> dict:
    """The usual keys of such a file; input_size is what the network resizes to after all of them but normalisation.

    Where a view is square they say the same as pkd does but for fractions of a pixel at the margins; they cannot say that an
    image covers a view that is not, and leave resizing to the reader then.
    """
    height, width = facts["view_size"]
    return {"do_convert_rgb": facts["channels"] == 3,
            "do_resize": height == width, "resample": 2, "size": {"shortest_edge": min(height, width)},  # 2: bilinear
            "do_center_crop": height == width, "crop_size": {"height": height, "width": width},
            "do_rescale": True, "rescale_factor": 1 / 255, "input_size": facts["input_size"],
            "do_normalize": True, "image_mean": facts["mean"], "image_std": facts["std"]}
