"""`pkd bench`: programs take turns, and are compared run by run."""

import json

from ranks import refused, run

from pkd.bench import Program, Trial, few_steps, ratio, spread, take_turns
from pkd.recipe_file import load_recipe


def test_programs_take_turns_forwards_and_backwards_and_ratios_are_of_one_round():
    order, speed = [], iter([10.0, 20.0, 40.0, 80.0, 5.0, 20.0])  # in the order of the runs

    def program(name):
        return Program(name, lambda: order.append(name) or next(speed))
    rates = take_turns([program("a"), program("b")], 3, lambda text: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert rates == {"a": [10.0, 80.0, 5.0], "b": [20.0, 40.0, 20.0]}
    assert ratio(rates, "a", "b") == (0.25, 0.5, 2.0)
    assert spread([3.0, 1.0, 2.0, 4.0]) == (1.0, 2.0, 4.0)


def test_bench_compares_students_alone_teachers_and_archive_and_leaves_nothing(tiny, taught, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in taught.rglob("*")}
    said = run(1, "bench", tiny, f"teachers_from={taught}", "views.finite=2", "window=1", "answer_steps=1", "--rounds", 1,
               "--steps", 12, env=lambda rank: {"TMPDIR": str(tmp_path)})[0].out
    line = next(line for line in said.splitlines() if line.startswith("round 1 of 1"))
    assert all(f"{name} " in line for name in ("students alone", "online", "archive"))
    assert " 0.0 img/s" not in line and said.count("1 of 1 rank(s)") == 3
    assert before == {path: path.stat().st_mtime_ns for path in taught.rglob("*")}
    assert not list(tmp_path.glob("pkd-*"))


def test_teachers_of_a_bench_take_few_steps_whatever_their_level_says(tiny):
    words = ["pyramid.0.steps=100000", "pyramid.2.steps=7"]
    recipe = load_recipe(str(tiny), [*words, *few_steps(load_recipe(str(tiny), words))])
    assert [recipe.training(level).steps for level in range(3)] == [10, 10, 10]


def test_a_bench_that_cannot_run_says_why_in_one_sentence(tiny, tmp_path):
    said = refused(1, "bench", tiny, "objective.kind=composed", "pyramid.1.classes=[[0,1,2]]", "--rounds", 1)
    assert "pyramid.1" in said
    assert "no teachers" in refused(1, "bench", tiny, f"teachers_from={tmp_path / 'nothing'}")


def test_a_run_is_judged_by_its_epoch_of_most_steps(tmp_path, monkeypatch):
    lines = [{"step": step, "rate": rate} for step, rate in ((3, 1), (14, 2), (15, 3))]

    def phase(self, phase, *changes, run):
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "placement.json").write_text(json.dumps({"placement": {"world": 1}}))
    monkeypatch.setattr(Trial, "phase", phase)
    assert Trial(tmp_path, [], 1).distill(15) == {**lines[1], "placement": {"world": 1}}


def test_a_speed_without_the_teachers_work_is_refused(tiny, taught, tmp_path):
    """12 steps an epoch, of which teachers who answer four at once are eight ahead."""
    assert "too few to be timed" in refused(1, "bench", tiny, f"teachers_from={taught}", "window=4", "answer_steps=4",
                                            "--rounds", 1, "--steps", 8, env=lambda rank: {"TMPDIR": str(tmp_path)})
