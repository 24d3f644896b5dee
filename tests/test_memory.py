"""What a student rank holds, as `pkd plan` predicts it; tests/bench/memory.py has the table of 1, 2 and 4 ranks."""

import json

import pytest
from bench.memory import CASES, element_and_stage, name_of, worker
from ranks import free_port, spawn

from pkd.workload import student_bytes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    spawn(worker, 2, free_port(), str(folder), ranks=2)
    return json.loads((folder / "2").read_text())


@pytest.mark.parametrize("config, accumulation", CASES)
def test_weights_gradients_masters_and_states_are_predicted_within_a_tenth(measured, config, accumulation):
    found = measured[name_of(config, accumulation)]
    held = sum(found[kind] for kind in ("weights", "gradients", "masters", "states"))
    predicted = student_bytes(found["count"], *element_and_stage(config), 2, 1, accumulation)
    assert predicted == pytest.approx(held, rel=0.1)


def test_an_ensemble_under_zero_3_is_held_in_halves_by_two_ranks(measured):
    """Whose states do not fit one rank, fit two: weights, gradients and states alike."""
    for kind in ("weights", "gradients", "states"):
        assert measured["zero3"][kind] == pytest.approx(measured["zero0"][kind] / 2, rel=0.01), kind
