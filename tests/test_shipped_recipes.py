"""The recipes that come with pkd: each says how it is started and what it gives, and fits the data that it is for."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import REPOSITORY, run

from pkd.cli import parse
from pkd.console import Console
from pkd.data import load_data
from pkd.models import build, check_model
from pkd.objective import asked, constants
from pkd.plan import plan
from pkd.pyramid import Pyramid, build_pyramid
from pkd.recipe import Recipe
from pkd.recipe_file import load_recipe
from pkd.shipped import shipped_names
from pkd.sources import FASHION
from pkd.study.results import micro_batch

RECIPES = shipped_names("recipes")
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
            "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax")
DATA = {  # classes, channels and pixels a side of what each is for
    "digits": (10, 1, 8), "fashion-mnist": (FASHION, 1, 28), "glyphs": (100, 1, 28), "cifar100-paper": (100, 3, 32),
    "imagenet": (1000, 3, 224), "nih-chest-xray": (FINDINGS, 1, 224), "my-folder": (5, 3, 32),
}


def head(name: str) -> list[str]:
    """The lines of comment that a recipe begins with."""
    lines = (REPOSITORY / "launch" / "recipes" / f"{name}.yaml").read_text().splitlines()
    return [line[1:] for line in lines[:next(k for k, line in enumerate(lines) if not line.startswith("#"))]]


def commands(name: str) -> list[list[str]]:
    """The commands in a recipe's head, which are indented: each as words."""
    lines = [line for line in head(name) if line.startswith("   ")]
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r" {3,}|&&", line.strip())]
    return [found for found in words if found and ("pkd" in found or "launch/" in found[0] + found[-1])]


def pyramid_of(recipe: Recipe, classes: tuple[str, ...]) -> Pyramid:
    """With even groups where it is for the top teacher to say."""
    levels = tuple(level.model_copy(update={"partition": "contiguous"}) if level.partition == "confusion" else level
                   for level in recipe.pyramid)
    return build_pyramid(levels, classes, recipe.seed)


def test_every_recipe_is_tried_here():
    assert set(RECIPES) == set(DATA)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_commands_that_pkd_accepts_and_says_what_they_give(name):
    text = " ".join(head(name))
    assert head(name)[0].startswith("   ") and commands(name), "it does not begin with a command"
    figure = r"seeds? [\d, ]+: [\d., ]+ %", r"\d (seconds|minutes|hours)", r"\d (CPU|GPU|ranks|cores|H\d00)|two cores"
    assert "Not run here" in text or all(re.search(one, text) for one in figure), "no figure with seeds, time and machine"
    found = [words[words.index("pkd") + 1:] for words in commands(name) if "pkd" in words]
    assert found
    for words in found:
        arguments = parse(words)
        if hasattr(arguments, "recipe"):
            assert load_recipe(arguments.recipe, arguments.overrides).name == name
        else:
            assert str(arguments.run) == f"runs/{name}"
    for words in commands(name):
        assert "pkd" in words or any((REPOSITORY / word).is_file() for word in words), words


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_data_that_it_is_for(name):
    recipe, (classes, channels, side) = load_recipe(name), DATA[name]
    classes = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
    pyramid = pyramid_of(recipe, classes)
    constants(recipe, pyramid.levels)
    asked(recipe.objective.kind, pyramid)
    if recipe.data.image_size:
        assert recipe.data.image_size == side
    for teacher in pyramid.teachers:
        check_model(teacher.model)  # weights too, which are not fetched below
    for model, count in {(teacher.model, len(teacher.classes)) for teacher in pyramid.teachers}:
        build(model.model_copy(update={"weights": None}), count, channels, (side, side), empty=True)
    for model in {student.model for student in recipe.students}:
        build(model, len(classes), channels, (side, side))


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_a_recipe_can_be_planned_where_its_data_is(name):
    recipe = load_recipe(name)
    if recipe.data.path and not Path(recipe.data.path).is_dir():
        pytest.skip(f"{recipe.data.path} is not here: apt-get install dataset-fashion-mnist")
    assert len(plan(recipe, 4, Console(quiet=True))["ranks"]) == 4


def test_the_recipes_of_the_paper_have_its_published_constants():
    """As its two scripts have them: the fourth student of chest x-rays decays five times as fast as the one like it."""
    cifar, nih = load_recipe("cifar100-paper"), load_recipe("nih-chest-xray")
    assert [(level.model.name, level.teachers) for level in cifar.pyramid] == [("resnet101", 1), ("resnet50", 2),
                                                                                ("resnet18", 4)]
    assert [(level.model.name, len(level.classes or [0])) for level in nih.pyramid] == [("resnet101", 1), ("resnet50", 2)]
    students = ["mobilenet_v2", "shufflenet_v2_x1_0"] * 2
    for recipe, lr, decay, batch, seed in ((cifar, [0.06, 0.08] * 2, [2e-4] * 4, 32, 40),
                                           (nih, [0.06, 0.006] * 2, [5e-4] * 3 + [2.5e-3], 16, 42)):
        assert [student.model.name for student in recipe.students] == students
        assert [student.lr for student in recipe.students] == lr
        assert [student.weight_decay for student in recipe.students] == decay
        assert {(student.momentum, student.schedule, student.patience) for student in recipe.students} == {
            (0.9, "plateau", 3)}
        assert (recipe.distill.batch, recipe.distill.epochs, recipe.data.seed) == (batch, 500, seed)
        assert recipe.distill.sync_batch_norm, "batch statistics are of the whole batch, as in its one process"
        assert micro_batch(recipe, {"student_ranks": 2, "groups": 1, "accumulation": 1}) == batch
        assert (recipe.objective.kind, recipe.objective.temperature) == ("paper", 20)
        assert not any((recipe.objective.routes, recipe.objective.denominator)), "the kind's own, which are the paper's"
        assert recipe.views.different == 1, "no augmentation"
    assert cifar.objective.weights == (0.6, 0.6, 1.0) and cifar.objective.ensemble == (0.2, 0.8) * 2
    assert nih.objective.weights == (0.4, 0.6) and nih.objective.ensemble == (0.2, 0.6) * 2
    assert {student.model.input_size for student in cifar.students} == {120} and nih.data.image_size == 224


def test_the_recipe_of_chest_x_rays_reads_the_table_that_its_head_makes(tmp_path):
    rows = ["Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"]
    for number, finding in enumerate([*FINDINGS * 6, "Hernia|Mass"]):
        Image.fromarray(np.full((30, 30), number, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{finding},0,30,30,0.1,0.1,")
    (tmp_path / "single.csv").write_text("\n".join(rows))
    recipe = load_recipe("nih-chest-xray", [f"data.path={tmp_path / 'single.csv'}"])
    data = load_data(recipe.data)
    assert data.classes == FINDINGS and data.dropped == 1 and data.size == (224, 224)
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [56, 14, 14]
    levels = build_pyramid(recipe.pyramid, data.classes, recipe.seed)
    assert [len(teacher.classes) for teacher in levels.teachers] == [14, 7, 7]


def test_a_folder_of_ones_own_images_goes_through_all_phases(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(5):
        folder = tmp_path / "images" / f"digit {label}"
        folder.mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:20]):
            Image.fromarray((image * 15).astype(np.uint8)).resize((40, 50)).save(folder / f"{number}.png")
    words = ("my-folder", f"data.path={tmp_path / 'images'}", "teachers.steps=4", "teachers.batch=16",
             "teachers.evaluate_every=2", "distill.epochs=1", "distill.batch=16")
    run(1, "teach", *words, "--run-folder", tmp_path / "run")
    run(1, "distill", *words, "--run-folder", tmp_path / "run")
    assert "ensemble" in run(1, "evaluate", tmp_path / "run")[0].out
