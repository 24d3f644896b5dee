"""What of a stretch of steps is timed as the steady state; pure."""

from hypothesis import given
from hypothesis import strategies as st

from pkd.metrics import enough, steady


def answered(first: int, last: int, window: int, at_once: int) -> dict[int, int]:
    """Steps that co-located teachers answer while the students are in each step: Distillation.train_epoch, Exchange.fill."""
    filled: set[int] = set()

    def post(step: int) -> int:
        new = set(range(step, min(step + at_once, last))) if step not in filled else set()
        filled.update(new)
        return len(new)
    for step in range(first, min(first + window, last)):
        post(step)
    return {step: post(step + window) if step + window < last else 0 for step in range(first, last)}


@given(st.integers(0, 100), st.integers(1, 200), st.integers(1, 16), st.integers(1, 16))
def test_teachers_answer_as_many_steps_as_are_timed(first, steps, window, at_once):
    """Or a speed with teachers would leave out a part of their work: then there is none."""
    last, at_once = first + steps, min(window, at_once)
    timed = steady(first, last, window + at_once, at_once)
    assert first + steps // 4 <= timed.start and timed.stop <= max(last, timed.start)
    work = answered(first, last, window, at_once)
    assert sum(work[step] for step in timed) == len(timed)
    assert timed or steps < 4 * (window + 3 * at_once)
    more = enough(steps, window + at_once, at_once)
    assert steady(0, more, window + at_once, at_once) and (more == steps if timed else more > steps)


@given(st.integers(0, 100), st.integers(1, 200))
def test_without_teachers_all_but_the_first_quarter_is_timed(first, steps):
    assert steady(first, first + steps, 0, 1) == range(first + steps // 4, first + steps)
