"""`pkd plan`: who would be where, how long a step would take and what bounds it, without starting anything."""

import time
from collections import Counter
from dataclasses import replace
from itertools import groupby

import torch
from rich.table import Table

from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.devices import device_like, device_named
from pkd.ds_config import AUTO, arithmetic, load_ds_config
from pkd.errors import UserError
from pkd.figures import Keys, cached, surroundings
from pkd.hardware import Hardware, cores_per_node, hardware, known_ranks
from pkd.placement import Placement, group_options, place, without_teachers
from pkd.planner import next_rank
from pkd.pyramid import Pyramid, build_pyramid, foreseen
from pkd.rank_map import Ranks
from pkd.recipe import Recipe
from pkd.recipe_file import digest
from pkd.schedule import BLOCK, student_parts
from pkd.simulator import simulate
from pkd.system import Prediction, System
from pkd.timings import estimated, workload
from pkd.views import Views
from pkd.workload import Workload


def plan(recipe: Recipe, world: int, console: Console, device: str | None = None, here: bool = True,
         per_node: int | None = None, decode: bool = True, data: DataSet | None = None) -> dict:
    """Print and return the placement of a recipe on `world` ranks, with the work and the bytes of each.

    device: every rank's, by its name in the table of devices, one node each; None: this machine's, which all ranks share, or
    `per_node` each of machines like it. here: whether they are such machines; else nothing is known of their memory. decode:
    whether images are decoded as a run does it, which takes a while, or only so many as are timed. data: what the recipe
    names, if it has been loaded.
    """
    if device and per_node:
        raise UserError(f"--ranks-per-node is {per_node}, but of --device {device} every rank is taken to be on a node of "
                        "its own: leave one of the two out")
    if device:
        _check_bf16(recipe, device)
    data = data or load_data(recipe.data if decode else recipe.data.model_copy(update={"cache_gib": 0.0}))
    pyramid = build_pyramid(foreseen(recipe.pyramid), data.classes, recipe.seed)
    if device and recipe.deepspeed.students == "auto":
        kind = AUTO["cpu" if device.lower() == "cpu" else "cuda"]
        recipe = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"students": kind})})
    ranks = _like_this_machine(world, per_node or world)
    work, known = _workload(recipe, pyramid, data, ranks, device, here)
    wish = recipe
    if recipe.soft_targets == "archive":
        wish, work = without_teachers(recipe), replace(work, teachers={})
    placement = place(wish, world, work, known)
    work = replace(work, groups=placement.groups)
    system = placement.rank_map().system(work, placement.accumulation, known)
    predicted = simulate(system)
    ranks = _ranks(placement, work, system, predicted, [student.name for student in recipe.students])
    bounds = system.bounds()
    found = {
        "placement": placement.to_json(), "seconds": work.source, "ranks": ranks, "step_ms": 1000 * predicted.step,
        "idle": {role: predicted.idle(role) for role in dict.fromkeys(rank["role"] for rank in ranks)},
        "bound_by": max(bounds, key=bounds.get),
        "next_rank": next_rank(work, placement.rank_map(), placement.accumulation, known, predicted.step,
                               group_options(wish if work.teachers else without_teachers(wish), world + 1)
                               if known.apart(range(world)) else ()),
    }
    groups = f", students in {placement.groups} groups" if placement.groups > 1 else ""
    console.show(_table(f"{recipe.name} on {world} rank(s): {placement.kind}{groups}", ranks))
    console.say("\n".join([placement.why] * bool(placement.why) + [
        f"a step of {work.batch} samples takes {1000 * predicted.step:.3g} ms ({work.source}), "
        f"{len(data.students_see) // work.batch} of them are an epoch; it is bound by {found['bound_by']}, idle are "
        + ", ".join(f"{100 * share:.0f} % of the {role} ranks' time" for role, share in found["idle"].items()),
        f"one more rank would go {found['next_rank']}"] + _too_large(ranks, known)))
    return found


def _check_bf16(recipe: Recipe, name: str) -> None:
    files = {f"deepspeed.{role}": getattr(recipe.deepspeed, role) for role in ("students", "teachers")}
    asking = [key for key, file in files.items() if "bf16" in arithmetic(load_ds_config(file))]
    asking += ["teachers.forward"] * (recipe.teachers.forward == "bf16")
    if asking and not device_named(name).bf16:
        raise UserError(f"{asking[0]} asks for bf16, in which a {name} does not reckon: choose fp32, or fp16 for students")


def _workload(recipe: Recipe, pyramid: Pyramid, data: DataSet, ranks: list[Hardware], name: str | None,
              here: bool) -> tuple[Workload, Ranks]:
    world = len(ranks)
    device = device_named(name) if name else device_like(ranks[0].device)
    view = _seconds_a_view(Views(data, recipe.views, recipe.seed), data)
    timings = estimated(recipe, pyramid, data, device, view, f"estimated for {name or ranks[0].device}")
    most = recipe.placement.memory_gib
    limit = int(2**30 * most) if most else 0
    if name:
        least = min(filter(None, (int(device.memory), limit)), default=0)
        known = Ranks((least,) * world if least else ())
    else:
        cores = cores_per_node(ranks[:1])
        known = known_ranks(ranks, recipe.threads, most) if here \
            else Ranks((limit,) * world if limit else (), cores=cores, threads=recipe.threads)
        busy = torch.cuda.device_count() or max(1, int(cores[0]) // recipe.threads)
        each = [min(count, busy) for count in Counter(rank.host for rank in ranks).values()]  # of a node
        keys = Keys(recipe, pyramid, data, surroundings([ranks[0].device], max(each), sum(each)), world,
                    recipe.soft_targets != "archive")
        figures = cached(keys.all())
        # Networks that were timed beside networks that were not would be compared by two standards; the rest is small.
        if all(digest(key) in figures for key in keys.all() if key["part"] in ("forward", "train")):
            timings = keys.timings(figures, timings)
    return workload(recipe, pyramid, data, timings, device), known


def _like_this_machine(world: int, per_node: int) -> list[Hardware]:
    """Ranks on as many machines as they need, GPUs in turn, as launchers give them; ranks beyond the last one share them."""
    gpus = range(min(torch.cuda.device_count(), per_node))
    found = [hardware(torch.device("cuda", index)) for index in gpus] or [hardware(torch.device("cpu"))]
    places = (divmod(rank, per_node) for rank in range(world))
    return [replace(found[local % len(found)], host=f"{found[0].host}/{node}") for node, local in places]


def _seconds_a_view(views: Views, data: DataSet) -> float:
    ids = data.splits["train"][:BLOCK]
    views.batch(ids[:1], 0)
    began = time.perf_counter()
    views.batch(ids, 0)
    return (time.perf_counter() - began) / len(ids)


def _ranks(placement: Placement, work: Workload, system: System, predicted: Prediction, students: list[str]) -> list[dict]:
    """students: their names."""
    trained = [[students[index] for index in group] for group in placement.dealt]
    places = placement.student_ranks // placement.groups
    shards = {name: f"{name} (1/{len(source.group)})" for source in placement.sources if source.group
              for name in source.teachers}
    parts = student_parts(work.batch, placement.student_ranks, placement.groups)
    size = placement.rank_map().bytes(work, placement.accumulation)
    return [{"rank": rank, "role": placement.role(rank),
             "students": trained[rank // places] if rank < placement.student_ranks else [],
             "samples": parts[rank].stop - parts[rank].start if rank < len(parts) else 0,
             "teachers": [shards.get(name, name) for name in placement.answers_for(rank)],
             "ms": 1000 * float(system.answer[rank] + system.train[rank]),
             "idle": 1 - float(predicted.busy[rank]), "bytes": int(size[rank])} for rank in range(placement.world)]


def _too_large(ranks: list[dict], known: Ranks) -> list[str]:
    over = [rank for rank in ranks if rank["bytes"] > known.usable(rank["rank"])]
    return [f"rank {over[0]['rank']} would need {over[0]['bytes'] / 1e9:.1f} GB, and of its device's memory "
            f"{known.usable(over[0]['rank']) / 1e9:.1f} GB are to be counted on: raise placement.accumulation, lower "
            "distill.batch, choose a higher ZeRO stage or start more ranks"] if over else []


def _table(title: str, ranks: list[dict]) -> Table:
    """One row for neighbours that do the same."""
    table = Table(title=title)
    for column in ("ranks", "role", "trains", "samples", "answer for", "ms of work", "idle %", "GB"):
        table.add_column(column, justify="left" if column in ("role", "trains", "answer for") else "right")
    for (role, students, samples, teachers), group in groupby(
            ranks, key=lambda rank: (rank["role"], rank["students"], rank["samples"], rank["teachers"])):
        same = list(group)
        first, last = same[0]["rank"], same[-1]["rank"]
        table.add_row(f"{first}" if first == last else f"{first}-{last}", role, ", ".join(students), f"{samples or ''}",
                      ", ".join(teachers),
                      f"{max(r['ms'] for r in same):,.2f}", f"{100 * sum(r['idle'] for r in same) / len(same):.0f}",
                      f"{max(r['bytes'] for r in same) / 1e9:,.2f}")
    return table
