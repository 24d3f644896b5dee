"""Step -> global batch -> each rank's samples -> routes; pure, so that every rank knows every other rank's work.

A *route* is one (sample, teacher) pair of a step. The routes of a step are ordered by source (the teacher rank that
answers them), then the part of the batch (that of the student ranks which get it, where each gets only its own), then
teacher, then position of the sample in the global batch; the soft targets of a step lie in one flat buffer in that order.
So each source fills one contiguous slice of it, and what a source has for a student rank is contiguous, too.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pkd.pyramid import Pyramid

BLOCK = 32  # rows of every teacher forward, unless the recipe says otherwise; replicas share routes in whole blocks
SAMPLES_PER_RANK = 8  # of a micro batch at least: fewer make batch statistics and kernels poor


def split(total: int, parts: int) -> list[slice]:
    """`total` items over `parts` in order, the first ones one longer: 64 over 3 gives 22, 21, 21."""
    bounds = np.cumsum([0] + [total // parts + (i < total % parts) for i in range(parts)])
    return [slice(int(a), int(b)) for a, b in pairwise(bounds)]


def student_parts(batch: int, ranks: int, groups: int) -> list[slice]:
    """Positions in the global batch of each student rank: every group of them has the whole batch."""
    return split(batch, ranks // groups) * groups


class Schedule:
    """Which samples belong to which optimizer step; an epoch's last partial batch is dropped.

    samples: int64 ids of the training samples; batch: samples per optimizer step over all ranks.
    """

    def __init__(self, samples: np.ndarray, batch: int, seed: int):
        self.samples, self.batch, self.seed = np.asarray(samples), batch, seed
        self._epoch, self._order = -1, self.samples

    @property
    def steps_per_epoch(self) -> int:
        return len(self.samples) // self.batch

    def order(self, epoch: int) -> np.ndarray:
        """int64 [samples]: the ids in the order of this epoch."""
        if epoch != self._epoch:  # a shuffle of a million ids takes longer than a step's other bookkeeping
            self._order = np.random.default_rng([self.seed, epoch, 0x5C]).permutation(self.samples)
            self._epoch = epoch
        return self._order

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [batch]: the ids of one optimizer step, in global order."""
        return self.order(epoch)[step * self.batch:(step + 1) * self.batch]

    def micro_batches(self, ranks: int, rank: int, accumulation: int) -> list[slice]:
        """Positions in the global batch of each micro batch of student rank `rank`, the same for every step."""
        mine = split(self.batch, ranks)[rank]
        return [slice(mine.start + s.start, mine.start + s.stop)
                for s in split(mine.stop - mine.start, accumulation)]


@dataclass(frozen=True)
class Routes:
    """The routes of one step. Arrays are int64 [routes] unless said."""

    source: np.ndarray  # index into the placement's sources
    teacher: np.ndarray  # index into pyramid.teachers
    position: np.ndarray  # in the global batch
    offset: np.ndarray  # of the route's first logit in the step's flat buffer
    size: int  # logits in the flat buffer
    bounds: np.ndarray  # [sources, parts + 1]: where each part of the batch begins in each source's slice, and its end
    count: np.ndarray  # int64 [teachers]: routes of each teacher over the whole global batch, |R_t|

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of each source in the flat buffer."""
        return tuple(slice(int(bound[0]), int(bound[-1])) for bound in self.bounds)

    def part(self, source: int, part: int) -> slice:
        """Of the flat buffer: what a source has for one part of the batch."""
        return slice(int(self.bounds[source, part]), int(self.bounds[source, part + 1]))


class Router:
    """Routes of a step from the labels of its global batch.

    sources: for every teacher rank, the teachers that it answers for; a teacher on several ranks is shared by them.
    own: ask a specialist only about samples whose label it knows; else every teacher about every sample.
    parts: of the batch, as split() makes them, that lie apart in the flat buffer. block: rows of a teacher's forward.
    """

    def __init__(self, pyramid: Pyramid, sources: list[list[int]], own: bool, parts: int = 1, block: int = BLOCK):
        self.member = pyramid.asked_about(own)
        self.width = np.array([len(teacher.classes) for teacher in pyramid.teachers])
        pairs = [(source, teacher) for source, teachers in enumerate(sources) for teacher in teachers]
        self.replicas = np.bincount([t for _, t in pairs], minlength=len(self.width))
        self.asked = self.replicas > 0
        self.host = np.zeros((len(self.width), max(1, self.replicas.max(initial=0))), dtype=np.int64)
        seen = np.zeros(len(self.width), dtype=np.int64)
        for source, teacher in pairs:  # host[t, r]: the source that holds teacher t's r-th replica
            self.host[teacher, seen[teacher]] = source
            seen[teacher] += 1
        self.sources, self.parts, self.block = len(sources), parts, block

    def largest(self, batch: int) -> int:
        """Logits in the flat buffer if every teacher is asked about every sample."""
        return int(self.width[self.asked].sum()) * batch

    def routes(self, labels: np.ndarray) -> Routes:
        """The routes of a step whose global batch has these labels, int64 [batch]; the number of classes for none."""
        mask = self.member[:, labels] & self.asked[:, None]
        teacher, position = np.nonzero(mask)  # ordered by teacher, then position
        count = mask.sum(1)
        rank_in_teacher = np.arange(len(teacher)) - np.repeat(np.cumsum(count) - count, count)
        blocks = -(-count // self.block)
        replica = (rank_in_teacher // self.block) * self.replicas[teacher] // np.maximum(blocks[teacher], 1)
        source = self.host[teacher, replica]
        ends = np.array([piece.stop for piece in split(len(labels), self.parts)])
        piece = source * self.parts + np.searchsorted(ends, position, side="right")
        order = np.argsort(piece, kind="stable")
        source, teacher, position, piece = source[order], teacher[order], position[order], piece[order]
        width = self.width[teacher]
        end = np.cumsum(width)
        sizes = np.bincount(piece, weights=width, minlength=self.sources * self.parts).astype(np.int64)
        stop = np.cumsum(sizes).reshape(self.sources, self.parts)
        bounds = np.concatenate([stop[:, :1] - sizes.reshape(stop.shape)[:, :1], stop], 1)
        return Routes(source, teacher, position, end - width, int(end[-1]) if len(end) else 0, bounds, count)
