"""The constants of each objective, in place of those that the recipe leaves out.

paper:    distillation weights 0.6 a level and 1.0 on the bottom one, temperature 20, ensemble terms 0.2 / 0.8 alternating;
          a specialist is asked about its own classes' samples, and its term is the mean over these.
composed: temperature 4, weight 1, no ensemble term; every teacher is asked about every sample.
top:      the top teacher only, temperature 4, weight 1.   alone: cross-entropy only; no teacher is asked.
"""

from dataclasses import dataclass, replace

from pkd.errors import UserError
from pkd.pyramid import Pyramid, teacher_names
from pkd.recipe import Level, Recipe


@dataclass(frozen=True)
class Constants:
    kind: str
    temperature: float
    weights: tuple[float, ...]  # one a level (paper), one (composed, top), none (alone)
    ensemble: tuple[float, ...]  # one a student
    label_smoothing: tuple[float, ...]  # one a student
    own: bool  # a specialist is asked only about samples whose label it knows
    per_batch: bool = False  # paper: a teacher's term is a sum over its routes divided by the batch, not by their number

    def of(self, students: list[int]) -> "Constants":
        """For some of the students only."""
        pick = lambda values: tuple(values[index] for index in students)  # noqa: E731
        return replace(self, ensemble=pick(self.ensemble), label_smoothing=pick(self.label_smoothing))


def constants(recipe: Recipe, levels: int) -> Constants:
    """The objective of `recipe` with nothing left open."""
    wish = recipe.objective
    weights = {"paper": (0.6,) * (levels - 1) + (1.0,), "composed": (1.0,), "top": (1.0,), "alone": ()}[wish.kind]
    alternating = tuple((0.2, 0.8)[i % 2] for i in range(len(recipe.students)))
    ensemble = alternating if wish.kind == "paper" else (0.0,) * len(recipe.students)
    return Constants(
        kind=wish.kind,
        temperature=wish.temperature or (20.0 if wish.kind == "paper" else 4.0),
        weights=wish.weights if wish.weights is not None else weights,
        ensemble=wish.ensemble if wish.ensemble is not None else ensemble,
        label_smoothing=tuple(student.label_smoothing for student in recipe.students),
        own=wish.kind == "paper" and wish.routes != "all",
        per_batch=wish.denominator == "batch",
    )


def asked_names(kind: str, levels: tuple[Level, ...]) -> list[str]:
    """Names of the teachers that an objective asks, whether or not their classes are known yet."""
    return {"alone": [], "top": ["level0"]}.get(kind, teacher_names(levels))


def asked(kind: str, pyramid: Pyramid) -> list[int]:
    """Indices of the teachers that an objective asks. Raises UserError where the pyramid does not suit it."""
    if kind == "composed":
        for level in range(pyramid.levels):
            if not pyramid.partitions(level):
                raise UserError(f"the composed objective needs every class exactly once on each level, but "
                                f"pyramid.{level} overlaps or leaves a class out: change its classes, or set "
                                "objective.kind=paper")
    return {"alone": [], "top": [0]}.get(kind, list(range(len(pyramid.teachers))))
