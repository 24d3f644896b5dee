"""`auto`: as fast as the best placement there is, within samples and memory; and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import large_workload, work_of

from pkd.errors import UserError
from pkd.placement import describe, group_options, place
from pkd.planner import Planner, next_rank
from pkd.rank_map import USABLE, RankMap, Ranks
from pkd.recipe import Recipe
from pkd.recipe_file import parse_recipe
from pkd.schedule import SAMPLES_PER_RANK
from pkd.simulator import simulate
from pkd.system import System
from pkd.wire import choose
from pkd.workload import Links, StudentWork, lateness

GIB = 2**30


def recipe(batch: int, students: int = 1, **placement) -> Recipe:
    return parse_recipe({"name": "r", "data": {"name": "digits"}, "pyramid": [{"model": "m", "teachers": 1}],
                         "students": [{"name": f"s{number}", "model": "m"} for number in range(students)],
                         "distill": {"batch": batch}, "placement": placement})


def test_a_thousand_ranks_are_busy_and_nothing_is_over_its_limit():
    work, nodes, options = large_workload(8, 4096), tuple(range(1024)), [1, 2, 3, 4]
    free = Planner(work, 1024, 1, {}, Ranks((), nodes)).choose(options)
    most = free.map.bytes(replace(work, groups=free.groups), 1).max()
    for memory in (80 * GIB, int(0.7 * most / USABLE)):  # the second is too little for what is chosen without a limit
        known = Ranks((memory,) * 1024, nodes)
        choice = Planner(work, 1024, 1, {}, known).choose(options)
        assert choice.predicted.busy.mean() / choice.predicted.busy.max() > 0.9
        assert set().union(*map(set, choice.map.hosted.values())) == set(work.teachers) and len(work.teachers) == 255
        assert work.batch // (choice.map.students // choice.groups) >= SAMPLES_PER_RANK
        assert choice.map.bytes(replace(work, groups=choice.groups), 1).max() <= known.usable(0)
    slow = Planner(replace(work, view=2e-3), 1024, 1, {}, Ranks((), nodes)).choose(options)
    assert slow.map.students > 1.5 * free.map.students, "images that are dear to decode are shared out to more"


@given(costs=st.lists(st.floats(0.01, 3), min_size=1, max_size=4), row=st.floats(0.001, 0.05), world=st.integers(2, 5),
       batch=st.sampled_from([16, 64, 128]), cores=st.sampled_from([(), (2.0,)]), slow=st.booleans(),
       students=st.integers(1, 3), view=st.sampled_from([0.0, 0.01]))
@settings(max_examples=15, deadline=None)
def test_no_placement_is_predicted_to_be_much_faster_than_autos(costs, row, world, batch, cores, slow, students, view):
    links = Links(1e5, 0.001, 1e5, 0.001) if slow else Links()
    work = work_of(recipe(batch, students), {f"t{i}": cost for i, cost in enumerate(costs)}, row=row, links=links, view=view)
    known, steps, options = Ranks(cores=cores), [], group_options(recipe(batch, students), world)
    for groups in options:
        planner = Planner(replace(work, groups=groups), world, 1, {}, known)
        every = [planner.rank_map(trained, hosts) for trained in range(1, world + 1) if planner.trains(trained)
                 for hosts in range(1, max(2, world - trained + 1))]
        steps += [simulate(ranks.system(planner.work, 1, known)).step for ranks in every if ranks]
    assert Planner(work, world, 1, {}, known).choose(options).predicted.step <= 1.02 * min(steps)


def test_teachers_as_heavy_as_the_students_are_put_apart_where_the_gradients_are_dear():
    work = work_of(recipe(64), {"top": 0.7}, micro=0.06, row=0.01, links=Links(1e9, 1e-4, 2e3))
    placement = place(recipe(64), 2, work)
    assert placement.kind == "dedicated" and placement.student_ranks == 1
    assert "1 of 2 ranks train, dedicated" in placement.why and "co-located would take" in placement.why
    assert placement.why in describe(placement, ["s0"])


def test_light_teachers_do_not_get_a_rank_of_their_own():
    assert place(recipe(64), 2, work_of(recipe(64), {"top": 0.01})).kind == "co-located"


def test_a_teacher_too_large_for_a_student_rank_gets_one_of_its_own():
    """A rank that trains 32 rows and answers needs 10.5 GiB; apart, it is 7 GiB for the student and 8.5 for the teacher."""
    work = work_of(recipe(64), {"top": 0.01}, {"top": 5 * GIB}, runtime=3 * GIB, teacher_memory=0.5 * GIB,
                   activations=GIB / 16)
    assert place(recipe(64), 2, work, Ranks((20 * GIB,) * 2)).kind == "co-located"
    placement = place(recipe(64), 2, work, Ranks((8 * GIB, 10 * GIB)))
    assert placement.kind == "dedicated" and [source.rank for source in placement.sources] == [1]
    with pytest.raises(UserError, match=r"weights need 5\.00 GiB .* 1 rank\(s\) for teachers have room for 3\.\d+ GiB"):
        place(recipe(64), 2, work, Ranks((8 * GIB,) * 2))
    for wish in (recipe(64), recipe(64, kind="dedicated", student_ranks=1)):  # in two shards it is 6 GiB a rank
        known = Ranks((8 * GIB,) * 3)
        placement = place(wish, 3, work, known)
        assert [source.group for source in placement.sources] == [(1, 2)]
        assert placement.rank_map().bytes(work, 1).max() <= known.usable(0)


def test_ranks_that_a_small_batch_cannot_feed_are_left_out_and_said():
    placement = place(recipe(8), 6, work_of(recipe(8), {"top": 0.2, "left": 0.1}))
    assert placement.student_ranks == 1 and len(placement.sources) <= 2 and "nothing to do" in placement.why


def test_a_batch_that_feeds_nobody_is_refused():
    with pytest.raises(UserError, match=r"distill\.batch is 4, too few"):
        place(recipe(4), 2, work_of(recipe(4), {"top": 0.2}))


@pytest.mark.parametrize("costs", [{}, {"top": 0.01}], ids=["no teacher", "a light teacher"])
@pytest.mark.parametrize(("view", "links", "groups"), [(0.0, Links(1e9, 1e-4, 1e4), 2), (0.1, Links(1e9, 1e-4, 1e9), 1)],
                         ids=["gradients are dear", "views are dear"])
def test_students_are_in_groups_where_gradients_are_dearer_than_views(costs, view, links, groups):
    wish = recipe(64, students=2)
    work = work_of(wish, costs, links=links, view=view)
    placement = place(wish, 2, work)
    assert placement.groups == groups and placement.student_ranks == 2
    assert ("2 groups of students" in placement.why or "in 2 group(s)" in placement.why) == (groups == 2)


DEAR = Links(1e9, 1e-4, 1e4)  # gradients are


def test_students_are_in_one_group_where_the_recipe_says_so_or_how_many_ranks_train():
    work = work_of(recipe(64, 2), {"top": 0.01}, links=DEAR)
    for told in ({"student_groups": 1}, {"kind": "co-located"}, {"student_ranks": 2}):
        assert place(recipe(64, 2, **told), 3, work).groups == 1, told
    for free in ({}, {"student_ranks": 1}):  # without teachers every rank trains, whatever was said
        assert place(recipe(64, 2, **free), 2, replace(work, teachers={})).groups == 2


def test_a_batch_that_feeds_too_few_ranks_together_feeds_them_in_groups():
    """Where only so many groups can be fed, that is what they are; and of those, only what can be held."""
    wish = recipe(8, students=2)
    work = work_of(wish, {})
    assert place(wish, 2, work).groups == 2
    with pytest.raises(UserError, match=r"does not fit on 2 rank.*smallest rank's memory"):
        place(wish, 2, work, Ranks((1, 100 * GIB)))
    one = recipe(8, 2, student_groups=1)
    for told, world, most in ((one, 2, "1 student ranks"), (wish, 4, "2 student ranks in 2 groups")):
        with pytest.raises(UserError, match=f"batch 8 feeds at most {most}"):
            place(told, world, work)
    heavy = work_of(recipe(64, students=2), {}, view=0.1)  # 7 GiB a rank together under ZeRO 1, 5 GiB apart
    heavy = replace(heavy, each=tuple(replace(one, parameters=2**28) for one in heavy.each))
    assert [place(recipe(64, 2), 2, heavy, Ranks((size * GIB,) * 2)).groups for size in (8, 7)] == [1, 2]


def test_ranks_that_share_a_gpu_train_in_groups_only_where_they_must():
    """NCCL joins no two ranks of one GPU; side by side they are no faster."""
    wish, shared = recipe(64, students=2), Ranks(devices=(0, 0))
    assert place(wish, 2, work_of(wish, {}), shared).groups == 2, "every rank trains"
    work = work_of(wish, {"top": 0.01}, links=DEAR)
    assert place(wish, 2, work).groups == 2 and place(wish, 2, work, shared).student_ranks == 1


def test_a_step_takes_as_long_as_the_largest_group_takes_and_the_others_wait():
    work = work_of(recipe(64, students=3), {}, micro=0.3, row=0.03)
    for groups, part in ((1, 1), (2, 2 / 3), (3, 1 / 3)):
        dealt = replace(work, groups=groups)
        assert (dealt.students.micro, dealt.students.parameters) == pytest.approx((0.3 * part, 999 * part))
        trained = RankMap(groups, groups, {}).system(dealt, 1, Ranks()).train
        assert trained.sum() == pytest.approx(0.3 + 64 * 0.03) and trained.max() == pytest.approx(part * trained.sum())
    bytes_of = RankMap(2, 2, {}).bytes(replace(work, groups=2), 1)
    assert bytes_of[0] == replace(work, groups=2).student_memory(2, 1) > bytes_of[1]


def test_unlike_students_are_dealt_by_cost_and_each_rank_is_judged_by_its_own():
    """One has all the activations, the other all the weights: each fits a rank of its own, both together none."""
    wish = recipe(64, 2)
    dear, light = StudentWork(0.1, 0.01, 10**6, 1, GIB / 16), StudentWork(0.02, 0.002, 2**28, 1, 1000.0)
    work = replace(work_of(wish, {}), each=(dear, light))
    placement = place(wish, 2, work, Ranks((6 * GIB,) * 2))
    assert placement.groups == 2 and placement.dealt == ((0,), (1,))
    three = place(recipe(64, 3, kind="co-located", student_groups=2), 2, replace(work, each=(light, dear, light), groups=2))
    assert three.dealt == ((1,), (0, 2))
    asked = replace(work_of(wish, {"top": 0.5}), each=(dear, replace(light, parameters=1000)), groups=2)
    assert Planner(asked, 2, 1, {}, Ranks()).rank_map(2, 0).hosted == {1: ["top"]}, "the rank that trains the light one"
    two = replace(work_of(wish, {"a": 0.2, "b": 0.2}), each=asked.each, groups=2, together=64)
    assert Planner(two, 2, 1, {}, Ranks()).rank_map(2, 0).hosted.keys() == {1}
    meet = Planner(replace(two, crossing=1.0), 2, 1, {}, Ranks()).rank_map(2, 0)
    assert meet.hosted.keys() == {0, 1}, "in the step in which they answer for 64 what they train weighs little"


def test_groups_wait_for_each_others_logits_where_there_is_an_ensemble_term():
    """2,000 bytes a row and so many a second: 64 rows take 0.128 s, and each of two micro batches a message."""
    alone = work_of(recipe(64, students=2), {}, links=Links(1e6, 1e-3, float("inf"), 0.0), groups=2)
    crossing = replace(alone, crossing=2000.0)
    assert alone.sync(2, 1) == replace(crossing, groups=1).sync(2, 1) == 0
    assert crossing.sync(2, 1) == pytest.approx(0.129) and crossing.sync(2, 2) == pytest.approx(0.130)
    assert crossing.sync(4, 1) == pytest.approx(0.065), "a rank of two in each group has half of the rows"
    jitter = replace(crossing, jitter=0.1)
    late = 0.1 * lateness(2, jitter.students.seconds(64, 1))
    assert jitter.sync(2, 1) == pytest.approx(0.129 + late) and jitter.sync(4, 1) == pytest.approx(0.065)
    assert replace(alone, jitter=0.1).sync(2, 1) == 0, "ranks that tell each other nothing do not wait"


def test_the_last_of_several_ranks_is_as_late_as_chance_says():
    draws = np.random.default_rng(0).normal(size=(20_000, 64))
    assert lateness(1, 1.0) == pytest.approx(0) and lateness(8, 0.0) == 0
    for ranks in (2, 4, 64):
        assert lateness(ranks, 2.0) == pytest.approx(2 * draws[:, :ranks].max(1).mean(), rel=0.06)


@pytest.mark.parametrize(("cost", "wanted"), [(5.0, "to the teachers"), (0.5, "to the students")])
def test_one_more_rank_goes_where_the_work_is(cost, wanted):
    work = work_of(recipe(64), {"top": cost})
    ranks = Planner(work, 2, 1, {}, Ranks()).rank_map(1, 1)
    step = simulate(ranks.system(work, 1, Ranks())).step
    assert next_rank(work, ranks, 1, Ranks(), step).startswith(wanted)


def test_what_bounds_a_step_is_named():
    system = System(1, np.array([0.0, 3.0]), np.array([2.0, 0.0]), np.array([0.0, 1e6]), 2, bandwidth=1e6)
    assert max(system.bounds(), key=system.bounds().get) == "the teacher ranks' work" and system.bound() == 3.0


def test_the_plan_takes_the_exchange_that_the_run_will_take():
    """Direct where broadcasts are dear: each student rank then gets the soft targets of its own samples only."""
    links = Links(1e9, 0.0, float("inf"))
    few = work_of(recipe(64), {"top": 0.1}, links=links)
    many = replace(few, teachers={"top": replace(few.teachers["top"], width=10**5)})
    system = {}
    for name, work in (("few", few), ("many", many), ("told", replace(few, exchange="direct")),
                       ("as ever", replace(many, exchange="broadcast"))):
        system[name] = Planner(work, 5, 1, {}, Ranks()).rank_map(4, 1).system(work, 1, Ranks())
    assert [system[name].places for name in system] == [0, 4, 4, 0]
    assert system["many"].inbound() == pytest.approx(system["as ever"].inbound() / 4)
    assert system["many"].outbound().max() < system["as ever"].outbound().max()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 4000), students=st.integers(1, 40), hosts=st.integers(1, 6), shards=st.booleans(),
       share=st.floats(0.01, 1.0))
def test_the_plan_and_the_run_choose_the_same_exchange(width, students, hosts, shards, share):
    """Whatever part of the samples teachers are asked about, and whether they are whole or in shards."""
    wish = recipe(256 * students, kind="dedicated", student_ranks=students, **{"shards": {"top": hosts}} if shards else {})
    work = work_of(wish, {"top": 1.0})
    work = replace(work, teachers={"top": replace(work.teachers["top"], width=width, rows=share * work.batch)})
    placement = place(wish, students + hosts, work)
    system = placement.rank_map().system(work, 1, Ranks())
    assert bool(system.places) == (choose("auto", placement, width * work.batch)[0] == "direct")


def test_views_that_are_sent_cost_links_and_not_decoding():
    work = replace(work_of(recipe(64), {"top": 0.1}, links=Links(1e6, 0.0, float("inf"))), view=0.5, image=10**6)
    rebuilt, sent = (Planner(one, 2, 1, {}, Ranks()).rank_map(1, 1).system(one, 1, Ranks())
                     for one in (work, replace(work, sent=True)))
    assert rebuilt.answer[1] - sent.answer[1] == pytest.approx(64 * 0.5) and rebuilt.views is None
    assert sent.bounds()["the link of a rank that is sent views"] >= 64


def test_on_a_shared_gpu_only_one_rank_trains():
    work = work_of(recipe(64), {"top": 5.0})
    assert Planner(work, 2, 1, {}, Ranks(devices=(0, 1))).choose().map.kind == "co-located"
    for shared in (2, 3):
        found = Planner(work, shared, 1, {}, Ranks(devices=(0,) * shared)).choose().map
        assert found.kind == "dedicated" and found.students == 1
    work = work_of(recipe(64, students=2), {"top": 5.0}, groups=2)
    assert Planner(work, 2, 1, {}, Ranks(devices=(0, 0))).trains(2), "each an island of its own"


def test_groups_of_students_save_gradients_and_make_every_view_more_often():
    """Half of the parameters travel between half of the ranks; every group needs all views."""
    ranks, links = Ranks(), Links(1e9, 1e-4, 1e5)
    whole = work_of(recipe(64, students=2), {"top": 0.1}, links=links)
    grouped = replace(whole, groups=2)
    steps = {}
    for view in (0.0, 0.1):
        for work in (whole, grouped):
            placed = Planner(replace(work, view=view), 4, 1, {}, ranks).rank_map(4, 0)
            steps[work.groups, view] = simulate(placed.system(replace(work, view=view), 1, ranks)).step
    assert steps[2, 0.0] < steps[1, 0.0] and steps[2, 0.1] > steps[1, 0.1]
    assert grouped.student_memory(4, 1) < whole.student_memory(4, 1)  # as many activations, half of the weights
