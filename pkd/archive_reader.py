"""Soft targets of each step from an archive, in the place of an exchange with teachers."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pkd.archive_layout import Layout
from pkd.errors import LocalError
from pkd.files import raise_passing
from pkd.schedule import Router, Routes, Schedule


@dataclass
class Slot:
    """One step that is being read, or was."""

    flat: torch.Tensor  # fp16, on the host
    routes: Routes | None = None
    reading: Future | None = None


class ArchiveReader:
    """In an Exchange's place. Shards are mapped into memory, and a thread reads a window of steps ahead.

    mine: positions in the global batch whose soft targets this rank needs; the rest of the flat buffer is left as it is.
    labels: int64 [samples of the data set].
    """

    def __init__(self, folder: Path, layout: Layout, schedule: Schedule, router: Router, labels: np.ndarray, mine: slice,
                 window: int, pin: bool):
        self.folder, self.layout, self.schedule, self.router = folder, layout, schedule, router
        self.labels, self.mine = labels, mine
        size = router.largest(schedule.batch)
        self.ring = [Slot(torch.zeros(size, dtype=torch.float16, pin_memory=pin)) for _ in range(window + 1)]
        self.thread = ThreadPoolExecutor(1, "archive")
        self.view = -1
        self.shards: dict[int, dict[str, np.ndarray]] = {}  # of one view: shard -> teacher -> rows

    @property
    def ahead(self) -> tuple[int, int]:
        """For steady(): no teacher answers ahead."""
        return 0, 1

    def fill(self, epoch: int, step: int, last: int) -> None:
        """Begin to read a step's soft targets."""
        slot = self.ring[step % len(self.ring)]
        self._finish(slot)
        ids = self.schedule.global_batch(epoch, step)
        slot.routes = self.router.routes(self.labels[ids])
        slot.reading = self.thread.submit(self._read, slot, ids, epoch % self.layout.views)

    def transfer(self, step: int) -> None:
        """No other rank waits for this one."""

    def take(self, step: int) -> tuple[Routes, torch.Tensor]:
        """The routes and the flat buffer, fp16, of a filled step; valid until the step `window + 1` later is filled."""
        slot = self.ring[step % len(self.ring)]
        self._finish(slot)
        return slot.routes, slot.flat

    def drain(self) -> None:
        """Wait for everything under way."""
        for slot in self.ring:
            self._finish(slot)

    def _finish(self, slot: Slot) -> None:
        if slot.reading:
            slot.reading.result()
            slot.reading = None

    def _read(self, slot: Slot, ids: np.ndarray, view: int) -> None:
        """Fill in this rank's rows: one index for each teacher and shard that is touched."""
        routes, layout = slot.routes, self.layout
        here = (routes.position >= self.mine.start) & (routes.position < self.mine.stop)
        for teacher, form in layout.formats.items():
            own = np.flatnonzero(here & (routes.teacher == teacher))
            if len(own) == 0:
                continue
            shard, row = layout.locate(teacher, ids[routes.position[own]])
            order = np.argsort(shard, kind="stable")
            own, shard, row = own[order], shard[order], row[order]
            bounds = np.flatnonzero(np.diff(shard, prepend=-1, append=-1))
            parts = [self._open(view, int(shard[a]))[layout.names[teacher]][row[a:b]] for a, b in pairwise(bounds)]
            rows = form.decode(torch.from_numpy(np.concatenate(parts)))
            # With a single source, a teacher's routes lie in one piece.
            offset = routes.offset[own]
            start = int(routes.offset[np.searchsorted(routes.teacher, teacher)])
            part = slot.flat[start:start + int(routes.count[teacher]) * form.width].view(-1, form.width)
            part[torch.from_numpy((offset - start) // form.width)] = rows

    def _open(self, view: int, shard: int) -> dict[str, np.ndarray]:
        if view != self.view:
            self.view, self.shards = view, {}
        if shard not in self.shards:
            path = self.folder / self.layout.file(view * self.layout.shards + shard)[0]
            try:
                with safe_open(path, framework="pt") as file:
                    self.shards[shard] = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise_passing(path, error)
                raise LocalError(f"shard {path} was whole at the start and can no longer be read ({error}): see to the "
                                 "disk, run pkd archive again and start the same command again") from None
        return self.shards[shard]
