"""Students out of a run folder, and predictions for image files by any of them or by their ensemble."""

from pathlib import Path

import torch
from rich.table import Table

from pkd.console import Console
from pkd.errors import UserError, nearest
from pkd.evaluate import finished_students
from pkd.files import read_json, write_json
from pkd.images import decode
from pkd.models import Network
from pkd.network_file import copy_network, read_network
from pkd.run_folder import RunFolder


def export(path: Path, target: Path, student: str | None, console: Console) -> None:
    """Write one student or all of them (the ensemble) to `target`, which must be new or empty.

    safetensors and a JSON each: architecture, class names, normalisation, input size; ensemble.json lists them.
    """
    run = RunFolder(path)
    names = [facts["name"] for _, facts in finished_students(run, smoke=True)]
    chosen = [_known(student, names)] if student else names
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and is not empty: give a new folder with --to")
    for name in chosen:
        copy_network(run.students / name, target / name)
    write_json(target / "ensemble.json", {"students": chosen, "prediction": "argmax of the mean of the logits"})
    console.say(f"{len(chosen)} student(s) written to {target}: {', '.join(chosen)}")


def predict(path: Path, images: list[Path], student: str | None, console: Console) -> list[dict]:
    """The class and its probability for each image file; path: a run folder or what `export` wrote."""
    networks = _networks(path, student)
    facts = networks[0][1]
    size, grey = tuple(facts["view_size"]), facts["channels"] == 1
    views = torch.stack([decode(file, size, grey) for file in images])
    with torch.inference_mode():
        logits = torch.stack([own.eval()(views).float() for own, _ in networks]).mean(0)
    probabilities = logits.softmax(1)
    best = probabilities.argmax(1)
    results = [{"image": str(file), "class": facts["classes"][index], "probability": row[index].item()}
               for file, index, row in zip(images, best.tolist(), probabilities)]
    table = Table("image", "class", "probability")
    for result in results:
        table.add_row(result["image"], result["class"], f"{result['probability']:.4f}")
    console.show(table)
    return results


def _networks(path: Path, student: str | None) -> list[tuple[Network, dict]]:
    if (path / "ensemble.json").exists():
        networks = [read_network(path / name) for name in read_json(path / "ensemble.json")["students"]]
    else:
        networks = finished_students(RunFolder(path), smoke=True)
    if student is None:
        return networks
    names = [facts["name"] for _, facts in networks]
    return [networks[names.index(_known(student, names))]]


def _known(student: str, names: list[str]) -> str:
    if student not in names:
        raise UserError(f"student {student} was asked for, but the run has {', '.join(names)}{nearest(student, names)}")
    return student
