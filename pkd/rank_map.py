"""One way to put a workload on ranks: what each does in a step, and how much memory it takes; pure."""

from dataclasses import dataclass

import numpy as np

from pkd.schedule import student_parts
from pkd.system import System
from pkd.wire import dear
from pkd.workload import Workload

USABLE = 0.9  # of a device's memory; the rest is the driver's and the allocator's


@dataclass(frozen=True)
class Ranks:
    """What is known of the ranks' hardware. Empty: unknown, thus no limit."""

    memory: tuple[int, ...] = ()  # bytes of each rank
    nodes: tuple[int, ...] = ()  # each rank's node, numbered from 0
    cores: tuple[float, ...] = ()  # of each node, where the ranks compute on them
    threads: int = 1  # of each rank
    devices: tuple[int, ...] = ()  # each rank's, numbered; ranks of one GPU cannot train together, which NCCL does

    def apart(self, ranks: range) -> bool:
        """Whether no two of these ranks share a device."""
        return not self.devices or len({self.devices[rank] for rank in ranks}) == len(ranks)

    def usable_by_all(self, count: int) -> float:
        """By each of the first so many ranks."""
        return USABLE * min(self.memory[:count]) if self.memory else float("inf")

    def usable(self, rank: int) -> float:
        return USABLE * self.memory[rank] if self.memory else float("inf")


@dataclass(frozen=True)
class RankMap:
    """hosted: rank -> the teachers that it answers for. The student ranks are the first ones.

    A teacher on several ranks is whole on each, and each does some of its rows; one of `shards` lies on them in parts, all
    of them do all rows, and the first one sends.
    """

    world: int
    students: int
    hosted: dict[int, list[str]]
    shards: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return "dedicated" if self.students < self.world else "co-located" if self.world > 1 else "single"

    @property
    def used(self) -> int:
        """Ranks that have anything to do."""
        return len({*range(self.students), *self.hosted})

    def bytes(self, work: Workload, accumulation: int) -> np.ndarray:
        """Estimated bytes on each rank, float [world]."""
        out = np.full(self.world, work.runtime + work.slots)
        for group, ranks in enumerate(self._groups(work)):
            out[ranks] = work.student_memory(self.students, accumulation, group)
        holders = self._holders()
        for rank, names in self.hosted.items():
            out[rank] += work.host_memory + sum(
                work.teachers[name].size / (len(holders[name]) if name in self.shards else 1) for name in names)
        return out

    def system(self, work: Workload, accumulation: int, known: Ranks) -> System:
        answer, train, sent = (np.zeros(self.world) for _ in range(3))
        rows = np.array([part.stop - part.start for part in student_parts(work.batch, self.students, work.groups)])
        for engine, ranks in zip(work.engines, self._groups(work)):
            train[ranks] = accumulation * engine.micro + rows[ranks] * (engine.row + work.view)
        answer += work.step
        asked = np.zeros(self.world)  # rows of all its teachers; where they overlap, a view is made once
        for name, ranks in self._holders().items():
            teacher = work.teachers[name]
            parts = np.ones(len(ranks)) if name in self.shards else replica_shares(teacher.blocks, len(ranks))
            answer[ranks] += parts * teacher.seconds
            asked[ranks] += parts * teacher.rows
            senders = slice(1) if name in self.shards else slice(None)
            sent[ranks[senders]] += parts[senders] * teacher.wire
        asked = np.minimum(asked, work.batch)
        views = None
        if work.sent:  # a student rank makes its own and gets those of the others
            asked[:self.students] *= 1 - 1 / self.students
            views = asked * work.image
        else:
            answer += asked * work.view
        places = self.students // work.groups if self._direct(work) else 0
        return System(self.students, answer, train, sent, work.window, work.sync(self.students, accumulation),
                      work.links.bandwidth, work.links.latency, np.array(known.nodes) if known.nodes else None,
                      np.array(known.cores) if known.cores else None, known.threads, places, views, work.together,
                      None if work.meets else np.arange(self.students) // (self.students // work.groups))

    def _groups(self, work: Workload) -> list[slice]:
        """The ranks of each group of students."""
        places = self.students // work.groups
        return [slice(first, first + places) for first in range(0, self.students, places)]

    def _direct(self, work: Workload) -> bool:
        """Whether rows go to those student ranks only that need them, as pkd.wire.choose() decides."""
        if work.exchange != "auto":
            return work.exchange == "direct"
        size = 2 * work.batch * sum(teacher.width for teacher in work.teachers.values())  # of a step, at most
        senders = {rank for name, ranks in self._holders().items() for rank in ranks[:1 if name in self.shards else None]}
        return dear(self.students, senders, size) and self.students > 1

    def _holders(self) -> dict[str, list[int]]:
        """Teacher -> the ranks that hold it, ascending, as Router numbers them."""
        out: dict[str, list[int]] = {}
        for rank in sorted(self.hosted):
            for name in self.hosted[rank]:
                out.setdefault(name, []).append(rank)
        return out


def replica_shares(blocks: float, replicas: int) -> np.ndarray:
    """Part of a teacher's work that each replica does, float [replicas]: Router gives them whole blocks."""
    count = max(1, int(np.ceil(blocks)))
    return np.bincount(np.arange(count) * replicas // count, minlength=replicas) / count
