"""The folder of a run: one identity, one writer at a time, and where each phase stands."""

import time
from pathlib import Path

from pkd.errors import UserError
from pkd.files import read_json, write_json
from pkd.lock import Lock, check_inode, slurm_job
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
        self.locks: list[Lock] = []
        self.inodes: dict[str, int] = {}  # of the locks that rank 0 holds, by path

    def open(self, recipe: Recipe, phase: str, teacher: str | None = None) -> list[str]:
        """Take the lock and check the identity, as rank 0 alone. Returns remarks for the user. Raises UserError.

        Jobs that train one named teacher each may be several at a time; all others have the folder to themselves.
        """
        own = [self.path / "teachers" / f"{teacher}.lock"] if teacher else []
        others = sorted(set(self.path.glob("teachers/*.lock")) - set(own))
        self.locks = [Lock(path, phase) for path in own]
        self.locks.append(Lock(self.path / "lock", phase, shared=teacher is not None, others=others))
        remarks = [lock.remark for lock in self.locks if lock.remark]
        free = self.check(recipe).get("free", {})
        for key in ("threads", "answer_rows"):
            before, now = free.get(key, getattr(recipe, key)), getattr(recipe, key)
            if before != now:
                remarks.append(f"{key} was {before} and is now {now}: not bit-identical from here")
        if not free:
            self.record(recipe)
        return remarks

    def record(self, recipe: Recipe) -> None:
        """Write down the recipe with its free part, such as data.path, once all that could refuse it has been checked."""
        asked = identity(recipe)
        write_json(self.path / "run.json", {"identity": digest(asked), "recipe": asked, "free": part(recipe, free=True)})

    def check(self, recipe: Recipe) -> dict:
        """The folder's record, {} in a new one. Raises UserError where it belongs to a recipe of another identity."""
        if not (self.path / "run.json").exists():
            return {}
        found, asked = read_json(self.path / "run.json"), identity(recipe)
        if found.get("identity") != digest(asked):
            raise UserError(f"run folder {self.path} belongs to another recipe: "
                            f"{difference(asked, found.get('recipe', {}))}; give another folder with --run-folder, or "
                            "delete that one")
        return found

    def held_by_rank_0(self, inodes: dict[str, int]) -> None:
        """What check_locks() goes by on ranks that hold no lock themselves."""
        self.inodes = inodes

    def check_locks(self) -> None:
        """Before something is written that another job may have written meanwhile, on any rank. Raises UserError."""
        for path, inode in self.inodes.items():
            check_inode(Path(path), inode)
        for lock in self.locks:
            lock.check()

    def mark(self, phase: str, state: str, **more) -> None:
        """Record where a phase stands, for whoever holds its lock.

        phase: "distill", "archive", "teach" or "teach-<teacher>"; state: "running", "stopped" (by a signal, with everything
        saved: start it again), "refused" (by a mistake of the user's) or "finished".
        """
        write_json(self.path / "state" / f"{phase}.json", {"state": state, "time": time.time(), **slurm_job(), **more})

    def state(self, phase: str) -> dict:
        """What mark() recorded last, or {"state": "none"}."""
        path = self.path / "state" / f"{phase}.json"
        return read_json(path) if path.exists() else {"state": "none"}
