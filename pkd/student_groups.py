"""Students in groups, each an island of its own that trains on the whole batch: no gradient crosses between groups; pure.

The ranks of a group share the batch out as all student ranks do without groups, so a rank has the samples of the rank at
the same *place* in every other group. A student's losses are those that it has with as many student ranks as a group has
and no groups, to the last bit but for dropout: groups are a placement, not a part of the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pkd.errors import UserError


@dataclass(frozen=True)
class Grouping:
    """dealt: indices of each group's students; student ranks [0, ranks) are a multiple of the groups."""

    dealt: tuple[tuple[int, ...], ...]
    ranks: int

    @property
    def groups(self) -> int:
        return len(self.dealt)

    @property
    def students(self) -> int:
        return sum(map(len, self.dealt))

    @property
    def places(self) -> int:
        """Ranks of each group."""
        return self.ranks // self.groups

    def island(self, group: int) -> list[int]:
        """The ranks of a group."""
        return list(range(group * self.places, (group + 1) * self.places))

    def column(self, place: int) -> list[int]:
        """The rank at a place in every group."""
        return list(range(place, self.ranks, self.places))

    def members(self, group: int) -> list[int]:
        """Indices of a group's students."""
        return list(self.dealt[group])


def deal(costs: Sequence[float], groups: int) -> tuple[tuple[int, ...], ...]:
    """Indices of each group's students: the dearest first, each to the group that has the least to do. costs: one a student,
    of which there are at least as many as groups.
    """
    load, dealt = [0.0] * groups, [[] for _ in range(groups)]
    for student in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = min(range(groups), key=lambda group: (load[group], len(dealt[group])))
        load[least] += costs[student]
        dealt[least].append(student)
    return tuple(tuple(sorted(group)) for group in dealt)


def check_groups(groups: int, students: int, ranks: int) -> None:
    """Raises UserError where a group would have no student, or others would have more ranks."""
    if groups > students:
        raise UserError(f"placement.student_groups is {groups}, but the recipe has {students} student(s): ask for at most "
                        f"{students}")
    if ranks % groups:
        raise UserError(f"placement.student_groups is {groups}, but {ranks} student rank(s) are no multiple of it: change "
                        "placement.student_ranks or the number of ranks")
