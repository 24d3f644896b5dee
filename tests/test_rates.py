"""Learning rates by step and by validation, and their state through a checkpoint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkd.rates import Rates, cosine
from pkd.recipe import Optimisation


@given(base=st.floats(1e-4, 10), steps=st.integers(2, 500), warmup=st.integers(0, 100))
def test_cosine_rises_to_the_base_and_falls_to_nothing(base, steps, warmup):
    rates = [cosine(base, step, steps + warmup, warmup) for step in range(steps + warmup + 1)]
    assert max(rates) == pytest.approx(base)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[-1] == pytest.approx(0, abs=1e-9 * base)


def test_plateau_lowers_one_students_rate_after_its_patience_and_no_others():
    settings = [Optimisation(schedule="plateau", lr=1.0, patience=2, factor=0.5), Optimisation(schedule="constant", lr=3.0)]
    rates = Rates(settings, 100)
    seen = []
    for loss in (1.0, 0.9, 0.95, 0.95, 0.95, 0.8):
        rates.validated([loss, loss])
        seen.append(rates.at(7))
    assert seen == [[1.0, 3.0]] * 4 + [[0.5, 3.0]] * 2


@given(losses=st.lists(st.floats(0.1, 5), min_size=1, max_size=20), part=st.floats(0, 1, exclude_max=True))
def test_a_schedule_goes_on_from_json_as_if_nothing_had_happened(losses, part):
    cut = int(part * len(losses))
    settings = [Optimisation(schedule="plateau", patience=1, warmup_steps=3), Optimisation(),
                Optimisation(schedule="plateau")]
    whole, first, second = (Rates(settings, 50) for _ in range(3))
    for step, loss in enumerate(losses):
        whole.validated([loss] * 3)
        (first if step < cut else second).validated([loss] * 3) if step != cut else None
        if step == cut:
            second.load_json(json.loads(json.dumps(first.to_json())))
            second.validated([loss] * 3)
    assert [second.at(step) for step in range(50)] == [whole.at(step) for step in range(50)]
