"""One pkd run on the virtual cluster: its job, its folder, its log, and what a fault does to it."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster
from ranks import REPOSITORY, students, trace
from virtual_hosts import parent, read

LAUNCH = REPOSITORY / "launch"
# Long enough to be hit by something: 24 steps an epoch; a checkpoint about every second.
LONG = ("distill.batch=16", "distill.epochs=6", "checkpoint_minutes=0.02", "timeouts={start: 60, step: 10}",
        "placement.student_ranks=2", "deepspeed.students=zero1")  # ZeRO as on the GPUs of a cluster


@dataclass
class Recovery:
    """Seconds since the fault, and steps that had to be taken again."""

    noticed: float
    going_on: float
    steps_lost: int


class SlurmRun:
    """script: a file of launch/; words: the recipe and what follows it."""

    def __init__(self, cluster: Cluster, folder: Path, script: str, *words, options: tuple[str, ...] = ()):
        self.cluster, self.folder = cluster, folder
        self.base = folder.parent
        self.script, self.words, self.options = script, [str(word) for word in words], options
        self.job = 0

    def submit(self, *options: str) -> "SlurmRun":
        self.job = self.cluster.sbatch(
            f"--output={self.folder}-%j.log", *self.options, *options, LAUNCH / self.script, *self.words, "--run-folder",
            self.folder, cwd=REPOSITORY, env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"})
        return self

    @property
    def log(self) -> str:
        path = Path(f"{self.folder}-{self.job}.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def last_step(self) -> int:
        """Of the steps written so far, -1 before the first."""
        path = self.folder / "steps.jsonl"
        found = re.findall(r'^\{"step": (\d+).*\}$', path.read_text(), re.MULTILINE) if path.exists() else []
        return int(found[-1]) if found else -1

    def wait_for_step(self, step: int, timeout: float = 90.0) -> None:
        self._until(lambda: self.last_step() >= step, timeout, f"step {step}")

    def end(self, timeout: float = 180.0) -> str:
        return self.cluster.wait(self.job, timeout)

    def pid(self, rank: int) -> int:
        """This machine's pid of a rank; two ranks a node, students on the first. Its environment tells it from others, for
        the machine's pids start again from low ones at some time."""
        for pid in self.cluster.pids(self.cluster.hosts(self.job)[rank // 2], "-m pkd distill "):
            own = dict(word.partition("=")[::2] for word in read(pid, "environ").split())
            if read(pid, "comm").startswith("python") and own.get("RANK", own.get("SLURM_PROCID")) == str(rank):
                return pid
        raise AssertionError(f"no rank {rank} runs:\n{self.log[-3000:]}")

    def launcher(self) -> int:
        """The pid of srun, which has a child of the same name."""
        found = self.cluster.pids(self.cluster.batch_host(self.job), "srun --kill-on-bad-exit")
        return next(pid for pid in found if parent(pid) not in found)

    def recovery(self, timeout: float = 150.0) -> Recovery:
        """Call right after a fault: until training goes on past the point where it was hit."""
        began, resumed, hit = time.monotonic(), self.log.count("resuming from"), self.last_step()
        restarts = self.cluster.restarts(self.job)

        def noticed() -> bool:
            return "is queued again" in self.log[len(before):] or self.cluster.state(self.job) != "RUNNING" \
                or self.cluster.restarts(self.job) > restarts
        before = self.log
        self._until(noticed, timeout, "a notice of the fault")
        seen, hit = time.monotonic() - began, max(hit, self.last_step())

        def goes_on() -> bool:
            found = re.findall(r"step-(\d+)", " ".join(self.log.split("resuming from")[resumed + 1:]))
            return bool(found) and self.last_step() >= int(found[0])
        self._until(goes_on, timeout, "going on")
        start = int(re.findall(r"step-(\d+)", " ".join(self.log.split("resuming from")[resumed + 1:]))[0])
        return Recovery(seen, time.monotonic() - began, max(0, hit + 1 - start))

    def two_nodes(self) -> list[dict]:
        """The ranks, two of which train, which are on one node, and two of which are on another."""
        placement = json.loads((self.folder / "placement.json").read_text())["placement"]
        assert placement["nodes"] == [0, 0, 1, 1] and placement["student_ranks"] == 2
        ranks = json.loads((self.folder / "ranks" / "distill.json").read_text())["ranks"]
        assert len({rank["host"] for rank in ranks[:2]}) == 1 and len({rank["host"] for rank in ranks}) == 2
        return ranks

    def result(self) -> tuple:
        return trace(self.folder), students(self.folder)

    def _until(self, true, timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {timeout:.0f} s:\n{self.log[-3000:]}")
            time.sleep(0.1)
