"""What of a stretch of steps is timed as the steady state; pure."""

from hypothesis import given
from hypothesis import strategies as st

from pkd.metrics import steady


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
    """Or a speed with teachers would leave out a part of their work."""
    last = first + steps
    timed = steady(first, last, window + at_once, at_once)
    assert first + steps // 4 <= timed.start < timed.stop <= last
    if at_once <= window and steps >= 4 * (window + 3 * at_once):
        assert len(timed) >= steps // 4 - at_once
        work = answered(first, last, window, at_once)
        assert sum(work[step] for step in timed) == len(timed)


@given(st.integers(0, 100), st.integers(1, 200))
def test_without_teachers_all_but_the_first_quarter_is_timed(first, steps):
    assert steady(first, first + steps, 0, 1) == range(first + steps // 4, first + steps)
