"""Students out of a run folder, for use elsewhere: weights and a JSON each, or what export_onnx and export_hub write."""

import time
from collections.abc import Sequence
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError, nearest
from pkd.evaluate import cut_short, finished_students
from pkd.files import new_folder, write_json
from pkd.models import Network
from pkd.network_file import copy_network
from pkd.run_folder import RunFolder

LIST = "ensemble"  # <LIST>.json names the students of an export
PREDICTION = "argmax of the mean of the logits"


def export(path: Path, target: Path, student: str | None, form: str, console: Console, study: Path | None = None,
           overrides: Sequence[str] = (), random_images: bool = False) -> None:
    """Write one student or all of them (the ensemble) to `target`, which must be new or empty; all of it or nothing.

    form: "safetensors" (a safetensors file and a JSON each: architecture, class names, normalisation, input size;
    ensemble.json lists them), "onnx" or "hub". study: a folder of `pkd study` whose arms a hub's card is to state. An
    ONNX file is checked on the run's validation images; overrides: such as data.path=, where they are now; random_images:
    on random ones instead. Raises UserError.
    """
    if (overrides or random_images) and form != "onnx":
        raise UserError(f"{overrides[0] if overrides else '--random-images'} is for the images that --format onnx is "
                        f"checked on, but the format is {form}: leave it out")
    if study is not None and form != "hub":
        raise UserError(f"--study {study} is for the model card of --format hub, but the format is {form}: leave it out")
    run, began = RunFolder(path), time.monotonic()
    students = finished_students(run, smoke=True)
    if said := cut_short(path):
        console.say(said)
    if student is not None:
        students = [chosen(students, student)]
    names = [facts["name"] for _, facts in students]
    with new_folder(target) as folder:
        if form == "onnx":
            from pkd.export_onnx import export_onnx

            export_onnx(run, students, folder, console, overrides, random_images)
        elif form == "hub":
            from pkd.export_hub import export_hub

            export_hub(run, students, folder, study)
        else:
            _export_files(run, names, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.say(f"{len(names)} student(s) written to {target}: {', '.join(names)} "
                f"({size / 1e6:.2f} MB, in {time.monotonic() - began:.0f} s)")


def chosen(students: list[tuple[Network, dict]], name: str) -> tuple[Network, dict]:
    """The student of that name. Raises UserError where there is none."""
    names = [facts["name"] for _, facts in students]
    if name not in names:
        raise UserError(f"student {name} was asked for, but there are only {', '.join(names)}{nearest(name, names)}")
    return students[names.index(name)]


def _export_files(run: RunFolder, names: list[str], folder: Path) -> None:
    if LIST in names:
        raise UserError(f"a student of {run.path} is called {LIST}, which is the name of the export's list of students: "
                        "export it with --format hub or --format onnx")
    for name in names:
        copy_network(run.students / name, folder / name)
    write_json(folder / f"{LIST}.json", {"students": names, "prediction": PREDICTION})
