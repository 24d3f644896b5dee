"""`auto` on real ranks: parts are timed once, the placement is kept, and what is cached may be damaged."""

import json

import pytest
from ranks import refused, run


@pytest.fixture
def distill(tiny, new_run, tmp_path):
    """distill(name, *changes) -> what rank 0 said; a cache of this test's own."""
    def start(name: str, *changes) -> str:
        folder, teachers_from = new_run(name)
        return run(2, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 3, *changes,
                   env=lambda rank: {"XDG_CACHE_HOME": str(tmp_path / "cache")})[0].out
    return start


def test_parts_are_timed_once_and_the_placement_is_reused(distill, tmp_path):
    said = distill("first")
    assert "timing" in said and "ms a step predicted (measured)" in said
    files = list((tmp_path / "cache" / "pkd" / "calibration").glob("*.json"))
    figures = [json.loads(file.read_text()) for file in files]
    # One size of teacher for 10, 5 and 2 or 3 classes; the same model is timed once.
    parts = sorted(figure["key"]["part"] for figure in figures)
    assert parts == sorted(["view", "links", "train", "sync", *["forward"] * len({10, 5, 3, 2})])
    assert all(second > 0 for figure in figures for second in figure["seconds"])
    assert "timing" not in distill("second")
    placement = (tmp_path / "first" / "placement.json").read_text()
    for file in files:
        file.unlink()
    assert "timing" not in distill("first") and (tmp_path / "first" / "placement.json").read_text() == placement


def test_a_damaged_figure_is_measured_again_and_a_new_model_is_timed_alone(distill, tmp_path):
    distill("first")
    next((tmp_path / "cache" / "pkd" / "calibration").glob("*.json")).write_text("{")
    assert "timing 1 part(s)" in distill("second")
    assert "timing 2 part(s)" in distill("third", "students.0.model.width=0.5")  # the step, alone and in common


def test_plan_takes_what_was_timed_here_or_a_data_sheet(tiny, distill, tmp_path):
    distill("first")
    cache = {"env": lambda rank: {"XDG_CACHE_HOME": str(tmp_path / "cache")}}
    found = json.loads(run(1, "plan", tiny, "--world", 2, "--json", **cache)[0].out)
    assert found["seconds"] == "measured"
    placed = json.loads((tmp_path / "first" / "placement.json").read_text())["placement"]
    assert (found["placement"]["kind"], found["placement"]["sources"]) == (placed["kind"], placed["sources"])
    assert found["step_ms"] >= max(rank["ms"] for rank in found["ranks"]) * (1 - 1e-9)
    words = ("plan", tiny, "--world", 4096, "distill.batch=40000", "objective.kind=paper")
    large = json.loads(run(1, *words, "--json", "--device", "h200")[0].out)
    assert large["seconds"] == "estimated for h200" and len(large["ranks"]) == 4096
    assert all(rank["samples"] >= 8 for rank in large["ranks"] if rank["role"] == "student")
    assert all(0 < rank["bytes"] < 141e9 for rank in large["ranks"]) and large["bound_by"] and large["next_rank"]
    assert "did you mean 'h200'" in refused(1, *words, "--device", "h20")
