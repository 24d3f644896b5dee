"""From the flat buffer of a step to the soft targets of one micro batch; pure, needs no process group."""

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
        self.classes = np.zeros((len(teachers), max(self.width)), dtype=np.int64)
        for row, teacher in zip(self.classes, teachers):
            row[:len(teacher.classes)] = teacher.classes

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
        members = np.flatnonzero(self.level_of == level)
        column = np.arange(self.width[members].max())
        mask = column < self.width[teacher][:, None]
        index = np.where(mask, routes.offset[rows][:, None] + column, 0)
        share = 1.0 / np.maximum(self.batch or routes.count[teacher], 1) + np.zeros(len(rows))
        logits = flat[torch.from_numpy(index)] if len(rows) else flat.new_zeros(index.shape)
        arrays = self.classes[teacher][:, column], mask, routes.position[rows] - micro.start, share.astype(np.float32)
        classes, known, sample, share = (to_device(torch.from_numpy(array), device) for array in arrays)
        return LevelTargets(to_device(logits, device), classes, known, sample, share, len(members))
