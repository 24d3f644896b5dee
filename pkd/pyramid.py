"""The pyramid: levels of teachers, each knowing a tuple of classes; pure.

Level 0 is the top and covers every class. Every lower teacher knows a proper subset of what some teacher above knows, or
every class and is alone on its level: a peer of the top. Classes may overlap inside a level, except on the bottom one.
"""

from dataclasses import dataclass

import numpy as np

from pkd.errors import UserError, nearest
from pkd.recipe import Level, Model


@dataclass(frozen=True)
class Teacher:
    name: str  # "level0", or "level1-2": the third teacher of level 1
    level: int
    classes: tuple[int, ...]  # ascending class ids; its k-th logit is the class classes[k]
    model: Model


@dataclass(frozen=True)
class Pyramid:
    classes: tuple[str, ...]
    teachers: tuple[Teacher, ...]  # from the top down

    @property
    def levels(self) -> int:
        return self.teachers[-1].level + 1

    def level(self, number: int) -> tuple[Teacher, ...]:
        return tuple(teacher for teacher in self.teachers if teacher.level == number)

    def membership(self) -> np.ndarray:
        """bool [teachers, classes]: who knows what."""
        known = np.zeros((len(self.teachers), len(self.classes)), dtype=bool)
        for row, teacher in zip(known, self.teachers):
            row[list(teacher.classes)] = True
        return known

    def asked_about(self, own: bool) -> np.ndarray:
        """bool [teachers, classes + 1]: who is asked about samples of which label; the last column is that of samples
        without one. own: specialists only about their classes, so that nobody but who knows all classes is asked about the
        last.
        """
        if not own:
            return np.ones((len(self.teachers), len(self.classes) + 1), dtype=bool)
        known = self.membership()
        return np.concatenate([known, known.all(1, keepdims=True)], 1)

    def partitions(self, number: int) -> bool:
        """Whether the classes of a level are disjoint and complete, as the composed objective needs them."""
        counts = sum(np.bincount(teacher.classes, minlength=len(self.classes)) for teacher in self.level(number))
        return bool((counts == 1).all())

    def to_json(self) -> dict:
        teachers = [{"name": t.name, "level": t.level, "classes": list(t.classes)} for t in self.teachers]
        return {"classes": list(self.classes), "teachers": teachers}


def foreseen(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """Levels of which a pyramid can be built before its top is trained: who is confused with whom is not known yet, but how
    many groups there are, and about how large.
    """
    return tuple(level.model_copy(update={"partition": "contiguous"}) if level.partition == "confusion" else level
                 for level in levels)


def build_pyramid(levels: tuple[Level, ...], classes: tuple[str, ...], seed: int,
                  found: dict[int, list[list[int]]] | None = None) -> Pyramid:
    """The pyramid of a recipe over the data set's `classes`. Raises UserError where class lists do not fit.

    found: the groups of levels by confusion, level -> class ids of each teacher. Without them such levels are left out.
    """
    known = {number: level for number, level in enumerate(levels) if level.partition != "confusion" or found}
    groups = {number: (found or {})[number] if level.partition == "confusion" else _groups(level, number, classes, seed)
              for number, level in known.items()}
    top = set(groups[0][0])
    if len(groups[0]) != 1 or len(top) < len(classes):
        missing = f" and lacks {len(classes) - len(top)} of the {len(classes)} classes" if len(groups[0]) == 1 else ""
        raise UserError(f"pyramid.0 must be one teacher that knows every class, but it has {len(groups[0])} "
                        f"teacher(s){missing}: set teachers: 1 there")
    for number in list(groups)[1:]:
        for group in groups[number]:
            if len(group) == len(classes) and len(groups[number]) == 1:
                continue
            if not any(set(group) < set(above) for upper in range(number) for above in groups.get(upper, ())):
                raise UserError(f"pyramid.{number}: the teacher of classes {_some(group)} knows no fewer classes than "
                                "every teacher above it: split its classes further, or give every class to one teacher "
                                "alone on the level")
    lowest = max(groups)
    bottom = np.bincount([c for group in groups[lowest] for c in group], minlength=len(classes))
    if lowest == len(levels) - 1 and bottom.max() > 1:
        raise UserError(f"pyramid.{lowest}: class {classes[bottom.argmax()]!r} belongs to {bottom.max()} "
                        "teachers, but on the bottom level classes must not overlap")
    teachers = []
    for number, members in groups.items():
        for index, group in enumerate(members):
            name = f"level{number}" if len(members) == 1 else f"level{number}-{index}"
            teachers.append(Teacher(name, number, tuple(group), known[number].model))
    return Pyramid(classes, tuple(teachers))


def teacher_names(levels: tuple[Level, ...]) -> list[str]:
    """Every teacher's name, whether or not its classes are known yet."""
    return list(levels_of(levels))


def levels_of(levels: tuple[Level, ...]) -> dict[str, int]:
    """Every teacher's name -> the number of its level."""
    counts = [level.teachers or len(level.classes or ()) for level in levels]
    return {f"level{number}" if count == 1 else f"level{number}-{index}": number
            for number, count in enumerate(counts) for index in range(count)}


def check_count(level: Level, number: int, classes: int) -> None:
    """Raises UserError where a level asks for more teachers than there are pairs of classes."""
    if level.teachers > 1 and level.teachers * 2 > classes:
        raise UserError(f"pyramid.{number} asks for {level.teachers} teachers over {classes} classes, but a "
                        f"teacher needs at least 2 classes: ask for at most {max(1, classes // 2)}")


def _groups(level: Level, number: int, classes: tuple[str, ...], seed: int) -> list[list[int]]:
    if level.classes is not None:
        if not level.classes:
            raise UserError(f"pyramid.{number}.classes is an empty list: give each teacher's classes, or teachers: 1")
        return [_ids(group, number, classes) for group in level.classes]
    check_count(level, number, len(classes))
    order = np.arange(len(classes))
    if level.partition == "random":
        order = np.random.default_rng([seed, number]).permutation(order)
    return [sorted(map(int, group)) for group in np.array_split(order, level.teachers)]


def _ids(group: tuple[int | str, ...], number: int, classes: tuple[str, ...]) -> list[int]:
    ids = []
    for entry in group:
        if isinstance(entry, str) and entry not in classes:
            raise UserError(f"pyramid.{number}.classes names {entry!r}, which the data set does not have"
                            f"{nearest(entry, classes)}")
        if not isinstance(entry, str) and str(entry) in classes and classes.index(str(entry)) != entry:
            raise UserError(f"pyramid.{number}.classes holds the id {entry}, but a class is named {entry}, too, and has the "
                            f"id {classes.index(str(entry))}: write names in quotes, as in ['{entry}']")
        ids.append(classes.index(entry) if isinstance(entry, str) else entry)
    outside = [i for i in ids if not 0 <= i < len(classes)]
    if outside:
        raise UserError(f"pyramid.{number}.classes names class {outside[0]}, but ids run from 0 to {len(classes) - 1}")
    if len(set(ids)) < len(ids) or len(ids) < 2:
        raise UserError(f"pyramid.{number}.classes holds the list {_some(ids)}: each list needs at least 2 classes, "
                        "each of them once")
    return sorted(ids)


def _some(group: list[int]) -> str:
    return str(list(group)) if len(group) <= 8 else f"[{', '.join(map(str, group[:6]))}, ... {len(group)} in all]"
