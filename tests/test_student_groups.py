"""Groups of students with islands of their own: the same students as with fewer ranks and no groups."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import refused, run, students, trace

from pkd.schedule import student_parts
from pkd.student_groups import Grouping

GROUPS, DEDICATED, CO_LOCATED = "placement.student_groups=2", "placement.kind=dedicated", "placement.kind=co-located"


@given(groups=st.integers(1, 5), places=st.integers(1, 5), more=st.integers(0, 7), batch=st.integers(25, 200))
def test_every_student_sees_every_sample_on_the_ranks_of_one_group(groups, places, more, batch):
    grouping = Grouping(groups, groups * places, groups + more)
    islands = [grouping.island(group) for group in range(groups)]
    assert sorted(sum(islands, [])) == list(range(grouping.ranks)) and {len(island) for island in islands} == {places}
    members = [grouping.members(group) for group in range(groups)]
    assert sorted(sum(members, [])) == list(range(grouping.students)) and all(members)
    parts = student_parts(batch, grouping.ranks, groups)
    for island in islands:
        assert [n for rank in island for n in range(batch)[parts[rank]]] == list(range(batch))
    for place in range(places):
        assert len({(parts[rank].start, parts[rank].stop) for rank in grouping.column(place)}) == 1


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trace(folder), students(folder), [[line[key] for key in ("train", "validation", "ensemble")] for line in lines]


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_a_student_on_ranks_of_its_own_is_that_of_a_single_process(tiny, new_run, objective):
    """To the last bit, with the paper's ensemble term too: batch statistics do not depend on the number of ranks."""
    kind = f"objective.kind={objective}"
    alone = distilled(1, tiny, new_run("alone"), kind)
    assert distilled(2, tiny, new_run("co-located"), kind, GROUPS, CO_LOCATED, "teacher_views=sent") == alone
    assert distilled(3, tiny, new_run("dedicated"), kind, GROUPS, DEDICATED, "placement.student_ranks=2",
                     "exchange=direct") == alone
