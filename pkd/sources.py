"""Data sets by name: where their images and labels come from. Nothing is unpickled.

Every malformed input ends in a UserError of one sentence.
"""

import csv
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pkd.errors import UserError, nearest
from pkd.files import one_at_a_time
from pkd.images import ArrayImages, FileImages, read_images
from pkd.recipe import Data
from pkd.source_files import read_cifar, read_idx, read_npz

DOWNLOADABLE = ("fashion-mnist", "cifar10", "cifar100")  # by torchvision
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Source:
    images: ArrayImages | FileImages
    labels: np.ndarray  # int64 [samples]
    classes: tuple[str, ...]
    part: np.ndarray  # [samples] of "train", "validation", "test": the official splits; "train" where there is none; and of
    # "unlabelled", whose labels are the number of classes
    index: bytes  # what identifies the images: their contents in memory, or files' names and sizes
    dropped: int = 0


def read_source(recipe: Data, works: Callable[[], None] = lambda: None) -> Source:
    """The samples of the data set that the recipe names; works: told while files are looked at and decoded."""
    readers = {"digits": _digits, "fashion-mnist": _fashion, "cifar10": _cifar, "cifar100": _cifar, "npz": _npz,
               "folder": partial(_folder, works), "csv": partial(_csv, works)}
    if recipe.unlabelled and recipe.name not in ("npz", "folder", "csv"):
        raise UserError(f"data.unlabelled is true, but data set {recipe.name} has a label for every image: take npz, folder "
                        "or csv, or leave it out")
    source = readers[recipe.name](recipe)
    if recipe.unlabelled and "unlabelled" not in source.part:
        raise UserError(f"data.unlabelled is true, but {recipe.path} holds no image without a label: give some (npz: "
                        "x_unlabelled; folder: in unlabelled/ beside train/; csv: rows without a label), or leave it out")
    if len(source.labels) == 0 or len(source.classes) < 2:
        raise UserError(f"data set {recipe.name} ({recipe.path}) holds {len(source.labels)} images of "
                        f"{len(source.classes)} classes: at least 2 classes are needed")
    named, times = Counter(source.classes).most_common(1)[0]
    if times > 1:
        raise UserError(f"data set {recipe.name} ({recipe.path}) has {times} classes of the name {named!r}: give each "
                        "a name of its own")
    return source


def in_memory(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], test: int, name: str,
              validation: int = 0, unlabelled: np.ndarray | None = None) -> Source:
    """A source of arrays, uint8 [n, channels, h, w] and integers [n], the last `test` of them the test split, so many before
    those the validation split. unlabelled: more images, without labels.
    """
    if len(images) != len(labels):
        raise UserError(f"{name} holds {len(images)} images, but {len(labels)} labels: they must be equally many")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{name} holds labels from {labels.min()} to {labels.max()}, but {len(classes)} classes have "
                        f"labels 0 to {len(classes) - 1}: mend the labels or name all classes")
    part = np.array(["train"] * (len(labels) - validation - test) + ["validation"] * validation + ["test"] * test)
    if unlabelled is not None:
        images = np.concatenate([images, unlabelled])
        labels = np.concatenate([labels, np.full(len(unlabelled), len(classes))])
        part = np.concatenate([part, np.full(len(unlabelled), "unlabelled")])
    images = np.ascontiguousarray(images)
    index = hashlib.sha256(repr(images.shape).encode() + images.tobytes()).digest()
    return Source(ArrayImages(torch.from_numpy(images)), labels.astype(np.int64), classes, part, index)


def _digits(recipe: Data) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return in_memory(pixels, digits.target, tuple(str(digit) for digit in range(10)), 0, "digits")


def _fashion(recipe: Data) -> Source:
    folder = Path(recipe.path or DEBIAN_FASHION)
    if recipe.download:
        folder = _downloaded(recipe, "FashionMNIST", "FashionMNIST/raw")
    if os.path.isdir(folder / "FashionMNIST" / "raw"):  # where torchvision, and so pkd fetch, puts them
        folder = folder / "FashionMNIST" / "raw"
    if not os.path.isdir(folder):
        raise UserError(f"fashion-mnist is not in {folder}: install Debian's package dataset-fashion-mnist, or set "
                        "data.path to a folder with its four IDX files, or data.path and data.download=true")
    arrays = [read_idx(folder, f"{part}-{kind}", dimensions) for part in ("train", "t10k")
              for kind, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))]
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels):
            raise UserError(f"fashion-mnist in {folder} holds {len(images)} images for {len(labels)} labels: its files "
                            "are not of one set")
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise UserError(f"fashion-mnist in {folder}: training images are {arrays[0].shape[1:]} pixels and test images "
                        f"{arrays[2].shape[1:]}: its files are not of one set")
    images = np.concatenate([arrays[0], arrays[2]])[:, None]
    return in_memory(images, np.concatenate([arrays[1], arrays[3]]), FASHION, len(arrays[3]), str(folder))


def _cifar(recipe: Data) -> Source:
    fine = recipe.name == "cifar100"
    if recipe.download:
        from pkd.source_files import download_cifar

        download_cifar(_path(recipe), fine)
    images, labels, classes, test = read_cifar(_path(recipe), fine)
    return in_memory(images, labels, classes, test, f"{recipe.name} in {recipe.path}")


def _npz(recipe: Data) -> Source:
    images, labels, classes, test, validation, unlabelled = read_npz(_path(recipe))
    return in_memory(images, labels, classes, test, str(recipe.path), validation, unlabelled if recipe.unlabelled else None)


def _folder(works: Callable[[], None], recipe: Data) -> Source:
    root = _path(recipe)
    if not root.is_dir():
        raise UserError(f"data.path {root} is no folder: give one with a folder of images per class")
    folders = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
    found = [name for name in folders if (root / name).is_dir()]
    splits = {folders[name]: root / name for name in found}
    deep = [name for name in found if any(entry.is_dir() for entry in (root / name).iterdir())]
    if "train" not in deep:
        if deep:
            raise UserError(f"data.path {root} has {deep[0]}/ with folders in it, as of a split, but no train/ with any: "
                            f"name the training images' folder train, or, if {deep[0]} is a class, give it another name")
        splits = {"train": root}  # and train/, if any, is a class of that name
    elif len(splits) < len(found):
        raise UserError(f"data.path {root} has {', '.join(f'{name}/' for name in found)}, of which two are for validation: "
                        "leave one of them")
    names = sorted(entry.name for entry in splits["train"].iterdir() if entry.is_dir())
    unreadable = next((name for name in names if not _is_text(name)), None)
    if unreadable:
        raise UserError(f"the class folder {unreadable!r} in {splits['train']} has a name that is no UTF-8: rename it")
    files, labels, parts = [], [], []
    for split, folder in splits.items():
        for label in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()):
            if label not in names:
                raise UserError(f"{folder} has a class folder {label!r} that {splits['train']} does not have"
                                f"{nearest(label, names)}")
            found = _images_in(folder / label)
            works()
            files += found
            labels += [names.index(label)] * len(found)
            parts += [split] * len(found)
    if recipe.unlabelled:
        if "train" not in deep:
            raise UserError(f"data.unlabelled is true, but data.path {root} has no train/, beside which unlabelled/ would "
                            "be: put the classes' folders into train/")
        found = _images_in(root / "unlabelled")
        files, labels, parts = files + found, labels + [len(names)] * len(found), parts + ["unlabelled"] * len(found)
    return _files(works, recipe, root, files, np.array(labels, dtype=np.int64), tuple(names), np.array(parts, dtype=str))


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _csv(works: Callable[[], None], recipe: Data) -> Source:
    path = _path(recipe)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            known, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.path {path} cannot be read as CSV ({error}): give a table with a header line") from None
    for key, column in (("image_column", recipe.image_column), ("label_column", recipe.label_column)):
        if column not in known:
            raise UserError(f"data.{key} is {column!r}, but {path} has the columns {', '.join(known) or '(none)'}"
                            f"{nearest(column, known)}")
    cells = [(row[recipe.image_column] or "", (row[recipe.label_column] or "").strip()) for row in rows]
    incomplete = next((number for number, cell in enumerate(cells, 1) if not (cell[0] and (cell[1] or recipe.unlabelled))),
                      None)
    if incomplete:
        raise UserError(f"row {incomplete} of {path} lacks its image or its label: complete it or take it out"
                        + ", or set data.unlabelled for images without a label" * bool(cells[incomplete - 1][0]))
    single = [cell for cell in cells if recipe.label_separator not in cell[1]]
    places = Counter(os.path.normpath(path.parent / image) for image, _ in single)  # one file may be written in several ways
    twice, times = next(iter(places.most_common(1)), ("", 0))
    if times > 1:
        raise UserError(f"image {twice} is in {times} rows of {path}, so that students could be trained and tested on it: "
                        f"keep one row an image (one of several labels, joined by {recipe.label_separator!r}, is left out)")
    names = tuple(sorted({label for _, label in single if label}))
    number = {name: index for index, name in enumerate([*names, ""])}  # no label is the number of classes
    files = [path.parent / image for image, _ in single]
    labels = np.array([number[label] for _, label in single], dtype=np.int64)
    parts = np.where(labels < len(names), "train", "unlabelled")
    return _files(works, recipe, path.parent, files, labels, names, parts, len(rows) - len(single))


def _files(works: Callable[[], None], recipe: Data, root: Path, files: list[Path], labels: np.ndarray,
           names: tuple[str, ...], parts: np.ndarray, dropped: int = 0) -> Source:
    if not files:
        raise UserError(f"{recipe.path} holds no images ({', '.join(sorted(SUFFIXES))} in a folder per class, or rows "
                        "of a table): check data.path")
    # The path as the data names it, not where this machine keeps it.
    index = "\n".join(f"{file.relative_to(root) if file.is_relative_to(root) else file.name} {size}"
                      for file, size in zip(files, _sizes(files, works)))
    images = read_images(files, recipe.image_size, recipe.workers, recipe.cache_gib, works)
    return Source(images, labels, names, parts, f"{images.size}\n{index}".encode(errors="surrogateescape"), dropped)


def _sizes(files: list[Path], works: Callable[[], None]) -> list[int]:
    """Bytes of each. Raises UserError where one is missing."""
    out = []
    for number, file in enumerate(files):
        if number % 256 == 0:
            works()
        try:
            found = os.stat(file)
        except (OSError, ValueError):  # ValueError: a null byte in its name
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise UserError(f"image {file} is named in the data, but there is no such file: mend the list or the path")
        out.append(found.st_size)
    return out


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _path(recipe: Data) -> Path:
    if recipe.path is None:
        raise UserError(f"data set {recipe.name} needs data.path: set it to where the data is")
    try:
        os.stat(recipe.path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in it
        if not (recipe.download and isinstance(error, FileNotFoundError)):
            raise UserError(f"data.path {recipe.path} cannot be read ({error}): set it to where the data is") from None
    return Path(recipe.path)


def _downloaded(recipe: Data, name: str, inside: str) -> Path:
    from pkd.vision import torchvision

    try:
        with one_at_a_time(_path(recipe)):
            getattr(torchvision.datasets, name)(str(_path(recipe)), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"data set {recipe.name} could not be downloaded to {recipe.path} ({error}): fetch it where "
                        "there is a network and set data.path") from None
    return _path(recipe) / inside
