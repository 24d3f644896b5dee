"""Folders of teachers that arms share: what one has, another of the same seed takes over, and nothing else."""

import shutil
from pathlib import Path

import pytest
import torch

from pkd.confusion import group_levels, pyramid_of
from pkd.data import load_data
from pkd.files import read_json, write_json
from pkd.network_file import fresh, teacher_identity, write_network
from pkd.order import Order, is_done
from pkd.pyramid import Teacher
from pkd.recipe import Recipe
from pkd.recipe_file import load_recipe
from pkd.run_folder import RunFolder
from pkd.study.teachers import hand_on

SMALL = "{name: pkd_resnet_s, width: 0.25}"
BY_CONFUSION = f"pyramid=[{{teachers: 1, model: {SMALL}}}, {{teachers: 2, partition: confusion, model: {SMALL}}}]"


def put(folder: Path, recipe: Recipe, data, teacher: Teacher) -> None:
    """A teacher as `pkd teach` leaves it, but for the training."""
    network = fresh(teacher.model, len(teacher.classes), data, recipe.seed, teacher.name)
    facts = {"name": teacher.name, "level": teacher.level, "class_ids": list(teacher.classes), "steps": 30,
             "identity": teacher_identity(recipe, teacher, data)}
    write_network(folder / "teachers" / teacher.name, network, teacher.model, [str(c) for c in teacher.classes], data, facts)


@pytest.fixture
def there(tiny, tmp_path):
    """A folder with a whole pyramid by confusion, its recipe and its data."""
    recipe = load_recipe(str(tiny), [BY_CONFUSION])
    data, folder = load_data(recipe.data), tmp_path / "there-seed-0"
    run = RunFolder(folder)
    run.open(recipe, "teach")
    put(folder, recipe, data, pyramid_of(recipe, data, run.teachers, partial=True).teachers[0])
    top = fresh(recipe.pyramid[0].model, 10, data, 0, "level0")
    group_levels(recipe, data, run.teachers, top, torch.device("cpu"))
    for teacher in pyramid_of(recipe, data, run.teachers).teachers[1:]:
        put(folder, recipe, data, teacher)
    for lock in run.locks:
        lock.release()
    return folder, recipe, data


def test_a_whole_pyramid_by_confusion_is_taken_over_with_its_groups(there, tiny, tmp_path):
    folder, _, data = there
    here, recipe = tmp_path / "here-seed-0", load_recipe(str(tiny), [BY_CONFUSION, "distill.epochs=9"])
    assert hand_on(here, recipe, data) == ["level0", "level1-0", "level1-1"]
    assert read_json(here / "pyramid.json") == read_json(folder / "pyramid.json")
    for name in ("level0", "level1-0", "level1-1"):
        assert (here / "teachers" / f"{name}.safetensors").read_bytes() == \
            (folder / "teachers" / f"{name}.safetensors").read_bytes()
    assert is_done(Order(recipe, [], here, "here", 1, ("teach",), None), "teach"), "nothing is left to train"
    assert hand_on(here, recipe, data) == [], "what is there stays"


def test_another_pyramid_takes_the_top_alone(there, tiny, tmp_path):
    data = there[2]
    peers = load_recipe(str(tiny), [f"pyramid=[{{teachers: 1, model: {SMALL}}}, {{teachers: 1, model: {SMALL}}}]"])
    assert hand_on(tmp_path / "peers-seed-0", peers, data) == ["level0"]
    assert not is_done(Order(peers, [], tmp_path / "peers-seed-0", "here", 1, ("teach",), None), "teach")
    other = load_recipe(str(tiny), [BY_CONFUSION.replace("teachers: 2", "teachers: 3")])
    assert hand_on(tmp_path / "three-seed-0", other, data) == ["level0"], "groups of other levels are made anew"


@pytest.mark.parametrize("change", ["seed=1", "teachers.steps=31", "teachers.lr=0.2", "views.flip=true"])
def test_teachers_of_other_settings_or_seeds_are_not_taken(there, tiny, tmp_path, change):
    recipe = load_recipe(str(tiny), [BY_CONFUSION, change])
    if recipe.seed:  # a folder's name is not believed
        shutil.copytree(there[0], tmp_path / "renamed-seed-1")
    assert hand_on(tmp_path / f"here-seed-{recipe.seed}", recipe, there[2]) == []


def test_a_damaged_teacher_is_refused_rather_than_handed_on(there, tiny, tmp_path):
    folder, recipe, data = there
    facts = read_json(folder / "teachers" / "level0.json")
    write_json(folder / "teachers" / "level0.json", {**facts, "sha256": "0" * 64})
    with pytest.raises(Exception, match="another sha256"):
        hand_on(tmp_path / "here-seed-0", recipe, data)
