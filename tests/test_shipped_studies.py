"""The studies that launch/studies.sh keeps: results are of their study's recipe, study.json is what they say together."""

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import REPOSITORY

from pkd.data import load_data
from pkd.files import read_json
from pkd.recipe_file import identity, load_recipe
from pkd.shipped import shipped_names
from pkd.study.arms import built_in, pyramid_flops, student_flops, teacher_flops
from pkd.study.figures import aggregate
from pkd.study.results import all_readings, as_of_now, read_results, right
from pkd.study.statistics import crossed_bootstrap
from pkd.study.table import arms_rows

STUDIES = sorted(path.parent for path in (REPOSITORY / "launch" / "studies").glob("*/recipe.yaml"))


def rounded(tree: dict) -> dict:
    """As JSON holds it, numbers to nine digits: processors and versions of numpy add up in orders of their own."""
    return json.loads(json.dumps(tree), parse_float=lambda text: float(f"{float(text):.9g}"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_what_a_kept_study_says_follows_from_its_results(folder: Path):
    said = read_json(folder / "study.json")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    fingerprints = {read_json(path)["fingerprint"] for path in folder.glob("results/*.json")}
    assert len(fingerprints) == 1, "all arms and seeds saw the same images and split"
    results = read_results(folder, identity(recipe.model_copy(update={"seed": 0})), fingerprints.pop())
    found = aggregate(recipe.name, results, said["arms_asked"], said["asked"], said["pyramid_flops"], said["classes"],
                      all_readings(folder, results), said["not_run"] + [
                          arm for arm, own in said["arms"].items() if own["control"]])
    found, said = rounded(found), rounded(said)
    found["missing"], said["missing"] = sorted(found["missing"]), sorted(said["missing"])
    for key in found.keys() - {"written"}:
        assert said[key] == found[key], key
    assert said["test_readings"] >= len(results), "the test images are read once an arm and seed, again where one is redone"
    assert all(0.2 < own["networks"]["ensemble"]["accuracy"][0] <= 1 for own in said["arms"].values())


def test_costs_and_titles_of_the_digits_study_are_what_arithmetic_and_arms_say_today():
    """The digits are the set that is at hand everywhere."""
    folder = REPOSITORY / "launch" / "studies" / "digits"
    recipe, said = load_recipe(str(folder / "recipe.yaml")), read_json(folder / "study.json")
    data = load_data(recipe.data)
    shape, seen, labelled = (len(data.classes), data.channels, data.size), len(data.students_see), len(data.splits["train"])
    assert said["pyramid_flops"] == pytest.approx(pyramid_flops(recipe, shape, seen)[0])
    known = {arm.name: arm for arm in built_in(recipe, shape, data.classes, seen)[0]}
    assert set(known) <= set(said["arms"]), "no control is missing"
    for path in folder.glob("results/*.json"):
        found = read_json(path)
        mine = load_recipe(str(folder / "recipe.yaml"), [*found["changes"], f"seed={found['seed']}"])
        assert found["fingerprint"] == data.fingerprint and as_of_now(found["recipe"]) == identity(mine)
        costs = [teacher_flops(mine, mine.pyramid[own["level"]], own["classes"], shape, seen, labelled)
                 for own in found["teachers"].values()]
        assert found["teacher_flops"] == pytest.approx(sum(costs)), path.name
        assert found["student_flops"] == pytest.approx(student_flops(mine, shape, seen))
        arm = known.get(found["arm"])
        assert arm is None or (list(arm.changes), arm.title) == (found["changes"], found["title"]), path.name


def finished() -> dict[str, dict]:
    found = {folder.name: read_json(folder / "study.json") for folder in STUDIES}
    return {name: said for name, said in found.items() if said["complete"]}


def summary(name: str, said: dict) -> str:
    """A study as a row of README's table."""
    def ensemble(arm: str) -> str:
        mean, sd = said["arms"][arm]["networks"]["ensemble"]["accuracy"]
        return f"{100 * mean:.1f} ± {100 * sd:.1f}"
    best, other = said["best_control"], said["challenger"]
    gap = next(one for one in said["differences"]
               if (one["arm"], one["against"], one["network"]) == (other, best, "ensemble"))
    low, high = gap["interval"]
    cells = (f"`{name}`", len(said["asked"]), ensemble("alone"), ensemble("top"), f"`{best}` {ensemble(best)}",
             f"`{other}` {ensemble(other)}", f"{100 * gap['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    return f"| {' | '.join(map(str, cells))} |"


def test_readme_says_what_finished_studies_found():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("| study | seeds |")) + 2
    rows = lines[at:lines.index("", at)]
    assert rows == [summary(name, said) for name, said in sorted(finished().items())] and rows


def test_their_tables_are_beside_them():
    text = (REPOSITORY / "launch" / "studies" / "README.md").read_text()
    for name, said in finished().items():
        columns, *rows = (f"| {' | '.join(row)} |" for row in arms_rows(said))
        assert f"## {name}\n" in text and "\n".join([columns, "|" + "---|" * (columns.count("|") - 1), *rows]) in text


def test_what_images_without_a_label_add_is_told_over_seeds_and_test_images():
    """Two studies, for arms of one see the same images; their test images are the same."""
    without, with_them = (REPOSITORY / "launch" / "studies" / name for name in ("digits-300", "digits-300-unlabelled"))
    rows = []
    for arm in read_json(without / "study.json")["arms"]:
        found = [[read_json(folder / "results" / f"{arm}-seed-{seed}.json") for seed in range(3)]
                 for folder in (with_them, without)]
        gap = crossed_bootstrap(*(np.stack([right(one, "ensemble") for one in own]) for own in found))
        rows.append("| {} | {:+.1f} ({:+.1f} to {:+.1f}) |".format(arm, *(100 * number + 0.0 for number in gap)))
    text = (REPOSITORY / "launch" / "studies" / "README.md").read_text()
    assert "\n".join(["", *sorted(rows, key=text.find), ""]) in text


def test_recipes_give_the_figures_of_their_studies():
    """Of the arm that is the recipe itself, where nothing but its comments has changed since."""
    looked_at = []
    for name in finished().keys() & set(shipped_names("recipes")):
        recipe = load_recipe(name)
        if identity(recipe) != identity(load_recipe(str(REPOSITORY / "launch" / "studies" / name / "recipe.yaml"))):
            continue
        results = [read_json(path) for path in (REPOSITORY / "launch" / "studies" / name / "results").glob("*.json")]
        own = {found["seed"]: found["networks"]["ensemble"]["accuracy"] for found in results
               if found["arm"] == recipe.objective.kind}
        figures = ", ".join(f"{100 * own[seed]:.1f}" for seed in sorted(own))
        text = (REPOSITORY / "launch" / "recipes" / f"{name}.yaml").read_text()
        head = " ".join(text.partition("\nname:")[0].replace("#", "").split())
        assert f"seeds {', '.join(map(str, sorted(own)))}: {figures} %" in head
        looked_at.append(name)
    assert "digits" in looked_at
