"""Whatever can classify an image: the students of a run, or of an export in any of the three formats."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pkd.errors import UserError
from pkd.evaluate import finished_students
from pkd.export import LIST, chosen
from pkd.export_hub import CONFIG, WEIGHTS
from pkd.export_onnx import IMAGES, LOGITS, session
from pkd.files import read_json
from pkd.models import Network
from pkd.network_file import read_network
from pkd.run_folder import RunFolder
from pkd.weights_file import INDEX, ONE


@dataclass(frozen=True)
class Classifier:
    classes: list[str]
    channels: int  # 1: grey images, 3: colour
    view_size: tuple[int, int]  # height and width in pixels
    logits: Callable[[torch.Tensor], torch.Tensor]  # uint8 [n, channels, *view_size] -> fp32 [n, classes], on the CPU


def open_classifier(path: Path, student: str | None, trust_code: bool = False) -> Classifier:
    """The ensemble, or one student, of a run folder or of what `pkd export` wrote. Raises UserError.

    trust_code: import a model of the user's own that an export names.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or what pkd export wrote")
    if path.is_file() and path.stem in (CONFIG, WEIGHTS) and (path.parent / f"{CONFIG}.json").exists():
        path = path.parent  # the hub's names for a network's files
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if path.is_file() and path.suffix != ".onnx":
        students = [_written(path, trust_code)]
    elif (path / "run.json").exists():
        students = finished_students(RunFolder(path), smoke=True)
    elif (path / f"{LIST}.json").exists():
        students = [_exported(path / name, None, trust_code) for name in _listed(path / f"{LIST}.json")]
    elif (path / f"{CONFIG}.json").exists():
        students = _of_hub(path, trust_code)
    elif len(files) == 1:
        return _of_onnx(files[0], student)
    else:
        raise UserError(f"{path} is neither a run folder nor what pkd export wrote: it holds no run.json, {LIST}.json or "
                        f"{CONFIG}.json, and {len(files)} .onnx files, of which one may be named")
    return _of_networks([chosen(students, student)] if student is not None else students)


def _of_networks(students: list[tuple[Network, dict]]) -> Classifier:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = [network.to(device).eval() for network, _ in students]
    facts = students[0][1]

    def logits(views: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([network(views.to(device)).float() for network in networks]).mean(0).cpu()
    return Classifier(facts["classes"], facts["channels"], tuple(facts["view_size"]), logits)


def _written(path: Path, trust_code: bool) -> tuple[Network, dict]:
    """The student whose weights, or the JSON beside them, `path` is."""
    stem = path.with_name(path.name.removesuffix(INDEX)) if path.name.endswith(INDEX) else path.with_suffix("")
    facts, weights = (stem.with_name(f"{stem.name}{end}") for end in (".json", ONE))
    index = stem.with_name(stem.name + INDEX)  # of weights in several files
    if path not in (facts, weights, index) or not facts.is_file() or not (weights.is_file() or index.is_file()):
        raise UserError(f"{path} is no .onnx file, nor are {facts.name} and {weights.name} both there: give a run folder, "
                        "or what pkd export wrote")
    return _exported(stem, None, trust_code)


def _exported(path: Path, stem: Path | None, trust_code: bool) -> tuple[Network, dict]:
    name = str(read_json(path.with_name(path.name + ".json")).get("architecture"))
    if ":" in name and not trust_code:
        raise UserError(f"{path}.json names code, {name[:100]!r}, which would be imported and run: pass --trust-code if you "
                        "know where it comes from")
    return read_network(path, stem)


def _of_hub(path: Path, trust_code: bool) -> list[tuple[Network, dict]]:
    several = "students" in read_json(path / f"{CONFIG}.json")
    folders = [path / name for name in _listed(path / f"{CONFIG}.json")] if several else [path]
    return [_exported(folder / CONFIG, folder / WEIGHTS, trust_code) for folder in folders]


def _of_onnx(file: Path, student: str | None) -> Classifier:
    try:
        run = session(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the path") from None
    try:
        facts = {key: json.loads(text) for key, text in run.get_modelmeta().custom_metadata_map.items()}
        names, view_size = list(facts["students"]), tuple(facts["view_size"])
        found = Classifier(facts["classes"], facts["channels"], view_size,
                           lambda views: torch.from_numpy(run.run([LOGITS], {IMAGES: views.numpy()})[0]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no ONNX file that pkd export wrote (its metadata: {type(error).__name__} {error}): "
                        "give one that is") from None
    if student is not None and names != [student]:
        raise UserError(f"student {student} was asked for, but {file} is one network of {', '.join(names)}: export it with "
                        "--student")
    return found


def _listed(path: Path) -> list[str]:
    names = read_json(path).get("students")
    if not isinstance(names, list) or not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise UserError(f"{path} does not list students of its own folder: restore it or export again")
    return names
