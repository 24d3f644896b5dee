"""Results of a study that nobody ran, as `pkd study` writes them."""

import json

import numpy as np

from pkd.study.figures import aggregate
from pkd.study.results import packed

IMAGES = 400


def made_up(arm: str, seed: int, accuracy: float, validation: float, control: bool = False, cost: float = 1.0,
            loss: float = 0.5) -> dict:
    """Of one student; the pyramid costs 2."""
    correct = np.random.default_rng(seed).random(IMAGES) < accuracy
    figures = {"accuracy": correct.mean(), "loss": 0.5, "calibration_error": 0.1, "validation_accuracy": validation,
               "parameters": 7}
    figures["validation_loss"] = loss
    return {"arm": arm, "title": arm, "control": control, "changes": [], "seed": seed, "test_readings": 1,
            "test_images": IMAGES, "world_size": 1, "micro_batch": 32, "networks": {"mobile": figures, "ensemble": figures},
            "correct": {"mobile": packed(correct), "ensemble": packed(correct)}, "student_flops": 5.0,
            "teachers": {"level0": {"accuracy": accuracy}} if cost else {}, "teacher_flops": cost}


def figures_of(results: list[dict], arms: list[str], wanted: tuple[int, ...] = (0, 1)) -> dict:
    return json.loads(json.dumps(aggregate("made-up", results, arms, list(wanted), 2.0, 10), allow_nan=False))
