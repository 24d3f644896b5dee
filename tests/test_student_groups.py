"""Groups of students with islands of their own: the same students as with fewer ranks and no groups."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import LIGHT, free_port, run, students, trace

from pkd.joined import Joined
from pkd.launcher import Launch
from pkd.recipe import Timeouts
from pkd.schedule import student_parts
from pkd.student_groups import Grouping, deal
from pkd.world import World

GROUPS, DEDICATED, CO_LOCATED = "placement.student_groups=2", "placement.kind=dedicated", "placement.kind=co-located"


@given(costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=9), groups=st.integers(1, 9))
def test_no_group_has_more_to_do_than_another_but_for_one_student(costs, groups):
    groups = min(groups, len(costs))
    dealt = deal(costs, groups)
    assert sorted(chain(*dealt)) == list(range(len(costs))) and all(dealt)
    loads = [sum(costs[index] for index in group) for group in dealt]
    for group, load in zip(dealt, loads):
        assert load - min(costs[index] for index in group) <= min(loads) + 1e-9


def test_students_that_are_alike_go_round_and_unlike_ones_are_paired():
    assert deal([1.0] * 5, 2) == ((0, 2, 4), (1, 3)) and deal([2.0, 1.0, 2.0, 1.0], 2) == ((0, 1), (2, 3))
    assert deal([1.0, 5.0, 1.0, 3.0], 2) == ((1,), (0, 2, 3)) and deal([1.0, 2.0], 1) == ((0, 1),)


@given(groups=st.integers(1, 5), places=st.integers(1, 5), more=st.integers(0, 7), batch=st.integers(25, 200))
def test_every_student_sees_every_sample_on_the_ranks_of_one_group(groups, places, more, batch):
    grouping = Grouping(deal([1.0] * (groups + more), groups), groups * places)
    islands = [grouping.island(group) for group in range(groups)]
    assert sorted(chain(*islands)) == list(range(grouping.ranks)) and {len(island) for island in islands} == {places}
    members = [grouping.members(group) for group in range(groups)]
    assert sorted(chain(*members)) == list(range(grouping.students)) and all(members)
    parts = student_parts(batch, grouping.ranks, groups)
    for island in islands:
        assert [n for rank in island for n in range(batch)[parts[rank]]] == list(range(batch))
    for place in range(places):
        assert len({(parts[rank].start, parts[rank].stop) for rank in grouping.column(place)}) == 1


def in_threads(ranks, action):
    """action(world) by so many ranks at the same time, each with a world of its own in this process; by rank."""
    port = free_port()

    def rank(index):
        world = World(Launch("plain", index, ranks, index, "127.0.0.1", port, "0", index == 0), Timeouts(start=30))
        found = action(world)
        world.close()
        return found
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank, range(ranks)))


def test_every_group_learns_all_students_figures_in_the_recipes_order():
    """Five students in two groups of two ranks: three and two of them, along any dimension; nothing is nothing."""
    grouping = Grouping(((0, 3, 4), (1, 2)), 4)
    whole = torch.arange(5 * 3 * 4, dtype=torch.float64).view(5, 3, 4)

    def join(world):
        joined = Joined(world, grouping)
        place = world.rank % 2
        own = (whole + 100 * place)[joined.own]  # other samples at the other place
        found = joined.everyone(own.requires_grad_()), joined.everyone(own.movedim(0, 1), 1), joined.everyone(own[:, :0])
        return [*found, joined.gather({"group": joined.group}) if place == 0 else None]
    for rank, (first, second, empty, gathered) in enumerate(in_threads(4, join)):
        assert torch.equal(first, whole + 100 * (rank % 2)) and not first.requires_grad
        assert torch.equal(second, first.movedim(0, 1)) and empty.shape == (5, 0, 4)
        assert gathered == ([{"group": 0}, {"group": 1}] if rank == 0 else None)


def came_to(folder):
    """Every step's losses, every epoch's figures and the students."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [[line[key] for key in ("train", "validation", "ensemble", "learning_rate")] for line in lines]
    return trace(folder), figures, students(folder)


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    return came_to(folder)


def test_a_student_on_ranks_of_its_own_is_that_of_a_single_student_rank(tiny, new_run, finished):
    """To the last bit: batch statistics do not depend on the number of ranks."""
    assert distilled(2, tiny, new_run("split"), GROUPS, CO_LOCATED, "teacher_views=sent") == came_to(finished)


def test_groups_of_several_ranks_exchange_the_mean_of_logits(tiny, new_run):
    """The paper's ensemble term, four student ranks in two groups against two without groups: to the last bit."""
    words = ("objective.kind=paper", CO_LOCATED, "exchange=direct", "placement.accumulation=2", *LIGHT)
    together = distilled(2, tiny, new_run("together"), *words)
    assert distilled(4, tiny, new_run("split"), *words, GROUPS) == together


def test_a_run_goes_on_split_and_together_as_if_it_had_never_been_stopped(tiny, new_run, finished):
    """From groups to none and back, one stop in each epoch: momentum, statistics, best weights and sums included."""
    folder, teachers_from = new_run("moved")
    words = ("distill", tiny, "--run-folder", folder, teachers_from)
    split = (GROUPS, DEDICATED, "placement.student_ranks=2")
    run(3, *words, *split, "--steps", 5)
    run(1, *words, "--steps", 14)
    run(3, *words, *split)
    assert came_to(folder) == came_to(finished)
