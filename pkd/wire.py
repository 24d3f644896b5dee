"""What an exchange costs in sockets and bytes, and which kind to take; pure.

A gloo group of n ranks costs each of them n - 1 connections; all groups of a rank share a thread and a socket that listens.
`broadcast` has a group of {source} and all student ranks for every source: a student rank holds about sources x student
ranks. `direct` has one connection for each pair of a source and a student rank: a student rank holds one a source, a source
one a student rank.
Every student rank receives all soft targets of a step by `broadcast`, and those of its own samples by `direct`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkd.placement import Placement  # which needs this module

KINDS = ("broadcast", "direct")
SOCKETS = 256  # a quarter of the usual limit of 1,024 open files a process
BYTES = 2**20  # to a student rank in a step: a millisecond at 1 GB/s


def dear(students: int, sources: set[int], size: float) -> bool:
    """Whether broadcasts of `size` bytes a step open more sockets on a rank, or bring it more bytes, than they may."""
    return size > BYTES or _listening(sum(students - (source < students) for source in sources)) > SOCKETS


def sockets(kind: str, placement: "Placement", rank: int) -> int:
    """That the exchange opens on a rank."""
    students, sources = placement.student_ranks, {source.rank for source in placement.sources}
    trains = rank < students
    if kind == "broadcast":
        return _listening(sum(students - (source < students) for source in sources if trains or source == rank))
    return _listening(len(partners(placement, rank)))


def _listening(connections: int) -> int:
    """Sockets of so many connections."""
    return connections + (connections > 0)


def partners(placement: "Placement", rank: int) -> list[int]:
    """The ranks to which a rank has rows to send, or from which it gets some, by `direct`; ascending."""
    students, sources = placement.student_ranks, {source.rank for source in placement.sources}
    found = (set(range(students)) if rank in sources else set()) | (sources if rank < students else set())
    return sorted(found - {rank})


def received(kind: str, placement: "Placement", logits: int) -> int:
    """Bytes at most that a student rank receives in a step whose soft targets are `logits` numbers of two bytes."""
    return 2 * (logits if kind == "broadcast" else -(-logits // (placement.student_ranks // placement.groups)))


def choose(wish: str, placement: "Placement", logits: int) -> tuple[str, str]:
    """The kind for a wish (auto or a kind), and why, as a sentence. logits: of all teachers in one step."""
    ranks = range(placement.world)
    most = {kind: max(sockets(kind, placement, rank) for rank in ranks) for kind in KINDS}
    size = {kind: received(kind, placement, logits) for kind in KINDS}
    costly = dear(placement.student_ranks, {source.rank for source in placement.sources}, size["broadcast"])
    kind = wish if wish != "auto" else "direct" if costly and placement.student_ranks > 1 else "broadcast"
    costs = "; ".join(f"{name} {most[name]:,} sockets a rank and {size[name]:,} bytes a student rank and step"
                      for name in KINDS)
    return kind, f"exchange: {kind}, {'chosen by size' if wish == 'auto' else 'as the recipe says'} ({costs})"
