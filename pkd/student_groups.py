"""Students in groups, each an island of its own that trains on the whole batch: no gradient crosses between groups; pure.

The ranks of a group share the batch out as all student ranks do without groups, so a rank has the samples of the rank at
the same *place* in every other group. A student's losses are those that it has with as many student ranks as a group has
and no groups, to the last bit but for dropout: groups are a placement, not a part of the identity.
"""

from dataclasses import dataclass

from pkd.errors import UserError


@dataclass(frozen=True)
class Grouping:
    """Student ranks [0, ranks) and students, dealt to `groups` groups; `ranks` is a multiple of it."""

    groups: int
    ranks: int
    students: int

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
        """Indices of a group's students. Dealt round, for those that a recipe names side by side are often alike."""
        return list(range(group, self.students, self.groups))


def useful(students: int) -> list[int]:
    """Numbers of groups of which each makes the largest group smaller than all before."""
    largest = [-(-students // groups) for groups in range(1, students + 1)]
    return [1, *(groups for groups in range(2, students + 1) if largest[groups - 1] < largest[groups - 2])]


def check_groups(groups: int, students: int, ranks: int) -> None:
    """Raises UserError where a group would have no student, or others would have more ranks."""
    if groups > students:
        raise UserError(f"placement.student_groups is {groups}, but the recipe has {students} student(s): ask for at most "
                        f"{students}")
    if ranks % groups:
        raise UserError(f"placement.student_groups is {groups}, but {ranks} student rank(s) are no multiple of it: change "
                        "placement.student_ranks or the number of ranks")
