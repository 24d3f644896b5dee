"""How soft targets cross between islands: by a broadcast from every source, or only each student rank's own rows."""

import torch
import torch.distributed as dist

from pkd.placement import Placement
from pkd.schedule import Routes
from pkd.wire import partners
from pkd.world import LostPeer, World

Works = list[tuple[str, dist.Work]]  # each with what it moves, in words
HELLO, TARGETS, VIEWS = 0, 1, 2  # tags: HELLO once, then 2 * step + TARGETS or VIEWS


class Broadcast:
    """One bridge a source, in the placement's order on every rank; a collective over the source and all student ranks."""

    def __init__(self, world: World, placement: Placement):
        students = list(range(placement.student_ranks))
        self.bridges = []
        for source in placement.sources:
            name = f"soft targets of {source.where}"
            ranks = [source.rank] + [rank for rank in students if rank != source.rank]
            self.bridges.append((name, world.bridge(name, ranks)))

    def post(self, flat: torch.Tensor, routes: Routes, step: int) -> Works:
        """Begin to move a step's soft targets, out of a source's slice of `flat` and into the others'."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return [(name, bridge.broadcast([flat[part]], options)) for (name, bridge), part in zip(self.bridges, routes.slices)
                if bridge and part.stop > part.start]


class Peers:
    """One group over all ranks, in which only those are connected that have rows for each other."""

    def __init__(self, world: World, placement: Placement):
        self.group = world.bridge("rows", list(range(world.size)), lazy=True)
        hello = torch.zeros(1, dtype=torch.uint8)
        # A first message waits for its other side. All pairs in one order, so that no ranks wait for each other in a ring.
        for peer in partners(placement, world.rank):
            post = self.group.send if world.rank < peer else self.group.recv
            try:
                post([hello], peer, HELLO).wait()
            except RuntimeError as error:
                raise LostPeer(f"rank {world.rank} could not be connected with rank {peer}: "
                               f"{str(error).splitlines()[0]}") from error

    def send(self, rows: torch.Tensor, peer: int, tag: int) -> dist.Work:
        return self.group.send([rows], peer, tag)

    def receive(self, rows: torch.Tensor, peer: int, tag: int) -> dist.Work:
        return self.group.recv([rows], peer, tag)


class Direct:
    """A message from every source to every student rank that it has rows for. Routes must have the parts of a
    group's ranks."""

    def __init__(self, peers: Peers, placement: Placement, rank: int):
        self.peers, self.rank, self.students = peers, rank, placement.student_ranks
        self.parts = placement.student_ranks // placement.groups
        self.sources = [source.rank for source in placement.sources]

    def post(self, flat: torch.Tensor, routes: Routes, step: int) -> Works:
        """Begin to move a step's soft targets, out of a source's slice of `flat` and into the others'."""
        works = []
        for index, source in enumerate(self.sources):
            name = f"soft targets of rank {source}"
            for student in range(self.students) if source == self.rank else [self.rank] * (self.rank < self.students):
                part = routes.part(index, student % self.parts)
                if student == source or part.start == part.stop:
                    continue
                if source == self.rank:
                    works.append((f"{name} for rank {student}",
                                  self.peers.send(flat[part], student, 2 * step + TARGETS)))
                else:
                    works.append((name, self.peers.receive(flat[part], source, 2 * step + TARGETS)))
        return works
