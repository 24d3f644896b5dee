"""The studies that launch/studies.sh keeps: results are of their study's recipe, study.json is what they say together."""

import json
from pathlib import Path

import pytest
from ranks import REPOSITORY

from pkd.files import read_json
from pkd.recipe_file import identity, load_recipe
from pkd.study.figures import aggregate
from pkd.study.results import all_readings, read_results

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
    arms = list(dict.fromkeys([*said["arms"], *(name.rpartition("-seed-")[0] for name in said["missing"])]))
    found = aggregate(recipe.name, results, arms, said["asked"], said["pyramid_flops"], said["classes"],
                      all_readings(folder, results))
    found, said = rounded(found), rounded(said)
    found["missing"], said["missing"] = sorted(found["missing"]), sorted(said["missing"])
    for key in found.keys() - {"written"}:
        assert said[key] == found[key], key
    assert said["test_readings"] >= len(results), "the test images are read once an arm and seed, again where one is redone"
    assert all(0.2 < own["networks"]["ensemble"]["accuracy"][0] <= 1 for own in said["arms"].values())
