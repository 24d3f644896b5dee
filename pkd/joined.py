"""What groups of students know, each of its own, joined to what all of them know.

Every rank of a group is bridged with those that have the same samples in the other groups. What crosses is small: logits,
in validation and where the objective has an ensemble term, and sums of losses.
"""

from typing import Any

import torch
import torch.distributed as dist

from pkd.student_groups import Grouping
from pkd.world import LostPeer, World


class Joined:
    """Of a student rank. Every method is a collective over ranks of all groups; with one group none talks to anybody."""

    name = "the other groups of students"

    def __init__(self, world: World, grouping: Grouping):
        self.world, self.grouping, self.gathered = world, grouping, 0
        self.group, place = divmod(world.rank, grouping.places)
        self.own = grouping.members(self.group)
        self.bridge = world.bridge(f"students at place {place}", grouping.column(place))

    def everyone(self, mine: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """All students along `dim`, in the recipe's order, where `mine` has this group's; without gradient."""
        if self.bridge is None:
            return mine.detach()
        mine = mine.detach().movedim(dim, 0)
        whole = mine.new_empty((self.grouping.students, *mine.shape[1:]), device="cpu")
        pieces, works = [], []
        for group in range(self.grouping.groups) if whole.numel() else ():
            piece = whole[self.grouping.members(group)]  # a copy
            if group == self.group:
                piece.copy_(mine)
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = group, 0
            pieces.append(piece)
            works.append(self.bridge.broadcast([piece], options))
        for group, (work, piece) in enumerate(zip(works, pieces)):
            try:
                work.wait()
            except RuntimeError as error:
                raise LostPeer(f"what crosses between groups of students broke on rank {self.world.rank}: "
                               f"{str(error).splitlines()[0]}") from error
            whole[self.grouping.members(group)] = piece
        return whole.to(mine.device).movedim(0, dim)

    def gather(self, mine: Any) -> list[Any] | None:
        """JSON-able `mine` of every group's first rank, on rank 0; None on the others. Only first ranks call this."""
        self.gathered += 1
        return self.world.gather(f"students {self.gathered}", mine, self.grouping.column(0))
