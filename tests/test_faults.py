"""Damage and hangs: what is whole is used, what hangs is named."""

import json
import os
import shutil
import signal
import time

import pytest
from ranks import Ranks, refused, run, students, trace, wait_for_step


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(tiny, taught, tmp_path_factory):
    """A run cut short twice, so that it has two checkpoints; and what it becomes undisturbed."""
    folder = tmp_path_factory.mktemp("faults")
    start = ("distill", tiny, f"teachers_from={taught}")
    run(1, *start, "--run-folder", folder / "whole")
    for steps in (4, 8):
        run(1, *start, "--run-folder", folder / "cut", "--steps", steps)
    return folder, start


@pytest.mark.parametrize("name", ["network-mobile.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_its_checksum_and_the_one_before_it_used(stopped, tmp_path, name):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-8" / name)
    ended = run(1, *start, "--run-folder", tmp_path / "run")
    said = " ".join(ended[0].out.split())
    assert "step-8 is damaged" in said and name in said and "step-4" in said
    assert students(tmp_path / "run") == students(folder / "whole")
    assert trace(tmp_path / "run") == trace(folder / "whole")


def test_without_a_whole_checkpoint_the_run_is_refused_and_nothing_lost(stopped, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/network-shuffle.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    assert "no whole checkpoint is left" in refused(1, *start, "--run-folder", tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before


def test_checkpoints_are_chosen_by_step_not_by_clock_and_two_are_kept(stopped, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        os.utime(path, (0, 0) if path.name == "step-8" else None)
    ended = run(1, *start, "--run-folder", tmp_path / "run")
    assert "step-8" in ended[0].out
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-12", "step-24"], "each epoch's end, the last two"
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_metrics_after_the_checkpoint_are_dropped_on_resume(stopped, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 7, "step": 99}) + "\n" + '{"half a li')
    run(1, *start, "--run-folder", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train"] for line in lines] == [line["train"] for line in whole]
    assert [line["validation"] for line in lines] == [line["validation"] for line in whole]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_hangs_is_named_and_the_job_ends(tiny, new_run, victim):
    """Invariant 5: SIGSTOP of a student or a teacher; the others end within the limit and say who."""
    folder, teachers_from = new_run("run")
    ranks = Ranks(3, "distill", tiny, "--run-folder", folder, teachers_from, "distill.epochs=100",
                  "placement={kind: dedicated, student_ranks: 2}", "timeouts={start: 40, step: 5}")
    wait_for_step(folder, 3)
    ranks.processes[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [process for rank, process in enumerate(ranks.processes) if rank != victim]
    for process in others:
        process.wait(20)
    assert time.monotonic() - began < 15
    ranks.processes[victim].kill()
    said = "".join(one.err for one in ranks.wait())
    role = "teacher" if victim == 2 else "student"
    if victim:
        assert f"the stalest is rank {victim} ({role})" in said and "does not answer" in said
    else:  # it serves the store, too
        assert f"stalest is rank {victim}" in said or "the store does not answer" in said
    assert "pkd: hang: rank" in said and "at step" in said


def test_a_long_validation_that_moves_is_no_hang(tiny, new_run):
    """Invariant 5: three times the limit, with progress all along; the teacher only waits meanwhile."""
    folder, _ = new_run("run")
    start = (tiny, "--run-folder", folder, "data.validation=0.7", "teachers.steps=2", "objective.kind=top",
             "students.0.model=own_model:Slow", "students.1.model=own_model:Slow")
    run(1, "teach", *start, "--teacher", "level0")
    began = time.monotonic()
    run(2, "distill", *start, "--steps", 3, "placement.kind=dedicated", "timeouts={start: 60, step: 4}",
        env=lambda rank: {"PKD_TEST_SLOW_VALIDATION": "1"})
    assert time.monotonic() - began > 12
