"""Folders of teachers that the arms of a study share: each teacher, and each archive, is made once.

Arms that need the same teachers read one folder through teachers_from. Folders that have only some teachers in common, such
as the top, hand those on as copies.
"""

import json
from pathlib import Path

from pkd.confusion import pyramid_of, waiting_levels
from pkd.data import DataSet
from pkd.files import read_json, write_bytes, write_json
from pkd.network_file import copy_network, teacher_identity
from pkd.objective import constants
from pkd.pyramid import Teacher, teacher_names
from pkd.recipe import Recipe
from pkd.recipe_file import digest, identity
from pkd.run_folder import RunFolder

STUDENTS = ("students", "objective")  # sections that decide nothing about teachers


def archived(recipe: Recipe) -> bool:
    """Whether an arm's soft targets come from an archive: where views repeat, unless the recipe says online itself."""
    online = "soft_targets" in recipe.model_fields_set and recipe.soft_targets == "online"
    return bool(recipe.views.different) and not online


def teacher_words(recipe: Recipe, words: list[str]) -> list[str]:
    """The recipe's words without what its teachers and their archive do not depend on, so that arms meet in one folder."""
    kept = [word for word in words[1:] if word.partition("=")[0].split(".")[0] not in STUDENTS]
    asks, fixed = {"kind": "paper"}, constants(recipe, len(recipe.pyramid))
    if archived(recipe):  # which depends on who is asked about what
        asks = {"kind": fixed.kind} | ({} if fixed.own or fixed.kind != "paper" else {"routes": "all"})
        if recipe.archive.top_k and fixed.kind != "composed":
            asks["temperature"] = fixed.temperature
    return [words[0], *kept, f"objective={json.dumps(asks)}"]


def folder_name(recipe: Recipe) -> str:
    """Of a recipe made of teacher_words()."""
    return f"{digest(identity(recipe))[:12]}-seed-{recipe.seed}"


def hand_on(path: Path, recipe: Recipe, data: DataSet) -> list[str]:
    """Make or open a folder of teachers and copy into it what other folders beside it have of its teachers: of the same
    name, trained by the same settings from the same seed. Returns the names. Raises UserError where another job writes it.
    """
    run = RunFolder(path)
    run.open(recipe, "study")
    others = [other for other in sorted(path.parent.glob(f"*-seed-{recipe.seed}")) if other != path]
    copied: list[str] = []
    while True:  # a partition by confusion is known only once the top is there
        pyramid = pyramid_of(recipe, data, run.teachers, partial=True)
        for teacher in pyramid.teachers:
            source = _source(teacher, others, recipe, data)
            if source and not (run.teachers / f"{teacher.name}.json").exists():
                copy_network(source, run.teachers / teacher.name)
                copied.append(teacher.name)
        if not waiting_levels(recipe):
            write_json(path / "pyramid.json", pyramid.to_json())
            break
        if len(pyramid.teachers) == len(teacher_names(recipe.pyramid)) or not _take_groups(path, others):
            break
    for lock in run.locks:
        lock.release()
    return copied


def _source(teacher: Teacher, others: list[Path], recipe: Recipe, data: DataSet) -> Path | None:
    for other in others:
        path = other / "teachers" / teacher.name
        facts = path.with_name(path.name + ".json")
        if facts.exists():
            found = read_json(facts)
            steps = recipe.training(teacher.level).steps
            if found.get("identity") == teacher_identity(recipe, teacher, data) and found["steps"] >= steps:
                return path
    return None


def _take_groups(path: Path, others: list[Path]) -> bool:
    """Take over the groups that the same top teacher made of the same levels; whether there were any."""
    top = path / "teachers" / "level0.json"
    mine = read_json(path / "run.json")["recipe"]["pyramid"]
    for other in others:
        groups = other / "pyramid.json"
        if top.exists() and groups.exists() and read_json(other / "run.json")["recipe"]["pyramid"] == mine \
                and read_json(groups).get("grouped_by") == read_json(top)["sha256"]:
            write_bytes(path / "pyramid.json", groups.read_bytes())
            return True
    return False
