"""Accuracy and loss of networks on a split, shared out over the ranks of the island."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pkd.joined import Joined
from pkd.schedule import split
from pkd.views import Views

ROWS = 128


@dataclass(frozen=True)
class Scores:
    """Fractions and mean cross-entropies over the split."""

    accuracy: list[float]  # one a network
    loss: list[float]
    ensemble_accuracy: float  # of the mean of logits
    ensemble_loss: float


def validate(networks: list[torch.nn.Module], views: Views, ids: np.ndarray, labels: torch.Tensor,
             device: torch.device, beat: Callable[[str | None], None],
             seen: Callable[[torch.Tensor, torch.Tensor], None] = lambda logits, labels: None,
             joined: Joined | None = None) -> Scores:
    """Networks on their plain views; labels: int64, the class index of each of `ids` as the networks number classes.

    In float64 and rank order, so that every rank has the same figures to the last bit. A collective if ranks > 1.
    beat: told of progress, and for what this rank waits then. seen: told the logits of this rank's images batch by batch,
    fp32 [networks and their mean, rows, classes], and their labels. joined: where `networks` are those of a group of
    students, to score the students of all groups.
    """
    together = dist.is_initialized()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
    mine = split(len(ids), ranks)[rank]
    sums = torch.zeros(2, (joined.grouping.students if joined else len(networks)) + 1, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(mine.start, mine.stop, ROWS):
            beat(None)
            rows = slice(start, min(start + ROWS, mine.stop))
            images = views.plain(torch.from_numpy(ids[rows])).to(device)
            truth = labels[rows].to(device)
            logits = []
            for network in networks:
                logits.append(network(images).float())
                beat(None)
            logits = torch.stack(logits)
            if joined:
                beat(joined.name)
                logits = joined.everyone(logits)
            logits = torch.cat([logits, logits.mean(0, keepdim=True)])
            seen(logits, truth)
            for index, own in enumerate(logits):
                sums[0, index] += (own.argmax(1) == truth).sum().item()
                sums[1, index] += F.cross_entropy(own, truth, reduction="sum").double().item()
    if together:
        beat("the other ranks' scores")
        sums = sums.to(device)
        parts = [torch.empty_like(sums) for _ in range(ranks)]
        dist.all_gather(parts, sums)
        sums = torch.stack(parts).sum(0).cpu()
    if joined:  # a student's as its own group found them: what all groups choose by is the same to the last bit
        sums[:, :-1] = joined.everyone(sums[:, joined.own], 1)
    accuracy, loss = (sums / max(1, len(ids))).tolist()
    return Scores(accuracy[:-1], loss[:-1], accuracy[-1], loss[-1])
