"""Soft targets between ranks: packed, asynchronous, a window of steps ahead.

Each source (a teacher rank) fills its slice of a step's flat buffer, which a carrier takes to the student ranks. Students
post the receive for step k + window before they compute step k. One process alone takes the same way, without a carrier.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from pkd.carrier import Broadcast, Direct, Peers, Works
from pkd.placement import Placement
from pkd.schedule import Router, Routes, Schedule
from pkd.sent_views import SentViews
from pkd.teacher import Question, TeacherHost
from pkd.views import Views
from pkd.world import LostPeer, World


@dataclass
class Slot:
    """One step in flight."""

    flat: torch.Tensor  # fp16, on the host
    at: tuple[int, int] = (-1, -1)  # epoch and step
    filled: tuple[int, int] = (-1, -1)  # the same, once this rank's teachers have answered
    routes: Routes | None = None
    ids: np.ndarray | None = None
    works: Works = field(default_factory=list)
    arriving: Works = field(default_factory=list)  # views


class Exchange:
    """labels: int64 [samples of the data set]; hosts: this rank's teachers, of each source that it belongs to.

    kind: broadcast or direct. router: for `direct` with a part for each rank of a group of students. views: of this rank,
    where student ranks send theirs. at_once: steps that teachers answer together.
    """

    def __init__(self, world: World, placement: Placement, schedule: Schedule, router: Router, labels: np.ndarray,
                 window: int, hosts: list[TeacherHost], kind: str = "broadcast", views: Views | None = None,
                 at_once: int = 1):
        self.world, self.schedule, self.router, self.labels, self.hosts = world, schedule, router, labels, hosts
        self.role, self.asks = placement.role(world.rank), bool(placement.sources)
        several = world.size > 1
        peers = Peers(world, placement) if several and (kind == "direct" or views) else None
        self.carrier = None
        if several:
            self.carrier = Direct(peers, placement, world.rank) if kind == "direct" else Broadcast(world, placement)
        pin = world.device.type == "cuda"
        size = router.largest(schedule.batch)
        self.at_once = 1 if views else at_once  # views come step by step
        self.ring = [Slot(torch.zeros(size, dtype=torch.float16, pin_memory=pin)) for _ in range(window + self.at_once)]
        self.sent = SentViews(peers, placement, views, world.rank, schedule.batch, len(self.ring)) if views else None

    @property
    def ahead(self) -> tuple[int, int]:
        """How many steps ahead of the students teachers may be, and how many they answer together; for steady()."""
        return (len(self.ring) if self.asks else 0), (self.at_once if self.asks else 1)

    def begin(self, epoch: int, step: int) -> None:
        """The routes of a step; where views are sent, send this rank's and begin to receive the others'.

        fill() begins a step that is not begun. Where views are sent, only a step that all ranks run may be begun.
        """
        slot = self._slot(step)
        if slot.at == (epoch, step):
            return
        self._finish(slot)  # its buffers are free once its last step has left
        slot.at, slot.ids = (epoch, step), self.schedule.global_batch(epoch, step)
        slot.routes = self.router.routes(self.labels[slot.ids])
        if self.sent:
            sends, slot.arriving = self.sent.post(step % len(self.ring), slot.routes, slot.ids, epoch, step)
            slot.works.extend(sends)

    def await_views(self, step: int) -> None:
        """Wait for the views of a begun step that other ranks send; there are none where views are rebuilt."""
        self._wait(self._slot(step).arriving, step)

    def fill(self, epoch: int, step: int, last: int) -> None:
        """Run this rank's teachers, if any, for a step: what they say goes into its flat buffer, for transfer().

        They answer for `at_once` steps before `last` together: each teacher pads one block of rows for all of them.
        """
        if self._slot(step).filled == (epoch, step):
            return
        steps = range(step, min(step + self.at_once, last))
        questions = []
        for each in steps:
            self.begin(epoch, each)
            self.await_views(each)
            slot = self._slot(each)
            slot.filled = slot.at
            images = self.sent.asked[each % len(self.ring)] if self.sent else None
            questions.append(Question(slot.routes, slot.ids, slot.flat, images))
        for host in self.hosts:
            host.answer(questions, epoch)

    def transfer(self, step: int) -> None:
        """Begin to move the soft targets of a filled step: what this rank's teachers said goes out, what it needs comes in.
        """
        slot = self._slot(step)
        if self.carrier:
            slot.works.extend(self.carrier.post(slot.flat, slot.routes, step))

    def take(self, step: int) -> tuple[Routes, torch.Tensor]:
        """The routes and the flat buffer, fp16, of a posted step; valid until the slot is begun anew."""
        slot = self._slot(step)
        self._finish(slot)
        return slot.routes, slot.flat

    def views_of(self, step: int, micro: slice) -> torch.Tensor | None:
        """This student rank's views of a micro batch of a taken step, if views are sent; valid as long as take()'s."""
        return self.sent.batch(step % len(self.ring), micro) if self.sent else None

    def drain(self) -> None:
        """Wait for everything under way; at the end of an epoch, when all of it has its other side."""
        for slot in self.ring:
            self._finish(slot)

    def _slot(self, step: int) -> Slot:
        return self.ring[step % len(self.ring)]

    def _finish(self, slot: Slot) -> None:
        self._wait(slot.arriving, slot.at[1])
        self._wait(slot.works, slot.at[1])

    def _wait(self, works: Works, step: int) -> None:
        for name, work in works:
            try:
                work.wait()
            except RuntimeError as error:
                raise LostPeer(f"{name} broke at step {step} on rank {self.world.rank} ({self.role}): "
                               f"{str(error).splitlines()[0]}") from error
        works.clear()
