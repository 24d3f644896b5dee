"""How much work a recipe is: seconds, bytes and rows of one optimizer step; pure.

Seconds are of one rank alone on its device (on a CPU: on its core). They come from pkd/calibration.py or pkd/devices.py.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cached_property
from statistics import NormalDist

from pkd.schedule import BLOCK
from pkd.student_groups import deal


@dataclass(frozen=True)
class TeacherWork:
    block: float  # seconds of one forward of one block of rows
    rows: float  # mean rows asked in a step
    blocks: float  # mean blocks a step, the last one padded
    size: int  # bytes of its weights
    width: int  # classes, thus logits of an answer

    @property
    def seconds(self) -> float:
        """Of a step, on one rank."""
        return self.block * self.blocks

    @property
    def wire(self) -> float:
        """Mean bytes of its soft targets in a step, fp16."""
        return 2 * self.rows * self.width


@dataclass(frozen=True)
class StudentWork:
    """One student, or all of an engine together."""

    micro: float  # seconds of a micro batch, whatever its rows
    row: float  # seconds a row
    parameters: int
    states: int  # elementwise optimizer states a parameter
    activations: float  # bytes a row kept for the backward pass

    def seconds(self, rows: int, accumulation: int) -> float:
        """Of a step of `rows` rows on one rank."""
        return accumulation * self.micro + rows * self.row

    @staticmethod
    def together(each: Iterable["StudentWork"]) -> "StudentWork":
        """Of an engine that has all of these."""
        micro, row, parameters, states, activations = zip(*map(astuple, each))
        return StudentWork(sum(micro), sum(row), sum(parameters), max(states), sum(activations))


@dataclass(frozen=True)
class Links:
    """Soft targets, votes and, on a CPU, gradients go over gloo; gradients of GPUs over NCCL."""

    bandwidth: float = 1e9  # bytes per second between two ranks over gloo
    latency: float = 1e-4  # seconds of a small message over gloo
    gradients: float = 1e9  # bytes per second of one rank in an all-reduce
    gradients_latency: float = 1e-4  # seconds of one of its hops


@dataclass(frozen=True)
class Workload:
    teachers: dict[str, TeacherWork]  # only those that the objective asks
    each: tuple[StudentWork, ...]  # a student, in the recipe's order
    batch: int
    groups: int = 1  # of students and their ranks
    crossing: float = 0.0  # bytes a row of what groups tell each other in a step: logits, where there is an ensemble term
    jitter: float = 0.0  # standard deviation of a students' step, as a share of it
    view: float = 0.0  # seconds to read, decode and augment one image
    step: float = 0.0  # seconds of every rank's bookkeeping in a step: routes, votes
    window: int = 2
    together: int = 1  # steps that teachers answer at once
    stage: int = 1  # of ZeRO
    element: int = 4  # bytes of a weight in forward and backward
    teacher_memory: float = 0.0  # bytes of the largest teacher's forward of one block
    image: int = 0  # bytes of one view
    links: Links = Links()
    runtime: float = 0.0  # bytes of a rank before anything else: libraries, and on a CPU the decoded images
    source: str = "estimated"  # where the seconds are from, as a person reads it
    sent: bool = False  # whether student ranks send their views to teachers that need them
    exchange: str = "auto"  # broadcast, direct or auto
    block: int = BLOCK  # rows of a teacher's forward
    copies: int = 1  # of students' weights in fp32: what is validated and, on a CPU's rank that keeps them, the best so far

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of each teacher's forwards in a step."""
        return {name: teacher.seconds for name, teacher in self.teachers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each teacher's weights."""
        return {name: teacher.size for name, teacher in self.teachers.items()}

    @property
    def blocks(self) -> dict[str, float]:
        """Blocks of rows that each teacher is asked in a step."""
        return {name: teacher.blocks for name, teacher in self.teachers.items()}

    @property
    def most(self) -> int:
        """Replicas of a teacher that can be of use: with more, one would not have a whole block of rows."""
        return -(-self.batch // self.block)

    @cached_property
    def dealt(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the students of each group, dealt by their seconds."""
        return deal([one.seconds(self.batch, 1) for one in self.each], self.groups)

    @cached_property
    def engines(self) -> list[StudentWork]:
        """What each group's engine has to do."""
        return [StudentWork.together(self.each[index] for index in group) for group in self.dealt]

    @cached_property
    def students(self) -> StudentWork:
        """What an engine has to do at most: the largest of each figure over the groups."""
        return StudentWork(*map(max, zip(*map(astuple, self.engines))))

    @property
    def meets(self) -> bool:
        """Whether all ranks that train wait for each other in every step."""
        return self.groups == 1 or self.crossing > 0

    def sync(self, ranks: int, accumulation: int) -> float:
        """Seconds that `ranks` student ranks wait for each other: for the gradients' all-reduce within each group, whose
        measured links hold that one rank is slower than another, and for what crosses between groups with every micro batch.
        """
        places, seconds = ranks // self.groups, 0.0
        if self.groups > 1 and self.crossing:
            rows = -(-self.batch // places)
            seconds = accumulation * self.links.latency + self.crossing * rows / self.links.bandwidth
            if places == 1:
                seconds += lateness(self.groups, self.jitter * self.students.seconds(rows, accumulation))
        if places == 1:
            return seconds
        size = self.students.parameters * self.element
        return seconds + ring(self.links.gradients, self.links.gradients_latency, size, places)

    def student_memory(self, ranks: int, accumulation: int, group: int | None = None) -> float:
        """Bytes of a student rank without teachers: weights and states by ZeRO stage, fp32 copies, a micro batch's
        activations, slots. group: the rank's; None: whichever has the most.
        """
        if group is None:
            return max(self.student_memory(ranks, accumulation, group) for group in range(self.groups))
        students, ranks = self.engines[group], ranks // self.groups
        rows = -(-self.batch // ranks // accumulation)
        own = student_bytes(students.parameters, self.element, self.stage, ranks, students.states, accumulation)
        micro = rows * (students.activations + self.image)
        return own + self.copies * 4 * students.parameters + micro + self.slots + self.runtime

    @property
    def host_memory(self) -> float:
        """Bytes of a rank that answers for teachers, besides their weights (and besides what it trains)."""
        return self.teacher_memory + 2 * self.together * self.batch * self.image  # all images, and one teacher's of them

    @cached_property
    def slots(self) -> float:
        """Bytes of the window's buffers, large enough for every teacher's answers."""
        return (self.window + self.together) * sum(2 * self.batch * teacher.width for teacher in self.teachers.values())


def ring(bandwidth: float, latency: float, size: float, ranks: int) -> float:
    """Seconds of an all-reduce of `size` bytes over a ring of ranks (Patarasuk & Yuan 2009)."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def lateness(ranks: int, deviation: float) -> float:
    """How much later than on the mean the last of so many ranks is there, each of which varies by this standard deviation:
    the expected largest of normal variables (Blom 1958).
    """
    return deviation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def student_bytes(parameters: int, element: int, stage: int, ranks: int, states: int, accumulation: int = 1) -> float:
    """Persistent bytes on one student rank: weights, gradients, master weights, optimizer states by ZeRO stage.

    element: bytes of a weight; states: elementwise optimizer states a parameter. After Rajbhandari et al. 2020, figure 1,
    but for two things that tests/bench/memory.py measures: fp32 has no masters of its own in ZeRO 0, and in ZeRO 1
    DeepSpeed too keeps only this rank's part of the gradients once they are reduced, which is after the last micro batch:
    before that, whole ones lie beside the activations of the next. DeepSpeed's buckets come on top.
    """
    weights = element / ranks if stage == 3 else element
    gradients = element / ranks if stage > 1 or (stage == 1 and accumulation == 1) else element
    masters = 4 / ranks if stage else 0 if element == 4 else 4
    return parameters * (weights + gradients + masters + 4 * states / (ranks if stage else 1))
