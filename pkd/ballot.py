"""Agreement of all ranks on what happens next, without a stop in the steady state.

Every few steps each rank casts a vote, all-reduced asynchronously on a small gloo group. The vote cast at step k decides
what happens right after step k + window + 1; until then every rank goes on, so all learn of it before they act. It is
the flow control too: nobody posts an exchange for a step whose ballot is not complete, so nothing is pending when a run
stops or an epoch ends.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

# Non-finite losses are voted as LATEST - (step * STUDENTS + student), so that the maximum names the earliest.
LATEST, STUDENTS = 2**62, 2**16


@dataclass(frozen=True)
class Vote:
    stop: bool = False
    save: bool = False
    broken: tuple[int, int] | None = None  # (step, student) whose loss was not finite

    def encode(self) -> torch.Tensor:
        broken = LATEST - (self.broken[0] * STUDENTS + self.broken[1]) if self.broken else 0
        return torch.tensor([self.stop, self.save, broken], dtype=torch.int64)

    @staticmethod
    def decode(vector: torch.Tensor) -> "Vote":
        stop, save, broken = vector.tolist()
        return Vote(bool(stop), bool(save), divmod(LATEST - broken, STUDENTS) if broken else None)


class Ballot:
    """group: a raw gloo group over all ranks, or None in a single process."""

    def __init__(self, group: dist.ProcessGroupGloo | None, window: int, every: int):
        self.group, self.delay, self.every = group, window + 1, every
        self.began = False

    def open(self, first: int, last: int) -> None:
        """Begin a stretch of steps [first, last) without a pause, such as an epoch; nothing may be pending."""
        self.first, self.end = first, last - 1
        self.pending: list[tuple[torch.Tensor, dist.Work | None]] = []
        self.votes: list[Vote] = []
        self.saved = -1  # the last vote that may not ask for a save again

    def permit(self, step: int) -> bool:
        """Whether step `step` is to run, and may be posted for; waits for the vote that it depends on."""
        self._resolve((step - self.delay - 1 - self.first) // self.every + 1)
        return step <= self.end

    def cast(self, step: int, vote: Vote) -> None:
        """This rank's vote at `step`; every rank casts for every step that it runs, in order."""
        if (step - self.first) % self.every:
            return
        vector = vote.encode()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self.pending.append((vector, self.group.allreduce([vector], options) if self.group else None))

    def after(self, step: int) -> Vote:
        """What was decided for the moment right after `step`; to be asked once a step, in order."""
        index, rest = divmod(step - self.delay - self.first, self.every)
        if rest or index < 0:
            return Vote()
        self._resolve(index + 1)
        vote = self.votes[index]
        if vote.save and index <= self.saved:
            return replace(vote, save=False)
        if vote.save:  # what is voted until this moment asks for the same
            self.saved = (step - self.first) // self.every
        return vote

    def close(self) -> Vote:
        """Wait for every vote that is still out; all of them together. Nothing is pending afterwards."""
        self._resolve(len(self.votes) + len(self.pending))
        self.began = self.all_began
        broken = [vote.broken for vote in self.votes if vote.broken]
        return Vote(any(v.stop for v in self.votes), any(v.save for v in self.votes), min(broken, default=None))

    @property
    def all_began(self) -> bool:
        """Whether a vote is known that every rank that trains cast after its first step of this or an earlier stretch."""
        return self.began or len(self.votes) > 1

    def maximum(self, values: list[float]) -> list[float]:
        """Elementwise maximum over all ranks, at once; for epochs' ends."""
        vector = torch.tensor(values, dtype=torch.float64)
        if self.group:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            self.group.allreduce([vector], options).wait()
        return vector.tolist()

    def _resolve(self, count: int) -> None:
        """Make the first `count` votes known."""
        while len(self.votes) < count:
            vector, work = self.pending.pop(0)
            if work:
                work.wait()
            vote = Vote.decode(vector)
            if vote.stop or vote.broken:
                self.end = min(self.end, self.first + len(self.votes) * self.every + self.delay)
            self.votes.append(vote)
