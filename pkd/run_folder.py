"""The folder of a run: one identity, one writer at a time."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from pkd.errors import UserError
from pkd.files import read_json, unwritable, write_json
from pkd.recipe import Recipe, part
from pkd.recipe_file import difference, digest, identity


class RunFolder:
    """Paths of a run; `open` checks or creates it and takes its lock.

    teachers_from: another run folder, whose teachers are read in place of this one's own.
    """

    def __init__(self, path: Path, teachers_from: str | None = None):
        self.path = path
        self.teachers = (Path(teachers_from) if teachers_from else path) / "teachers"
        self.students = path / "students"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.steps = path / "steps.jsonl"
        self.marker = path / "state.json"
        self._lock = None

    def open(self, recipe: Recipe, phase: str) -> list[str]:
        """Take the lock and check the identity, as rank 0 alone. Returns remarks for the user. Raises UserError."""
        self._take_lock(phase)
        asked = identity(recipe)
        record = {"identity": digest(asked), "recipe": asked, "free": part(recipe, free=True)}
        remarks = []
        if (self.path / "run.json").exists():
            found = read_json(self.path / "run.json")
            if found.get("identity") != record["identity"]:
                raise UserError(f"run folder {self.path} belongs to another recipe: "
                                f"{difference(asked, found.get('recipe', {}))}; give another folder with --run-folder, or "
                                "delete that one")
            before = found.get("free", {}).get("threads")
            if before != recipe.threads:
                remarks.append(f"threads was {before} and is now {recipe.threads}: not bit-identical from here")
        write_json(self.path / "run.json", record)
        return remarks

    def mark(self, phase: str, state: str, **more) -> None:
        """Record where a phase stands: "running", "stopped" (resume it) or "finished"."""
        tree = read_json(self.marker) if self.marker.exists() else {}
        write_json(self.marker, {**tree, phase: {"state": state, "time": time.time(), **more}})

    def state(self, phase: str) -> str:
        return read_json(self.marker).get(phase, {}).get("state", "none") if self.marker.exists() else "none"

    def _take_lock(self, phase: str) -> None:
        """An advisory lock on an open file: the system drops it when its holder dies, however it dies."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise unwritable(self.path / "lock", error, 0) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise UserError(f"run folder {self.path} is being written by another job ({self._lock.read().strip()}): "
                            "wait for it, end it, or give another folder with --run-folder") from None
        self._lock.truncate(0)
        self._lock.write(json.dumps({"phase": phase, "host": socket.gethostname(), "pid": os.getpid(),
                                     "slurm_job": os.environ.get("SLURM_JOB_ID")}) + "\n")
        self._lock.flush()
