"""What is kept of every test image is enough for the summary's figures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pkd.errors import UserError
from pkd.predictions import ENSEMBLE, Predictions, Recorder, calibration_error


def recorded(seed: int, batches: list[int], classes: int = 5) -> tuple[Predictions, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    record = Recorder(["one", "two"])
    logits = [4 * torch.randn(3, rows, classes, generator=chance) for rows in batches]
    labels = [torch.randint(classes, (rows,), generator=chance) for rows in batches]
    for own, truth in zip(logits, labels):
        record.add(own, truth)
    return record.predictions(), torch.cat(logits, 1), torch.cat(labels)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_predictions_are_those_of_the_logits_however_they_came(seed, batches):
    mine, logits, labels = recorded(seed, batches)
    assert mine.names == ("one", "two", ENSEMBLE) and torch.equal(mine.labels, labels)
    probability = logits.double().softmax(-1)
    assert torch.equal(mine.predicted, logits.argmax(-1))
    assert torch.equal(mine.correct, logits.argmax(-1) == labels)
    np.testing.assert_allclose(mine.confidence, probability.max(-1).values, rtol=1e-5)
    truth = probability.gather(-1, labels.expand(3, -1)[..., None])[..., 0]
    np.testing.assert_allclose(mine.loss, -truth.log(), rtol=1e-5, atol=1e-6)


def test_predictions_survive_the_disk(tmp_path):
    mine, _, _ = recorded(0, [7, 2])
    mine.write(tmp_path / "predictions")
    found = Predictions.read(tmp_path / "predictions")
    assert found.names == mine.names
    assert all(torch.equal(getattr(found, key), getattr(mine, key)) for key in ("labels", "predicted", "confidence", "loss"))
    (tmp_path / "predictions.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        Predictions.read(tmp_path / "predictions")


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_the_calibration_error_is_the_mean_gap_of_its_bins(images):
    confidence, correct = (torch.tensor(column) for column in zip(*images))
    gaps = 0.0
    for index in range(15):
        inside = [(c, r) for c, r in images if min(int(c * 15), 14) == index]
        if inside:
            gaps += len(inside) * abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
    assert calibration_error(confidence, correct) == pytest.approx(gaps / len(images), abs=1e-9)


def test_a_sure_network_that_is_right_half_of_the_time_is_half_off():
    assert calibration_error(torch.ones(10), torch.arange(10) % 2 == 0) == 0.5
