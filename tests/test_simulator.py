"""The simulated step: closed forms where one part limits it, bounds everywhere."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.simulator import simulate
from pkd.system import System

quick = settings(max_examples=40, deadline=None)
seconds = st.floats(0.01, 1.0)


def dedicated(train: list[float], answer: list[float], sent: float = 0.0, **more) -> System:
    ranks = len(train) + len(answer)
    teacher = np.arange(ranks) >= len(train)
    return System(len(train), np.array([0.0] * len(train) + answer), np.array(train + [0.0] * len(answer)),
                  sent * teacher, more.pop("window", 2), **more)


@given(train=st.lists(seconds, min_size=1, max_size=4), answer=st.lists(seconds, min_size=1, max_size=4),
       window=st.integers(1, 5), sync=st.floats(0, 0.5))
@quick
def test_with_free_links_and_cores_the_slowest_rank_sets_the_pace(train, answer, window, sync):
    predicted = simulate(dedicated(train, answer, window=window, sync=sync))
    slowest = max(max(train) + sync, max(answer))
    assert predicted.step == pytest.approx(slowest, rel=1e-6)
    assert predicted.busy == pytest.approx(np.array(train + answer) / slowest, rel=1e-6)


@given(answer=st.lists(seconds, min_size=1, max_size=4), train=seconds, sync=st.floats(0, 0.5))
@quick
def test_co_located_ranks_do_both_one_after_the_other(answer, train, sync):
    predicted = simulate(System(len(answer), np.array(answer), np.full(len(answer), train), np.zeros(len(answer)), 2,
                                sync=sync))
    assert predicted.step == pytest.approx(max(answer) + train + sync, rel=1e-6)


@pytest.mark.parametrize(("meeting", "step"), [(None, (5 + 3 * 2) / 4), ([0, 1], 2.5)])
def test_who_answers_for_several_steps_at_once_is_waited_for_in_the_first_and_waits_in_the_others(meeting, step):
    """Two ranks train for 1 and 2 s and answer for 1 and 0.5 s a step, for four at once: 5 and 4 s, then 1 and 2 s."""
    system = System(2, np.array([1.0, 0.5]), np.array([1.0, 2.0]), np.zeros(2), 4, together=4,
                    meeting=meeting and np.array(meeting))
    assert simulate(system).step == pytest.approx(step)


@given(answer=seconds, train=seconds, together=st.integers(1, 5))
@quick
def test_a_teacher_rank_that_answers_for_several_steps_is_not_waited_for_longer(answer, train, together):
    predicted = simulate(dedicated([train], [answer], window=together + 1, together=together))
    assert predicted.step == pytest.approx(max(train, answer), rel=1e-6)


@given(sources=st.integers(1, 5), students=st.integers(1, 4), size=st.floats(1e6, 1e8))
@quick
def test_a_full_wire_sets_the_pace(sources, students, size):
    """A student receives everything; a source sends its own part as often as a binomial tree's root."""
    predicted = simulate(dedicated([1e-3] * students, [1e-3] * sources, size, bandwidth=1e7))
    wire = max(sources * size, size * np.ceil(np.log2(students + 1))) / 1e7
    assert predicted.step == pytest.approx(wire, rel=0.02, abs=2e-3)


@given(ranks=st.integers(1, 6), cores=st.integers(1, 6), work=seconds, threads=st.integers(1, 2))
@quick
def test_ranks_of_one_node_share_its_cores(ranks, cores, work, threads):
    predicted = simulate(System(ranks, np.zeros(ranks), np.full(ranks, work), np.zeros(ranks), 2,
                                cores=np.array([float(cores)]), threads=threads))
    assert predicted.step == pytest.approx(work * max(1.0, ranks * threads / cores), rel=1e-6)


@given(data=st.data(), students=st.integers(1, 4), teachers=st.integers(0, 4), window=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_step_is_faster_than_its_bound_nor_slower_than_one_after_the_other(data, students, teachers, window):
    ranks = students + teachers
    def draw(least, most):
        return np.array(data.draw(st.lists(st.floats(least, most), min_size=ranks, max_size=ranks)))
    train = np.where(np.arange(ranks) < students, draw(0.01, 1), 0)
    system = System(students, draw(0, 1), train, draw(0, 1e6), window, 0.01, 1e7, 1e-4, np.arange(ranks) % 2,
                    np.array([2.0, 1.0]))
    predicted = simulate(system)
    one_by_one = (system.answer + train).sum() + 0.02 + system.inbound() + system.outbound().max() + 0.01
    assert system.bound() * (1 - 1e-6) <= predicted.step <= one_by_one
    assert ((predicted.busy >= 0) & (predicted.busy <= 1)).all()


def test_two_teachers_that_wake_together_take_turns_with_the_student_on_two_cores():
    """Worked by hand: three at work share two cores until both teachers are done at 1.5; the student's other 2 follow."""
    assert simulate(dedicated([3.0], [1.0, 1.0], cores=np.array([2.0]))).step == pytest.approx(3.5)


@given(train=seconds, latency=st.floats(0, 0.5))
@quick
def test_a_slow_network_is_hidden_until_the_ballot_is_late(train, latency):
    """A student may post for step k + window once the vote of step k - 2 is known, three trainings later at the soonest."""
    ballot = 2 * latency  # two ranks: one hop there, one back
    predicted = simulate(dedicated([train], [0.5 * train], 1.0, bandwidth=1e9, latency=latency, window=8))
    assert predicted.step == pytest.approx(max(train, (train + ballot) / 3), rel=1e-3)


def test_who_has_little_to_do_is_idle():
    predicted = simulate(dedicated([1.0, 1.0], [0.25, 0.75]))
    assert predicted.idle("student") == pytest.approx(0) and predicted.idle("teacher") == pytest.approx(0.5)


def test_thousands_of_ranks_are_simulated_in_seconds():
    chance = np.random.default_rng(0)
    train = [0.9] * 512
    answer = chance.uniform(0.5, 1.0, 4096 - 512).tolist()
    began = time.process_time()
    predicted = simulate(dedicated(train, answer, 1e4, bandwidth=1e9, latency=1e-5))
    assert time.process_time() - began < 5  # 0.1 s where it was written
    assert predicted.step == pytest.approx(max(answer), rel=0.05)
