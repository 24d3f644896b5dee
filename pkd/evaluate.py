"""The test split, read once per call and counted: students, their ensemble, and each teacher within its classes."""

import time
from pathlib import Path

import torch

from pkd.confusion import pyramid_of
from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.errors import UserError
from pkd.files import read_json, read_lines, write_json
from pkd.models import Network
from pkd.network_file import read_network, read_teacher, teacher_hash
from pkd.objective import asked
from pkd.predictions import ENSEMBLE, Recorder
from pkd.pyramid import Teacher
from pkd.recipe import Recipe
from pkd.recipe_file import override, parse_recipe
from pkd.run_folder import RunFolder
from pkd.summary import table
from pkd.validate import validate
from pkd.views import Views

COUNT = "test-readings.json"


def evaluate(path: Path, console: Console, overrides: list[str], limit: int | None) -> dict:
    """Write predictions and summary.json of a finished run, return the latter; limit: read only so many test images (a
    smoke run).

    Raises UserError for a run that is not finished.
    """
    run = RunFolder(path)
    students = finished_students(run, smoke=limit is not None)
    done = read_json(run.students / "students.json")
    if limit is not None and (path / "summary.json").exists() and read_json(path / "summary.json")["complete"]:
        raise UserError(f"--steps asks for {limit} test image(s) of run {path}, whose summary.json is of all of them: "
                        "delete that file first, or leave --steps out")
    recipe = recipe_of(run, overrides)
    run = RunFolder(path, recipe.teachers_from)
    torch.set_num_threads(recipe.threads)
    run.open(recipe, "evaluate")
    data = load_data(recipe.data)
    if done.get("fingerprint", data.fingerprint) != data.fingerprint:
        raise UserError(f"run {path} was trained on other images, classes or another split than the data that are here, so "
                        "that its test images may be among those: restore the data, or set data.path to them")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = Views(data, recipe.views, recipe.seed)
    pyramid = pyramid_of(recipe, data, run.teachers)
    teachers = [pyramid.teachers[index] for index in asked(recipe.objective.kind, pyramid)]
    for teacher in teachers:  # before anything is read
        teacher_hash(run.teachers, recipe, teacher, data, complete=limit is None)
    run.record(recipe)
    readings = _one_more_reading(path)
    test = data.splits["test"][:limit]
    networks = [network.to(device) for network, _ in students]
    facts = [facts for _, facts in students]
    record = Recorder([own["name"] for own in facts])
    scores = validate(networks, views, test.numpy(), data.labels[test], device, lambda group: None, record.add)
    predictions = record.predictions()
    predictions.write(path / "predictions")
    calibration = dict(zip(predictions.names, predictions.calibration_errors()))
    chosen = data.splits["validation"][:limit]  # what choices between runs go by
    validation = validate(networks, views, chosen.numpy(), data.labels[chosen], device, lambda group: None)
    lines = read_lines(run.metrics)
    summary = {
        "recipe": recipe.name, "identity": read_json(path / "run.json")["identity"], "seed": recipe.seed,
        "fingerprint": data.fingerprint, "world_size": done["world_size"], "placement": done["placement"],
        "made_by": done.get("made_by", "an earlier pkd"), "complete": done["complete"] and limit is None,
        "evaluated": time.time(),
        "teachers": {teacher.name: _teacher(run, recipe, teacher, data, views, limit, device, console)
                     for teacher in teachers},
        "students": {own["name"]: {"accuracy": accuracy, "loss": loss, "calibration_error": calibration[own["name"]],
                                   "parameters": own["parameters"], "validation_accuracy": chosen_by,
                                   "validation_loss": and_by}
                     for own, accuracy, loss, chosen_by, and_by in zip(facts, scores.accuracy, scores.loss,
                                                                       validation.accuracy, validation.loss)},
        "ensemble": {"accuracy": scores.ensemble_accuracy, "loss": scores.ensemble_loss,
                     "calibration_error": calibration[ENSEMBLE],
                     "parameters": sum(own["parameters"] for own in facts),
                     "validation_accuracy": validation.ensemble_accuracy,
                     "validation_loss": validation.ensemble_loss},
        "images": {"train": len(data.splits["train"]), "unlabelled": len(data.unlabelled),
                   "validation": len(data.splits["validation"])},
        "test_images": len(test), "test_readings": readings,
        "images_per_second": sorted(line["images_per_second"] for line in lines)[len(lines) // 2] if lines else 0.0,
        "wall_seconds": sum(line["seconds"] for line in lines),
    }
    write_json(path / "summary.json", summary)
    console.show(table(summary))
    console.say(f"test images {len(test)}, read {readings} time(s); run folder: {path}")
    return summary


def finished_students(run: RunFolder, smoke: bool) -> list[tuple[Network, dict]]:
    """The students of a run and what their JSON files say. Raises UserError where it is not finished."""
    if not run.path.is_dir():
        raise UserError(f"run folder {run.path} does not exist: give the folder that pkd distill wrote")
    state = run.state("distill")["state"]
    if state != "finished":
        raise UserError(f"run {run.path} is not finished (distill: {state}): start pkd distill again, "
                        "it goes on where it stopped")
    done = read_json(run.students / "students.json")
    if not done["complete"] and not smoke:
        raise UserError(f"run {run.path} was cut short by --steps after {done['epochs']} epoch(s): run pkd distill "
                        "without --steps to finish it, or pass --steps here as well")
    return [read_network(run.students / name) for name in done["students"]]


def cut_short(run: Path) -> str:
    """A sentence where a run's students were ended by --steps, else nothing."""
    done = read_json(run / "students" / "students.json")
    return "" if done["complete"] else f"the students of {run} are those of a smoke run: --steps ended their training"


def recipe_of(run: RunFolder, overrides: list[str]) -> Recipe:
    """The recipe that a run folder was made with; overrides may change its free part, such as data.path."""
    record = read_json(run.path / "run.json")
    tree = merged(record["recipe"], record["free"])
    tree.pop("dtypes", None)
    for text in overrides:
        override(tree, text)
    return parse_recipe(tree, str(run.path / "run.json"))


def merged(a: dict, b: dict) -> dict:
    """b laid over a, dictionary by dictionary."""
    out = dict(a)
    for key, value in b.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _one_more_reading(path: Path) -> int:
    """How often the test split will have been read; written down before it is, whatever becomes of it then."""
    count, summary = path / COUNT, path / "summary.json"
    before = read_json(count)["test_readings"] if count.exists() else \
        read_json(summary)["test_readings"] if summary.exists() else 0
    write_json(count, {"test_readings": before + 1})
    return before + 1


def _teacher(run: RunFolder, recipe: Recipe, teacher: Teacher, data: DataSet, views: Views, limit: int | None,
             device: torch.device, console: Console) -> dict:
    """A teacher on the test images of its own classes."""
    network, facts = read_teacher(run.teachers, recipe, teacher, data, complete=limit is None)
    local = torch.full((len(data.classes),), -1)
    local[list(teacher.classes)] = torch.arange(len(teacher.classes))
    test = data.splits["test"][:limit]
    ids = test[local[data.labels[test]] >= 0]

    def accuracy(on: torch.device) -> float | None:
        if len(ids) == 0:
            return None
        return validate([network.to(on)], views, ids.numpy(), local[data.labels[ids]], on, lambda group: None).accuracy[0]
    try:
        found = accuracy(device)
    except torch.cuda.OutOfMemoryError:  # while students were trained, several ranks held it together
        console.say(f"teacher {teacher.name} does not fit on the GPU, so that the CPU evaluates it: this takes longer")
        found = accuracy(torch.device("cpu"))
    return {"level": teacher.level, "classes": list(teacher.classes), "accuracy": found, "test_images": len(ids),
            "parameters": facts["parameters"]}
