"""`pkd study`: arms by seeds, each run by the phases of pkd launch, compared in one table."""

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from pkd import slurm_chain, slurm_job
from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.errors import UserError
from pkd.files import write_json
from pkd.launch import check_plan, world_of
from pkd.lock import Lock, held_by, told
from pkd.order import Order, is_done
from pkd.phases import run_phases
from pkd.recipe import Recipe
from pkd.recipe_file import identity, load_recipe
from pkd.run_folder import RunFolder
from pkd.shipped import shipped_file
from pkd.study.arms import Arm, built_in, choose, fitting_shards, is_control, own_arm, pyramid_flops, refuse_unequal
from pkd.study.figures import aggregate
from pkd.study.results import (
    all_readings,
    go_on_counting,
    keep_readings,
    make_result,
    read_results,
    refuse_foreign,
    refuse_other,
    result_path,
)
from pkd.study.table import arms_table, differences_table, networks_table, remarks
from pkd.study.teachers import archived, folder_name, hand_on, teacher_words

MOST = 100  # seeds
REFUSED = 2  # the exit code of what the user must mend


@dataclass(frozen=True)
class Trial:
    """One arm with one seed. words: the recipe and its changes, as one would type them."""

    arm: Arm
    recipe: Recipe
    words: list[str]

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed-{self.recipe.seed}"


class Study:
    """What was asked for, checked. Raises UserError before anything is started or written."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.arguments, self.console, self.way = arguments, console, arguments.on
        self.base = load_recipe(arguments.recipe, arguments.overrides)
        if self.base.teachers_from:
            raise UserError(f"teachers_from is {self.base.teachers_from}, but every seed of a study trains a pyramid of its "
                            "own: leave it out")
        self.seeds = seeds(arguments.seeds, self.base.seed)
        if arguments.only_seed is not None and arguments.only_seed not in self.seeds:
            raise UserError(f"--only-seed is {arguments.only_seed}, but --seeds asks for {', '.join(map(str, self.seeds))}: "
                            "name one of these")
        if self.way == "slurm" and arguments.only_seed is not None:
            raise UserError(f"--only-seed is {arguments.only_seed}, but --on slurm submits an element for every seed: ask "
                            f"for --seeds {arguments.only_seed}, instead")
        if arguments.sbatch and self.way != "slurm":
            raise UserError(f"--sbatch is for jobs to submit, but --on is {self.way}: use --on slurm, or leave it out")
        self.folder = arguments.study_folder or Path("studies") / self.base.name
        self.ranks = world_of(self.way, arguments.nodes, arguments.ranks_per_node)
        quick = self.base.data.model_copy(update={"cache_gib": 0.0})  # no image is looked at here
        self.data: DataSet = load_data(quick)
        self.shape = (len(self.data.classes), self.data.channels, self.data.size)
        self.samples = len(self.data.students_see)
        known, self.left_out = built_in(self.base, self.shape, self.data.classes, self.samples)
        self.controls = [arm.name for arm in known if arm.control]
        wanted = arguments.arms.split(",") if arguments.arms else None
        self.arms = choose(known, self.left_out, [own_arm(text) for text in arguments.arm], wanted)
        self.trials = [self._trial(arm, seed) for seed in self.seeds for arm in self.arms]
        self.shown: set[Path] = set()  # by a dry run
        self.identity = identity(self.base.model_copy(update={"seed": 0}))
        refuse_foreign(self.folder)
        mine = {arm.name: arm for arm in [*known, *self.arms]}  # what this call does not ask for is compared, too
        for found in self.results():  # of other seeds, too: an arm is one thing
            if found["arm"] in mine:
                refuse_other(self.folder, found, self._trial(mine[found["arm"]], found["seed"]).recipe)
        unfinished = {trial.arm.name: trial for trial in self.trials if not self.is_done(trial)}
        for trial in unfinished.values() if not arguments.table else ():
            check_plan(trial.recipe, self.ranks, not self.way.startswith(("slurm", "srun")), self.data)
        # Pixels are for the processes that are started.
        sizes = SimpleNamespace(channels=self.data.channels, size=self.data.size)
        self.data = replace(self.data, images=sizes)

    def _trial(self, arm: Arm, seed: int) -> Trial:
        # What an arm sets as a whole may have fewer parts than a word of the user's names, such as pyramid.1.teachers.
        whole = tuple(change.partition("=")[0] + "." for change in arm.changes)
        kept = [word for word in self.arguments.overrides if not word.partition("=")[0].startswith(whole)]
        words = [self.arguments.recipe, *kept, *arm.changes, f"seed={seed}"]
        recipe = load_recipe(words[0], words[1:])
        if recipe.teachers_from:
            raise UserError(f"arm {arm.name} sets teachers_from, but every seed of a study trains teachers of its own: "
                            "leave it out")
        refuse_unequal(self.base.model_copy(update={"seed": seed}), arm, recipe)
        # Students of all arms see equally large batches a rank, with teachers, without, and from the archive.
        words += [f"placement.kind={'co-located' if self.ranks > 1 else 'single'}", "placement.student_ranks=null",
                  "placement.replicas={}"]
        words += fitting_shards(recipe)
        arm = replace(arm, control=is_control(recipe, self.data.classes))
        return Trial(arm, load_recipe(words[0], words[1:]), words)

    def results(self) -> list[dict]:
        return read_results(self.folder, self.identity, self.data.fingerprint)

    def is_done(self, trial: Trial) -> bool:
        return result_path(self.folder, trial.arm.name, trial.recipe.seed).exists()

    def run(self) -> int:
        """The exit code: 0 done, or stopped by a signal."""
        wanted = self.seeds
        if self.way.startswith("srun") and "SLURM_ARRAY_TASK_ID" in os.environ:
            wanted = [_of_this_element(self.seeds)]
        elif self.arguments.only_seed is not None:
            wanted = [self.arguments.only_seed]
        elif self.arguments.dry_run:
            left = [trial.recipe.seed for trial in self.trials if not self.is_done(trial)]
            wanted = left[:1]
            if len(set(left)) > 1:
                self.console.say(f"what seed {left[0]} lacks is shown; {len(set(left)) - 1} more lack something, too")
        ended: dict[str, int] = {}  # name -> exit code of what did not come to its end
        if not (self.arguments.dry_run or self.results()):
            self.aggregate()  # so that pkd report has something to say from the beginning
        for seed in wanted:
            trials = [trial for trial in self.trials if trial.recipe.seed == seed and not self.is_done(trial)]
            lock = self._lock(seed) if trials and not self.arguments.dry_run else None
            for trial in trials:
                if self.is_done(trial):  # by whoever had the lock before
                    continue
                self.console.say(f"arm {trial.arm.name}, seed {seed}: {trial.arm.title}")
                try:
                    code = self._run(trial)
                except UserError as error:
                    self.console.error(f"pkd: {error}")
                    code = REFUSED
                if code == REFUSED or (code and (not self.way.startswith("srun") or slurm_job.goes_on())):
                    ended[trial.name] = code  # it would end so again; the other arms need not wait for its mending
                    continue
                if code is not None:  # stopped, or queued again by Slurm
                    return max([code, *ended.values()])
                if not self.arguments.dry_run:
                    self.aggregate()
            if lock:
                lock.release()
        if ended:
            self.console.error(f"pkd: {', '.join(ended)} ended as said above: mend that and start the same command again, "
                               "or leave the arm out by --arms")
        return max(ended.values(), default=0)

    def _run(self, trial: Trial) -> int | None:
        """One arm with one seed, from its teachers to its result; an exit code where it did not come to its end. Raises
        UserError.
        """
        began, dry = time.time(), self.arguments.dry_run
        orders = self._orders(trial)
        if not dry:
            go_on_counting(self.folder, trial.arm.name, trial.recipe.seed)
        for order in orders:
            if dry and order.run in self.shown:
                continue
            self.shown.add(order.run)
            RunFolder(order.run).check(order.recipe)  # else what is there would count as done
            if "teach" in order.phases and not dry:
                copied = hand_on(order.run, order.recipe, self.data)
                if copied:
                    self.console.say(f"teachers of another folder of the study are used: {', '.join(copied)}")
            code = run_phases(order, self.console, dry)
            if not dry:
                keep_readings(self.folder, trial.arm.name, trial.recipe.seed)
            if code or (not dry and not all(is_done(order, phase) for phase in order.phases)):
                return code
        if not dry:
            run = orders[-1].run
            result = make_result(run, self.identity, trial.arm, trial.recipe, self.data, time.time() - began)
            write_json(result_path(self.folder, trial.arm.name, trial.recipe.seed), result)
        return None

    def _orders(self, trial: Trial) -> list[Order]:
        """The teachers' phases in the folder that they are shared by, and the arm's own."""
        run, words, out = self.folder / "runs" / trial.name, trial.words, []
        if trial.recipe.objective.kind != "alone":
            shared = teacher_words(trial.recipe, trial.words)
            recipe = load_recipe(shared[0], shared[1:])
            place, read = self.folder / "teachers" / folder_name(recipe), archived(recipe)
            out.append(Order(recipe, shared, place, self.way, self.ranks, ("teach", *["archive"] * read), None))
            words = [*words, f"teachers_from={json.dumps(str(place))}", *["soft_targets=archive"] * read]
        recipe = load_recipe(words[0], words[1:])
        return [*out, Order(recipe, words, run, self.way, self.ranks, ("distill", "evaluate"), None)]

    def _lock(self, seed: int) -> Lock:
        """Who works on a seed has its teachers and runs to itself."""
        path = self.folder / "locks" / f"seed-{seed}"
        try:
            lock = Lock(path, "study")
        except UserError:
            holder = held_by(path)
            if holder is None:
                raise
            raise UserError(f"seed {seed} of study {self.folder} is being worked on by another job ({told(holder)}): wait "
                            "for it, end it, or ask for other --seeds") from None
        if lock.remark:
            self.console.say(lock.remark)
        return lock

    def aggregate(self) -> dict:
        """Write study.json anew from all results."""
        results = self.results()
        found = aggregate(self.base.name, results, [arm.name for arm in self.arms], self.seeds,
                          pyramid_flops(self.base, self.shape, self.samples)[0], len(self.data.classes),
                          all_readings(self.folder, results), self.controls)
        write_json(self.folder / "study.json", found)
        return found

    def submit(self) -> int:
        """An array of Slurm jobs, one element a seed, and a last job that prints the table."""
        words = ["study", self.arguments.recipe, *self.arguments.overrides, "--seeds", ",".join(map(str, self.seeds)) + ",",
                 "--arms", ",".join(arm.name for arm in self.arms), "--study-folder", str(self.folder),
                 *(word for text in self.arguments.arm for word in ("--arm", text))]
        jobs = slurm_chain.study(words, len(self.seeds), self.arguments.nodes, self.arguments.ranks_per_node)
        script = shipped_file("launch", "slurm.sbatch")
        if self.arguments.dry_run:
            ids = {job.name: f"<id of {job.name}>" for job in jobs}
            for job in jobs:
                self.console.report(slurm_chain.shown(slurm_chain.sbatch(job, script, self.arguments.sbatch, ids)))
            return 0
        ids = slurm_chain.submit(jobs, script, self.arguments.sbatch, self.folder, self.console)
        self.console.say(f"results come into {self.folder / 'results'}, the table into the log of the last job; "
                         f"scancel {' '.join(ids.values())} ends it")
        return 0


def study(arguments: argparse.Namespace, console: Console) -> int:
    """The exit code of `pkd study`. Raises UserError."""
    if arguments.json:
        out = os.dup(1)
        os.dup2(2, 1)  # what phases say goes where errors go
    mine = Study(arguments, console)
    for name, why in mine.left_out.items():
        if not arguments.arms:
            console.say(f"arm {name} is left out: {why}")
    if arguments.on == "slurm" and not arguments.table and not all(map(mine.is_done, mine.trials)):
        return mine.submit()
    if arguments.table and not mine.results():
        raise UserError(f"study {mine.folder} has no result yet, so that there is no table: start it without --table")
    code = 0 if arguments.table else mine.run()
    if arguments.dry_run or not mine.results():
        return code
    found = mine.aggregate()
    if arguments.json:
        os.write(out, (json.dumps(found, indent=2) + "\n").encode())
        return code
    console.show(arms_table(found))
    console.show(networks_table(found))
    if found["differences"]:
        console.show(differences_table(found))
    console.say("\n".join(remarks(found)))
    console.say(f"all figures are in {mine.folder / 'study.json'}")
    return code


def seeds(text: str, first: int) -> list[int]:
    """"3": so many, from the recipe's seed on; "0,1,5": these; "4,": this one. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and parts[-1] == "":
        parts.pop()
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
        raise UserError(f"--seeds is {text!r}: give how many, as in --seeds 3, or which, as in --seeds 0,1,5")
    if "," not in text and int(text) > MOST:
        raise UserError(f"--seeds is {text!r}, which asks for so many seeds, and {MOST} are the most: write {text}, for "
                        "that one, with the comma")
    found = list(map(int, parts)) if "," in text else list(range(first, first + int(text)))
    if not found or len(set(found)) < len(found):
        raise UserError(f"--seeds is {text!r}, which names {'a seed twice' if found else 'no seed'}: give different ones")
    return found


def _of_this_element(wanted: list[int]) -> int:
    """The seed that an element of a job array works on: that of its index."""
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if index >= len(wanted):
        raise UserError(f"this is element {index} of a job array, but --seeds names {len(wanted)}, for elements 0 to "
                        f"{len(wanted) - 1}: submit an array of that size")
    return wanted[index]
