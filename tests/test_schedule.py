"""The schedule and the routes: every sample once, every asked (sample, teacher) pair once, whoever answers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.pyramid import Pyramid, Teacher
from pkd.recipe import Model
from pkd.schedule import BLOCK, Router, Routes, Schedule, split

quick = settings(max_examples=100, deadline=None)
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def pyramids(draw) -> Pyramid:
    """A top over all classes and a few specialists, which may overlap."""
    classes = draw(st.integers(3, 10))
    some = st.sets(st.integers(0, classes - 1), min_size=2, max_size=classes - 1)
    known = [set(range(classes)), *draw(st.lists(some, max_size=4))]
    teachers = [Teacher(f"t{i}", min(i, 1), tuple(sorted(k)), Model(name="m")) for i, k in enumerate(known)]
    return Pyramid(tuple(f"class {c}" for c in range(classes)), tuple(teachers))


def hosted(draw, teachers: list[int]) -> list[list[int]]:
    """Sources for these teachers: each teacher on one source at least, on each at most once."""
    ranks = draw(st.integers(1, 5))
    on = {t: draw(st.sets(st.integers(0, ranks - 1), min_size=1)) for t in teachers}
    return [[t for t in teachers if rank in on[t]] for rank in range(ranks)]


@st.composite
def steps(draw) -> tuple[Pyramid, list[list[int]], bool, np.ndarray]:
    """(pyramid, sources, own, labels of a global batch, the number of classes for none)."""
    pyramid = draw(pyramids())
    asked = sorted(draw(st.sets(st.integers(0, len(pyramid.teachers) - 1), min_size=1)))
    rng = np.random.default_rng(draw(SEEDS))
    labels = rng.integers(0, draw(st.integers(1, len(pyramid.classes) + 1)), size=draw(st.integers(1, 200)))
    return pyramid, hosted(draw, asked), draw(st.booleans()), labels


def pairs(routes: Routes) -> list[tuple[int, int]]:
    return list(zip(routes.teacher.tolist(), routes.position.tolist()))


def wanted_pairs(pyramid: Pyramid, sources: list[list[int]], own: bool, labels: np.ndarray) -> list[tuple[int, int]]:
    asked = sorted({teacher for teachers in sources for teacher in teachers})
    knows_all = [len(teacher.classes) == len(pyramid.classes) for teacher in pyramid.teachers]
    return [(t, n) for t in asked for n, label in enumerate(labels)
            if not own or label in pyramid.teachers[t].classes or knows_all[t]]


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
@quick
def test_split_covers_in_order_and_is_even_within_one(total, parts):
    slices = split(total, parts)
    sizes = [s.stop - s.start for s in slices]
    assert slices[0].start == 0 and slices[-1].stop == total and len(slices) == parts
    assert all(a.stop == b.start for a, b in pairwise(slices))
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_64_over_3_is_22_21_21():
    assert [s.stop - s.start for s in split(64, 3)] == [22, 21, 21]


@given(samples=st.sets(st.integers(0, 10**6), min_size=1, max_size=150), batch=st.integers(1, 60), seed=SEEDS,
       epoch=st.integers(0, 1000))
@quick
def test_an_epochs_batches_are_full_and_disjoint_and_only_the_last_partial_one_is_dropped(samples, batch, seed, epoch):
    schedule = Schedule(np.array(sorted(samples)), batch, seed)
    assert schedule.steps_per_epoch == len(samples) // batch
    batches = [schedule.global_batch(epoch, step) for step in range(schedule.steps_per_epoch)]
    seen = [int(i) for ids in batches for i in ids]
    assert all(len(ids) == batch for ids in batches)
    assert len(set(seen)) == len(seen) and set(seen) <= samples
    assert len(samples) - len(seen) < batch
    assert sorted(schedule.order(epoch)) == sorted(samples)


@given(seed=SEEDS, epochs=st.lists(st.integers(0, 20), min_size=1, max_size=6))
@quick
def test_an_epochs_order_depends_on_nothing_but_seed_and_epoch(seed, epochs):
    samples = np.arange(40)
    busy = Schedule(samples, 8, seed)
    for epoch in epochs:  # whatever was asked before
        assert np.array_equal(busy.global_batch(epoch, 1), Schedule(samples, 8, seed).global_batch(epoch, 1))
    orders = {tuple(busy.order(epoch)) for epoch in epochs}
    assert len(orders) == len(set(epochs))
    assert tuple(Schedule(samples, 8, (seed + 1) % 2**63).order(epochs[0])) != tuple(busy.order(epochs[0]))


@given(batch=st.integers(1, 200), ranks=st.integers(1, 9), accumulation=st.integers(1, 4))
@quick
def test_micro_batches_cover_the_global_batch_once_in_order(batch, ranks, accumulation):
    schedule = Schedule(np.arange(200), batch, 0)
    of_rank = [schedule.micro_batches(ranks, rank, accumulation) for rank in range(ranks)]
    assert all(len(micro) == accumulation for micro in of_rank)
    positions = [n for micro in of_rank for piece in micro for n in range(batch)[piece]]
    assert positions == list(range(batch))


@given(step=steps())
@quick
def test_routes_are_exactly_the_asked_pairs_each_once(step):
    pyramid, sources, own, labels = step
    routes = Router(pyramid, sources, own).routes(labels)
    wanted = wanted_pairs(pyramid, sources, own, labels)
    assert sorted(pairs(routes)) == wanted
    of_teacher = [sum(t == teacher for t, _ in wanted) for teacher in range(len(pyramid.teachers))]
    assert routes.count.tolist() == of_teacher
    assert all(teacher in sources[source] for source, teacher in zip(routes.source, routes.teacher))


@given(step=steps())
@quick
def test_the_flat_buffer_is_ordered_contiguous_and_covered_once(step):
    pyramid, sources, own, labels = step
    router = Router(pyramid, sources, own)
    routes = router.routes(labels)
    keys = list(zip(routes.source, routes.teacher, routes.position))
    assert keys == sorted(keys)
    end = 0
    for teacher, offset in zip(routes.teacher, routes.offset):
        assert offset == end
        end = offset + len(pyramid.teachers[teacher].classes)
    assert routes.size == end <= router.largest(len(labels))
    bounds = [0, *(piece.stop for piece in routes.slices)]
    assert [piece.start for piece in routes.slices] == bounds[:-1] and bounds[-1] == routes.size
    assert len(routes.slices) == len(sources)
    for source, offset in zip(routes.source, routes.offset):
        assert routes.slices[source].start <= offset < routes.slices[source].stop


@given(step=steps(), parts=st.integers(1, 7))
@quick
def test_what_a_source_has_for_a_student_rank_lies_in_one_piece(step, parts):
    """And nothing else changes: the same routes by the same sources, in the same blocks of every teacher's rows."""
    pyramid, sources, own, labels = step
    whole, routes = (Router(pyramid, sources, own, n).routes(labels) for n in (1, parts))
    assert routes.slices == whole.slices and np.array_equal(routes.count, whole.count)
    part = np.array([next(p for p, piece in enumerate(split(len(labels), parts)) if piece.start <= n < piece.stop)
                     for n in range(len(labels))])
    keys = list(zip(routes.source, part[routes.position], routes.teacher, routes.position))
    assert keys == sorted(keys)
    for source, student, offset in zip(routes.source, part[routes.position], routes.offset):
        assert routes.part(source, student).start <= offset < routes.part(source, student).stop
    parts_of = [routes.part(source, student) for source in range(len(sources)) for student in range(parts)]
    assert sum(piece.stop - piece.start for piece in parts_of) == routes.size
    for source in range(len(sources)):
        for teacher in sources[source]:
            rows = [r.position[(r.source == source) & (r.teacher == teacher)].tolist() for r in (whole, routes)]
            assert rows[0] == rows[1] == sorted(rows[0])


@given(step=steps(), rows=st.sampled_from([8, BLOCK, 100]))
@quick
def test_replicas_share_a_teachers_routes_evenly_in_whole_blocks(step, rows):
    pyramid, sources, own, labels = step
    routes = Router(pyramid, sources, own, block=rows).routes(labels)
    for teacher in range(len(pyramid.teachers)):
        replicas = [source for source, teachers in enumerate(sources) if teacher in teachers]
        of_teacher = routes.teacher == teacher
        by_position = np.argsort(routes.position[of_teacher])
        answered_by = routes.source[of_teacher][by_position]
        blocks = [set(answered_by[start:start + rows].tolist()) for start in range(0, len(answered_by), rows)]
        assert all(len(block) == 1 for block in blocks)
        shares = [sum(replica in block for block in blocks) for replica in replicas]
        assert not shares or max(shares) - min(shares) <= 1


@given(step=steps(), data=st.data())
@quick
def test_moving_teachers_between_sources_permutes_the_routes_and_changes_none(step, data):
    pyramid, sources, own, labels = step
    asked = sorted({teacher for teachers in sources for teacher in teachers})
    here = Router(pyramid, sources, own).routes(labels)
    there = Router(pyramid, hosted(data.draw, asked), own).routes(labels)
    assert sorted(pairs(here)) == sorted(pairs(there))
    assert np.array_equal(here.count, there.count) and here.size == there.size


@pytest.mark.parametrize("own", [True, False])
def test_no_teacher_asked_means_no_routes(own):
    pyramid = Pyramid(("a", "b"), (Teacher("top", 0, (0, 1), Model(name="m")),))
    router = Router(pyramid, [], own)
    routes = router.routes(np.array([0, 1, 1]))
    assert len(routes.teacher) == routes.size == router.largest(3) == 0
    assert routes.slices == () and routes.count.tolist() == [0]


def test_own_asks_a_specialist_about_its_classes_only():
    pyramid = Pyramid(("a", "b", "c", "d"), (
        Teacher("top", 0, (0, 1, 2, 3), Model(name="m")),
        Teacher("left", 1, (0, 1), Model(name="m")), Teacher("right", 1, (2, 3), Model(name="m"))))
    routes = Router(pyramid, [[1, 2], [0]], own=True).routes(np.array([3, 0, 2]))
    assert pairs(routes) == [(1, 1), (2, 0), (2, 2), (0, 0), (0, 1), (0, 2)]
    assert routes.source.tolist() == [0, 0, 0, 1, 1, 1]
    assert routes.offset.tolist() == [0, 2, 4, 6, 10, 14]
    assert routes.slices == (slice(0, 6), slice(6, 18))
    assert routes.count.tolist() == [3, 1, 2]
