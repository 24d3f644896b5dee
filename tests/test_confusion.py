"""A partition by confusion: classes that are mistaken for each other share a specialist; known once the top is trained."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import refused, run

from pkd.confusion import group

LEVELS = ("pyramid.1={teachers: 2, partition: confusion, model: {name: pkd_resnet_s, width: 0.25}}",
          "pyramid.2={teachers: 4, partition: confusion, slack: 0.5, model: {name: pkd_resnet_s, width: 0.25}}",
          "teachers.steps=10", "teachers.evaluate_every=5", "distill.epochs=1")


@given(classes=st.integers(4, 40), count=st.integers(1, 8), slack=st.floats(0, 1), seed=st.integers(0, 2**40),
       draw=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_groups_are_a_balanced_partition(classes, count, slack, seed, draw):
    count = min(count, classes // 2)
    seen = np.random.default_rng(draw.randrange(2**32)).dirichlet(np.full(classes, 0.2), classes)
    groups = group(seen, count, slack, seed)
    assert sorted(c for members in groups for c in members) == list(range(classes)) and len(groups) == count
    share = classes / count
    for members in groups:
        assert members == sorted(members) and len(members) >= 2
        assert math.floor(share * (1 - slack)) <= len(members) <= max(math.ceil(share), share * (1 + slack))
    assert groups == group(seen, count, slack, seed), "the same on every machine that asks"


@given(count=st.integers(2, 5), size=st.integers(2, 6), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_classes_that_are_confused_land_together(count, size, seed):
    """Hidden groups, shuffled: 0.3 within a group, hardly anything across."""
    chance = np.random.default_rng(seed)
    hidden = chance.permutation(np.repeat(np.arange(count), size))
    seen = np.where(hidden[:, None] == hidden, 0.3, 0.001) + chance.uniform(0, 0.0005, (count * size,) * 2)
    found = group(seen / seen.sum(1, keepdims=True), count, 0.25, seed)
    assert sorted(found) == sorted(np.flatnonzero(hidden == index).tolist() for index in range(count))


def test_teach_trains_the_top_groups_the_classes_and_trains_the_specialists(tiny, tmp_path):
    folder = tmp_path / "run"
    start = (tiny, "--run-folder", folder, *LEVELS)
    assert "run pkd teach first" in refused(1, "distill", *start)
    few = (*start[:1], "--run-folder", tmp_path / "labels", *LEVELS, "objective.kind=alone", "--steps", 2)
    run(1, "distill", *few)  # who asks no specialist needs no groups
    assert "asks no teacher: there is nothing to teach" in refused(1, "teach", *few)
    assert "--teacher level0 first" in refused(1, "teach", *start, "--teacher", "level1-0")
    run(2, "teach", *start, "--teacher", "level0")
    tree = json.loads((folder / "pyramid.json").read_text())
    groups = [teacher["classes"] for teacher in tree["teachers"] if teacher["level"] == 1]
    assert sorted(c for members in groups for c in members) == list(range(10)) and tree["grouped_by"]
    run(2, "teach", *start)
    assert json.loads((folder / "pyramid.json").read_text()) == tree, "found once"
    assert json.loads((folder / "teachers" / "level1-1.json").read_text())["class_ids"] == groups[1]
    run(2, "distill", *start)
    run(1, "evaluate", folder)
    whole = tmp_path / "whole"
    run(2, "teach", tiny, "--run-folder", whole, *LEVELS)
    assert json.loads((whole / "pyramid.json").read_text()) == tree
    for before, after, sentence in (("teachers: 4", "teachers: 3", "asks for 3 groups"),
                                    ("slack: 0.5", "slack: 1", "with slack 1.0")):
        other = (LEVELS[0], LEVELS[1].replace(before, after), *LEVELS[2:], f"teachers_from={whole}")
        said = refused(1, "distill", tiny, "--run-folder", tmp_path / after[:5], *other)
        assert sentence in said and "holds 4 of slack 0.5" in said


def test_the_top_comes_first_in_a_chain_of_jobs(tiny, tmp_path):
    out = run(1, "launch", tiny, *LEVELS, "--run-folder", tmp_path / "run", "--on", "slurm", "--ranks-per-node", 2,
              "--dry-run")[0].out
    specialists = next(line for line in out.splitlines() if "--array" in line)
    assert "--array=0-5" in specialists and "--dependency=afterok:<id of teach-top>" in specialists
    assert "pyramid.0" in refused(1, "plan", tiny, "pyramid.0.partition=confusion")
    assert run(1, "plan", tiny, *LEVELS, "--world", 2)[0].out.count("level2-3") == 1


@pytest.mark.parametrize("count", [1, 5])
def test_what_no_teacher_confuses_is_grouped_all_the_same(count):
    assert sorted(c for members in group(np.eye(10), count, 0.0, 0) for c in members) == list(range(10))
