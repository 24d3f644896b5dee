"""What was tried for a gain on seeds 1 to 4: tables of launch/studies/README.md follow from files in launch/studies/screens.
"""

import numpy as np
import pytest
from ranks import REPOSITORY

from pkd.files import read_json

SCREENS = REPOSITORY / "launch" / "studies" / "screens"
PLAIN = "pyramid composed with the top of pyramid: specialists' weight {}, temperature {}"
LEARNED = "pyramid composed, a weight and a temperature learned for each {}"
SOFT_TARGETS = {  # as the table calls them, and as launch/weigh_targets.py does
    "the top": "pyramid level0",
    "one top of 2.33 times the steps (`top-long`)": "top-long level0",
    "mean of two tops": "mean of pyramid and another-top",
    "composed: the top and four specialists by confusion, `pkd_resnet_s`, 3,000 steps each":
        PLAIN.format(0.5, 1) + " <- pkd's",
    "specialists' weight 0.25 in place of 0.5": PLAIN.format(0.25, 1),
    "specialists' weight 0.75": PLAIN.format(0.75, 1),
    "specialists' answers alone, by the chain rule (weight 1)": PLAIN.format(1, 1),
    "specialists' temperature 1.5 in place of 1": PLAIN.format(0.5, 1.5),
    "specialists' temperature 2": PLAIN.format(0.5, 2),
    "weight and temperature of the level learned": LEARNED.format("level"),
    "weight and temperature of each specialist learned": LEARNED.format("specialist"),
    "composed, with the longer top": "pyramid composed with the top of top-long: specialists' weight 0.5, temperature 1",
    "mean of the longer top and another top": "mean of another-top and top-long",
}

SEED_1 = {  # (file, name in it)
    "the top": ("soft-targets", "pyramid level0"),
    "composed": ("soft-targets", PLAIN.format(0.5, 1) + " <- pkd's"),
    "the top, trained on sharper views": ("sharper-views", "sharper level0"),
    "composed, specialists of sharper views": (
        "sharper-views", "sharper composed with the top of pyramid: specialists' weight 0.5, temperature 1"),
    "a top of 4,480 steps that sees 42 x 42 pixels": ("higher-resolution", "a top of 4,480 steps at 42 x 42"),
    "composed, specialists that see 42 x 42 pixels": (
        "higher-resolution", "specialists at 42 x 42 composed with the top, 28 x 28: weight 0.5"),
    "a top of 16,300 steps": ("trained-out", "trained-out level0"),
    "composed, the top and specialists of 6,987 steps": (
        "trained-out", "trained-out composed with the top of top-long: specialists' weight 0.5, temperature 1"),
}


def of_seeds(values: list[float]) -> str:
    """Of shares: their mean and range in %."""
    mean, least, most = (f"{100 * number:.1f}" for number in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def row(beginning: str) -> str:
    lines = (REPOSITORY / "launch" / "studies" / "README.md").read_text().splitlines()
    found = [line for line in lines if line.startswith(f"| {beginning} | ")]
    assert len(found) == 1, beginning
    return found[0]


def said_of_soft_targets(name: str) -> str:
    seen = [{one["name"]: one for one in read_json(path)["rows"]}[name]
            for path in sorted(SCREENS.glob("glyphs-soft-targets-seed-*.json"))]
    assert len(seen) == 4
    return f"{of_seeds([one['accuracy'] for one in seen])} | {np.mean([one['cross_entropy'] for one in seen]):.3f} |"


@pytest.mark.parametrize("text", SEED_1)
def test_soft_targets_of_seed_1(text: str):
    file, name = SEED_1[text]
    found = {one["name"]: one for one in read_json(SCREENS / f"glyphs-{file}-seed-1.json")["rows"]}[name]
    assert row(f"seed 1: {text}").endswith(f" | {100 * found['accuracy']:.1f} | {found['cross_entropy']:.3f} |")


@pytest.mark.parametrize("text", SOFT_TARGETS)
def test_soft_targets_of_four_seeds(text: str):
    assert row(text).endswith(f" | {said_of_soft_targets(SOFT_TARGETS[text])}"), "what they cost, before that, is arithmetic"


def trained(file: str) -> dict[str, list[float]]:
    """Ensembles' validation accuracy by arm, one a training."""
    found = read_json(SCREENS / f"glyphs-{file}.json")
    return {one["name"]: [training["ensemble"] for training in one["trainings"]] for one in found["rows"]}


def test_a_long_schedule_gains_more_than_soft_targets_do():
    long, text = trained("long-schedule-seed-1"), (SCREENS.parent / "README.md").read_text()
    said = ", ".join(f"`{arm}` {100 * found:.1f}" for arm, (found,) in long.items())
    assert f"{said}," in " ".join(text.split())


def test_students_on_paths_by_groups():
    found, again = trained("paths-by-groups"), trained("students-seed-1")
    said = " | ".join(of_seeds(found[arm]) for arm in ("top", "composed", "paths by groups", "top-long"))
    assert row("one training a seed") == f"| one training a seed | {said} |"
    second = [f"{100 * again[arm][1]:.1f}" for arm in ("top", "composed", "paths by groups")]
    assert "A second training on seed 1 gave {}, {} and {},".format(*second) in (SCREENS.parent / "README.md").read_text()
