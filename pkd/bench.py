"""`pkd bench`: what the teachers cost a run on this hardware, as ratios between programs that take turns.

A machine's speed drifts and others use it, too: two programs are compared by the ratios of runs that lie side by side, not
by their times.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import read_json, read_lines
from pkd.launch import check_plan
from pkd.metrics import enough
from pkd.placement import Placement, outline
from pkd.recipe import Recipe
from pkd.recipe_file import load_recipe
from pkd.ways import command, environment

# Enough for batch statistics with which deep teachers' logits stay finite; their speed does not depend on more.
FEW = ("teachers.steps=10", "teachers.lr=0.0001", "teachers.schedule=constant")


@dataclass(frozen=True)
class Program:
    name: str
    run: Callable[[], float]  # one run of it: images per second in the steady state


def take_turns(programs: list[Program], rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Images per second of each program in each round; every other round goes through them backwards."""
    rates: dict[str, list[float]] = {program.name: [] for program in programs}
    for number in range(rounds):
        for program in programs if number % 2 == 0 else reversed(programs):
            rates[program.name].append(program.run())
        say(f"round {number + 1} of {rounds}: "
            + ", ".join(f"{name} {own[-1]:.1f} img/s" for name, own in rates.items()))
    return rates


def spread(values: list[float]) -> tuple[float, float, float]:
    """Minimum, median (the lower of two) and maximum."""
    ordered = sorted(values)
    return ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]


def ratio(rates: dict[str, list[float]], one: str, other: str) -> tuple[float, float, float]:
    """Spread of `one`'s speed over `other`'s, round by round."""
    return spread([a / b for a, b in zip(rates[one], rates[other])])


@dataclass(frozen=True)
class Trial:
    """pkd on `ranks` processes of this machine, in run folders that are thrown away. words: recipe and changes."""

    folder: Path
    words: list[str]
    ranks: int

    def phase(self, phase: str, *changes: str, run: Path) -> None:
        """Raises UserError if it does not end well."""
        words = [phase, *self.words, *changes, "--run-folder", str(run)]
        argv = command("torchrun", words, self.ranks, os.environ, run)
        done = subprocess.run(argv, env={**os.environ, **environment("torchrun", os.environ)},
                              capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("pkd: ")] or [done.stderr.strip()[-800:]]
            raise UserError(f"the benchmark's own pkd {phase} failed: {said[0].removeprefix('pkd: ')}")

    def distill(self, steps: int, *changes: str) -> dict:
        """The line of metrics.jsonl for the epoch of most steps, in a run that ends after so many, and its placement."""
        run = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        try:
            self.phase("distill", *changes, "--steps", str(steps), run=run)
            lines = read_lines(run / "metrics.jsonl")
            taken = np.diff([0, *(line["step"] for line in lines)])
            return {**lines[int(taken.argmax())], "placement": read_json(run / "placement.json")["placement"]}
        finally:
            shutil.rmtree(run)

    def rate(self, steps: int, *changes: str) -> tuple[float, str]:
        """Images per second in the steady state, and who was where. Raises UserError where no epoch is long enough to have
        one.
        """
        line = self.distill(steps, *changes)
        if line["steady_images_per_second"] is None:
            raise UserError(f"{line['step']} steps are too few to be timed, since teachers answer ahead of the students and "
                            f"several steps at once, and the longest epoch has no {steps}: make window and answer_steps "
                            "smaller, or distill.batch")
        return line["steady_images_per_second"], outline(Placement.from_json(line["placement"]))


def few_steps(recipe: Recipe) -> tuple[str, ...]:
    """Changes with which teachers are trained for FEW's steps, whatever their level says."""
    return (*FEW, *(f"pyramid.{number}.steps=null" for number, level in enumerate(recipe.pyramid) if level.steps))


def bench(recipe: str, overrides: list[str], ranks: int, rounds: int, steps: int, console: Console) -> dict:
    """Students alone, with their teachers and, where views repeat, from the archive; on the recipe's placement."""
    known = load_recipe(recipe, overrides)
    no_teachers = ("objective={kind: alone}", "placement.replicas={}", "placement.shards={}")
    for changes in ((), no_teachers):  # without teachers, as from the archive, every rank trains
        check_plan(load_recipe(recipe, [*overrides, *changes]), ranks)
    with tempfile.TemporaryDirectory(prefix="pkd-bench-") as temporary:
        folder, taught = Path(temporary), Path(temporary) / "taught"
        words = [recipe, *overrides, f"teachers_from={taught}"]
        if known.teachers_from:
            if not Path(known.teachers_from, "teachers").is_dir():
                raise UserError(f"teachers_from is {known.teachers_from}, where there are no teachers: mend the path")
            other = shutil.ignore_patterns("checkpoints", "soft-targets", "run.json", "lock")
            shutil.copytree(known.teachers_from, taught, ignore=other)
        else:
            console.say("making teachers, trained for a few steps")
            few = few_steps(known)
            words.extend(few)
            Trial(folder, [recipe, *overrides, *few], ranks).phase("teach", run=taught)
        trial = Trial(folder, words, ranks)
        kinds = {"students alone": no_teachers, "online": ("soft_targets=online",)}
        if known.views.different:
            console.say("filling the archive")
            trial.phase("archive", run=taught)
            kinds["archive"] = ("soft_targets=archive",)
        ahead = known.window + known.together  # steps that teachers are ahead
        asked = {name: enough(steps, ahead, known.together) if name == "online" else steps for name in kinds}
        placed: dict[str, str] = {}

        def run(name: str) -> float:
            rate, placed[name] = trial.rate(asked[name], *kinds[name])
            return rate
        rates = take_turns([Program(name, lambda name=name: run(name)) for name in kinds], rounds, console.say)
    table = Table(title=f"{known.name} on {ranks} rank(s), {rounds} rounds of {steps} steps ({asked['online']} online)")
    for column in ("program", "who is where", "img/s: min", "median", "max", "of students alone: min", "median", "max"):
        table.add_column(column, justify="left" if column in ("program", "who is where") else "right")
    for name in rates:
        table.add_row(name, placed[name], *(f"{value:.1f}" for value in spread(rates[name])),
                      *(f"{value:.2f}" for value in ratio(rates, name, "students alone")))
    console.show(table)
    return {"images_per_second": rates, "placements": placed}
