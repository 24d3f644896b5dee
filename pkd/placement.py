"""Who is where: teachers -> ranks. A pure function of the recipe, the world size and the teachers' costs.

Student ranks come first, [0, student_ranks). `dedicated`: teachers on ranks of their own, [student_ranks, world).
`co-located`: every rank trains students and hosts some teachers. `single`: one process does all.
"""

from dataclasses import asdict, dataclass

from pkd.errors import UserError, nearest
from pkd.recipe import Recipe
from pkd.schedule import BLOCK
from pkd.shards import Group, needed_shards, shard_groups, wanted_shards

SAMPLES_PER_RANK = 8  # fewer make batch statistics and kernels poor
USABLE = 0.9  # of a device's memory; the rest is the driver's and the allocator's


@dataclass(frozen=True)
class Source:
    """Who answers for some teachers: a rank that holds them whole, or several that hold them together."""

    rank: int  # that sends the soft targets
    teachers: tuple[str, ...]
    load: float  # forward FLOPs per training sample, on each of its ranks
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
    nodes: tuple[int, ...] = ()  # of each rank, numbered from 0; unknown before ranks are started

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
                         tuple(tree.get("nodes", ())))


@dataclass(frozen=True)
class Ranks:
    """What is known of the ranks' hardware; memory: bytes a rank; nodes: each rank's node, numbered from 0."""

    memory: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()


def place(recipe: Recipe, world: int, costs: dict[str, float], sizes: dict[str, int] | None = None,
          known: Ranks | None = None) -> Placement:
    """The placement of a recipe on `world` ranks. Raises UserError where it does not fit.

    costs: teacher -> forward FLOPs per training sample (its cost per row times the share of samples it is asked
    about), only for teachers that the objective asks. sizes: teacher -> bytes of its weights.
    """
    wish, known = recipe.placement, known or Ranks()
    kind, students = _kind_and_students(recipe, world, teachers=len(costs))
    accumulation = wish.accumulation
    check_batch(recipe.distill.batch, students, accumulation)
    unknown = [name for name in wish.replicas if name not in costs]
    if unknown:
        raise UserError(f"placement.replicas names {unknown[0]!r}, but the teachers asked are "
                        f"{', '.join(costs) or 'none'}{nearest(unknown[0], costs)}")
    hosts = list(range(students, world)) if kind == "dedicated" else list(range(world))
    most = -(-recipe.distill.batch // BLOCK)  # a replica without a whole block of rows would idle
    room = [USABLE * known.memory[rank] for rank in hosts] if known.memory else None
    at = [known.nodes[rank] for rank in hosts] if known.nodes else [0] * len(hosts)
    groups, loads = _shard_and_share(recipe, kind, costs, most, sizes or {}, room or [float("inf")] * len(hosts), at)
    busy = {rank for group in groups for rank in group.ranks} | {rank for rank, (names, _) in enumerate(loads) if names}
    if kind == "dedicated" and len(busy) < len(hosts):
        raise UserError(f"{len(hosts)} teacher ranks were asked for, but a batch of {recipe.distill.batch} keeps only "
                        f"{len(busy)} of them busy ({len(costs)} teachers, {most} block(s) of "
                        f"{BLOCK} rows each): start fewer ranks, or raise placement.student_ranks or distill.batch")
    sources = [Source(hosts[group.ranks[0]], tuple(group.teachers), sum(costs[name] for name in group.teachers),
                      tuple(hosts[rank] for rank in group.ranks)) for group in groups]
    sources += [Source(rank, tuple(teachers), load) for rank, (teachers, load) in zip(hosts, loads) if teachers]
    return Placement(kind, world, students, accumulation, tuple(sources), known.nodes)


def _shard_and_share(recipe: Recipe, kind: str, costs: dict[str, float], most: int, sizes: dict[str, int],
                     room: list[float], nodes: list[int]) -> tuple[list[Group], list[tuple[list[str], float]]]:
    """Groups of ranks for teachers in shards, and what share_out gives for all others.

    On dedicated ranks a teacher that none can hold is sharded without being asked for, over the fewest ranks that fit.
    """
    counts = wanted_shards(recipe.placement, kind, list(costs), len(room))
    asked = recipe.placement.shards
    needed = needed_shards({n: sizes.get(n, 0) for n in costs if n not in asked}, room) if kind == "dedicated" else {}
    counts |= {name: count for name, count in needed.items() if count <= len(room)}
    while True:
        groups = shard_groups(counts, sizes, room, nodes)
        if groups is not None:
            free, load = list(room), [0.0] * len(room)
            for group in groups:
                for rank in group.ranks:
                    free[rank] -= sum(sizes.get(name, 0) / counts[name] for name in group.teachers)
                    load[rank] += sum(costs[name] for name in group.teachers)
            whole = {name: cost for name, cost in costs.items() if name not in counts}
            try:
                return groups, share_out(whole, len(room), recipe.placement.replicas, most, sizes, free, load)
            except UserError:
                if not any(counts[name] < len(room) for name in needed if name in counts):
                    raise
        growing = [name for name in needed if counts.get(name, len(room)) < len(room)]
        if not growing:
            raise UserError(f"{', '.join(counts)} in {', '.join(map(str, counts.values()))} shards need "
                            f"{max(sizes.get(n, 0) / counts[n] for n in counts) / 2**30:.2f} GiB a rank and groups of ranks "
                            f"of their own, but there are {len(room)} rank(s) for teachers with room for "
                            f"{max(room) / 2**30:.2f} GiB at most: start more ranks, or change placement.shards")
        counts[max(growing, key=lambda name: sizes[name] / counts[name])] += 1


def without_teachers(recipe: Recipe) -> Recipe:
    """The recipe to place where soft targets come from an archive: no teacher has replicas or shards."""
    return recipe.model_copy(update={"placement": recipe.placement.model_copy(update={"replicas": {}, "shards": {}})})


def describe(placement: Placement) -> str:
    """The rank map as a person reads it."""
    students = f"ranks 0-{placement.student_ranks - 1}" if placement.student_ranks > 1 else "rank 0"
    lines = [f"{placement.kind}: students on {students} of {placement.world}"]
    several = len(set(placement.nodes)) > 1
    for source in placement.sources:
        at = sorted({placement.nodes[rank] for rank in source.ranks}) if several else []
        where = f" (node{'s' * (len(at) > 1)} {', '.join(map(str, at))})" if several else ""
        shards = f" in {len(source.group)} shards" if source.group else ""
        lines.append(f"  {source.where}{where}: {', '.join(source.teachers)}{shards}")
    return "\n".join(lines)


def check_batch(batch: int, ranks: int, accumulation: int) -> None:
    """Raises UserError if a micro batch would fall below SAMPLES_PER_RANK."""
    if batch // ranks // accumulation < SAMPLES_PER_RANK:
        split = f" with {accumulation} micro batches each" if accumulation > 1 else ""
        raise UserError(f"batch {batch} feeds at most {batch // SAMPLES_PER_RANK // accumulation} student ranks{split} "
                        f"({SAMPLES_PER_RANK} samples each at least), you asked for {ranks}: raise distill.batch or "
                        "start fewer student ranks")


def share_out(costs: dict[str, float], ranks: int, fixed: dict[str, int], most: int,
              sizes: dict[str, int] | None = None, room: list[float] | None = None,
              load: list[float] | None = None) -> list[tuple[list[str], float]]:
    """Teachers and their load of each of `ranks` ranks: longest first onto the least loaded rank, heavy ones replicated.

    The heaviest share is split over one rank more as long as that lowers the highest load, up to `most` replicas a
    teacher; `fixed` sets the number for some. Ties go to the first teacher and the lowest rank. No rank gets more bytes
    of teachers than its `room`; `load` is what a rank does besides.
    """
    besides = load or [0.0] * ranks
    for name, count in fixed.items():
        if count > min(ranks, most):
            raise UserError(f"placement.replicas.{name} asks for {count} ranks, but at most {min(ranks, most)} can "
                            f"share its rows ({ranks} rank(s) for teachers, blocks of {BLOCK} rows)")
    shelves = _Shelves(costs, sizes or {}, room or [float("inf")] * ranks, besides)
    replicas = {name: fixed.get(name, 1) for name in costs}
    best = shelves.fill(replicas)
    if best is None:
        raise UserError(shelves.why_not(replicas))
    for _ in range(ranks):
        movable = [n for n in costs if n not in fixed and replicas[n] < min(ranks, most)]
        if not movable:
            break
        heaviest = max(movable, key=lambda n: costs[n] / replicas[n])
        replicas = {**replicas, heaviest: replicas[heaviest] + 1}
        trial = shelves.fill(replicas)
        if trial is None:
            break
        idle = any(not teachers and not other for (teachers, _), other in zip(best, besides))
        if idle or shelves.highest(trial) < 0.95 * shelves.highest(best):
            best = trial
    return best


@dataclass(frozen=True)
class _Shelves:
    """Ranks that teachers are put on; room: bytes of each; besides: its other load."""

    costs: dict[str, float]
    sizes: dict[str, int]
    room: list[float]
    besides: list[float]

    def highest(self, loads: list[tuple[list[str], float]]) -> float:
        return max(load + other for (_, load), other in zip(loads, self.besides))

    def fill(self, replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        """Longest first; where that leaves a large teacher without room, largest first; None if neither fits."""
        longest = sorted(self.costs, key=lambda n: -self.costs[n] / replicas[n])
        largest = sorted(self.costs, key=lambda n: -self.sizes.get(n, 0))
        return self._in_order(longest, replicas) or self._in_order(largest, replicas)

    def _in_order(self, names: list[str], replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        hosted: list[list[str]] = [[] for _ in self.room]
        load, free = list(self.besides), list(self.room)
        for name in names:
            size = self.sizes.get(name, 0)
            fitting = sorted((rank for rank in range(len(free)) if free[rank] >= size), key=lambda r: load[r])
            if len(fitting) < replicas[name]:
                return None
            for rank in fitting[:replicas[name]]:
                hosted[rank].append(name)
                load[rank] += self.costs[name] / replicas[name]
                free[rank] -= size
        order = {name: index for index, name in enumerate(self.costs)}
        return [(sorted(names, key=order.__getitem__), sum(self.costs[n] / replicas[n] for n in names)) for names in hosted]

    def why_not(self, replicas: dict[str, int]) -> str:
        needed = sum(self.sizes.get(name, 0) * replicas[name] for name in self.costs)
        largest = max(self.costs, key=lambda n: self.sizes.get(n, 0))
        return (f"the teachers' weights need {needed / 2**30:.2f} GiB (the largest, {largest}, "
                f"{self.sizes[largest] / 2**30:.2f}), but the {len(self.room)} rank(s) for teachers have room for "
                f"{sum(self.room) / 2**30:.2f} GiB in all and {max(self.room) / 2**30:.2f} at most: start more ranks, "
                "lower placement.student_ranks or placement.replicas, or set placement.shards")


def _kind_and_students(recipe: Recipe, world: int, teachers: int) -> tuple[str, int]:
    wish, kind = recipe.placement, recipe.placement.kind
    if kind == "auto":
        kind = "single" if world == 1 else "dedicated"
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
    students = wish.student_ranks or max(1, world // 2)
    if students >= world:
        raise UserError(f"placement.student_ranks is {students}, which leaves {max(0, world - students)} of {world} "
                        f"ranks to the teachers: ask for at most {world - 1} or start more ranks")
    return kind, students
