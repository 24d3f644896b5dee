"""What is beyond chance: properties of the crossed bootstrap."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.study import statistics
from pkd.study.statistics import crossed_bootstrap, mean_sd

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 40))


def answers(seed: int, shape: tuple[int, int], share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


@given(st.integers(0, 2**32), SHAPES)
def test_an_arm_does_not_differ_from_itself(seed, shape):
    arm = answers(seed, shape, 0.7)
    assert crossed_bootstrap(arm, arm, 200) == (0.0, 0.0, 0.0)


@given(st.integers(0, 2**32), SHAPES)
def test_the_difference_is_that_of_the_means_and_turns_with_the_arms(seed, shape):
    one, other = answers(seed, shape, 0.8), answers(seed + 1, shape, 0.5)
    mean, low, high = crossed_bootstrap(one, other, 400)
    assert mean == pytest.approx(one.mean() - other.mean(), abs=1e-12) and low <= high
    assert crossed_bootstrap(one, other, 400) == (mean, low, high), "the same draws every time"
    back, _, _ = crossed_bootstrap(other, one, 400)
    assert back == pytest.approx(-mean, abs=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 6))
@settings(max_examples=20)
def test_seeds_that_all_say_the_same_leave_the_uncertainty_of_images_alone(seed, seeds):
    one, other = answers(seed, (1, 300), 0.8), answers(seed + 1, (1, 300), 0.5)
    alone = crossed_bootstrap(one, other, 4000)
    together = crossed_bootstrap(one.repeat(seeds, 0), other.repeat(seeds, 0), 4000)
    assert together == pytest.approx(alone, abs=0.02)
    gap = one.astype(float) - other
    width = 2 * 1.96 * gap.std() / np.sqrt(300)
    assert alone[2] - alone[1] == pytest.approx(width, rel=0.15), "as the normal approximation has it"


@pytest.mark.parametrize(("values", "quantile"), [([0.0, 1.0], 12.706), ([1.0, 1.0, 0.0, 1.0], 3.182)])
def test_where_only_seeds_differ_the_interval_is_students(values, quantile):
    one = np.repeat(np.array(values)[:, None], 50, axis=1)
    mean, low, high = crossed_bootstrap(one, np.zeros_like(one), 100_000)
    half = quantile * np.std(values, ddof=1) / len(values)**0.5
    assert mean == np.mean(values) and (low, high) == pytest.approx((mean - half, mean + half), abs=0.04 * half)


def test_of_a_hundred_studies_about_as_many_as_promised_cover_the_truth():
    """Image difficulty, seeds and noise all vary; 0.8 points (sd) between the differences of seeds, 4 points of effect."""
    chance = np.random.default_rng(5)
    covered, sure = 0, 0
    for _ in range(100):
        difficulty = chance.random(1500)
        skill = 0.70 + chance.normal(0, 0.006, (2, 5, 1)) + np.array([0.04, 0])[:, None, None]
        right = difficulty + chance.uniform(-0.1, 0.1, (2, 5, 1500)) < skill
        _, low, high = crossed_bootstrap(right[0], right[1], 500)
        covered += low <= 0.04 <= high
        sure += low > 0
    assert covered >= 92 and sure >= 90


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_where_only_seeds_differ_95_of_100_intervals_cover_the_truth(seeds):
    gaps = np.random.default_rng(seeds).normal(0, 1, (1000, seeds, 1))
    covered = np.mean([low <= 0 <= high for _, low, high in (crossed_bootstrap(gap, np.zeros_like(gap)) for gap in gaps)])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_five_seeds_of_ten_thousand_images_take_less_than_a_second():
    one, other = answers(0, (5, 10_000), 0.8), answers(1, (5, 10_000), 0.7)
    began = time.process_time()
    crossed_bootstrap(one, other)
    assert time.process_time() - began < 1


def test_what_is_drawn_at_once_changes_nothing(monkeypatch):
    """Of ten seeds nearly every image is of a kind of its own, too many for all resamples at once."""
    one, other = answers(0, (10, 500), 0.8), answers(1, (10, 500), 0.5)
    whole = crossed_bootstrap(one, other, 1000)
    monkeypatch.setattr(statistics, "NUMBERS", 7 * 500)
    assert crossed_bootstrap(one, other, 1000) == pytest.approx(whole, abs=1e-12)


def test_a_single_value_has_no_deviation():
    assert mean_sd([0.5]) == (0.5, None)
    assert mean_sd([0.4, 0.6]) == (0.5, pytest.approx(0.1 * 2**0.5))
