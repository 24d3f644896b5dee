"""Teachers shared out over ranks: heavy ones replicated, longest first onto the least loaded rank; pure."""

import heapq
import math
from dataclasses import dataclass

from pkd.errors import UserError

# Largest shares aimed at, over the least possible highest load. Smaller ones are more replicas, thus more weights and
# views, and fill ranks more evenly: they have to be worth it.
AIMS = (math.inf, 3.0, 2.0, 1.5, 1.2, 1.05, 1.0, 0.7, 0.5, 0.34, 0.25, 0.17, 0.12)
WORTH = 0.99  # of the highest load before


def share_out(costs: dict[str, float], ranks: int, fixed: dict[str, int], most: int, sizes: dict[str, int] | None = None,
              room: list[float] | None = None, blocks: dict[str, float] | None = None,
              idle: bool = False, load: list[float] | None = None) -> list[tuple[list[str], float]]:
    """Teachers and load of each of `ranks` ranks, the highest load as low as this finds it.

    costs: seconds (or anything else) of each teacher's whole work; `fixed` sets the number of replicas for some, the
    others get up to `most`. sizes: bytes of weights, of which no rank gets more than its `room`. blocks: whole blocks of
    rows that a teacher's replicas share; without them work is divisible at will. idle: leave ranks without a teacher where
    another replica would not lower any load. load: what a rank does besides, in the unit of the costs. Ties go to the first
    teacher and the lowest rank. Raises UserError.
    """
    most = min(ranks, most)
    for name, count in fixed.items():
        if count > most:
            raise UserError(f"placement.replicas.{name} asks for {count} ranks, but at most {most} can share its rows "
                            f"({ranks} rank(s) for teachers, blocks of answer_rows rows): lower it or answer_rows, raise "
                            "distill.batch, or give the teachers more ranks")
    besides = load or [0.0] * ranks
    shelves = _Shelves(costs, sizes or {}, room or [math.inf] * ranks, blocks or {}, besides)
    least = max([(sum(costs.values()) + sum(besides)) / ranks,
                 *(shelves.share(name, fixed.get(name, most)) for name in costs)], default=0.0)
    best, tried = None, set()
    for aim in AIMS:
        replicas = {name: fixed.get(name) or shelves.fewest(name, aim * least, most) for name in costs}
        if not idle:
            shelves.spread(replicas, fixed, besides.count(0.0), most)
        key = tuple(replicas.values())
        if key in tried:
            continue
        tried.add(key)
        filled = shelves.fill(replicas)
        if filled and (best is None or shelves.highest(filled) < shelves.highest(best) * WORTH):
            best = filled
    if best is None:
        raise UserError(shelves.why_not({name: fixed.get(name, 1) for name in costs}))
    return best


@dataclass(frozen=True)
class _Shelves:
    """Ranks that teachers are put on; room: bytes of each; besides: its other load."""

    costs: dict[str, float]
    sizes: dict[str, int]
    room: list[float]
    blocks: dict[str, float]
    besides: list[float]

    def highest(self, shares: list[tuple[list[str], float]]) -> float:
        return max(load + other for (_, load), other in zip(shares, self.besides))

    def share(self, name: str, replicas: int) -> float:
        """The largest replica's part of a teacher's work: whole blocks, where they are known."""
        count = math.ceil(self.blocks.get(name, 0.0))
        part = math.ceil(count / replicas) / count if count else 1 / replicas
        return self.costs[name] * part

    def fewest(self, name: str, load: float, most: int) -> int:
        """The least number of replicas whose shares are at most `load`, or else the most there may be."""
        count = next((r for r in range(1, most) if self.share(name, r) <= load * (1 + 1e-9)), most)
        blocks = math.ceil(self.blocks.get(name, 0.0))
        return math.ceil(blocks / math.ceil(blocks / count)) if blocks else count  # fewer may do as many blocks each

    def spread(self, replicas: dict[str, int], fixed: dict[str, int], ranks: int, most: int) -> None:
        """More replicas of the heaviest until there are as many as ranks, or no more can be."""
        heap = [(-self.costs[n] / replicas[n], i, n) for i, n in enumerate(self.costs) if n not in fixed]
        heapq.heapify(heap)
        missing = ranks - sum(replicas.values())
        while missing > 0 and heap:
            _, index, name = heapq.heappop(heap)
            if replicas[name] < most:
                replicas[name] += 1
                missing -= 1
                heapq.heappush(heap, (-self.costs[name] / replicas[name], index, name))

    def fill(self, replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        """Longest first; where that leaves a large teacher without room, largest first; None if neither fits."""
        longest = sorted(self.costs, key=lambda n: -self.share(n, replicas[n]))
        largest = sorted(self.costs, key=lambda n: -self.sizes.get(n, 0))
        return self._in_order(longest, replicas) or self._in_order(largest, replicas)

    def _in_order(self, names: list[str], replicas: dict[str, int]) -> list[tuple[list[str], float]] | None:
        hosted: list[list[str]] = [[] for _ in self.room]
        free = list(self.room)
        heap = [(load, 0, rank) for rank, load in enumerate(self.besides)]  # load, teachers, rank
        heapq.heapify(heap)
        shares = {name: self.share(name, replicas[name]) for name in names}
        for name in names:
            size, share = self.sizes.get(name, 0), shares[name]
            taken, full = [], []
            while heap and len(taken) < replicas[name]:
                entry = heapq.heappop(heap)
                (taken if free[entry[2]] >= size else full).append(entry)
            if len(taken) < replicas[name]:
                return None
            for load, count, rank in taken:
                hosted[rank].append(name)
                free[rank] -= size
                heapq.heappush(heap, (load + share, count + 1, rank))
            for entry in full:
                heapq.heappush(heap, entry)
        order = {name: index for index, name in enumerate(self.costs)}
        return [(sorted(names, key=order.__getitem__), sum(map(shares.__getitem__, names))) for names in hosted]

    def why_not(self, replicas: dict[str, int]) -> str:
        needed = sum(self.sizes.get(name, 0) * replicas[name] for name in self.costs)
        largest = max(self.costs, key=lambda n: self.sizes.get(n, 0))
        return (f"the teachers' weights need {needed / 2**30:.2f} GiB (the largest, {largest}, "
                f"{self.sizes.get(largest, 0) / 2**30:.2f}), but the {len(self.room)} rank(s) for teachers have room for "
                f"{sum(self.room) / 2**30:.2f} GiB in all and {max(self.room) / 2**30:.2f} at most: start more ranks, "
                "lower placement.student_ranks or placement.replicas, or set placement.shards")
