"""From the flat buffer of a step to the soft targets of one micro batch; pure, needs no process group."""

from itertools import pairwise

import numpy as np
import torch

from pkd.loss import LevelTargets
from pkd.pyramid import Pyramid
from pkd.schedule import Routes
from pkd.transfer import to_device


class Unpacker:
    """Tables of a pyramid that turn routes into padded, masked rows by level.

    batch: of the whole step, by which each row counts 1 / batch; None: 1 / (its teacher's routes in the step).
    """

    def __init__(self, pyramid: Pyramid, asked: list[int], batch: int | None = None):
        self.batch = batch
        teachers = pyramid.teachers
        self.levels = sorted({teachers[index].level for index in asked})
        self.level_of = np.array([teacher.level for teacher in teachers])
        self.width = np.array([len(teacher.classes) for teacher in teachers])
        self.place = np.zeros(len(teachers), dtype=np.int64)  # of a teacher in its level's tables
        self.tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        for level in self.levels:
            members = np.flatnonzero(self.level_of == level)
            self.place[members] = np.arange(len(members))
            classes = np.zeros((len(members), self.width[members].max()), dtype=np.int64)
            for row, member in zip(classes, members):
                row[:self.width[member]] = teachers[member].classes
            mask = np.arange(classes.shape[1]) < self.width[members][:, None]
            self.tables[level, torch.device("cpu")] = torch.from_numpy(classes), torch.from_numpy(mask)

    def unpack(self, routes: Routes, flat: torch.Tensor, micro: slice, device: torch.device) -> list[LevelTargets]:
        """The asked levels' targets from the top down.

        flat: fp16 [routes.size] on the host; micro: the micro batch's positions in the global batch.
        """
        here = (routes.position >= micro.start) & (routes.position < micro.stop)
        return [self._level(level, routes, flat, micro, here, device) for level in self.levels]

    def _level(self, level: int, routes: Routes, flat: torch.Tensor, micro: slice, here: np.ndarray,
               device: torch.device) -> LevelTargets:
        rows = np.flatnonzero(here & (self.level_of[routes.teacher] == level))
        rows = rows[np.lexsort((routes.position[rows], routes.teacher[rows]))]
        teacher = routes.teacher[rows]
        share = 1.0 / np.maximum(self.batch or routes.count[teacher], 1) + np.zeros(len(rows))
        arrays = self.place[teacher], routes.position[rows] - micro.start, share.astype(np.float32)
        place, sample, share = (to_device(torch.from_numpy(array), device) for array in arrays)
        classes, mask = self._table(level, device)
        logits = padded_rows(flat, routes.offset[rows], self.width[teacher], classes.shape[1])
        return LevelTargets(to_device(logits, device), classes[place], mask[place], sample, share, len(classes))

    def _table(self, level: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A level's classes and mask, [teachers, width], which cross to a device once."""
        if (level, device) not in self.tables:
            own = self.tables[level, torch.device("cpu")]
            self.tables[level, device] = tuple(tensor.to(device) for tensor in own)
        return self.tables[level, device]


def padded_rows(flat: torch.Tensor, offset: np.ndarray, width: np.ndarray, widest: int) -> torch.Tensor:
    """[rows, widest]: of each row `width` numbers of `flat` from `offset` on, then zeros.

    Rows of one width that lie behind each other, as those of a teacher do, are copied in one piece.
    """
    out = flat.new_zeros((len(offset), widest))
    if len(offset) == 0:
        return out
    apart = np.flatnonzero((np.diff(offset) != width[:-1]) | (np.diff(width) != 0)) + 1
    for first, last in pairwise([0, *apart.tolist(), len(offset)]):
        start, wide = int(offset[first]), int(width[first])
        out[first:last, :wide] = flat[start:start + (last - first) * wide].view(-1, wide)
    return out
