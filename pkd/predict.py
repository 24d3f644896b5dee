"""Classes and probabilities of image files, on the terminal or as CSV."""

import csv
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from pkd.classifier import Classifier, open_classifier
from pkd.console import Console
from pkd.errors import UserError
from pkd.evaluate import cut_short
from pkd.files import write_bytes
from pkd.images import decode
from pkd.sources import SUFFIXES

BATCH = 64  # images that are decoded and in memory at a time
NAMED = 10  # of the images that cannot be read; all are counted


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the likeliest first."""

    image: Path
    classes: list[str]
    probabilities: list[float]


def predict(path: Path, given: list[Path], student: str | None, top: int, table: Path | None, console: Console,
            trust_code: bool = False) -> list[Prediction]:
    """The `top` likeliest classes of each image; path: a run folder or what `export` wrote; given: files and folders.

    table: a CSV file, which must not exist yet: image, class, probability, class_2, probability_2, ... Without it the
    terminal shows them. Raises UserError, before anything is written, for images that cannot be read.
    """
    if table is not None and os.path.lexists(table):
        raise UserError(f"{table} already exists: give a new file with --csv")
    classifier = open_classifier(path, student, trust_code)
    if (path / "run.json").exists() and (said := cut_short(path)):
        console.say(said)
    found = _predictions(classifier, image_files(given), min(top, len(classifier.classes)), console)
    if table is None:
        console.show(_shown(found))
    else:
        write_bytes(table, _csv(found).encode("utf-8", "surrogateescape"))
        console.say(f"predictions for {len(found)} image(s) written to {_text(table)}")
    return found


def image_files(given: list[Path]) -> list[Path]:
    """Files as they are, folders as the image files in and below them, by name. Raises UserError for an empty folder."""
    files = []
    for path in given:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.is_dir())
        if not inside:
            raise UserError(f"folder {path} holds no images ({', '.join(sorted(SUFFIXES))}): give another")
        files += inside
    return files


def _predictions(classifier: Classifier, files: list[Path], top: int, console: Console) -> list[Prediction]:
    """Batch by batch; after the first image that cannot be read it only looks for more of them."""
    found, unreadable = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), BATCH):
            batch = files[start:start + BATCH]
            views = list(pool.map(lambda file: _view(file, classifier), batch))
            unreadable += [file for file, view in zip(batch, views) if view is None]
            if not unreadable:
                best = classifier.logits(torch.stack(views)).softmax(1).topk(top)
                found += [Prediction(file, [classifier.classes[index] for index in indices], values)
                          for file, indices, values in zip(batch, best.indices.tolist(), best.values.tolist())]
            console.progress("predict", start + len(batch), len(files))
    console.end_progress()
    if unreadable:
        more = f" and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        raise UserError(f"{len(unreadable)} of {len(files)} image(s) cannot be decoded "
                        f"({', '.join(map(_text, unreadable[:NAMED]))}{more}): replace them or leave them out")
    return found


def _view(file: Path, classifier: Classifier) -> torch.Tensor | None:
    try:
        return decode(file, classifier.view_size, classifier.channels == 1)
    except UserError:
        return None


def _shown(found: list[Prediction]) -> Table:
    table = Table()
    for column, justify in (("image", "left"), ("class", "left"), ("probability", "right")):
        table.add_column(column, justify=justify, overflow="fold")
    for prediction in found:
        for place, (name, probability) in enumerate(zip(prediction.classes, prediction.probabilities)):
            table.add_row(Text("" if place else _text(prediction.image)), Text(name), f"{probability:.4f}")
        table.add_section()
    return table


def _text(path: Path) -> str:
    """A file's name as it can be printed, whatever bytes are in it."""
    return os.fsencode(path).decode(errors="replace")


def _csv(found: list[Prediction]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = ["", *(f"_{place}" for place in range(2, len(found[0].classes) + 1))]
    writer.writerow(["image", *(f"{column}{place}" for place in places for column in ("class", "probability"))])
    for prediction in found:
        pairs = zip(prediction.classes, prediction.probabilities)
        writer.writerow([str(prediction.image), *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])
    return text.getvalue()
