"""Who is where: teachers -> ranks. A pure function of the recipe, its workload and the facts about the ranks.

Student ranks come first, [0, student_ranks). `dedicated`: teachers on ranks of their own, [student_ranks, world).
`co-located`: every rank trains students and hosts some teachers. `single`: one process does all.
`auto` is decided by pkd/planner.py, or here where no teacher is asked; the other kinds do as they are told, and only share
the teachers out.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from pkd.errors import UserError, nearest
from pkd.planner import Planner, rounded
from pkd.rank_map import USABLE, RankMap, Ranks
from pkd.recipe import Recipe
from pkd.schedule import SAMPLES_PER_RANK
from pkd.shards import Group, needed_shards, shard_groups, wanted_shards
from pkd.share import share_out
from pkd.simulator import simulate
from pkd.student_groups import check_groups
from pkd.workload import Workload

TRIED = 16  # numbers of student ranks at most where teachers lie in shards


@dataclass(frozen=True)
class Source:
    """Who answers for some teachers: a rank that holds them whole, or several that hold them together."""

    rank: int  # that sends the soft targets
    teachers: tuple[str, ...]
    load: float  # seconds of forwards a step, on each of its ranks
    group: tuple[int, ...] = ()  # the ranks that hold these teachers in shards, `rank` first; () if it holds them whole

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.group or (self.rank,)

    @property
    def where(self) -> str:
        return f"ranks {self.group[0]}-{self.group[-1]}" if self.group else f"rank {self.rank}"


@dataclass(frozen=True)
class Placement:
    kind: str
    world: int
    student_ranks: int
    accumulation: int
    sources: tuple[Source, ...]
    groups: int = 1  # of students and student ranks; each has the whole batch
    dealt: tuple[tuple[int, ...], ...] = ()  # indices of each group's students
    nodes: tuple[int, ...] = ()  # of each rank, numbered from 0; unknown before ranks are started
    why: str = ""  # the planner's reasons, where it chose

    def role(self, rank: int) -> str:
        return "student" if rank < self.student_ranks else "teacher"

    def answers_for(self, rank: int) -> list[str]:
        """The teachers that a rank holds, whole or in parts."""
        return [name for source in self.sources if rank in source.ranks for name in source.teachers]

    def shard_group(self, rank: int) -> Source | None:
        """The source that this rank is one of the several ranks of, if any; a rank is in one such group at most."""
        return next((source for source in self.sources if rank in source.group), None)

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(tree: dict) -> "Placement":
        sources = tuple(Source(s["rank"], tuple(s["teachers"]), s["load"], tuple(s.get("group", ())))
                        for s in tree["sources"])
        return Placement(tree["kind"], tree["world"], tree["student_ranks"], tree["accumulation"], sources,
                         tree.get("groups", 1), tuple(map(tuple, tree.get("dealt", ()))), tuple(tree.get("nodes", ())),
                         tree.get("why", ""))

    def rank_map(self) -> RankMap:
        hosted = {rank: self.answers_for(rank) for rank in range(self.world)}
        return RankMap(self.world, self.student_ranks, {rank: names for rank, names in hosted.items() if names},
                       frozenset(name for source in self.sources if source.group for name in source.teachers))


def place(recipe: Recipe, world: int, work: Workload, known: Ranks | None = None) -> Placement:
    """The placement of a recipe on `world` ranks. Raises UserError where it does not fit."""
    known = known or Ranks()
    unknown = [name for name in recipe.placement.replicas if name not in work.teachers]
    if unknown:
        raise UserError(f"placement.replicas names {unknown[0]!r}, but the teachers asked are "
                        f"{', '.join(work.teachers) or 'none'}{nearest(unknown[0], work.teachers)}")
    check_groups(work.groups, len(recipe.students), min(work.groups, world))
    if not work.teachers:
        return _all_train(recipe, world, work, known)
    if not chooses(recipe, world):
        return _as_told(recipe, world, work, known)
    try:
        return _planned(recipe, world, work, known)
    except UserError:  # whole teachers do not fit; in shards they may
        if known.memory and needed_shards(work.sizes, _room(work, known, range(world))):
            return _in_shards(recipe, world, work, known)
        raise


def chooses(recipe: Recipe, world: int) -> bool:
    """Whether pkd decides how many ranks train, in how many groups. It does not where teachers are wanted in shards."""
    wish = recipe.placement
    return wish.kind == "auto" and wish.student_ranks is None and not wish.shards and world > 1


def group_options(recipe: Recipe, world: int, known: Ranks | None = None) -> list[int]:
    """The numbers of groups of students that pkd chooses from. Ranks that share a GPU train no faster side by side."""
    wish = recipe.placement
    if wish.student_groups or not chooses(recipe, world) or (known and not known.apart(range(world))):
        return [wish.student_groups or 1]
    return list(range(1, min(world, len(recipe.students)) + 1))


def without_teachers(recipe: Recipe) -> Recipe:
    """What to place where soft targets come from an archive: no teacher has replicas or shards, and every rank trains."""
    wish = recipe.placement.model_copy(update={"replicas": {}, "shards": {}, "student_ranks": None})
    return recipe.model_copy(update={"placement": wish})


def possible_groups(recipe: Recipe, world: int) -> list[int]:
    """The numbers of groups of students in which every rank can train, where no teacher is asked. Raises UserError."""
    found, refusal = [], None
    for groups in group_options(without_teachers(recipe), world):
        try:
            check_groups(groups, len(recipe.students), world)
            check_batch(recipe.distill.batch, world, recipe.placement.accumulation, groups)
            found.append(groups)
        except UserError as error:
            refusal = error if refusal is None or world % groups == 0 else refusal  # of those that would feed the most
    if not found:
        raise refusal
    return found


def _planned(recipe: Recipe, world: int, work: Workload, known: Ranks) -> Placement:
    wish = recipe.placement
    planner = Planner(work, world, wish.accumulation, wish.replicas, known)
    choice = planner.choose(group_options(recipe, world, known))
    return Placement(choice.map.kind, world, choice.map.students, wish.accumulation,
                     tuple(_sources(choice.map.hosted, work)), choice.groups, replace(work, groups=choice.groups).dealt,
                     known.nodes, choice.why)


def _all_train(recipe: Recipe, world: int, work: Workload, known: Ranks) -> Placement:
    """Where no teacher is asked; in that number of groups of students which has the shortest predicted step."""
    accumulation, groups, steps = recipe.placement.accumulation, possible_groups(recipe, world), {}
    least = min(replace(work, groups=count).student_memory(world, accumulation) for count in groups)
    room = known.usable_by_all(world)
    if least > room and chooses(recipe, world):
        raise UserError(f"the recipe does not fit on {world} rank(s), all of which train: each needs {least / 2**30:.2f} "
                        f"GiB at least, by estimate, but {100 * USABLE:.0f} % of the smallest rank's memory (or of "
                        f"placement.memory_gib) are {room / 2**30:.2f} GiB: start more ranks, raise placement.accumulation "
                        "or the ZeRO stage, or set placement.kind=co-located to try it all the same")
    for count in groups if len(groups) > 1 else ():
        grouped = replace(work, groups=count)
        if Planner(grouped, world, accumulation, {}, known).trains(world):
            steps[count] = simulate(RankMap(world, world, {}).system(grouped, accumulation, known)).step
    if not steps:
        return _as_told(recipe, world, replace(work, groups=groups[0]), known)
    best = min(steps, key=lambda count: (rounded(steps[count]), count))
    others = "; ".join(f"in {count} {1000 * step:.3g} ms" for count, step in steps.items() if count != best)
    why = (f"auto: the students in {best} group(s), {1000 * steps[best]:.3g} ms a step predicted ({work.source})"
           + f"; {others}" * bool(others))
    return replace(_as_told(recipe, world, replace(work, groups=best), known), why=why)


def _in_shards(recipe: Recipe, world: int, work: Workload, known: Ranks) -> Placement:
    """Of the numbers of student ranks, each with teachers in as few shards as fit, the one with the shortest predicted step.

    Raises UserError where no number will do.
    """
    wish = recipe.placement
    trains = Planner(work, world, wish.accumulation, {}, known).trains
    found: list[tuple[float, int, Placement]] = []
    for students in sorted({max(1, world * part // TRIED) for part in range(1, TRIED)}):
        told = wish.model_copy(update={"kind": "dedicated", "student_ranks": students})
        with contextlib.suppress(UserError):
            one = _as_told(recipe.model_copy(update={"placement": told}), world, work, known)
            if trains(students):
                step = simulate(one.rank_map().system(work, wish.accumulation, known)).step
                found.append((rounded(step), -students, one))
    if not found:
        return _as_told(recipe, world, work, known)
    step, _, chosen = min(found, key=lambda one: one[:2])
    return replace(chosen, why="auto: no rank has room for the teachers whole, so some lie in shards; "
                               f"{chosen.student_ranks} of {world} ranks train, dedicated: {1000 * step:.3g} ms a step "
                               f"predicted ({work.source})")


def _sources(hosted: dict[int, list[str]], work: Workload) -> list[Source]:
    """Of teachers that are whole on each of their ranks."""
    holders = Counter(name for names in hosted.values() for name in names)
    return [Source(rank, tuple(names), sum(work.costs[name] / holders[name] for name in names))
            for rank, names in sorted(hosted.items())]


def _as_told(recipe: Recipe, world: int, work: Workload, known: Ranks) -> Placement:
    """The kind and the student ranks that the recipe says, or half of the ranks; only the teachers are shared out."""
    kind, students = _kind_and_students(recipe, world, teachers=len(work.teachers))
    check_groups(work.groups, len(recipe.students), students)
    check_batch(recipe.distill.batch, students, recipe.placement.accumulation, work.groups)
    hosts = list(range(students, world)) if kind == "dedicated" else list(range(world))
    groups, shares = _shard_and_share(recipe, kind, work, hosts, known)
    busy = {rank for group in groups for rank in group.ranks} | {rank for rank, (names, _) in enumerate(shares) if names}
    if kind == "dedicated" and len(busy) < len(hosts):
        raise UserError(f"{len(hosts)} teacher ranks were asked for, but a batch of {recipe.distill.batch} keeps only "
                        f"{len(busy)} of them busy ({len(work.teachers)} teachers, {work.most} block(s) of "
                        f"{work.block} rows each): start fewer ranks, or raise placement.student_ranks or distill.batch")
    if work.sent and groups:
        raise UserError(f"teacher_views is sent, but {', '.join(groups[0].teachers)} lies in {len(groups[0].ranks)} shards, "
                        "which rebuild their views: set teacher_views to rebuilt")
    _refuse_shared_devices(work.groups, students, kind, groups, hosts, known)
    sources = [Source(hosts[group.ranks[0]], tuple(group.teachers), sum(work.costs[name] for name in group.teachers),
                      tuple(hosts[rank] for rank in group.ranks)) for group in groups]
    sources += _sources({rank: names for rank, (names, _) in zip(hosts, shares) if names}, work)
    return Placement(kind, world, students, recipe.placement.accumulation, tuple(sources), work.groups, work.dealt,
                     known.nodes)


def _refuse_shared_devices(groups: int, students: int, kind: str, shards: list[Group], hosts: list[int],
                           known: Ranks) -> None:
    """Raises UserError where ranks of one island share a GPU, which NCCL does not do."""
    places = students // groups
    for first in range(0, students, places):
        if not known.apart(range(first, first + places)):
            raise UserError(f"ranks {first} to {first + places - 1} train together, but some of them share a GPU: at most "
                            "one rank a GPU trains in a group, so set placement.student_ranks=1, or as many "
                            "placement.student_groups as ranks train, or start fewer ranks a node")
    for group in shards if kind == "dedicated" else ():
        if not known.apart(range(hosts[group.ranks[0]], hosts[group.ranks[-1]] + 1)):
            raise UserError(f"{', '.join(group.teachers)} in {len(group.ranks)} shards would lie on ranks that share a GPU: "
                            "start fewer ranks a node, or change placement.shards or placement.student_ranks")


def _shard_and_share(recipe: Recipe, kind: str, work: Workload, hosts: list[int],
                     known: Ranks) -> tuple[list[Group], list[tuple[list[str], float]]]:
    """Groups of ranks for teachers in shards, and what share_out gives for all others; ranks are positions in `hosts`.

    On dedicated ranks a teacher that none can hold is sharded without being asked for, over the fewest ranks that fit.
    """
    costs, sizes, wish = work.costs, work.sizes, recipe.placement
    room = _room(work, known, hosts) if kind == "dedicated" else [known.usable(rank) for rank in hosts]
    nodes = [known.nodes[rank] for rank in hosts] if known.nodes else [0] * len(hosts)
    counts = wanted_shards(wish, kind, list(costs), len(room), work.groups)
    needed = needed_shards({n: sizes[n] for n in costs if n not in wish.shards}, room) if kind == "dedicated" else {}
    counts |= {name: count for name, count in needed.items() if count <= len(room)}
    twice = next((name for name in needed if wish.replicas.get(name, 1) > 1), None)
    if twice:
        raise UserError(f"placement.replicas.{twice} is {wish.replicas[twice]}, but no rank has room for all of that "
                        f"teacher ({sizes[twice] / 2**30:.2f} GiB, {max(room) / 2**30:.2f} at most), and one in shards has "
                        "no replicas: leave it out of placement.replicas, or take devices with more memory")
    while True:
        groups = shard_groups(counts, sizes, room, nodes)
        if groups is not None:
            free, load = list(room), [0.0] * len(room)
            for group in groups:
                for rank in group.ranks:
                    free[rank] -= sum(sizes[name] / counts[name] for name in group.teachers)
                    load[rank] += sum(costs[name] for name in group.teachers)
            whole = {name: cost for name, cost in costs.items() if name not in counts}
            try:
                return groups, share_out(whole, len(room), wish.replicas, work.most, sizes, free, work.blocks, load=load)
            except UserError:
                if not any(counts[name] < len(room) for name in needed if name in counts):
                    raise
        growing = [name for name in needed if counts.get(name, len(room)) < len(room)]
        if not growing:
            raise UserError(f"{', '.join(counts)} in {', '.join(map(str, counts.values()))} shards need "
                            f"{max(sizes[n] / counts[n] for n in counts) / 2**30:.2f} GiB a rank and groups of ranks "
                            f"of their own, but there are {len(room)} rank(s) for teachers with room for "
                            f"{max(room) / 2**30:.2f} GiB at most: start more ranks, or change placement.shards")
        counts[max(growing, key=lambda name: sizes[name] / counts[name])] += 1


def _room(work: Workload, known: Ranks, ranks: Iterable[int]) -> list[float]:
    """Bytes that each of these ranks has for teachers' weights if it does nothing but answer."""
    return [max(0.0, known.usable(rank) - work.runtime - work.slots - work.host_memory) for rank in ranks]


def outline(placement: Placement) -> str:
    """Who is where, in a few words."""
    groups = f" in {placement.groups} groups of students" if placement.groups > 1 else ""
    return f"{placement.kind}, {placement.student_ranks} of {placement.world} rank(s) train{groups}"


def describe(placement: Placement, students: Sequence[str]) -> str:
    """The rank map as a person reads it. students: their names."""
    trains = f"ranks 0-{placement.student_ranks - 1}" if placement.student_ranks > 1 else "rank 0"
    dealt = " | ".join(", ".join(students[index] for index in group) for group in placement.dealt)
    groups = f" in {placement.groups} groups ({dealt})" if placement.groups > 1 else ""
    lines = [f"{placement.kind}: students{groups} on {trains} of {placement.world}"]
    lines += [placement.why] * bool(placement.why)
    several = len(set(placement.nodes)) > 1
    for source in placement.sources:
        at = sorted({placement.nodes[rank] for rank in source.ranks}) if several else []
        where = f" (node{'s' * (len(at) > 1)} {', '.join(map(str, at))})" if several else ""
        shards = f" in {len(source.group)} shards" if source.group else ""
        lines.append(f"  {source.where}{where}: {', '.join(source.teachers)}{shards}")
    return "\n".join(lines)


def check_batch(batch: int, ranks: int, accumulation: int, groups: int = 1) -> None:
    """Raises UserError if a micro batch would fall below SAMPLES_PER_RANK."""
    if batch // (ranks // groups) // accumulation < SAMPLES_PER_RANK:
        split = f" with {accumulation} micro batches each" if accumulation > 1 else ""
        split += f" in {groups} groups" if groups > 1 else ""
        most = batch // SAMPLES_PER_RANK // accumulation * groups
        raise UserError(f"batch {batch} feeds at most {most} student ranks{split} "
                        f"({SAMPLES_PER_RANK} samples each at least), you asked for {ranks}: raise distill.batch or "
                        "start fewer student ranks")


def _kind_and_students(recipe: Recipe, world: int, teachers: int) -> tuple[str, int]:
    wish, kind = recipe.placement, recipe.placement.kind
    if kind == "auto":
        kind = "single" if world == 1 else "dedicated"  # with the student_ranks that are asked for
    if teachers == 0 and kind == "dedicated":
        kind = "co-located"  # no teacher to ask: every rank trains students
    if kind == "single" and world > 1:
        raise UserError(f"placement.kind single runs one process, but {world} were started: start one, or set "
                        "placement.kind to dedicated or co-located")
    if kind == "dedicated" and world < 2:
        raise UserError("placement.kind dedicated needs at least 2 ranks (students and teachers apart), found 1: "
                        "start more (torchrun --nproc_per_node 2) or set placement.kind=single")
    if kind != "dedicated":
        return kind, world
    groups = wish.student_groups or 1
    students = wish.student_ranks or max(groups, world // 2 // groups * groups)
    if students >= world and wish.student_ranks is None:  # because of the groups
        raise UserError(f"placement.student_groups is {groups}, which leaves {max(0, world - students)} of {world} ranks to "
                        f"the teachers: ask for at most {world - 1}, start more ranks, or set placement.kind=co-located")
    if students >= world:
        raise UserError(f"placement.student_ranks is {students}, which leaves {max(0, world - students)} of {world} "
                        f"ranks to the teachers: ask for at most {world - 1} or start more ranks")
    return kind, students
