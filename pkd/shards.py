"""Which ranks hold a teacher together that one rank cannot hold: groups of consecutive ranks, each an island. Pure."""

from dataclasses import dataclass, field
from math import ceil

from pkd.errors import UserError, nearest
from pkd.recipe import Placement as Wish


@dataclass
class Group:
    """ranks: positions among the ranks for teachers; each holds 1/n of every one of `teachers`."""

    ranks: range
    teachers: list[str] = field(default_factory=list)


def wanted_shards(wish: Wish, kind: str, names: list[str], ranks: int, groups: int = 1) -> dict[str, int]:
    """Ranks for each teacher that the recipe wants on more than one, all holding parts. Raises UserError.

    ranks: those that may hold teachers. Among co-located ranks every rank is of the students' island, and of no smaller one;
    groups: of students, each of which has an island of its own.
    """
    for name, count in wish.shards.items():
        asked = f"placement.shards.{name} is {count}"
        if name not in names:
            raise UserError(f"placement.shards names {name!r}, but the teachers asked are {', '.join(names) or 'none'}"
                            f"{nearest(name, names)}")
        if count > ranks:
            raise UserError(f"{asked}, but there are {ranks} rank(s) for teachers: lower it, start more ranks, or lower "
                            "placement.student_ranks")
        if count > 1 and kind != "dedicated" and count != ranks:
            raise UserError(f"{asked}, but among {ranks} co-located ranks a teacher is whole or in {ranks} shards, one on "
                            f"every rank: set it to {ranks}, or set placement.kind to dedicated")
        if count > 1 and kind != "dedicated" and groups > 1:
            raise UserError(f"{asked}, but students are in {groups} groups, and co-located ranks hold a teacher together "
                            "with their own group only: set placement.student_groups to 1 or placement.kind to dedicated")
        if count > 1 and wish.replicas.get(name, 1) > 1:
            raise UserError(f"{asked} and placement.replicas.{name} is {wish.replicas[name]}, but a teacher in shards has "
                            "no replicas: leave one of them out")
    return {name: count for name, count in wish.shards.items() if count > 1}


def needed_shards(sizes: dict[str, int], room: list[float]) -> dict[str, int]:
    """The fewest ranks for each teacher that is too large for any one of them; room: bytes of each rank."""
    most = max(room)
    return {name: ceil(size / most) if most else len(room) + 1 for name, size in sizes.items() if size > most}


def shard_groups(counts: dict[str, int], sizes: dict[str, int], room: list[float], nodes: list[int]) -> list[Group] | None:
    """A group for each teacher of `counts`, on as few nodes as possible; None where one does not fit.

    No rank is in two groups, for it is in one island: where no others are left, teachers of as many shards share theirs.
    nodes: of each rank.
    """
    groups: list[Group] = []
    free = list(room)
    for name in sorted(counts, key=lambda n: (-counts[n], -sizes.get(n, 0))):
        count = counts[name]
        part = sizes.get(name, 0) / count
        taken = {rank for group in groups for rank in group.ranks}
        apart = [Group(range(first, first + count)) for first in range(len(free) - count + 1)
                 if not taken.intersection(range(first, first + count))]
        shared = [group for group in groups if len(group.ranks) == count]
        fitting = [group for group in apart + shared if all(free[rank] >= part for rank in group.ranks)]
        if not fitting:
            return None
        best = min(fitting, key=lambda group: len({nodes[rank] for rank in group.ranks}))
        best.teachers.append(name)
        if best in apart:
            groups.append(best)
        for rank in best.ranks:
            free[rank] -= part
    return sorted(groups, key=lambda group: group.ranks.start)
