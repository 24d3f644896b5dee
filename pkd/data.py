"""A labelled image set and its splits: training, validation and test samples by number."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pkd.errors import UserError
from pkd.images import ArrayImages, FileImages
from pkd.recipe import Data
from pkd.sources import read_source


@dataclass(frozen=True)
class DataSet:
    images: ArrayImages | FileImages  # images[ids] -> uint8 [n, channels, height, width], ids int64 on the CPU
    labels: torch.Tensor  # int64 [samples]; the number of classes where there is none
    classes: tuple[str, ...]
    splits: dict[str, torch.Tensor]  # "train", "validation", "test": ascending int64 sample numbers, disjoint
    unlabelled: torch.Tensor  # int64, ascending: samples without a label, from which students learn as well
    fingerprint: str  # sha256 of what the data set holds and how it is split
    dropped: int  # csv rows that had several labels

    @property
    def channels(self) -> int:
        return self.images.channels

    @property
    def students_see(self) -> torch.Tensor:
        """int64: the samples that students learn from."""
        return torch.cat([self.splits["train"], self.unlabelled])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.size


def load_data(recipe: Data, works: Callable[[], None] = lambda: None) -> DataSet:
    """Read the data set that the recipe names and split it by data.seed; works: told of progress. Raises UserError.

    The test split is the official one where there is one, else a stratified fraction; validation likewise, of the rest.
    """
    source = read_source(recipe, works)
    labels, names = source.labels, source.classes
    everything = np.arange(len(labels))
    test = everything[source.part == "test"]
    validation = everything[source.part == "validation"]
    train = everything[source.part == "train"]
    unlabelled = everything[source.part == "unlabelled"]  # their labels, which say that, are in the fingerprint
    _check_counts(labels[train], names, recipe, len(test) == 0, len(validation) == 0)
    if len(test) == 0 and recipe.test:
        spare = 1 + (len(validation) == 0 and recipe.validation > 0)
        train, test = stratified(train, labels, recipe.test, [recipe.seed, 0], spare)
    if len(validation) == 0:
        train, validation = stratified(train, labels, recipe.validation, [recipe.seed, 1])
    splits = {"train": train, "validation": validation, "test": test}
    if len(validation) == 0 or len(test) == 0:
        raise UserError(f"data.validation and data.test leave {len(validation)} validation and {len(test)} test images "
                        f"of {len(labels)}: both are needed, raise them (0.1 each by default)")
    return DataSet(source.images, torch.from_numpy(labels), names,
                   {key: torch.from_numpy(ids) for key, ids in splits.items()}, torch.from_numpy(unlabelled),
                   _fingerprint(source, splits), source.dropped)


def stratified(ids: np.ndarray, labels: np.ndarray, fraction: float, seed: list[int],
               spare: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Split `ids` into (kept, held), ascending: of each class `fraction` rounded, but one at least, is held.

    `spare` members of each class are kept whatever the fraction, even where that leaves none to hold.
    """
    held = []
    for label in np.unique(labels[ids]):
        members = np.random.default_rng([*seed, int(label)]).permutation(ids[labels[ids] == label])
        count = max(1, round(len(members) * fraction)) if fraction else 0
        held.append(members[:max(0, min(count, len(members) - spare))])
    held = np.sort(np.concatenate(held)) if held else ids[:0]
    return np.setdiff1d(ids, held), held


def _check_counts(labels: np.ndarray, names: tuple[str, ...], recipe: Data, splits_test: bool, splits_validation: bool):
    """Every class must have an image left for training after one at least went to each split that is made."""
    counts = np.bincount(labels, minlength=len(names))
    needed = 1 + (splits_test and recipe.test > 0) + (splits_validation and recipe.validation > 0)
    for name, count in zip(names, counts):
        if count < needed:
            raise UserError(f"class {name!r} has {count} training image(s), but needs at least {needed} (one for each "
                            "split): add images or take the class out")


def _fingerprint(source, splits: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in (repr(source.classes).encode(), source.labels.tobytes(), source.index,
                 *(ids.astype(np.int64).tobytes() for ids in splits.values())):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
