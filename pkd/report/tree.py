"""The pyramid as a tree from left to right: a column for each level, a row for each teacher that has none below it."""

from collections import Counter
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from pkd.report.facts import Teacher
from pkd.report.style import Theme, counted, listed, percent, short

ROWS = 40  # more are not drawn one by one
WIDTH, LEAST, GAP = 10.4, 2.35, 0.42  # inches: of the drawing and of a column at least, and between columns
BOX, ROW = 0.47, 0.58  # inches: height of a teacher's box, and of its row
LETTER = 0.073  # inches that a letter of 9 points takes


@dataclass(frozen=True)
class Place:
    teacher: Teacher
    row: float
    parent: int | None  # its index among the places
    below: int  # teachers under it that are not drawn


def places(teachers: list[Teacher], most: int = ROWS) -> list[Place]:
    """Where each drawn teacher stands. Of a tree of more than `most` rows the lowest levels are left out; pure."""
    shown = teachers
    while len(_rows(shown)) > most and shown[-1].level > 0:
        shown = [teacher for teacher in shown if teacher.level < shown[-1].level]
    hidden = _hidden(teachers, {teacher.name for teacher in shown})
    row, index = _rows(shown), {teacher.name: number for number, teacher in enumerate(shown)}
    at: dict[str, float] = dict(row)
    for teacher in reversed(shown):  # from the bottom up: in the middle of its children
        if teacher.name not in at:
            own = [at[child.name] for child in shown if child.parent == teacher.name]
            at[teacher.name] = (min(own) + max(own)) / 2
    return [Place(teacher, at[teacher.name], index.get(teacher.parent), hidden[teacher.name]) for teacher in shown]


def _rows(teachers: list[Teacher]) -> dict[str, int]:
    """A row for each teacher without children, in the order of the tree."""
    children: dict[str | None, list[str]] = {}
    for teacher in teachers:
        children.setdefault(teacher.parent, []).append(teacher.name)
    rows: dict[str, int] = {}
    waiting = list(reversed(children.get(None, [])))
    while waiting:
        name = waiting.pop()
        if name not in children:
            rows[name] = len(rows)
        waiting.extend(reversed(children.get(name, [])))
    return rows


def _hidden(teachers: list[Teacher], shown: set[str]) -> Counter:
    """How many teachers that are not drawn stand under each one that is."""
    parent = {teacher.name: teacher.parent for teacher in teachers}
    counts: Counter = Counter()
    for name in parent:
        above = parent[name] if name not in shown else None
        while above is not None and above not in shown:
            above = parent[above]
        counts[above] += above is not None
    return counts


def tree(teachers: list[Teacher], classes: tuple[str, ...], theme: Theme) -> Figure:
    where = places(teachers)
    levels = 1 + max(place.teacher.level for place in where)
    column = max(LEAST, (WIDTH + GAP) / max(2, levels) - GAP)
    width = levels * (column + GAP) - GAP + 0.1
    height = ROW * (1 + max(place.row for place in where)) + 0.1
    out = Figure(figsize=(width, height + 0.3))
    axes = out.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, -0.3))
    axes.axis("off")
    corners = [(0.05 + place.teacher.level * (column + GAP), ROW * place.row + 0.05) for place in where]
    for level in range(levels):
        axes.text(0.05 + level * (column + GAP), -0.14, f"level {level}", color=theme.muted, va="center")
    for place, (x, y) in zip(where, corners):
        if place.parent is not None:
            left, top = corners[place.parent]
            turn = left + column + GAP / 2
            axes.plot([left + column, turn, turn, x], [top + BOX / 2] * 2 + [y + BOX / 2] * 2, color=theme.muted, lw=0.9,
                      zorder=1)
    for place, (x, y) in zip(where, corners):
        _box(axes, theme, place, x, y, column, classes)
    return out


def _box(axes, theme: Theme, place: Place, x: float, y: float, width: float, classes: tuple[str, ...]) -> None:
    """Two lines: name, number of classes and accuracy; which classes, or what is not drawn under it."""
    teacher, letters = place.teacher, int((width - 0.16) / LETTER)
    axes.add_patch(FancyBboxPatch((x, y), width, BOX, boxstyle="round,pad=0,rounding_size=0.06", facecolor=theme.box,
                                  edgecolor=theme.colour(teacher.level), lw=1.2, zorder=2))
    right = percent(teacher.accuracy)
    count = f"{len(teacher.classes)} classes"
    name = short(teacher.name, max(8, letters - len(count) - len(right) - 6))
    axes.text(x + 0.08, y + 0.15, name, weight="bold", va="center", zorder=3)
    axes.text(x + 0.08 + 1.18 * LETTER * len(name) + 0.1, y + 0.15, count, color=theme.muted, va="center", zorder=3)
    axes.text(x + width - 0.08, y + 0.15, right, ha="right", va="center", weight="bold", color=theme.colour(teacher.level),
              zorder=3)
    known = [classes[index] for index in teacher.classes if index < len(classes)]
    hidden = f"{counted(place.below, 'teacher')} below, not drawn" if place.below else ""
    axes.text(x + 0.08, y + 0.33, hidden or listed(known, int(letters * 1.2)), fontsize=8, color=theme.muted, va="center",
              zorder=3)
