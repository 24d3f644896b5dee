"""Results of a study that nobody ran, as `pkd study` writes them; a network's files as those of a large one."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np

from pkd.files import read_json, write_json
from pkd.recipe_file import identity, load_recipe
from pkd.study.figures import aggregate
from pkd.study.results import packed
from pkd.tensor_file import read_tensors
from pkd.weights_file import Weights, write_weights

IMAGES = 400


@cache
def recipe_as_recorded(kind: str) -> dict:
    return identity(load_recipe("digits", [f"objective.kind={kind}"]))


def made_up(arm: str, seed: int, accuracy: float, validation: float, control: bool = False, cost: float = 1.0,
            loss: float = 0.5) -> dict:
    """Of an ensemble and its one student, which knows a tenth less; the pyramid costs 2."""
    networks, correct = {}, {}
    for name, share in (("mobile", 0.9), ("ensemble", 1.0)):
        right = np.random.default_rng([seed, len(name)]).random(IMAGES) < accuracy * share
        networks[name] = {"accuracy": right.mean(), "loss": loss + 1 - share, "validation_accuracy": validation * share,
                          "validation_loss": loss + 1 - share, "calibration_error": (1 - accuracy * share) / 4,
                          "parameters": len(name)}
        correct[name] = packed(right)
    return {"arm": arm, "title": arm, "control": control, "changes": [], "seed": seed, "test_readings": 1,
            "test_images": IMAGES, "world_size": 1, "micro_batch": 32, "made_by": "pkd", "networks": networks,
            "correct": correct, "student_flops": 5.0, "recipe": recipe_as_recorded("top" if control else "composed"),
            "teachers": {"level0": {"accuracy": accuracy}} if cost else {}, "teacher_flops": cost}


def in_several_files(stem: Path, to: Path) -> Path:
    """A copy of a network whose weights lie in more than one file; their index."""
    shutil.copy(stem.with_suffix(".json"), to.with_suffix(".json"))
    tensors = read_tensors(stem.with_suffix(".safetensors"))
    index = write_weights(to, tensors, most=max(tensor.nbytes for tensor in tensors.values()))
    write_json(to.with_suffix(".json"), read_json(to.with_suffix(".json")) | {"sha256": Weights(index).sha256()})
    assert index.name.endswith(".index.json")
    return index


def figures_of(results: list[dict], arms: list[str], wanted: tuple[int, ...] = (0, 1),
               controls: tuple[str, ...] = ()) -> dict:
    found = aggregate("made-up", results, arms, list(wanted), 2.0, 10, len(results), list(controls))
    return json.loads(json.dumps(found, allow_nan=False))
