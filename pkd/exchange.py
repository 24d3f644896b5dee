"""Soft targets between ranks: packed, asynchronous, a window of steps ahead.

Each source (a teacher rank) fills its slice of a step's flat buffer and broadcasts it to all student ranks over a bridge
of its own. Students post the receive for step k + window before they compute step k. One process alone takes the same
way, without a bridge.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from pkd.placement import Placement
from pkd.schedule import Router, Routes, Schedule
from pkd.teacher import TeacherHost
from pkd.world import LostPeer, World


@dataclass
class Slot:
    """One step in flight."""

    flat: torch.Tensor  # fp16, on the host
    step: int = -1
    routes: Routes | None = None
    works: list[tuple[str, dist.Work]] = field(default_factory=list)


class Exchange:
    """labels: int64 [samples of the data set]; hosts: this rank's teachers, of each source that it belongs to."""

    def __init__(self, world: World, placement: Placement, schedule: Schedule, router: Router, labels: np.ndarray,
                 window: int, hosts: list[TeacherHost]):
        self.world, self.schedule, self.router, self.labels, self.hosts = world, schedule, router, labels, hosts
        self.role = placement.role(world.rank)
        students = list(range(placement.student_ranks))
        self.bridges = []  # one a source, in the placement's order on every rank
        for source in placement.sources:
            name = f"soft targets of {source.where}"
            ranks = [source.rank] + [rank for rank in students if rank != source.rank]
            self.bridges.append((name, world.bridge(name, ranks)))
        pin = world.device.type == "cuda"
        size = router.largest(schedule.batch)
        self.ring = [Slot(torch.zeros(size, dtype=torch.float16, pin_memory=pin)) for _ in range(window + 1)]

    def fill(self, epoch: int, step: int) -> None:
        """Run this rank's teachers, if any, for a step: everything of post() that needs no other rank."""
        slot = self.ring[step % len(self.ring)]
        self._finish(slot)  # its buffer is free once its last step has left
        ids = self.schedule.global_batch(epoch, step)
        slot.step, slot.routes = step, self.router.routes(self.labels[ids])
        for host in self.hosts:
            host.answer(slot.routes, ids, epoch, slot.flat)

    def send(self, step: int) -> None:
        """Begin the broadcasts of a filled step: this rank's own, and the receives of all others."""
        slot = self.ring[step % len(self.ring)]
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for (name, bridge), part in zip(self.bridges, slot.routes.slices):
            if bridge and part.stop > part.start:
                slot.works.append((name, bridge.broadcast([slot.flat[part]], options)))

    def take(self, step: int) -> tuple[Routes, torch.Tensor]:
        """The routes and the flat buffer, fp16, of a posted step; valid until the step `window + 1` later is filled."""
        slot = self.ring[step % len(self.ring)]
        self._finish(slot)
        return slot.routes, slot.flat

    def drain(self) -> None:
        """Wait for everything under way; at the end of an epoch, when all of it has its other side."""
        for slot in self.ring:
            self._finish(slot)

    def _finish(self, slot: Slot) -> None:
        for name, work in slot.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise LostPeer(f"{name} broke at step {slot.step} on rank {self.world.rank} ({self.role}): "
                               f"{str(error).splitlines()[0]}") from error
        slot.works.clear()
