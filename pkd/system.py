"""What is simulated, and what comes of it: the work of every rank in a step, their links and their cores; pure."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class System:
    """What every rank does in a step. Arrays are float [ranks] unless said; the students are the first ranks."""

    students: int
    answer: np.ndarray  # seconds at work for its own teachers, alone on a core
    train: np.ndarray  # seconds at work for its micro batches; 0 on teacher ranks
    sent: np.ndarray  # bytes of soft targets that it sends: to every student rank, or to each those of its own samples
    window: int
    sync: float = 0.0  # seconds of the gradients' all-reduce, after the slowest student
    bandwidth: float = np.inf  # bytes per second of one rank's link
    latency: float = 0.0  # seconds of one message
    node: np.ndarray | None = None  # int [ranks], numbered from 0; None: one node
    cores: np.ndarray | None = None  # cores for compute of each node [nodes]; None: enough
    threads: int = 1  # of a rank at work
    places: int = 0  # of `direct`: ranks of a group of students, which share the soft targets out; 0: each gets all
    views: np.ndarray | None = None  # bytes of views that are sent to it
    together: int = 1  # steps for which a rank answers at once: all their work in the first, none in the others
    meeting: np.ndarray | None = None  # int [students]: those of a number wait for each other in every step; None: all do

    @property
    def nodes(self) -> np.ndarray:
        return np.zeros(len(self.answer), dtype=np.int64) if self.node is None else np.asarray(self.node)

    def inbound(self) -> float:
        """Seconds that one step's soft targets keep a student's link busy."""
        return float(self.sent.sum()) / max(1, self.places) / self.bandwidth if self._travels() else 0.0

    def outbound(self) -> np.ndarray:
        """Seconds that a source's link is busy a step: the root of gloo's binomial tree sends about log2(ranks) times;
        `direct` sends every group of students one copy.
        """
        if self.places:
            return self.sent / self.bandwidth * (self.students // self.places)
        own = np.arange(len(self.sent)) < self.students
        others = self.students - own
        return self.sent / self.bandwidth * np.ceil(np.log2(others + 1))

    def bounds(self) -> dict[str, float]:
        """What a step takes at least, in seconds, by what takes it."""
        alone = self.answer + self.train
        out = {"the student ranks' work": float(alone[:self.students].max()) + self.sync,
               "the teacher ranks' work": float(alone[self.students:].max(initial=0.0)),
               "a student's link": self.inbound(), "a teacher's link": float(self.outbound().max())}
        if self.views is not None:
            out["the link of a rank that is sent views"] = float((self.outbound() + self.views / self.bandwidth).max())
        if self.cores is not None:
            work = np.bincount(self.nodes, alone * self.threads, minlength=len(self.cores))
            out["the cores of a node"] = float((work / self.cores).max())
        return out

    def bound(self) -> float:
        """A step takes no less than this."""
        return max(self.bounds().values())

    def _travels(self) -> bool:
        return len(self.answer) > 1 and bool(self.sent.any())


@dataclass(frozen=True)
class Prediction:
    step: float  # seconds
    busy: np.ndarray  # share of the time that each rank is at work, float [ranks]
    students: int

    def idle(self, role: str) -> float:
        """Mean idle share of a role, "student" or "teacher"; 0 where there is none."""
        part = self.busy[:self.students] if role == "student" else self.busy[self.students:]
        return float(1 - part.mean()) if len(part) else 0.0
