"""Who is where: teachers -> ranks. A pure function of the recipe, the world size and the teachers' costs.

Student ranks come first, [0, student_ranks). `dedicated`: teachers on ranks of their own, [student_ranks, world).
`co-located`: every rank trains students and hosts some teachers. `single`: one process does all.
"""

from dataclasses import asdict, dataclass

from pkd.errors import UserError, nearest
from pkd.recipe import Recipe
from pkd.schedule import BLOCK

SAMPLES_PER_RANK = 8  # fewer make batch statistics and kernels poor
USABLE = 0.9  # of a device's memory; the rest is the driver's and the allocator's


@dataclass(frozen=True)
class Source:
    """A rank that answers for teachers."""

    rank: int
    teachers: tuple[str, ...]
    load: float  # forward FLOPs per training sample


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

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(tree: dict) -> "Placement":
        sources = tuple(Source(s["rank"], tuple(s["teachers"]), s["load"]) for s in tree["sources"])
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
    loads = share_out(costs, len(hosts), wish.replicas, most, sizes, room)
    if kind == "dedicated" and not all(teachers for teachers, _ in loads):
        raise UserError(f"{len(hosts)} teacher ranks were asked for, but a batch of {recipe.distill.batch} keeps only "
                        f"{sum(bool(t) for t, _ in loads)} of them busy ({len(costs)} teachers, {most} block(s) of "
                        f"{BLOCK} rows each): start fewer ranks, or raise placement.student_ranks or distill.batch")
    sources = tuple(Source(rank, tuple(teachers), load) for rank, (teachers, load) in zip(hosts, loads) if teachers)
    return Placement(kind, world, students, accumulation, sources, known.nodes)


def without_teachers(recipe: Recipe) -> Recipe:
    """The recipe to place where soft targets come from an archive: no teacher has replicas."""
    return recipe.model_copy(update={"placement": recipe.placement.model_copy(update={"replicas": {}})})


def describe(placement: Placement) -> str:
    """The rank map as a person reads it."""
    students = f"ranks 0-{placement.student_ranks - 1}" if placement.student_ranks > 1 else "rank 0"
    lines = [f"{placement.kind}: students on {students} of {placement.world}"]
    several = len(set(placement.nodes)) > 1
    for source in placement.sources:
        where = f" (node {placement.nodes[source.rank]})" if several else ""
        lines.append(f"  rank {source.rank}{where}: {', '.join(source.teachers)}")
    return "\n".join(lines)


def check_batch(batch: int, ranks: int, accumulation: int) -> None:
    """Raises UserError if a micro batch would fall below SAMPLES_PER_RANK."""
    if batch // ranks // accumulation < SAMPLES_PER_RANK:
        split = f" with {accumulation} micro batches each" if accumulation > 1 else ""
        raise UserError(f"batch {batch} feeds at most {batch // SAMPLES_PER_RANK // accumulation} student ranks{split} "
                        f"({SAMPLES_PER_RANK} samples each at least), you asked for {ranks}: raise distill.batch or "
                        "start fewer student ranks")


def share_out(costs: dict[str, float], ranks: int, fixed: dict[str, int], most: int,
              sizes: dict[str, int] | None = None, room: list[float] | None = None) -> list[tuple[list[str], float]]:
    """Teachers and load of each of `ranks` ranks: longest first onto the least loaded rank, heavy ones replicated.

    The heaviest share is split over one rank more as long as that lowers the highest load, up to `most` replicas a
    teacher; `fixed` sets the number for some. Ties go to the first teacher and the lowest rank. No rank gets more bytes
    of teachers than its `room`.
    """
    for name, count in fixed.items():
        if count > min(ranks, most):
            raise UserError(f"placement.replicas.{name} asks for {count} ranks, but at most {min(ranks, most)} can "
                            f"share its rows ({ranks} rank(s) for teachers, blocks of {BLOCK} rows)")
    shelves = _Shelves(costs, sizes or {}, room or [float("inf")] * ranks)
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
        idle = any(not teachers for teachers, _ in best)
        if idle or max(load for _, load in trial) < 0.95 * max(load for _, load in best):
            best = trial
    return best


@dataclass(frozen=True)
class _Shelves:
    """Ranks that teachers are put on; room: bytes of each."""

    costs: dict[str, float]
    sizes: dict[str, int]
    room: list[float]

    def fill(self, replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        """Longest first; where that leaves a large teacher without room, largest first; None if neither fits."""
        longest = sorted(self.costs, key=lambda n: -self.costs[n] / replicas[n])
        largest = sorted(self.costs, key=lambda n: -self.sizes.get(n, 0))
        return self._in_order(longest, replicas) or self._in_order(largest, replicas)

    def _in_order(self, names: list[str], replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        hosted: list[list[str]] = [[] for _ in self.room]
        load, free = [0.0] * len(self.room), list(self.room)
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
        return [(sorted(names, key=order.__getitem__), total) for names, total in zip(hosted, load)]

    def why_not(self, replicas: dict[str, int]) -> str:
        needed = sum(self.sizes.get(name, 0) * replicas[name] for name in self.costs)
        largest = max(self.costs, key=lambda n: self.sizes.get(n, 0))
        return (f"the teachers' weights need {needed / 2**30:.2f} GiB (the largest, {largest}, "
                f"{self.sizes[largest] / 2**30:.2f}), but the {len(self.room)} rank(s) for teachers have room for "
                f"{sum(self.room) / 2**30:.2f} GiB in all and {max(self.room) / 2**30:.2f} at most: start more ranks, or "
                "lower placement.student_ranks or placement.replicas")


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
