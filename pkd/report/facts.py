"""What a run folder tells for its report, at any moment of a run; reads only."""

from dataclasses import dataclass
from pathlib import Path

from pkd.errors import UserError
from pkd.evaluate import merged
from pkd.files import read_json, read_lines
from pkd.placement import Placement
from pkd.predictions import Predictions
from pkd.run_folder import RunFolder
from pkd.standing import Standing, standing


@dataclass(frozen=True)
class Teacher:
    """accuracy: a fraction, on images of its own classes; of which split, says `split`. parent: who knows more above it."""

    name: str
    level: int
    classes: tuple[int, ...]
    parent: str | None
    accuracy: float | None
    split: str  # test, validation, or "" where there is no accuracy yet
    parameters: int | None


@dataclass(frozen=True)
class Facts:
    path: Path
    recipe: dict  # both parts of it together
    identity: str
    standing: Standing
    lines: list[dict]  # of metrics.jsonl
    students: list[str]
    classes: tuple[str, ...]
    teachers: list[Teacher]  # from the top down
    placement: Placement | None
    placed_since: int  # the first epoch that was wholly of this placement
    hosts: list[dict]  # of each rank
    summary: dict | None
    predictions: Predictions | None  # only with a summary

    @property
    def networks(self) -> list[str]:
        return [*self.students, "ensemble"]


def gather(path: Path) -> Facts:
    """Raises UserError where there is no run, or a file of it is damaged."""
    record, stands = read_json(path / "run.json"), standing(path)
    run = RunFolder(path, record["free"].get("teachers_from"))
    recipe = merged(record["recipe"], record["free"])
    students = [student["name"] for student in recipe["students"]]
    summary = _optional(path / "summary.json")
    predictions = Predictions.read(path / "predictions") if summary and (path / "predictions.json").exists() else None
    placed = _optional(path / "placement.json")
    names, teachers = _pyramid(run, students, summary or {})
    seen = 1 + max((int(t.max()) for t in (predictions.labels, predictions.predicted)), default=-1) if predictions else 0
    return Facts(
        path=path, recipe=recipe, identity=record["identity"], standing=stands, lines=read_lines(run.metrics),
        students=students, classes=(*names, *(f"class {index}" for index in range(len(names), seen))), teachers=teachers,
        placement=Placement.from_json(placed["placement"]) if placed else None,
        placed_since=placed.get("since_epoch", 0) if placed else 0,
        hosts=(_optional(path / "ranks" / "distill.json") or {"ranks": []})["ranks"], summary=summary,
        predictions=predictions)


def parents(known: list[tuple[int, tuple[int, ...]]]) -> list[int | None]:
    """For (level, classes) of each teacher: the index of the smallest one above that knows all of its classes."""
    out: list[int | None] = []
    for level, classes in known:
        above = [(len(other), -upper, index) for index, (upper, other) in enumerate(known)
                 if upper < level and set(classes) <= set(other)]
        out.append(min(above)[2] if above else None)
    return out


def _optional(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None


def _pyramid(run: RunFolder, students: list[str], summary: dict) -> tuple[tuple[str, ...], list[Teacher]]:
    """Class names and teachers; from the summary and the students' files where the teachers' own are gone."""
    listed, measured = _optional(run.teachers.parent / "pyramid.json"), summary.get("teachers", {})
    described = [_optional(run.students / f"{name}.json") for name in students]
    names = listed["classes"] if listed else next((one["classes"] for one in described if one), [])
    found = listed["teachers"] if listed else [{"name": name, **one} for name, one in measured.items()]
    found = sorted(found, key=lambda one: one["level"])
    above = parents([(one["level"], tuple(one["classes"])) for one in found])
    teachers = []
    for one, parent in zip(found, above):
        try:
            own = _optional(run.teachers / f"{one['name']}.json") or {}
        except UserError:  # a report does without it
            own = {}
        test, validation = measured.get(one["name"], {}), own.get("validation") or {}
        accuracy, split = (test["accuracy"], "test") if test else (validation.get("accuracy"), "validation")
        teachers.append(Teacher(one["name"], one["level"], tuple(one["classes"]),
                                None if parent is None else found[parent]["name"], accuracy,
                                split if accuracy is not None else "",
                                test.get("parameters", own.get("parameters"))))
    return tuple(names), teachers
