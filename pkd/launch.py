"""`pkd launch`: what it was asked, checked before anything is started or submitted."""

import argparse
import os
from pathlib import Path

from pkd import slurm_chain, slurm_job
from pkd.console import Console
from pkd.data import DataSet
from pkd.errors import UserError, nearest
from pkd.order import Order, is_done
from pkd.phases import run_phases
from pkd.recipe import Recipe
from pkd.recipe_file import load_recipe
from pkd.run_folder import RunFolder
from pkd.schedule import SAMPLES_PER_RANK
from pkd.shipped import shipped_file

PHASES = ("teach", "archive", "distill", "evaluate")


def launch(arguments: argparse.Namespace, console: Console) -> int:
    """The exit code of `pkd launch`. Raises UserError."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _check_models(recipe)
    phases, way = _phases(arguments.phases, recipe), arguments.on
    run = arguments.run_folder or Path("runs") / recipe.name
    RunFolder(run).check(recipe)
    words = [arguments.recipe, *arguments.overrides]
    if way == "slurm":
        return _submit(arguments, recipe, words, run, phases, console)
    if arguments.sbatch or arguments.script:
        raise UserError(f"{'--sbatch' if arguments.sbatch else '--script'} is for jobs to submit, but --on is {way}: use "
                        "--on slurm, or leave it out")
    _check_alone(arguments.teacher, phases)
    ranks = world_of(way, arguments.nodes, arguments.ranks_per_node)
    order = Order(recipe, words, run, way, ranks, phases, _teacher(arguments.teacher))
    if "distill" in phases and not is_done(order, "distill"):
        check_plan(recipe, ranks, here=not way.startswith("srun"))
    return run_phases(order, console, arguments.dry_run)


def world_of(way: str, nodes: int, per_node: int) -> int:
    """How many ranks a way of starting gives. Raises UserError where it cannot give what was asked for."""
    if way.startswith("srun") and (nodes > 1 or per_node > 1):
        raise UserError(f"--on {way} takes nodes and ranks from the Slurm allocation, but --nodes is {nodes} and "
                        f"--ranks-per-node {per_node}: give them to sbatch (--nodes, --ntasks-per-node)")
    if nodes > 1 and way != "slurm":
        raise UserError(f"--on {way} starts ranks on this machine only, but --nodes is {nodes}: use --on slurm, or leave "
                        "--nodes out")
    if way == "here" and per_node > 1:
        raise UserError(f"--on here runs one process, but --ranks-per-node is {per_node}: use --on torchrun")
    return slurm_job.world_size(os.environ) if way.startswith("srun") else nodes * per_node


def _submit(arguments: argparse.Namespace, recipe: Recipe, words: list[str], run: Path, phases: tuple[str, ...],
            console: Console) -> int:
    from pkd.confusion import waiting_levels
    from pkd.objective import asked_names
    from pkd.pyramid import teacher_names

    world = arguments.nodes * arguments.ranks_per_node
    order = Order(recipe, words, run, "slurm", world, phases, None)
    script = arguments.script or shipped_file("launch", "slurm.sbatch")
    if not script.is_file():
        raise UserError(f"--script {script} is no file: give a copy of launch/slurm.sbatch")
    names = teacher_names(recipe.pyramid)
    unknown = [name for name in arguments.teacher or () if name not in names]
    if unknown:
        raise UserError(f"--teacher {unknown[0]} was asked for, but the teachers are {', '.join(names)}"
                        f"{nearest(unknown[0], names)}")
    _check_alone(arguments.teacher, phases)
    students = "distill" in phases and not is_done(order, "distill")
    if students:
        check_plan(recipe, world, here=False)
    asked = arguments.teacher or asked_names(recipe.objective.kind, recipe.pyramid)
    wanted = [name for name in names if name in asked and "teach" in phases
              and not is_done(Order(recipe, words, run, "slurm", world, phases, name), "teach")]
    top_ranks = min(world, max(1, recipe.teachers.batch // SAMPLES_PER_RANK))
    jobs = slurm_chain.chain(words, run, names[0] if names[0] in wanted else None, [n for n in wanted if n != names[0]],
                             [phase for phase in ("archive", "distill") if phase in phases and not is_done(order, phase)],
                             "evaluate" in phases and (students or not is_done(order, "evaluate")), arguments.nodes,
                             arguments.ranks_per_node, top_ranks,
                             top_first=bool(waiting_levels(recipe)))
    if not jobs:
        console.say(f"nothing is left to do in {run}")
    elif arguments.dry_run:
        for job in jobs:
            ids = {name: f"<id of {name}>" for name in job.after}
            console.report(slurm_chain.shown(slurm_chain.sbatch(job, script, arguments.sbatch, ids)))
        console.report(f"\n# {script}\n{script.read_text(encoding='utf-8')}")
    else:
        ids = slurm_chain.submit(jobs, script, arguments.sbatch, run, console)
        console.say(f"pkd status {run} tells where it stands; scancel {' '.join(ids.values())} ends it")
    return 0


def _check_alone(teachers: list[str] | None, phases: tuple[str, ...]) -> None:
    if teachers and phases != ("teach",):
        raise UserError(f"--teacher names some teachers, but --phases is {','.join(phases)}, which needs them all: add "
                        "--phases teach, or leave --teacher out")


def _phases(text: str | None, recipe: Recipe) -> tuple[str, ...]:
    """Those asked for, in their order; archive is among them by default if the recipe reads one."""
    if text is None:
        return tuple(phase for phase in PHASES if phase != "archive" or
                     (recipe.soft_targets == "archive" and recipe.objective.kind != "alone"))
    phases = tuple(text.split(","))
    if any(phase not in PHASES for phase in phases):
        raise UserError(f"--phases is {text}, but the phases are {', '.join(PHASES)}: name some of them with commas")
    if "archive" in phases and "distill" in phases and recipe.soft_targets == "online":
        raise UserError(f"--phases is {text}, but soft_targets is online, so that nobody would read the archive: set "
                        "soft_targets=archive, or take archive out")
    return phases


def _teacher(names: list[str] | None) -> str | None:
    """The one teacher that is meant: of several, that of this element of a job array."""
    if not names or len(names) == 1:
        return names[0] if names else None
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if index is None:
        raise UserError(f"--teacher was given {len(names)} times, which only the elements of a job array can share out: "
                        "give it once, or use --on slurm")
    if int(index) >= len(names):
        raise UserError(f"this is element {index} of a job array, but --teacher was given {len(names)} times, for elements "
                        f"0 to {len(names) - 1}: submit an array of that size")
    return names[int(index)]


def _check_models(recipe: Recipe) -> None:
    from pkd.models import check_model, models_of

    for model in models_of(recipe):
        check_model(model)


def check_plan(recipe: Recipe, ranks: int, here: bool = True, data: DataSet | None = None) -> None:
    """Refuse here what every rank would refuse, before any of them is started. here: they run on this machine. data: what
    the recipe names, if it has been loaded.
    """
    from pkd.plan import plan

    # Of auto it is not known yet whether there will be teachers to hold.
    plan(recipe, ranks, Console(quiet=True), here=here and recipe.soft_targets != "auto", decode=False,
         data=data)
