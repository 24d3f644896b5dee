"""What `pkd launch` was asked, and whether a phase of it is done."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pkd import slurm_job
from pkd.objective import asked_names
from pkd.recipe import Recipe
from pkd.run_folder import RunFolder
from pkd.standing import standing
from pkd.ways import command


@dataclass(frozen=True)
class Order:
    """What was asked for. words: the recipe and its changes, as they were typed."""

    recipe: Recipe
    words: list[str]
    run: Path
    way: str
    ranks: int
    phases: tuple[str, ...]
    teacher: str | None  # teach this one only

    def name(self, phase: str) -> str:
        return f"teach-{self.teacher}" if phase == "teach" and self.teacher else phase

    def arguments(self, phase: str) -> list[str]:
        """What comes after `pkd`."""
        if phase == "evaluate":
            return ["evaluate", str(self.run), *self.words[1:]]
        only = ["--teacher", self.teacher] if phase == "teach" and self.teacher else []
        return [phase, *self.words, "--run-folder", str(self.run), *only]

    def command(self, phase: str) -> list[str]:
        if phase == "evaluate":
            return [sys.executable, "-m", "pkd", *self.arguments(phase)]
        env = slurm_job.with_first_host(os.environ)
        return command(self.way, self.arguments(phase), self.ranks, env, self.hostfile(phase))

    def hostfile(self, phase: str) -> Path:
        """For DeepSpeed's launcher; jobs that teach at the same time have one each."""
        return (self.run / "ranks" / f"hostfile-{self.name(phase)}").resolve()


def is_done(order: Order, phase: str) -> bool:
    """Whether the run folder holds the end of a phase."""
    wanted = [order.teacher] if order.teacher else asked_names(order.recipe.objective.kind, order.recipe.pyramid)
    if not (order.run / "run.json").exists():
        return phase == "teach" and (bool(order.recipe.teachers_from) or not wanted)
    found = standing(order.run)
    if phase == "teach":
        return bool(order.recipe.teachers_from) or all(found.teachers.get(name) == "done" for name in wanted)
    if phase == "archive":
        return found.archive == "done"
    if phase == "distill":
        return found.distill == "finished" and RunFolder(order.run).state("distill").get("complete", False)
    return found.evaluated
