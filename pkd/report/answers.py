"""What the predictions of a run tell: who is taken for what, how sure and how right, and how students help each other."""

from itertools import groupby

import numpy as np

from pkd.predictions import BINS, Predictions
from pkd.report.facts import Teacher

CELLS = 100  # of a confusion matrix, a side


def group_keys(teachers: list[Teacher], classes: int) -> list[tuple[int, ...]]:
    """For each class, on every level from the top down the first teacher that knows it (its place there, or -1)."""
    levels = [list(members) for _, members in groupby(teachers, key=lambda teacher: teacher.level)]
    keys = np.full((classes, len(levels)), -1)
    for column, members in enumerate(levels):
        for place, teacher in reversed(list(enumerate(members))):
            keys[[index for index in teacher.classes if index < classes], column] = place
    return [tuple(row) for row in keys.tolist()]


def cells(keys: list[tuple[int, ...]], most: int = CELLS) -> tuple[np.ndarray, np.ndarray]:
    """(order [classes], cell of each class [classes]): classes sorted by the pyramid's groups, and joined where there are
    more than `most`, never across groups of the lowest level that has no more groups than that; pure.
    """
    order = sorted(range(len(keys)), key=lambda index: keys[index])
    depth = next(d for d in range(len(keys[0]), -1, -1) if len({key[:d] for key in keys}) <= most)
    groups = [list(members) for _, members in groupby(order, key=lambda index: keys[index][:depth])]
    size = 1 if len(keys) <= most else -(-len(keys) // max(1, most - len(groups)))
    cell, count = np.zeros(len(keys), dtype=np.int64), 0
    for members in groups:
        for start in range(0, len(members), size):
            cell[members[start:start + size]] = count
            count += 1
    return np.array(order), cell


def confused(labels: np.ndarray, predicted: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """int64 [cells, cells]: images of row that were taken for column."""
    counts = np.zeros((cell.max() + 1,) * 2, dtype=np.int64)
    np.add.at(counts, (cell[labels], cell[predicted]), 1)
    return counts


def worst_pairs(labels: np.ndarray, predicted: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(true class, class that it was taken for, images), the most frequent first."""
    wrong = np.stack([labels, predicted], 1)[labels != predicted]
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:most]
    return [(*pairs[index].tolist(), int(counts[index])) for index in first]


def within_groups(labels: np.ndarray, predicted: np.ndarray, teachers: list[Teacher], classes: int) -> dict[int, float]:
    """Level -> share of the errors whose two classes one teacher of that level knows; without the top level."""
    wrong = labels != predicted
    out = {}
    for level in sorted({teacher.level for teacher in teachers} - {0}):
        known = np.zeros((sum(t.level == level for t in teachers), classes), dtype=bool)
        for row, teacher in zip(known, (t for t in teachers if t.level == level)):
            row[[index for index in teacher.classes if index < classes]] = True
        out[level] = float((known[:, labels[wrong]] & known[:, predicted[wrong]]).any(0).mean()) if wrong.any() else 0.0
    return out


def repairs(predictions: Predictions) -> dict[str, int]:
    """Counts of test images: all; right by the ensemble; where some student is wrong, and of these right by the ensemble;
    right by the ensemble though all students are wrong; wrong by it though some student is right.
    """
    right = predictions.correct.numpy()
    students, ensemble = right[:-1].sum(0), right[-1]
    some_wrong = students < len(right) - 1
    return {"images": len(ensemble), "right": int(ensemble.sum()), "some_wrong": int(some_wrong.sum()),
            "repaired": int((some_wrong & ensemble).sum()), "against_all": int(((students == 0) & ensemble).sum()),
            "lost": int(((students > 0) & ~ensemble).sum())}


def agreement_of(predictions: Predictions) -> np.ndarray:
    """float64 [names, names]: share of images that two networks put into the same class."""
    said = predictions.predicted.numpy()
    return (said[:, None] == said[None]).mean(2)


def bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, mean confidence, accuracy) of each of BINS equally wide bins of confidence; nan where one is empty."""
    at = np.clip((confidence.astype(np.float64) * BINS).astype(np.int64), 0, BINS - 1)
    counts = np.bincount(at, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return (counts, np.bincount(at, confidence, BINS) / counts, np.bincount(at, correct, BINS) / counts)
