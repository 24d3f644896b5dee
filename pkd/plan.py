"""`pkd plan`: who would be where and how large it would be, without starting anything."""

from rich.table import Table

from pkd.console import Console
from pkd.cost import forward_flops, teacher_costs
from pkd.data import load_data
from pkd.ds_config import load_ds_config, precision, stage
from pkd.objective import asked, constants
from pkd.placement import place, without_teachers
from pkd.pyramid import build_pyramid
from pkd.recipe import Recipe
from pkd.schedule import split

FORWARD_AND_BACKWARD = 3  # a training step costs about three forwards (Kaplan et al. 2020)


def plan(recipe: Recipe, world: int, console: Console) -> dict:
    """Print and return the placement of a recipe on `world` ranks, with work and weights of each rank."""
    data = load_data(recipe.data)
    # Who is confused with whom is not known yet, but how many groups there are, and about how large.
    levels = tuple(level.model_copy(update={"partition": "contiguous"}) if level.partition == "confusion" else level
                   for level in recipe.pyramid)
    pyramid = build_pyramid(levels, data.classes, recipe.seed)
    fixed = constants(recipe, pyramid.levels)
    wanted = asked(recipe.objective.kind, pyramid)
    if recipe.soft_targets == "archive":
        placement = place(without_teachers(recipe), world, {})
    else:
        placement = place(recipe, world, *teacher_costs(recipe, pyramid, data, wanted, fixed.own))
    sizes = {t.name: forward_flops(t.model, len(t.classes), data.channels, data.size)[1] for t in pyramid.teachers}
    students = [forward_flops(s.model, len(data.classes), data.channels, data.size) for s in recipe.students]
    step_flops = FORWARD_AND_BACKWARD * sum(flops for flops, _ in students)
    config = load_ds_config(recipe.deepspeed.students)
    persistent = student_bytes(sum(count for _, count in students), config, placement.student_ranks,
                               max(_states(s) for s in recipe.students))
    table = Table(title=f"{recipe.name} on {world} rank(s): {placement.kind}, ZeRO {stage(config)} {precision(config)}")
    for column in ("rank", "trains", "answers for", "MFLOP/step", "MB of weights and states"):
        table.add_column(column, justify="left" if column in ("trains", "answers for") else "right")
    ranks = []
    shares = split(recipe.distill.batch, placement.student_ranks)
    for rank in range(world):
        trains = rank < placement.student_ranks
        samples = shares[rank].stop - shares[rank].start if trains else 0
        sources = [source for source in placement.sources if rank in source.ranks]
        names = [f"{name} (1/{len(source.group)})" if source.group else name
                 for source in sources for name in source.teachers]
        flops = samples * step_flops + sum(source.load for source in sources) * recipe.distill.batch
        size = (persistent if trains else 0) + sum(4 * sizes[name] / len(source.ranks) for source in sources
                                                   for name in source.teachers)
        ranks.append({"rank": rank, "role": placement.role(rank), "samples": samples, "flops_per_step": flops,
                      "teachers": placement.answers_for(rank), "bytes": size})
        table.add_row(str(rank), f"{len(students)} students on {samples} samples" if trains else "",
                      ", ".join(names), f"{flops / 1e6:,.1f}", f"{size / 1e6:,.2f}")
    console.show(table)
    busiest = max(ranks, key=lambda r: r["flops_per_step"])
    console.say(f"every step waits for rank {busiest['rank']} ({busiest['role']}); "
                f"{len(data.splits['train']) // recipe.distill.batch} steps an epoch")
    return {"placement": placement.to_json(), "ranks": ranks}


def student_bytes(parameters: int, config: dict, ranks: int, states: int) -> float:
    """Persistent bytes on one student rank: weights, gradients, master weights, optimizer states by ZeRO stage.

    states: elementwise optimizer states a parameter. After Rajbhandari et al. 2020, figure 1, but for two things that
    tests/bench/memory.py measures: fp32 has no masters of its own in ZeRO 0, and in ZeRO 1 DeepSpeed too keeps only this
    rank's part of the gradients once they are reduced.
    """
    low = 4 if precision(config) == "fp32" else 2
    zero = stage(config)
    weights = low / ranks if zero == 3 else low
    gradients = low / ranks if zero else low
    masters = 4 / ranks if zero else 0 if low == 4 else 4
    return parameters * (weights + gradients + masters + 4 * states / (ranks if zero else 1))


def _states(settings) -> int:
    own = {"sgd": 1 if settings.momentum else 0, "adamw": 2}[settings.optimizer]
    return own + (1 if settings.ema else 0)
