"""Where a run stands, read from its folder alone: while it runs, after it, from any machine that sees the folder."""

import time
from dataclasses import dataclass
from pathlib import Path

from pkd.errors import UserError
from pkd.files import read_json, read_lines
from pkd.lock import held_by, told
from pkd.objective import asked_names
from pkd.pyramid import levels_of
from pkd.recipe import Level
from pkd.run_folder import RunFolder


@dataclass(frozen=True)
class Standing:
    """teachers: name -> "done", "12 of 30 steps saved", "refused: ..." or "not begun"; ages in seconds."""

    phase: str  # what is running, or what comes next: "teach", "archive", "distill", "evaluate" or "done"
    holder: str | None  # who writes the folder now
    teachers: dict[str, str]  # those that the objective asks, and others that are there
    archive: str  # none, "3 of 16 shards", done, or stale: made by other teachers than there are now
    distill: str  # none, running, stopped, refused, finished or "ended without a word"
    why: str | None  # the sentence of a refusal
    epoch: int
    epochs: int
    checkpoint: str | None
    checkpoint_age: float | None
    accuracy: float | None  # the ensemble's on validation, last epoch
    evaluated: bool

    @property
    def teachers_done(self) -> int:
        return sum(state == "done" for state in self.teachers.values())


def standing(path: Path) -> Standing:
    """Raises UserError where the folder is none of a run."""
    run = RunFolder(path)
    record = read_json(path / "run.json")
    free, recipe = record["free"], record["recipe"]
    run = RunFolder(path, free.get("teachers_from"))
    held = [holder for file in (path / "lock", *path.glob("teachers/*.lock")) if (holder := held_by(file)) is not None]
    levels = tuple(Level.model_validate(level) for level in recipe["pyramid"])
    asked = asked_names(recipe["objective"]["kind"], levels)
    names = [name for name in levels_of(levels) if name in asked or (run.teachers / f"{name}.json").exists()]
    steps = {name: levels[level].steps or recipe["teachers"]["steps"] for name, level in levels_of(levels).items()}
    teachers = _teachers(run, {name: steps[name] for name in names})
    distill = run.state("distill")
    if distill["state"] == "running" and not held:
        distill = {**distill, "state": "ended without a word"}
    newest = _newest(run.checkpoints)
    lines = read_lines(run.metrics)
    done = all(teachers[name] == "done" for name in asked)
    evaluated = _evaluated(path, distill)
    archive = _archive(run)
    waits = free.get("soft_targets") == "archive" and archive != "done" and distill["state"] == "none"
    phase = ("archive" if waits else "distill") if done else "teach"
    if distill["state"] == "finished":
        phase = "done" if evaluated else "evaluate"
    return Standing(
        phase=phase, holder=told(held[0]) if held else None, teachers=teachers, archive=archive,
        distill=distill["state"], why=distill.get("why") or run.state(phase).get("why"),
        epoch=lines[-1]["epoch"] + 1 if lines else 0, epochs=recipe["distill"]["epochs"],
        checkpoint=newest.name if newest else None,
        checkpoint_age=time.time() - newest.stat().st_mtime if newest else None,
        accuracy=lines[-1]["ensemble"]["accuracy"] if lines else None, evaluated=evaluated)


def progress(path: Path, name: str) -> list[int]:
    """Numbers that only grow while a phase gets on: its teachers that are there, their checkpoints' steps, shards, the
    students' step. name: the phase, or "teach-<teacher>", to which other teachers do not count.
    """
    mine = name.removeprefix("teach-") if name.startswith("teach-") else "*"
    steps = [int(folder.name[5:]) for folder in path.glob(f"teachers/{mine}.training/step-*") if folder.name[5:].isdigit()]
    newest = _newest(path / "checkpoints")
    return [len(list(path.glob(f"teachers/{mine}.json"))), sum(steps), len(_shards(path / "soft-targets")),
            int(newest.name[5:]) if newest else 0]


def _evaluated(path: Path, distill: dict) -> bool:
    """Whether there is a summary of these students on the whole test split, not of a smoke run."""
    if not (path / "summary.json").exists():
        return False
    summary = read_json(path / "summary.json")
    if "complete" not in summary:
        raise UserError(f"{path / 'summary.json'} is not what pkd evaluate writes: delete it and run pkd evaluate again")
    return summary["complete"] and summary.get("evaluated", 0.0) >= distill.get("time", 0.0)


def _archive(run: RunFolder) -> str:
    path = run.path / "soft-targets" / "archive.json"
    if not path.exists() and run.state("archive")["state"] == "finished":
        path = run.teachers.parent / "soft-targets" / "archive.json"  # the phase found one that fits there
    if not path.exists():
        return "none"
    record = read_json(path)
    for name, then in record["made_of"]["teachers"].items():
        facts = run.teachers / f"{name}.json"
        if facts.exists() and read_json(facts).get("sha256") != then:
            return "stale"
    return "done" if record["complete"] else f"{len(_shards(path.parent))} of {record['files']} shards"


def _shards(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def _teachers(run: RunFolder, wanted: dict[str, int]) -> dict[str, str]:
    """wanted: teacher -> steps of its training."""
    out = {}
    for name, steps in wanted.items():
        out[name] = "not begun"
        state = RunFolder(run.teachers.parent).state(f"teach-{name}")
        newest = _newest(run.teachers / f"{name}.training")
        if (run.teachers / f"{name}.json").exists():
            taken = read_json(run.teachers / f"{name}.json").get("steps", 0)
            out[name] = "done" if taken >= steps else f"{taken} of {steps} steps"
        elif state["state"] == "refused":
            out[name] = f"refused: {state['why']}"
        elif newest:
            out[name] = f"{newest.name[5:]} of {steps} steps saved"
    return out


def _newest(folder: Path) -> Path | None:
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)
