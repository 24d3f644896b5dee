"""`pkd status RUN`: where a run stands, from its folder; reads only."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import read_json
from pkd.standing import Standing, standing


def status(path: Path, as_json: bool, console: Console) -> Standing | None:
    """Print and return it; None of a run that was submitted and has not begun. Raises UserError where there is no run."""
    if not (path / "run.json").exists():
        if (path / "jobs.json").exists():
            return _submitted(path, as_json, console)
        raise UserError(f"run folder {path} holds no run: give the folder that pkd teach or pkd distill writes")
    found = standing(path)
    jobs = _jobs(path)
    if as_json:
        console.report(json.dumps({**asdict(found), "jobs": jobs}, indent=2))
        return found
    console.report(f"{path}: {_headline(found)}")
    for name, state in found.teachers.items():
        console.report(f"  teacher {name}: {state}")
    if found.archive != "none":
        console.report(f"  archive of soft targets: {found.archive}")
    if found.distill != "none":
        accuracy = f", ensemble {100 * found.accuracy:.1f} % on validation" if found.accuracy is not None else ""
        console.report(f"  distill: {found.distill}, epoch {found.epoch} of {found.epochs}{accuracy}")
    if found.checkpoint:
        console.report(f"  last checkpoint: {found.checkpoint}, {_age(found.checkpoint_age)} ago")
    if found.why:
        console.report(f"  refused: {found.why}")
    _show(jobs, console)
    return found


def _submitted(path: Path, as_json: bool, console: Console) -> None:
    jobs = _jobs(path)
    if as_json:
        return console.report(json.dumps({"phase": "submitted", "jobs": jobs}, indent=2))
    console.report(f"{path}: submitted, nothing has begun yet")
    return _show(jobs, console)


def _show(jobs: dict[str, str], console: Console) -> None:
    for name, state in jobs.items():
        console.report(f"  Slurm job {name}: {state}")


def _headline(found: Standing) -> str:
    teachers = f"{found.teachers_done} of {len(found.teachers)} teachers done"
    if found.phase == "done":
        return f"finished and evaluated, {teachers}"
    if found.holder:
        return f"{found.holder} is writing, {teachers}"
    return f"nobody is writing, next is {found.phase}, {teachers}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _jobs(path: Path) -> dict[str, str]:
    """Slurm's word on the jobs that `pkd launch` submitted, where there is a Slurm to ask."""
    out = {}
    for name, job in (read_json(path / "jobs.json") if (path / "jobs.json").exists() else {}).items():
        try:
            asked = subprocess.run(["scontrol", "--oneliner", "show", "job", str(job)], capture_output=True, text=True,
                                   timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return out
        states = [word[9:] for word in asked.stdout.split() if word.startswith("JobState=")]
        reasons = {word[7:] for word in asked.stdout.split() if word.startswith("Reason=")} - {"None"}
        text = ", ".join(f"{states.count(s)} {s}" if len(states) > 1 else s for s in sorted(set(states)))
        silent = "forgotten by Slurm" if "Invalid job id" in asked.stderr else "Slurm does not answer"
        out[f"{job} ({name})"] = (text or silent) + (f" ({', '.join(sorted(reasons))})" if reasons else "")
    return out
