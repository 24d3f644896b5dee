"""Groups of classes that the top teacher takes for each other: a partition that is known only once the top is trained."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pkd.data import DataSet
from pkd.errors import UserError
from pkd.files import read_json, write_json
from pkd.models import Network
from pkd.pyramid import Pyramid, build_pyramid, check_count
from pkd.recipe import Recipe
from pkd.views import Views

ROWS = 128


def pyramid_of(recipe: Recipe, data: DataSet, teachers: Path, partial: bool = False) -> Pyramid:
    """The recipe's pyramid, its groups by confusion read from the pyramid.json beside the folder of `teachers`.

    partial: where that is not there yet, the levels that are known without it; else, where the objective asks their
    teachers, a UserError.
    """
    wanted, path = waiting_levels(recipe), teachers.parent / "pyramid.json"
    found: dict[int, list[list[int]]] | None = None
    tree = read_json(path) if wanted and path.exists() else {}
    if tree and tree.get("grouped_by") == _hash_of_top(teachers):
        found = {number: [t["classes"] for t in tree["teachers"] if t["level"] == number] for number in wanted}
        for number in wanted:
            level, slack = recipe.pyramid[number], tree.get("slack", {}).get(str(number))
            if len(found[number]) != level.teachers or slack not in (None, level.slack):
                raise UserError(f"pyramid.{number} asks for {level.teachers} groups by confusion with slack {level.slack}, "
                                f"but {path} holds {len(found[number])} of slack {slack}: ask for those, or leave "
                                "teachers_from out")
    if wanted and not found and not partial and recipe.objective.kind not in ("alone", "top"):
        raise UserError(f"pyramid.{wanted[0]} is grouped by the top teacher's confusion, but {path} does not say how this "
                        "top teacher groups the classes: run pkd teach first")
    return build_pyramid(recipe.pyramid, data.classes, recipe.seed, found)


def _hash_of_top(teachers: Path) -> str | None:
    facts = teachers / "level0.json"
    return read_json(facts).get("sha256") if facts.exists() else None


def waiting_levels(recipe: Recipe) -> list[int]:
    """Levels whose groups the top teacher decides."""
    return [number for number, level in enumerate(recipe.pyramid) if level.partition == "confusion"]


def group_levels(recipe: Recipe, data: DataSet, teachers: Path, top: Network, device: torch.device,
                 beat: Callable[[], None] = lambda: None) -> None:
    """Write pyramid.json, grouped by what the trained top teacher takes for what on the validation split.

    beat: told of progress.
    """
    seen = confusion(top.to(device).eval(), Views(data, recipe.views, recipe.seed), data, device, beat)
    found = {}
    for number in waiting_levels(recipe):
        level = recipe.pyramid[number]
        check_count(level, number, len(data.classes))
        found[number] = group(seen, level.teachers, level.slack, recipe.seed)
        beat()
    whole = build_pyramid(recipe.pyramid, data.classes, recipe.seed, found)
    slack = {str(number): recipe.pyramid[number].slack for number in found}
    write_json(teachers.parent / "pyramid.json",
               {**whole.to_json(), "grouped_by": _hash_of_top(teachers), "slack": slack})


def confusion(top: Network, views: Views, data: DataSet, device: torch.device,
              beat: Callable[[], None] = lambda: None) -> np.ndarray:
    """float64 [classes, classes]: the mean probability that the top teacher gives class d for images of class c.

    Probabilities rather than decisions: they tell classes apart that a good teacher hardly ever mistakes.
    """
    classes, ids = len(data.classes), data.splits["validation"]
    sums = torch.zeros(classes, classes, dtype=torch.float64)
    with torch.inference_mode():
        for rows in ids.split(ROWS):
            probabilities = top(views.plain(rows).to(device)).float().softmax(1).double().cpu()
            sums.index_add_(0, data.labels[rows], probabilities)
            beat()
    counts = torch.bincount(data.labels[ids], minlength=classes).clamp(min=1)
    return (sums / counts[:, None]).numpy()


def group(seen: np.ndarray, count: int, slack: float, seed: int) -> list[list[int]]:
    """`count` groups of class ids, each ascending, from a confusion matrix [classes, classes]; pure.

    Spectral clustering (Ng, Jordan and Weiss 2001) of the symmetric confusion: classes as points of the leading
    eigenvectors, k-means on them; then classes are handed out to the centres at the least total squared distance, no group
    being smaller or larger than its even share allows by `slack`, and none below two classes.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.manifold import spectral_embedding

    classes, state = len(seen), seed % 2**32
    if count == 1:
        return [list(range(classes))]
    affinity = (seen + seen.T) / 2
    np.fill_diagonal(affinity, 0)
    affinity += 1e-9 + 1e-6 * affinity.max()  # a class that is never confused stays connected
    points = spectral_embedding(affinity, n_components=count, random_state=state, drop_first=False)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = KMeans(count, n_init=10, random_state=state).fit(points).cluster_centers_
    least = min(max(2, math.ceil(classes / count * (1 - slack))), classes // count)
    most = max(math.floor(classes / count * (1 + slack)), math.ceil(classes / count))
    distance = ((points[:, None] - centres) ** 2).sum(2)  # [classes, groups]
    # Each group has `most` seats, `least` of them to be taken: a class on another one pays more than any way can cost.
    optional = np.tile(np.arange(most) >= least, count)
    cost = np.repeat(distance, most, axis=1) + np.where(optional, 2 * (distance.max() + 1) * classes, 0)
    _, seats = linear_sum_assignment(cost)
    return sorted(np.flatnonzero(seats // most == index).tolist() for index in range(count))
