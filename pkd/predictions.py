"""What networks said of every image of a split: enough for accuracy, calibration and confusion, without logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pkd.files import read_json, write_json
from pkd.tensor_file import read_tensors, write_tensors

ENSEMBLE = "ensemble"  # the mean of the logits of all students, the last row of every tensor
BINS = 15  # of confidence, as in Guo et al. 2017


@dataclass(frozen=True)
class Predictions:
    """names: of the students and ENSEMBLE; images in the order of the split."""

    names: tuple[str, ...]
    labels: torch.Tensor  # int64 [images]
    predicted: torch.Tensor  # int64 [names, images], the class of the largest logit
    confidence: torch.Tensor  # fp32 [names, images], the probability of that class
    loss: torch.Tensor  # fp32 [names, images], -log of the label's probability, in nats

    @property
    def correct(self) -> torch.Tensor:
        """bool [names, images]."""
        return self.predicted == self.labels

    def calibration_errors(self) -> list[float]:
        return [calibration_error(own, right) for own, right in zip(self.confidence, self.correct)]

    def write(self, path: Path) -> None:
        """Write <path>.safetensors, then <path>.json with the names."""
        tensors = {key: getattr(self, key) for key in ("labels", "predicted", "confidence", "loss")}
        write_tensors(path.with_suffix(".safetensors"), tensors)
        write_json(path.with_suffix(".json"), {"names": list(self.names)})

    @staticmethod
    def read(path: Path) -> "Predictions":
        """The inverse of write. Raises UserError where a file is missing or damaged."""
        names = tuple(read_json(path.with_suffix(".json"))["names"])
        return Predictions(names, **read_tensors(path.with_suffix(".safetensors")))


class Recorder:
    """Collects predictions batch by batch."""

    def __init__(self, names: list[str]):
        self.names = (*names, ENSEMBLE)
        self.batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits: fp32 [names, rows, classes]; labels: int64 [rows]."""
        log_probability = F.log_softmax(logits, -1)
        best = log_probability.max(-1)
        loss = -log_probability.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
        self.batches.append(tuple(t.cpu() for t in (labels, best.indices, best.values.exp(), loss)))

    def predictions(self) -> Predictions:
        return Predictions(self.names, *(torch.cat(parts, -1) for parts in zip(*self.batches)))


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error, a fraction: over BINS equally wide bins of confidence, the mean distance between
    confidence and accuracy, weighted by images (Guo et al. 2017). confidence: [images] in [0, 1]; correct: bool [images].
    """
    bins = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - correct.double())
    return gap.abs().sum().item() / max(1, len(confidence))
