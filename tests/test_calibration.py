"""`auto` on real ranks: parts are timed once, the placement is kept, and what is cached may be damaged."""

import json
import shutil
from dataclasses import replace

import pytest
from ranks import refused, run

from pkd.data import load_data
from pkd.devices import DEVICES
from pkd.figures import Keys, surroundings
from pkd.images import FileImages
from pkd.pyramid import build_pyramid
from pkd.recipe_file import digest, load_recipe
from pkd.timings import Timings, estimated, workload


def started(tiny, taught, folder, cache, *changes) -> str:
    """What rank 0 of a run in `folder` says that times what is not in `cache`."""
    return run(2, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", "--steps", 3, *changes,
               env=lambda rank: {"XDG_CACHE_HOME": str(cache)})[0].out


@pytest.fixture(scope="module")
def first(tiny, taught, tmp_path_factory):
    """A folder with the first run, and the cache that it has filled; and what was said. To be copied."""
    folder = tmp_path_factory.mktemp("first")
    return folder, started(tiny, taught, folder / "first", folder / "cache")


@pytest.fixture
def distill(tiny, taught, first, tmp_path):
    """distill(name, *changes) -> what rank 0 said, with a copy of the first run and of its cache."""
    shutil.copytree(first[0], tmp_path, dirs_exist_ok=True)
    return lambda name, *changes: started(tiny, taught, tmp_path / name, tmp_path / "cache", *changes)


def test_parts_are_timed_once_and_the_placement_is_reused(first, distill, tmp_path):
    assert "timing" in first[1] and "ms a step predicted (measured)" in first[1]
    files = list((tmp_path / "cache" / "pkd" / "calibration").glob("*.json"))
    figures = [json.loads(file.read_text()) for file in files]
    # One size of teacher for 10, 5 and 2 or 3 classes; the same model is timed once.
    parts = sorted(figure["key"]["part"] for figure in figures)
    assert parts == sorted(["view", "links", "train", "sync", *["forward"] * len({10, 5, 3, 2})])
    assert all(second > 0 for figure in figures for second in figure["seconds"])
    train = next(figure["seconds"] for figure in figures if figure["key"]["part"] == "train")
    assert len(train) == 6 and sum(train[4:]) == pytest.approx(1, abs=0.1), "each of the two students' part of the step"
    assert "timing" not in distill("second")
    placement = (tmp_path / "first" / "placement.json").read_text()
    for file in files:
        file.unlink()
    assert "timing" not in distill("first") and (tmp_path / "first" / "placement.json").read_text() == placement


def test_a_damaged_figure_is_measured_again_and_a_new_model_is_timed_alone(distill, tmp_path):
    next((tmp_path / "cache" / "pkd" / "calibration").glob("*.json")).write_text("{")
    assert "timing 1 part(s)" in distill("second")
    assert "timing 2 part(s)" in distill("third", "students.0.model.width=0.5")  # the step, alone and in common


def test_without_teachers_students_are_in_groups_where_their_gradients_took_longer_here_than_views(distill, tmp_path):
    assert "ms a step predicted (measured)" in distill("alone", "objective.kind=alone")
    for part, seconds, groups in (("sync", [0.0, 10.0], "2 group(s)"), ("view", [1.0], "1 group(s)")):
        for file in (tmp_path / "cache" / "pkd" / "calibration").glob("*.json"):
            figure = json.loads(file.read_text())
            if figure["key"]["part"] == part:
                file.write_text(json.dumps(figure | {"seconds": seconds}))
        assert f"the students in {groups}" in distill(part, "objective.kind=alone")


@pytest.fixture(scope="module")
def keys(tiny):
    recipe = load_recipe(str(tiny), [])
    data = load_data(recipe.data)
    pyramid = build_pyramid(recipe.pyramid, data.classes, 0)
    return Keys(recipe, pyramid, data, surroundings(["a GPU"], 8, 64), 64, True)


def test_what_networks_and_views_take_serves_worlds_of_other_sizes(keys):
    other = replace(keys, where=surroundings(["a GPU"], 8, 40), world=40)
    for part in (Keys.train, Keys.view, *(lambda one, t=t: one.forward(t) for t in keys.pyramid.teachers)):
        assert part(keys) == part(other)
    large = keys.recipe.model_copy(update={"distill": keys.recipe.distill.model_copy(update={"batch": 4096})})
    assert replace(keys, recipe=large).train() == replace(other, recipe=large).train(), "40 ranks are timed as 64 are"
    assert keys.links() != other.links() and keys.sync() != other.sync()
    slower = replace(keys, where=surroundings(["a GPU"], 4, 64))
    assert not {digest(key) for key in keys.all()} & {digest(key) for key in slower.all()}, "fewer measured beside it"


def test_seconds_that_were_not_measured_are_estimates_and_their_source_says_which(keys):
    estimates = Timings(dict.fromkeys((t.name for t in keys.pyramid.teachers), 7.0), 1.0, 1.0, (0.5, 0.5), 9.0)
    figures = {digest(keys.forward(t)): [3.0] for t in keys.pyramid.teachers}
    figures[digest(keys.train())] = [0.5, 0.8, 0.1, 0.001, 0.4, 0.6]
    found = keys.timings(figures, estimates)
    assert set(found.blocks.values()) == {3.0} and found.parts == (0.4, 0.6) and found.view == 9.0
    assert found.links == estimates.links and found.source == "measured, but for view and links"
    figures |= {digest(keys.view()): [2.0], digest(keys.links()): [0.1, 1.1, 1000.0]}
    whole = keys.timings(figures, estimates)
    assert whole.view == 2.0 and whole.links.bandwidth == 2 * 63 / 64 * 1000 and whole.source == "measured"


def test_plan_takes_what_was_timed_here_or_a_data_sheet(tiny, first):
    cache = {"env": lambda rank: {"XDG_CACHE_HOME": str(first[0] / "cache")}}
    found = json.loads(run(1, "plan", tiny, "--world", 2, "--json", **cache)[0].out)
    assert found["seconds"] == "measured"
    placed = json.loads((first[0] / "first" / "placement.json").read_text())["placement"]
    assert all(found["placement"][key] == placed[key] for key in ("kind", "student_ranks", "groups", "sources"))
    assert found["step_ms"] >= max(rank["ms"] for rank in found["ranks"]) * (1 - 1e-9)
    words = ("plan", tiny, "--world", 4096, "distill.batch=40000", "objective.kind=paper")
    large = json.loads(run(1, *words, "--json", "--device", "h200")[0].out)
    assert large["seconds"] == "estimated for h200" and len(large["ranks"]) == 4096
    samples = [rank["samples"] for rank in large["ranks"] if rank["role"] == "student"]
    assert samples and min(samples) >= 8
    assert all(0 < rank["bytes"] < 141e9 for rank in large["ranks"]) and large["bound_by"] and large["next_rank"]
    assert "did you mean 'h200'" in refused(1, *words, "--device", "h20")


def test_on_a_cpu_decoded_images_and_the_best_weights_are_in_a_ranks_memory(tiny):
    recipe = load_recipe(str(tiny), [])
    data = load_data(recipe.data)
    pyramid = build_pyramid(recipe.pyramid, data.classes, recipe.seed)
    cpu, gpu = (workload(recipe, pyramid, data, estimated(recipe, pyramid, data, device), device)
                for device in (DEVICES["cpu"], DEVICES["h200"]))
    images, weights = 480 * 8 * 8, 4 * sum(student.parameters for student in cpu.each)
    same = DEVICES["cpu"].runtime - DEVICES["h200"].runtime
    assert cpu.runtime - gpu.runtime == images + same
    assert cpu.student_memory(1, 1) - gpu.student_memory(1, 1) == images + weights + same
    files = replace(data, images=FileImages([tiny] * 480, (8, 8), True, 1))  # as `pkd launch` checks them, undecoded
    for gib, held in ((1.0, images), (0.0, 0)):
        own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_gib": gib})})
        work = workload(own, pyramid, files, estimated(own, pyramid, files, DEVICES["cpu"]), DEVICES["cpu"])
        assert work.runtime - DEVICES["cpu"].runtime == held
