"""placement `auto`: teachers on ranks of their own or with the students, and how many ranks train; pure.

Every candidate has a bound that no step can beat (RankMap.system, System.bound). Those are simulated whose bound is
below the best step found so far.
"""

import math
from dataclasses import dataclass

from pkd.errors import UserError
from pkd.rank_map import USABLE, RankMap, Ranks
from pkd.schedule import SAMPLES_PER_RANK
from pkd.share import share_out
from pkd.simulator import simulate
from pkd.system import Prediction, System
from pkd.workload import Workload

SMALL = 16  # up to so many ranks every division is tried, with fewer than all ranks too
SIMULATED = 30  # candidates at most; mostly the first few decide


@dataclass(frozen=True)
class Choice:
    map: RankMap
    system: System
    predicted: Prediction
    why: str


@dataclass(frozen=True)
class Planner:
    work: Workload
    world: int
    accumulation: int
    fixed: dict[str, int]  # teacher -> replicas asked for
    known: Ranks

    def choose(self) -> Choice:
        """The placement with the shortest predicted step. Raises UserError where none fits."""
        found = self._candidates()
        if not found:
            if self._feasible():
                self._shares(self.world, [math.inf] * self.world)  # raises where it is the replicas that do not fit
            raise UserError(self._why_none())
        # Bounds that agree to 3 digits are equal: then rather use all ranks, keep teachers apart, and train on few.
        found.sort(key=lambda c: (_rounded(c[1].bound()), -c[0].used, c[0].kind == "co-located", c[0].students))
        ranks, system, predicted = *found[0], simulate(found[0][1])
        for other, trial in found[1:SIMULATED]:
            if _rounded(trial.bound()) >= _rounded(predicted.step):
                break  # none of those that follow can be faster
            step = simulate(trial)
            if _rounded(step.step) < _rounded(predicted.step):
                ranks, system, predicted = other, trial, step
        others = [(other.kind, s.bound()) for other, s in found if other.kind != ranks.kind]
        return Choice(ranks, system, predicted, self._why(ranks, predicted, others[:1]))

    def rank_map(self, students: int, hosts: int) -> RankMap | None:
        """Teachers on `hosts` ranks after the students, or on all ranks if all train; None if they do not fit."""
        work, apart = self.work, students < self.world
        ranks = range(students, students + hosts) if apart else range(self.world)
        taken = work.runtime + work.slots if apart else work.student_memory(students, self.accumulation)
        room = [self.known.usable(rank) - taken - work.host_memory for rank in ranks]
        try:
            shares = self._shares(len(ranks), room)
        except UserError:
            return None
        return RankMap(self.world, students, {rank: names for rank, (names, _) in zip(ranks, shares) if names})

    def _candidates(self) -> list[tuple[RankMap, System]]:
        feasible = self._feasible()
        pairs = [(self.world, 0)] if self.world in feasible else []
        if self.world <= SMALL:
            pairs += [(s, hosts) for s in feasible for hosts in range(1, self.world - s + 1)]
        else:
            pairs += [(s, self.world - s) for s in self._promising([s for s in feasible if s < self.world])]
        maps: list[RankMap] = []
        for students, hosts in pairs:
            ranks = self.rank_map(students, hosts)
            if ranks and ranks not in maps:  # more hosts than shares leave some without a teacher
                maps.append(ranks)
        return [(ranks, ranks.system(self.work, self.accumulation, self.known)) for ranks in maps]

    def _promising(self, students: list[int]) -> list[int]:
        """Of many numbers of student ranks, the few whose least possible step is the shortest."""
        work = self.work
        cost = sum(teacher.seconds for teacher in work.teachers.values())
        def least(s: int) -> float:
            rows = -(-work.batch // (s // work.groups))
            train = work.students.seconds(rows, self.accumulation) + rows * work.view + work.step + work.sync(s)
            return max(train, cost / (self.world - s))
        return sorted(students, key=least)[:4]

    def _feasible(self) -> list[int]:
        return [students for students in range(1, self.world + 1) if self.trains(students)]

    def trains(self, students: int) -> bool:
        """Whether so many student ranks have samples and memory enough."""
        share, rest = divmod(students, self.work.groups)
        if rest or self.work.batch // share // self.accumulation < SAMPLES_PER_RANK:
            return False
        islands = [range(first, first + share) for first in range(0, students, share)]
        needed = self.work.student_memory(students, self.accumulation)
        return all(map(self.known.apart, islands)) and all(needed <= self.known.usable(rank) for rank in range(students))

    def _shares(self, hosts: int, room: list[float]) -> list[tuple[list[str], float]]:
        work = self.work
        return share_out(work.costs, hosts, self.fixed, work.most, work.sizes, room, work.blocks, idle=True)

    def _why(self, ranks: RankMap, predicted: Prediction, others: list[tuple[str, float]]) -> str:
        text = (f"auto: {ranks.students} of {self.world} ranks train, {ranks.kind} with the teachers: "
                f"{1000 * predicted.step:.3g} ms a step predicted ({self.work.source}), students idle "
                f"{100 * predicted.idle('student'):.0f} %")
        if ranks.kind == "dedicated":
            text += f", teachers {100 * (1 - predicted.busy[sorted(ranks.hosted)].mean()):.0f} %"
        for kind, seconds in others:
            text += f"; {kind} would take {1000 * seconds:.3g} ms at least"
        if ranks.used < self.world:
            text += (f". {self.world - ranks.used} rank(s) have nothing to do: more would not make a step of "
                     f"{self.work.batch} samples faster, so start fewer, or raise distill.batch")
        return text

    def _why_none(self) -> str:
        groups = self.work.groups
        most = self.work.batch // SAMPLES_PER_RANK // self.accumulation * groups
        if most == 0:
            return (f"distill.batch is {self.work.batch}, too few for {self.accumulation} micro batch(es) of "
                    f"{SAMPLES_PER_RANK} samples at least: raise it, or lower placement.accumulation")
        least = min(self.work.student_memory(s, self.accumulation) for s in range(groups, min(most, self.world) + 1, groups))
        weights = sum(teacher.size for teacher in self.work.teachers.values())
        return (f"the recipe does not fit on {self.world} rank(s): a student rank needs {least / 2**30:.2f} GiB at least "
                f"and the teachers' weights {weights / 2**30:.2f} GiB in all, by estimate, but {100 * USABLE:.0f} % of the "
                f"largest rank's memory are {max(map(self.known.usable, range(self.world))) / 2**30:.2f} GiB: start more "
                "ranks, raise placement.accumulation or the ZeRO stage, or set placement.kind yourself")


def next_rank(work: Workload, ranks: RankMap, accumulation: int, known: Ranks, step: float) -> str:
    """Where one more rank, on a node of its own, would shorten a step of so many seconds most; in a few words."""
    if ranks.shards:
        return "to a place that was not looked for, as teachers lie in shards"
    more = Ranks(known.memory + known.memory[-1:], (*known.nodes, max(known.nodes) + 1) if known.nodes else (),
                 known.cores + known.cores[-1:] if known.nodes else known.cores, known.threads,
                 (*known.devices, max(known.devices) + 1) if known.devices else ())
    planner = Planner(work, ranks.world + 1, accumulation, {}, more)
    hosts = len(ranks.hosted)
    wishes = [("to the students", ranks.students + 1, hosts)]
    if ranks.kind == "dedicated":
        wishes.append(("to the teachers", ranks.students, hosts + 1))
    found = [(step, f"nowhere: no step of {work.batch} samples gets shorter")]
    for where, students, count in wishes:
        trial = planner.rank_map(students, count) if planner.trains(students) else None
        if trial:
            shorter = simulate(trial.system(work, accumulation, more)).step
            found.append((1.01 * shorter, f"{where}, for {1000 * shorter:.3g} ms a step"))
    return min(found)[1]


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.3g}")
