"""placement `auto`: teachers on ranks of their own or with the students, how many ranks train, in how many groups; pure.

Every candidate has a bound that no step can beat (RankMap.system, System.bound). Those are simulated whose bound is
below the best step found so far.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from pkd.errors import UserError
from pkd.rank_map import USABLE, RankMap, Ranks
from pkd.schedule import SAMPLES_PER_RANK
from pkd.share import share_out
from pkd.simulator import simulate
from pkd.system import Prediction, System
from pkd.workload import Workload

SMALL = 16  # up to so many ranks every division is tried, with fewer than all ranks too
FEW = 6  # of the divisions of more ranks than that, the ones with the shortest conceivable step are tried
SIMULATED = 30  # candidates at most; mostly the first few decide


@dataclass(frozen=True)
class Choice:
    map: RankMap
    groups: int  # of students
    system: System
    predicted: Prediction
    why: str


@dataclass(frozen=True)
class Candidate:
    map: RankMap
    groups: int
    system: System

    @property
    def key(self) -> tuple:
        """Bounds that agree to 3 digits are equal: then rather use all ranks, keep teachers apart, train on few, in one
        group.
        """
        ranks = self.map
        return rounded(self.system.bound()), -ranks.used, ranks.kind == "co-located", ranks.students, self.groups


@dataclass(frozen=True)
class Planner:
    work: Workload
    world: int
    accumulation: int
    fixed: dict[str, int]  # teacher -> replicas asked for
    known: Ranks

    def choose(self, groups: Iterable[int] = ()) -> Choice:
        """The placement with the shortest predicted step. groups: numbers of groups of students that it may have, by default
        what the workload says. Raises UserError where none fits.
        """
        planners = [replace(self, work=replace(self.work, groups=count)) for count in groups] or [self]
        found = self._candidates([(planner, *trial) for planner in planners for trial in planner._trials()])
        if not found:
            for planner in planners:
                if planner._feasible():
                    planner._shares(self.world, [math.inf] * self.world)  # raises where it is the replicas that do not fit
            raise UserError(self._why_none(planners))
        found.sort(key=lambda candidate: candidate.key)
        best, predicted = found[0], simulate(found[0].system)
        for other in found[1:SIMULATED]:
            if rounded(other.system.bound()) >= rounded(predicted.step):
                break  # none of those that follow can be faster
            step = simulate(other.system)
            if rounded(step.step) < rounded(predicted.step):
                best, predicted = other, step
        return Choice(best.map, best.groups, best.system, predicted, self._why(best, predicted, found))

    def rank_map(self, students: int, hosts: int) -> RankMap | None:
        """Teachers on `hosts` ranks after the students, or on all ranks if all train; None if they do not fit."""
        work, apart = self.work, students < self.world
        ranks = range(students, students + hosts) if apart else range(self.world)
        taken = RankMap(self.world, students, {}).bytes(work, self.accumulation) + work.host_memory
        room = [self.known.usable(rank) - taken[rank] for rank in ranks]
        if max(work.sizes.values(), default=0) > max(room):
            return None
        busy = [] if apart or work.groups == 1 else np.repeat(self._train(work.batch * work.groups / students),
                                                              students // work.groups).tolist()
        if work.meets:  # in the steps in which they answer for several, and in those in which they do not
            busy = [seconds / work.together for seconds in busy]
        try:
            shares = self._shares(len(ranks), room, busy if len(set(busy)) > 1 else None)
        except UserError:
            return None
        return RankMap(self.world, students, {rank: names for rank, (names, _) in zip(ranks, shares) if names})

    def _candidates(self, trials: list[tuple["Planner", float, int, int]]) -> list[Candidate]:
        """Those that fit; with many ranks the few with the shortest conceivable step. trials: of _trials(), and whose."""
        found: dict[tuple[str, int], Candidate] = {}
        most = len(trials) if self.world <= SMALL else FEW
        for planner, _, students, hosts in sorted(trials, key=lambda trial: trial[1]):  # stable: fewer groups first
            ranks, groups = planner.rank_map(students, hosts), planner.work.groups
            if ranks:  # the same as another one where there are more hosts than shares
                system = ranks.system(planner.work, planner.accumulation, planner.known)
                found.setdefault((repr(ranks), groups), Candidate(ranks, groups, system))
            if len(found) == most:
                break
        return list(found.values())

    def _trials(self) -> list[tuple[float, int, int]]:
        """What a step takes at the very least, student ranks, and ranks apart for teachers, of which 0 means that all ranks
        do both. With many ranks only divisions that leave none out.
        """
        work, out = self.work, []
        cost = sum(teacher.seconds for teacher in work.teachers.values())
        views = work.view * max((teacher.rows for teacher in work.teachers.values()), default=0.0) * (not work.sent)
        for students in self._feasible():
            places, apart = students // work.groups, self.world - students
            train = max(self._train(-(-work.batch // places))) + work.step + work.sync(students, self.accumulation)
            if not apart:
                whole = places * sum(self._train(work.batch / places))
                out.append((max(train, (whole + cost) / self.world), students, 0))
            for hosts in range(1, apart + 1) if self.world <= SMALL else filter(None, [apart]):
                out.append((max(train, (cost + views) / hosts), students, hosts))
        return out

    def _train(self, rows: float) -> list[float]:
        """Seconds of a step's micro batches of so many rows in all, for a rank of each group."""
        return [engine.seconds(rows, self.accumulation) + rows * self.work.view for engine in self.work.engines]

    def _feasible(self) -> list[int]:
        return [students for students in range(1, self.world + 1) if self.trains(students)]

    def trains(self, students: int) -> bool:
        """Whether so many student ranks have samples and memory enough."""
        share, rest = divmod(students, self.work.groups)
        if rest or self.work.batch // share // self.accumulation < SAMPLES_PER_RANK:
            return False
        islands = [range(first, first + share) for first in range(0, students, share)]
        needed = self.work.student_memory(students, self.accumulation)
        return needed <= self.known.usable_by_all(students) and all(map(self.known.apart, islands))

    def _shares(self, hosts: int, room: list[float], load: list[float] | None = None) -> list[tuple[list[str], float]]:
        work = self.work
        return share_out(work.costs, hosts, self.fixed, work.most, work.sizes, room, work.blocks, idle=True, load=load)

    def _why(self, best: Candidate, predicted: Prediction, found: list[Candidate]) -> str:
        ranks = best.map
        groups = f" in {best.groups} groups of students" if best.groups > 1 else ""
        text = (f"auto: {ranks.students} of {self.world} ranks train{groups}, {ranks.kind} with the teachers: "
                f"{1000 * predicted.step:.3g} ms a step predicted ({self.work.source}), students idle "
                f"{100 * predicted.idle('student'):.0f} %")
        if ranks.kind == "dedicated":
            text += f", teachers {100 * (1 - predicted.busy[sorted(ranks.hosted)].mean()):.0f} %"
        for other in [one for one in found if one.map.kind != ranks.kind][:1]:
            text += f"; {other.map.kind} would take {1000 * other.system.bound():.3g} ms at least"
        for other in [one for one in found if one.groups == 1][:1] if groups else ():
            text += f"; students in one group {1000 * other.system.bound():.3g} ms at least"
        if ranks.used < self.world:
            text += (f". {self.world - ranks.used} rank(s) have nothing to do: more would not make a step of "
                     f"{self.work.batch} samples faster, so start fewer, or raise distill.batch")
        return text

    def _why_none(self, planners: list["Planner"]) -> str:
        share = self.work.batch // SAMPLES_PER_RANK // self.accumulation  # ranks of a group at most
        if share == 0:
            return (f"distill.batch is {self.work.batch}, too few for {self.accumulation} micro batch(es) of "
                    f"{SAMPLES_PER_RANK} samples at least: raise it, or lower placement.accumulation")
        least = min(one.work.student_memory(students, self.accumulation) for one in planners
                    for students in range(one.work.groups, min(share * one.work.groups, self.world) + 1, one.work.groups))
        weights = sum(teacher.size for teacher in self.work.teachers.values())
        room = max(map(self.known.usable, range(self.world)))
        return (f"the recipe does not fit on {self.world} rank(s): a student rank needs {least / 2**30:.2f} GiB at least "
                f"and the teachers' weights {weights / 2**30:.2f} GiB in all, by estimate, but {100 * USABLE:.0f} % of the "
                f"largest rank's memory (or of placement.memory_gib) are {room / 2**30:.2f} GiB: start more ranks, raise "
                "placement.accumulation or the ZeRO stage, or set placement.kind yourself")


def next_rank(work: Workload, ranks: RankMap, accumulation: int, known: Ranks, step: float,
              groups: Iterable[int] = ()) -> str:
    """Where one more rank, on a node of its own, would shorten a step of so many seconds most; in a few words. groups: as in
    Planner.choose.
    """
    if ranks.shards:
        return "to a place that was not looked for, as teachers lie in shards"
    more = Ranks(known.memory + known.memory[-1:], (*known.nodes, max(known.nodes) + 1) if known.nodes else (),
                 known.cores + known.cores[-1:] if known.nodes else known.cores, known.threads,
                 (*known.devices, max(known.devices) + 1) if known.devices else ())
    hosts = len(ranks.hosted)
    wishes = [("to the students", ranks.students + 1, hosts)]
    if ranks.kind == "dedicated":
        wishes.append(("to the teachers", ranks.students, hosts + 1))
    found = [(step, f"nowhere: no step of {work.batch} samples gets shorter")]
    for grouped in [replace(work, groups=count) for count in groups] or [work]:
        planner = Planner(grouped, ranks.world + 1, accumulation, {}, more)
        for where, students, count in wishes:
            trial = planner.rank_map(students, count) if planner.trains(students) else None
            if trial:
                shorter = simulate(trial.system(grouped, accumulation, more)).step
                found.append((1.01 * shorter, f"{where}, for {1000 * shorter:.3g} ms a step"))
    return min(found)[1]


def rounded(seconds: float) -> float:
    return float(f"{seconds:.3g}")
