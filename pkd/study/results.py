"""results/<arm>-seed-<k>.json of a study: all that the comparison needs of one finished arm and seed."""

import base64
from pathlib import Path

import numpy as np

from pkd.data import DataSet
from pkd.errors import UserError
from pkd.evaluate import COUNT
from pkd.files import read_json, write_json
from pkd.predictions import Predictions
from pkd.recipe import Recipe
from pkd.recipe_file import difference, identity, parse_recipe
from pkd.study.arms import Arm, student_flops, teacher_flops

NEEDED = ("title", "control", "recipe", "test_readings", "test_images", "world_size", "teachers", "teacher_flops",
          "student_flops")
FIGURES = ("accuracy", "loss", "calibration_error", "validation_accuracy", "validation_loss", "parameters")


def result_path(folder: Path, arm: str, seed: int) -> Path:
    return folder / "results" / f"{arm}-seed-{seed}.json"


def make_result(run: Path, study: dict, arm: Arm, recipe: Recipe, data: DataSet, seconds: float) -> dict:
    """Of an evaluated run. study: the identity of the study's recipe with seed 0; seconds: that this start took for the arm.

    Raises UserError where it was evaluated on other data.
    """
    summary, said = read_json(run / "summary.json"), Predictions.read(run / "predictions")
    if summary.get("fingerprint") != data.fingerprint:
        raise UserError(f"run {run} was evaluated on other images or another split than the data that are here: delete that "
                        "folder, or restore the data")
    shape, samples = (len(data.classes), data.channels, data.size), len(data.students_see)
    teachers, flops = {}, 0.0
    for name, teacher in summary["teachers"].items():
        teachers[name] = {"level": teacher["level"], "accuracy": teacher["accuracy"], "classes": len(teacher["classes"]),
                          "parameters": teacher["parameters"]}
        flops += teacher_flops(recipe, recipe.pyramid[teacher["level"]], len(teacher["classes"]), shape, samples,
                               len(data.splits["train"]))
    networks = {**summary["students"], "ensemble": summary["ensemble"]}
    asked = identity(recipe)
    return {
        "arm": arm.name, "title": arm.title, "control": arm.control, "changes": list(arm.changes), "seed": recipe.seed,
        "recipe": asked, "study": study, "fingerprint": data.fingerprint,
        "test_readings": summary["test_readings"], "test_images": summary["test_images"],
        "world_size": summary["world_size"], "micro_batch": micro_batch(recipe, summary["placement"]),
        "made_by": summary["made_by"],
        "networks": {name: {key: own[key] for key in FIGURES} for name, own in networks.items()},
        "correct": {name: packed(right.numpy()) for name, right in zip(said.names, said.correct)},
        "teachers": teachers, "teacher_flops": flops,
        "student_flops": student_flops(recipe, shape, samples),
        "seconds": {"distill": summary["wall_seconds"], "this_start": seconds},
    }


def readings(folder: Path, arm: str, seed: int) -> int:
    """How often the test split was read for an arm and seed, by runs that were deleted since, too."""
    files = _kept_readings(folder, arm, seed), folder / "runs" / f"{arm}-seed-{seed}" / COUNT
    return max((_count(file) for file in files if file.exists()), default=0)


def _count(path: Path) -> int:
    found = read_json(path)
    if not isinstance(found.get("test_readings"), int):
        raise UserError(f"{path} does not say how often the test split was read (test_readings): restore it, or delete it "
                        "and add its readings yourself")
    return found["test_readings"]


def all_readings(folder: Path, results: list[dict]) -> int:
    """How often the test split was read for a study, for results that are gone as well."""
    counts: dict[str, int] = {}
    kept = [(path.stem, path) for path in (folder / "readings").glob("*.json")]
    for name, path in [*kept, *((path.parent.name, path) for path in (folder / "runs").glob(f"*/{COUNT}"))]:
        counts[name] = max(counts.get(name, 0), _count(path))
    for result in results:
        name = f"{result['arm']}-seed-{result['seed']}"
        counts[name] = max(counts.get(name, 0), result["test_readings"])
    return sum(counts.values())


def keep_readings(folder: Path, arm: str, seed: int) -> None:
    """Write down what readings() says, so that it outlives the run."""
    count, kept = readings(folder, arm, seed), _kept_readings(folder, arm, seed)
    if count and not (kept.exists() and _count(kept) == count):
        write_json(kept, {"test_readings": count})


def go_on_counting(folder: Path, arm: str, seed: int) -> None:
    """A new run counts on from those before it."""
    count, path = readings(folder, arm, seed), folder / "runs" / f"{arm}-seed-{seed}" / COUNT
    if count and not path.exists():
        write_json(path, {"test_readings": count})


def _kept_readings(folder: Path, arm: str, seed: int) -> Path:
    return folder / "readings" / f"{arm}-seed-{seed}.json"


def micro_batch(recipe: Recipe, placement: dict) -> int:
    """Samples of which a student's batch statistics are made, at most."""
    ranks = 1 if recipe.distill.sync_batch_norm else placement["student_ranks"] // placement["groups"]
    return -(-recipe.distill.batch // (ranks * placement["accumulation"]))


def read_results(folder: Path, study: dict, fingerprint: str) -> list[dict]:
    """All results of a study, in the order of arms' names and seeds. Raises UserError where one is of another recipe or
    other data.
    """
    out = []
    for path in sorted((folder / "results").glob("*.json")):
        found = read_json(path)
        try:
            mine, data = found["study"], found["fingerprint"]
            named = path == result_path(folder, found["arm"], found["seed"])
            right(found, "ensemble")
            [own[key] for own in found["networks"].values() for key in FIGURES]
            [found[key] for key in NEEDED]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no result of a study ({error}): delete it or restore it") from None
        if not named:
            raise UserError(f"{path} holds the result of arm {found['arm']}, seed {found['seed']}: give it that name again")
        if as_of_now(mine) != study:
            raise UserError(f"{path} belongs to a study of another recipe than this one: "
                            f"{difference(study, as_of_now(mine))}; give another --study-folder, undo the change, or delete "
                            "what is in that folder")
        found["test_readings"] = max(found["test_readings"], readings(folder, found["arm"], found["seed"]))
        found.setdefault("micro_batch", mine["distill"]["batch"] // found["world_size"])  # as all were that did not tell
        found.setdefault("made_by", "an earlier pkd")
        if data != fingerprint:
            raise UserError(f"{path} was measured on other images or another split than the data that are here: give "
                            "another --study-folder, or restore the data")
        out.append(found)
    return out


def refuse_foreign(folder: Path) -> None:
    """Raises UserError where a study.json, which is about to be written anew, is none of pkd's or tells of results that are
    gone.
    """
    path = folder / "study.json"
    if not path.exists():
        return
    found = read_json(path)
    if not isinstance(found.get("arms"), dict):
        raise UserError(f"{path} is there and not of a study of pkd: give another --study-folder")
    if found["arms"] and not any((folder / "results").glob("*.json")):
        raise UserError(f"{path} tells of results that are gone from {folder / 'results'}: restore them, or delete it "
                        "to begin anew")


def refuse_other(folder: Path, result: dict, recipe: Recipe) -> None:
    """Raises UserError where a result is not what `recipe`, an arm with its seed, asks for."""
    asked, found = identity(recipe), as_of_now(result["recipe"])
    if found != asked:
        path = result_path(folder, result["arm"], result["seed"])
        raise UserError(f"{path} is of other settings: {difference(asked, found)}; give another --study-folder, "
                        f"another name to the arm, or delete that file and runs/{result['arm']}-seed-{result['seed']}")


def as_of_now(stored: dict) -> dict:
    """An identity that was written down, with the defaults of keys that recipes have got since: it meant those."""
    tree = {key: value for key, value in stored.items() if key != "dtypes"}
    try:
        return {**identity(parse_recipe({**tree, "name": "stored"})), "dtypes": stored["dtypes"]}
    except (UserError, KeyError):  # of keys that there are no more, or none of a recipe
        return stored


def stored_recipe(result: dict) -> Recipe | None:
    """Of the arm that a result is of; None where it does not tell."""
    try:
        return parse_recipe({**{key: value for key, value in result["recipe"].items() if key != "dtypes"}, "name": "stored"})
    except (UserError, KeyError, AttributeError):
        return None


def packed(right: np.ndarray) -> str:
    """bool [images] as text."""
    return base64.b64encode(np.packbits(right)).decode()


def right(result: dict, network: str) -> np.ndarray:
    """bool [test images]: where a network of a result was right."""
    bits = np.frombuffer(base64.b64decode(result["correct"][network]), dtype=np.uint8)
    return np.unpackbits(bits, count=result["test_images"]).astype(bool)
