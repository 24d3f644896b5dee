"""The planner: nobody is forgotten, loads are even, and what does not fit is refused with its numbers."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import work_of

from pkd import placement as placing
from pkd.errors import UserError
from pkd.placement import Placement, check_batch
from pkd.rank_map import USABLE, Ranks
from pkd.recipe import Recipe
from pkd.recipe_file import parse_recipe
from pkd.schedule import BLOCK, SAMPLES_PER_RANK
from pkd.share import share_out
from pkd.simulator import simulate

quick = settings(max_examples=80, deadline=None)


def recipe(batch: int = 256, **placement) -> Recipe:
    return parse_recipe({
        "name": "r", "data": {"name": "digits"}, "pyramid": [{"model": "m", "teachers": 1}],
        "students": [{"name": name, "model": "m"} for name in ("s", "t")], "distill": {"batch": batch},
        "placement": placement})


def place(wish: Recipe, world: int, costs: dict[str, float], sizes: dict[str, int] | None = None,
          known: Ranks | None = None) -> Placement:
    work = work_of(wish, costs, sizes, groups=wish.placement.student_groups or 1)
    return placing.place(wish, world, work, known)


def costs_of(*, least: int = 1, most: int = 7) -> st.SearchStrategy[dict[str, float]]:
    return st.lists(st.floats(0.1, 100), min_size=least, max_size=most).map(
        lambda loads: {f"t{i}": load for i, load in enumerate(loads)})


@st.composite
def fixed_replicas(draw, costs: dict[str, float], most: int) -> dict[str, int]:
    some = draw(st.sets(st.sampled_from(sorted(costs))))
    return {name: draw(st.integers(1, most)) for name in sorted(some)}


def ranks_of(placement: Placement, teacher: str) -> list[int]:
    return [source.rank for source in placement.sources for name in source.teachers if name == teacher]


def best_unsplit(costs: dict[str, float], ranks: int) -> float:
    """The lowest possible highest load if no teacher is shared, by trying every assignment."""
    return min(max(sum(cost for cost, at in zip(costs.values(), where) if at == rank) for rank in range(ranks))
               for where in product(range(ranks), repeat=len(costs)))


@given(data=st.data(), kind=st.sampled_from(["co-located", "dedicated"]), world=st.integers(2, 8),
       costs=costs_of(least=3))
@quick
def test_every_teacher_is_placed_on_distinct_ranks_that_may_hold_it(data, kind, world, costs):
    students = data.draw(st.integers(max(1, world - 3), world - 1)) if kind == "dedicated" else world
    hosts = range(students, world) if kind == "dedicated" else range(world)
    replicas = data.draw(fixed_replicas(costs, most=len(hosts)))
    wish = recipe(kind=kind, replicas=replicas, **({"student_ranks": students} if kind == "dedicated" else {}))
    placement = place(wish, world, costs)
    assert (placement.kind, placement.world, placement.student_ranks) == (kind, world, students)
    for teacher in costs:
        at = ranks_of(placement, teacher)
        assert at and len(set(at)) == len(at) and set(at) <= set(hosts)
        assert teacher not in replicas or len(at) == replicas[teacher]
    assert all(source.teachers for source in placement.sources)
    assert [placement.role(rank) for rank in range(world)] == ["student"] * students + ["teacher"] * (world - students)
    if kind == "dedicated":
        assert [source.rank for source in placement.sources] == list(hosts)


@given(data=st.data(), world=st.integers(1, 8), costs=costs_of())
@quick
def test_a_ranks_load_is_the_sum_of_its_shares(data, world, costs):
    placement = place(recipe(kind="co-located", replicas=data.draw(fixed_replicas(costs, world))), world, costs)
    for source in placement.sources:
        shares = [costs[name] / len(ranks_of(placement, name)) for name in source.teachers]
        assert source.load == pytest.approx(sum(shares))
    assert sum(source.load for source in placement.sources) == pytest.approx(sum(costs.values()))


@given(ranks=st.integers(1, 3), costs=costs_of(most=6), most=st.integers(1, 4))
@quick
def test_the_highest_load_is_within_longest_first_s_bound_of_the_optimum(ranks, costs, most):
    """Graham's (4/3 - 1/(3m)) holds against the best assignment of whole teachers; replicas may only improve on it."""
    highest = max(load for _, load in share_out(costs, ranks, {}, most))
    assert highest <= (4 / 3 - 1 / (3 * ranks)) * best_unsplit(costs, ranks) * (1 + 1e-9)
    assert highest >= max(sum(costs.values()) / ranks, max(costs.values()) / min(ranks, most)) * (1 - 1e-9)


@given(cost=st.floats(0.1, 100), ranks=st.integers(1, 16))
@quick
def test_a_single_teacher_is_shared_by_all_ranks_that_its_blocks_can_feed(cost, ranks):
    shares = share_out({"top": cost}, ranks, {}, most=ranks)
    assert all(teachers == ["top"] and load == pytest.approx(cost / ranks) for teachers, load in shares)


@given(world=st.integers(2, 12), students=st.integers(1, 11), batch=st.sampled_from([96, 128, 256]), costs=costs_of())
@quick
def test_teacher_ranks_are_refused_only_if_there_are_not_enough_shares_for_them(world, students, batch, costs):
    students = min(students, world - 1)
    hosts, blocks = world - students, -(-batch // BLOCK)
    feasible = hosts <= len(costs) * min(hosts, blocks)
    try:
        placement = place(recipe(batch, kind="dedicated", student_ranks=students), world, costs)
        assert feasible and len(placement.sources) == hosts
    except UserError as refusal:
        assert not feasible and f"{hosts} teacher ranks were asked for" in str(refusal)


@given(data=st.data(), hosts=st.integers(2, 9), costs=costs_of(least=2))
@quick
def test_a_teacher_in_shards_has_consecutive_ranks_and_no_rank_is_in_two_groups(data, hosts, costs):
    """Asked for or needed; no rank holds more than it has room for, and every teacher is somewhere, once or replicated."""
    sizes = {name: data.draw(st.integers(1, 40)) for name in costs}
    asked = {name: data.draw(st.integers(1, hosts)) for name in data.draw(st.sets(st.sampled_from(sorted(costs))))}
    nodes = tuple(rank // 4 for rank in range(hosts + 1))
    room = data.draw(st.integers(10, 60))
    slots = int(work_of(recipe(), costs).slots)
    try:
        placement = place(recipe(kind="dedicated", student_ranks=1, shards=asked), hosts + 1, costs, sizes,
                          Ranks((int((slots + room) / USABLE) + 1,) * (hosts + 1), nodes))
    except UserError:
        return
    groups = {source.group for source in placement.sources if source.group}
    assert all(group == tuple(range(group[0], group[0] + len(group))) and group[0] >= 1 for group in groups)
    assert len({rank for group in groups for rank in group}) == sum(map(len, groups))
    for name in costs:
        sources = [source for source in placement.sources if name in source.teachers]
        assert sources and (len(sources) == 1 or not any(source.group for source in sources))
        assert name not in asked or len(sources[0].ranks) == asked[name]
    for rank in range(1, hosts + 1):
        held = sum(sizes[name] / len(source.ranks) for source in placement.sources if rank in source.ranks
                   for name in source.teachers)
        assert 0 < held <= room + 1
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


def test_a_teacher_that_no_rank_can_hold_is_sharded_over_the_fewest_that_can_on_one_node():
    costs, sizes = {"top": 2.0, "left": 1.0, "right": 1.0}, {"top": 25, "left": 2, "right": 2}
    slots = int(work_of(recipe(512), costs).slots)
    known = Ranks((int((slots + 10) / USABLE) + 1,) * 8, (0, 0, 0, 0, 1, 1, 1, 1))
    placement = place(recipe(512, kind="dedicated", student_ranks=2), 8, costs, sizes, known)
    top = next(source for source in placement.sources if "top" in source.teachers)
    assert (top.group, top.rank, top.where) == ((4, 5, 6), 4, "ranks 4-6"), "ranks 2-4 are on two nodes"
    assert placement.shard_group(5) == top and placement.shard_group(3) is None
    assert placement.answers_for(6)[0] == "top"
    asked = place(recipe(512, kind="dedicated", student_ranks=1, shards={"top": 2}), 6, costs, sizes,
                  Ranks((10**6,) * 6, (0, 0, 1, 1, 2, 2)))
    assert next(source.group for source in asked.sources if source.group) == (2, 3), "rank 1 has its node for itself"


@given(top=st.floats(0.01, 3), row=st.floats(0.001, 0.05), world=st.sampled_from([4, 6]))
@settings(max_examples=8, deadline=None)
def test_auto_chooses_how_many_ranks_train_beside_a_teacher_that_no_rank_can_hold(top, row, world):
    wish, known = recipe(512), Ranks((int(10e9),) * world)
    work = work_of(wish, {"top": top, "left": 0.1}, {"top": int(20e9), "left": int(1e9)}, row=row)
    chosen = placing.place(wish, world, work, known)
    assert any(source.group and "top" in source.teachers for source in chosen.sources) and "in shards" in chosen.why

    def step(placement):
        return simulate(placement.rank_map().system(work, 1, known)).step
    by_hand = [placing.place(recipe(512, kind="dedicated", student_ranks=students), world, work, known)
               for students in range(1, world - 2)]
    assert step(chosen) <= 1.01 * min(map(step, by_hand))


@given(data=st.data(), world=st.integers(1, 8), costs=costs_of())
@quick
def test_placement_is_deterministic_and_survives_json(data, world, costs):
    wish = recipe(kind="co-located", replicas=data.draw(fixed_replicas(costs, world)))
    placement = place(wish, world, costs)
    assert place(wish, world, dict(costs)) == placement
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


@given(batch=st.integers(1, 600), ranks=st.integers(1, 64), accumulation=st.integers(1, 4))
@quick
def test_the_batch_refusal_names_the_number_that_would_fit(batch, ranks, accumulation):
    smallest = batch // ranks // accumulation
    try:
        check_batch(batch, ranks, accumulation)
        assert smallest >= SAMPLES_PER_RANK
    except UserError as refusal:
        assert smallest < SAMPLES_PER_RANK
        fits = int(str(refusal).split("at most ")[1].split()[0])
        assert fits < ranks and f"you asked for {ranks}" in str(refusal)
        if fits:
            check_batch(batch, fits, accumulation)


def test_auto_is_single_alone_and_dedicated_if_student_ranks_are_given():
    costs = {"top": 2.0, "left": 1.0}
    assert place(recipe(), 1, costs).kind == "single"
    placement = place(recipe(student_ranks=2), 5, costs)
    assert (placement.kind, placement.student_ranks) == ("dedicated", 2)


@given(world=st.integers(2, 9), kind=st.sampled_from(["auto", "co-located", "dedicated"]),
       batch=st.sampled_from([8, 16, 64]))
@quick
def test_groups_of_students_have_as_many_ranks_and_the_whole_batch_each(world, kind, batch):
    """Twice as many student ranks are fed by the same batch; what cannot be dealt evenly is refused."""
    try:
        placement = place(recipe(batch, kind=kind, student_groups=2), world, {"top": 2.0})
    except UserError as refusal:
        assert any(words in str(refusal) for words in ("no multiple", "feeds at most", "of them busy", "to the teachers"))
        return
    assert placement.groups == 2 and placement.student_ranks % 2 == 0
    assert batch // (placement.student_ranks // 2) >= SAMPLES_PER_RANK
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


@pytest.mark.parametrize("kind", ["auto", "co-located", "dedicated"])
def test_without_teachers_every_rank_trains_students(kind):
    placement = place(recipe(kind=kind), 4, {})
    assert placement.student_ranks == 4 and placement.sources == ()


def test_a_heavy_teacher_is_shared_and_light_ones_are_not():
    placement = place(recipe(kind="dedicated", student_ranks=1), 4, {"top": 10.0, "left": 1.0, "right": 1.0})
    assert len(ranks_of(placement, "top")) > 1
    assert max(source.load for source in placement.sources) < 10


TWO = {"top": 2.0, "left": 1.0}
REFUSED = {
    "too many student ranks": (
        recipe(32, kind="dedicated", student_ranks=48), 60, TWO,
        ["batch 32 feeds at most 4 student ranks", "you asked for 48"]),
    "too many micro batches": (
        recipe(64, kind="co-located", accumulation=3), 4, TWO,
        ["batch 64 feeds at most 2 student ranks", "3 micro batches", "you asked for 4"]),
    "single on two": (recipe(kind="single"), 2, TWO, ["2 were started"]),
    "dedicated on one": (recipe(kind="dedicated"), 1, TWO, ["at least 2 ranks", "found 1"]),
    "no rank left": (recipe(kind="dedicated", student_ranks=4), 4, TWO, ["student_ranks is 4", "at most 3"]),
    "more student ranks than ranks": (recipe(kind="dedicated", student_ranks=9), 4, TWO, ["is 9", "at most 3"]),
    "replicas of nobody": (recipe(kind="co-located", replicas={"lefft": 2}), 4, TWO, ["'lefft'", "mean 'left'"]),
    "replicas without ranks": (
        recipe(kind="co-located", replicas={"top": 5}), 4, TWO, ["replicas.top", "5 ranks", "at most 4"]),
    "replicas without blocks": (
        recipe(64, kind="co-located", replicas={"top": 3}), 4, TWO, ["replicas.top", "3 ranks", "at most 2"]),
    "shards of nobody": (recipe(kind="dedicated", shards={"topp": 2}), 4, TWO, ["'topp'", "mean 'top'"]),
    "few co-located shards": (
        recipe(kind="co-located", shards={"top": 2}), 4, TWO, ["shards.top is 2", "among 4 co-located", "set it to 4"]),
    "shards without ranks": (
        recipe(kind="dedicated", student_ranks=2, shards={"top": 3}), 4, TWO, ["shards.top is 3", "2 rank(s)"]),
    "shards in one process": (recipe(kind="single", shards={"top": 2}), 1, TWO, ["shards.top is 2", "1 rank(s)"]),
    "co-located shards and groups": (
        recipe(kind="co-located", student_groups=2, shards={"top": 4}), 4, TWO,
        ["shards.top is 4", "in 2 groups", "student_groups to 1"]),
    "groups that leave no rank": (recipe(kind="dedicated", student_groups=2), 2, TWO, ["student_groups is 2", "at most 1"]),
    "shards and replicas": (recipe(kind="dedicated", student_ranks=1, shards={"top": 2}, replicas={"top": 2}), 4, TWO,
                            ["shards.top is 2", "replicas.top is 2"]),
    "shards of other numbers": (recipe(kind="dedicated", student_ranks=1, shards={"top": 2, "left": 3}), 4, TWO,
                                ["3 rank(s) for teachers", "in 2, 3 shards"]),
    "more groups than students": (
        recipe(student_groups=3), 6, TWO, ["student_groups is 3", "2 student(s)"]),
    "uneven groups": (recipe(kind="co-located", student_groups=2), 3, TWO, ["student_groups is 2", "3 student rank(s)"]),
    "groups in one process": (recipe(student_groups=2), 1, TWO, ["student_groups is 2", "1 student rank(s)"]),
    "idle teacher ranks": (
        recipe(32, kind="dedicated", student_ranks=1), 6, TWO, ["5 teacher ranks", "batch of 32", "2 of them"]),
}


def test_what_only_the_hardware_or_the_sizes_forbid_is_refused_with_the_plan():
    def refusal(wish, world, known, **more):
        with pytest.raises(UserError) as found:
            placing.place(wish, world, work_of(wish, TWO, {"top": 50, "left": 1}, groups=wish.placement.student_groups or 1,
                                               window=0, together=0, **more), known)
        return str(found.value)
    small, one_gpu = Ranks((100, 30, 30, 30)), Ranks(devices=(0, 0, 0, 0))
    apart = {"kind": "dedicated", "student_ranks": 1}
    assert "ranks 0 to 3 train together" in refusal(recipe(kind="co-located"), 4, one_gpu)
    assert "in 2 shards would lie on ranks that share a GPU" in refusal(recipe(**apart, shards={"top": 2}), 3, one_gpu)
    assert "replicas.top is 2, but no rank has room" in refusal(recipe(**apart, replicas={"top": 2}), 4, small)
    assert "top lies in 2 shards, which rebuild" in refusal(recipe(**apart, shards={"top": 2}), 4, small, sent=True)
    place(recipe(kind="co-located", student_groups=2), 2, TWO, None, Ranks(devices=(0, 0)))  # each an island of its own


@pytest.mark.parametrize(("wish", "world", "costs", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_with_its_numbers(wish, world, costs, words):
    with pytest.raises(UserError) as refusal:
        place(wish, world, costs)
    assert all(word in str(refusal.value) for word in words) and len(str(refusal.value).splitlines()) == 1
