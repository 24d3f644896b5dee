"""Running sums of an epoch, and the lines that they become in metrics.jsonl."""

import itertools
import json
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pkd.files import read_lines, write_bytes
from pkd.joined import Joined


class Sums:
    """Loss terms of an epoch so far of this rank's students, float64 [terms, students]; summed over ranks when asked."""

    def __init__(self, joined: Joined, device: torch.device):
        self.joined = joined
        self.names: list[str] = []
        self.values = torch.zeros(0, len(joined.own), dtype=torch.float64, device=device)
        self.steps, self.seconds, self.wait = 0, 0.0, 0.0
        self.steady_steps, self.steady_seconds = 0, 0.0  # see steady()

    def took(self, seconds: float, steady: bool) -> None:
        """Time of one optimizer step, from the end of the one before."""
        self.seconds += seconds
        self.steady_steps += steady
        self.steady_seconds += seconds * steady

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """One micro batch's terms, each [students]."""
        if not self.names:
            self.names = list(terms)
            if len(self.values) == 0:
                self.values = self.values.new_zeros(len(self.names), self.values.shape[1])
        self.values += torch.stack(list(terms.values())).double()

    def means(self) -> dict[str, list[float]]:
        """Each term's mean over the epoch's steps, one number a student; a collective over all student ranks."""
        total = self.gather().sum(0) / max(1, self.steps)
        return dict(zip(self.names, total.tolist()))

    def gather(self) -> torch.Tensor:
        """Float64 [ranks of the island, terms, all students] on the CPU; a collective over all student ranks."""
        parts = [torch.empty_like(self.values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.values)
        return self.joined.everyone(torch.stack(parts).cpu(), 2)

    def restore(self, names: list[str], every: torch.Tensor, ranks: int, rank: int) -> None:
        """The inverse of gather(); on another number of ranks the first one takes all."""
        self.names = names
        own = every[rank] if len(every) == ranks else every.sum(0) * (rank == 0)
        self.values = own[:, self.joined.own].to(self.values.device)


def steady(first: int, last: int, ahead: int, at_once: int) -> range:
    """The steps of a stretch [first, last) whose time counts as that of the steady state.

    Not the first quarter, which warms up, nor the last `ahead` steps, during which teachers may have nothing left to answer;
    and, because teachers answer `at_once` steps together, a whole number of such rounds. Empty where the stretch is too
    short for one: a figure that leaves out a part of the teachers' work would flatter.
    """
    quarter = (last - first) // 4
    start = first + -(-quarter // at_once) * at_once
    rounds = max(0, (last - ahead - start) // at_once)
    return range(start, start + rounds * at_once)


def enough(steps: int, ahead: int, at_once: int) -> int:
    """The fewest steps, but no fewer than `steps`, of which steady() counts any."""
    return next(more for more in itertools.count(steps) if steady(0, more, ahead, at_once))


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a JSON-lines file up to optimizer step `step`: what came later is computed again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if path.exists():
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def busy_shares(rank: int, world: int, busy: float, seconds: float) -> list[float]:
    """busy / seconds, of this rank's epoch, at its place among zeros for all others: the maximum over ranks holds all."""
    share = min(1.0, max(0.0, busy / max(seconds, 1e-9)))
    return [share if other == rank else 0.0 for other in range(world)]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
