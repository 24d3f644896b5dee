"""What the plots of a report are drawn from: pure functions of a run's answers, teachers and arms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.predictions import BINS, calibration_error
from pkd.report.answers import bins, cells, confused, group_keys
from pkd.report.facts import Teacher, parents
from pkd.report.study_plots import best_for_cost
from pkd.report.style import listed, short
from pkd.report.tree import places

keyed = st.integers(1, 3).flatmap(lambda depth: st.lists(
    st.tuples(st.just(0), *[st.integers(0, 40)] * depth), min_size=1, max_size=300))


@given(keyed, st.integers(2, 50))
def test_cells_keep_the_order_of_the_groups_and_join_no_two_of_them(keys, most):
    order, cell = cells(keys, most)
    assert sorted(order) == list(range(len(keys))) and [keys[i] for i in order] == sorted(keys)
    assert (np.diff(cell[order]) >= 0).all() and set(cell) == set(range(cell.max() + 1)) and cell.max() < most
    depth = next(d for d in range(len(keys[0]), -1, -1) if len({key[:d] for key in keys}) <= most)
    for index in set(cell):
        assert len({keys[i][:depth] for i in np.flatnonzero(cell == index)}) == 1
    said = np.random.default_rng(0).integers(0, len(keys), (2, 50))
    counts = confused(*said, cell)
    assert counts.sum() == 50 and counts.trace() == (cell[said[0]] == cell[said[1]]).sum()


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_the_bins_of_the_diagram_make_the_calibration_error(images):
    confidence, correct = (np.array(column) for column in zip(*images))
    number, sure, right = bins(confidence, correct)
    assert number.sum() == len(images) and len(number) == BINS
    error = np.nansum(number * np.abs(sure - right)) / len(images)
    assert error == pytest.approx(calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct)), abs=1e-9)


def teachers(counts: list[int], classes: int, seed: int) -> list[Teacher]:
    """A pyramid with so many teachers a level, each level cut from an order of its own."""
    chance, known = np.random.default_rng(seed), []
    for level, count in enumerate([1, *counts]):
        order = chance.permutation(classes) if seed % 2 else np.arange(classes)
        known += [(level, tuple(sorted(map(int, part)))) for part in np.array_split(order, count)]
    above = parents(known)
    return [Teacher(f"t{i}", level, own, None if above[i] is None else f"t{above[i]}", None, "", None)
            for i, (level, own) in enumerate(known)]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=4), st.integers(0, 99), st.integers(1, 40))
def test_no_two_teachers_of_a_level_are_drawn_over_each_other(counts, seed, most):
    pyramid = teachers(counts, 80, seed)
    where = places(pyramid, most)
    for one in where:
        others = [other for other in where if other.teacher.level == one.teacher.level and other is not one]
        assert all(abs(other.row - one.row) >= 1 for other in others)
    rows = {one.row for one in where}
    assert max(rows) + 1 <= max(most, 1) and min(rows) == 0
    assert len(where) + sum(one.below for one in where) == len(pyramid)


def test_a_teacher_hangs_below_the_smallest_one_that_knows_its_classes():
    assert parents([(0, (0, 1, 2, 3)), (1, (0, 1, 2)), (1, (0, 1)), (2, (0, 1)), (2, (2, 3))]) == [None, 0, 0, 2, 0]
    pyramid = [Teacher("top", 0, (0, 1, 2, 3), None, None, "", None), Teacher("a", 1, (1, 3), "top", None, "", None),
               Teacher("b", 1, (0, 2), "top", None, "", None)]
    assert group_keys(pyramid, 5) == [(0, 1), (0, 0), (0, 1), (0, 0), (-1, -1)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_line_of_compute_joins_what_nothing_beats_for_less(points):
    path = best_for_cost(points)
    for index, (cost, accuracy) in enumerate(points):
        beaten = any(other[0] <= cost and other[1] >= accuracy and other != (cost, accuracy) for other in points)
        assert ((cost, accuracy) in [points[i] for i in path]) == (not beaten), index


@settings(max_examples=30)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=9), st.integers(12, 40))
def test_lists_of_names_stay_on_one_line_and_short(names, most):
    line = listed(names, most)
    assert len(line) <= most + len(f" +{len(names)}") and line.isprintable()
    assert short("a\nb\x00c", 10) == "a b c"
