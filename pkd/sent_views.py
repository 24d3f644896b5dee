"""Views that student ranks make and send to the teacher ranks that need them, where decoding everywhere would be dear.

Each source needs the views of the samples that it is asked about; a student rank has those of its own samples. All is
known from the routes, and lies in buffers that are made once.
"""

import numpy as np
import torch

from pkd.carrier import VIEWS, Peers, Works
from pkd.placement import Placement
from pkd.schedule import Routes, split
from pkd.views import Views


class SentViews:
    """ring: how many steps are under way at most; batch: samples of a step."""

    def __init__(self, peers: Peers | None, placement: Placement, views: Views, rank: int, batch: int, ring: int):
        self.peers, self.views, self.rank = peers, views, rank
        self.sources = [source.rank for source in placement.sources]
        self.parts = split(batch, placement.student_ranks // placement.groups)
        self.starts = np.array([part.start for part in self.parts] + [batch])
        self.trains = rank < placement.student_ranks
        self.sends = rank < len(self.parts)  # the first group's ranks do, whose views are those of every group
        self.mine = self.parts[rank % len(self.parts)] if self.trains else slice(0, 0)
        pixels = (views.channels, *views.size)
        self.own = [torch.zeros(self.mine.stop - self.mine.start, *pixels, dtype=torch.uint8) for _ in range(ring)]
        asked = batch if rank in self.sources else 0
        self.asked = [torch.zeros(asked, *pixels, dtype=torch.uint8) for _ in range(ring)]
        self.packed: list[dict[int, torch.Tensor]] = [{} for _ in range(ring)]  # of sources that need only some of `own`

    def post(self, slot: int, routes: Routes, ids: np.ndarray, epoch: int, step: int) -> tuple[Works, Works]:
        """Make this rank's views of a step; begin to send and to receive. The sends and the receives."""
        sends, receives = [], []
        if self.trains:
            self.own[slot].copy_(self.views.batch(torch.from_numpy(ids[self.mine]), epoch))
        for index, source in enumerate(self.sources):
            if source != self.rank and not self.sends:
                continue
            needed = np.unique(routes.position[routes.source == index])
            bounds = np.searchsorted(needed, self.starts)
            if source != self.rank:
                rows = needed[bounds[self.rank]:bounds[self.rank + 1]] - self.mine.start
                if len(rows):
                    sends.append((f"views of rank {self.rank} for rank {source}",
                                  self.peers.send(self._rows(slot, source, rows), source, 2 * step + VIEWS)))
                continue
            for student in range(len(self.parts)):
                first, last = bounds[student], bounds[student + 1]
                if first == last:
                    continue
                target = self.asked[slot][first:last]
                if student == self.rank:
                    torch.index_select(self.own[slot], 0, torch.from_numpy(needed[first:last] - self.mine.start), out=target)
                else:
                    receives.append((f"views of rank {student}", self.peers.receive(target, student, 2 * step + VIEWS)))
        return sends, receives

    def batch(self, slot: int, micro: slice) -> torch.Tensor:
        """uint8 [n, channels, height, width]: this student rank's views of a micro batch, by positions in the batch."""
        return self.own[slot][micro.start - self.mine.start:micro.stop - self.mine.start]

    def _rows(self, slot: int, source: int, rows: np.ndarray) -> torch.Tensor:
        own = self.own[slot]
        if len(rows) == len(own):
            return own
        if source not in self.packed[slot]:
            self.packed[slot][source] = torch.zeros_like(own)
        return torch.index_select(own, 0, torch.from_numpy(rows), out=self.packed[slot][source][:len(rows)])
