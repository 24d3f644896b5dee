"""How often a Slurm job is queued again, and under which name; without Slurm."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkd import slurm_chain, slurm_job
from pkd.console import Console
from pkd.slurm_job import TRIES, job_id, may_try_again


@pytest.fixture
def again(tmp_path, monkeypatch):
    """again(phase, outcome) -> may_try_again of a job that runs."""
    monkeypatch.setattr(slurm_job, "_job_state", lambda: "RUNNING")
    (tmp_path / "state").mkdir()
    return lambda name, outcome: may_try_again(tmp_path, name, outcome, Console(quiet=True))


def test_an_element_of_an_array_has_a_name_of_its_own(monkeypatch):
    """One of them has the array's id as its own, by which Slurm would queue all of them again."""
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert job_id() == "70"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_id() == "70_3"


def test_a_job_finds_the_pkd_that_submits_it(monkeypatch, tmp_path):
    """Wherever its environment lies, and whether or not that was activated: sbatch hands the environment on."""
    seen = []
    monkeypatch.setattr(slurm_chain, "ask", lambda *argv, env: seen.append(env["PATH"]) or "7")
    monkeypatch.setenv("PATH", "/usr/bin")
    slurm_chain.submit([slurm_chain.Submission("distill", (), ())], tmp_path / "script", [], tmp_path, Console(quiet=True))
    assert seen == [f"{Path(sys.executable).parent}:/usr/bin"]


def test_fruitless_starts_are_counted_by_outcome_and_begin_anew_after_giving_up(again):
    kinds = ["failed", "stopped"] * (TRIES["failed"] - 1)
    assert all(again("distill", outcome) for outcome in kinds), "a stop between failures does not make up for them"
    assert not again("distill", "failed")
    assert all(again("distill", "failed") for _ in range(TRIES["failed"] - 1))


def test_a_stop_that_slurm_does_not_queue_again_stays_a_stop(monkeypatch):
    """So that a study begins no further arm in the seconds that are left."""
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.setattr(slurm_job, "_job_state", lambda: "RUNNING")
    monkeypatch.setattr(slurm_job.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no"))
    for stopped in (True, False):
        monkeypatch.setattr(slurm_job.signalled, "yes", stopped)
        assert not slurm_job.requeue(Console(quiet=True)) and slurm_job.goes_on() is not stopped


def test_only_a_teachers_own_progress_gives_it_new_tries(again, tmp_path):
    def fails(name):
        return [again(name, "failed") for _ in range(TRIES["failed"])].index(False) + 1

    def save(teacher, step):
        (tmp_path / "teachers" / f"{teacher}.training" / f"step-{step}").mkdir(parents=True)
    assert again("teach-level1-2", "failed")
    save("level0", 5)
    assert again("teach-level1-2", "failed")
    save("level0", 9)
    assert fails("teach-level1-2") == TRIES["failed"] - 2
    assert again("teach-level1-2", "failed")
    save("level1-2", 1)
    assert fails("teach-level1-2") == TRIES["failed"]
