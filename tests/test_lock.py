"""Locks of a run folder: one writer, or several teachers at a time; a dead holder's lock is no lock."""

import errno
import multiprocessing
import os
import subprocess
import sys

import pytest
from ranks import clean_environment

import pkd.lock
from pkd.errors import UserError
from pkd.lock import Lock, held_by
from pkd.run_folder import RunFolder


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(pkd.lock, "PATIENCE", 0.3)
    for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(key, raising=False)


def holder(path, shared=False, env=None):
    """Another process that holds a lock until its input is closed."""
    code = (f"import sys; from pathlib import Path; from pkd.lock import Lock; "
            f"lock = Lock(Path({str(path)!r}), 'distill', shared={shared}); print('held', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**clean_environment(), **(env or {})})
    assert process.stdout.readline() == "held\n"
    return process


def test_one_writer_at_a_time_named_to_the_second(tmp_path):
    with holder(tmp_path / "lock") as other:
        assert held_by(tmp_path / "lock")["pid"] == other.pid
        with pytest.raises(UserError, match=f"being written by another job .distill, pid {other.pid}"):
            Lock(tmp_path / "lock", "distill")
        other.kill()
        other.wait()
        assert held_by(tmp_path / "lock") is None
        lock = Lock(tmp_path / "lock", "distill")
        assert lock.remark is None and held_by(tmp_path / "lock")["pid"] == os.getpid()
        lock.release()


def test_teachers_share_the_folder_with_each_other_but_with_nobody_else(tmp_path):
    with holder(tmp_path / "lock", shared=True) as other:
        Lock(tmp_path / "lock", "teach", shared=True).release()
        with pytest.raises(UserError, match="another job"):
            Lock(tmp_path / "lock", "distill")
        other.kill()


def test_the_lock_of_this_jobs_earlier_start_is_taken_over(tmp_path, monkeypatch):
    """A node that lost its power may leave its lock on the file server after Slurm has queued the job again."""
    with holder(tmp_path / "lock", env={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}) as other:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(UserError, match="Slurm job 7"):  # the same start: it may be alive
            Lock(tmp_path / "lock", "distill")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        lock = Lock(tmp_path / "lock", "distill")
        assert "Slurm job 7" in lock.remark and held_by(tmp_path / "lock")["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):  # the new one holds as any other
            Lock(tmp_path / "lock", "distill")
        lock.check()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        again = Lock(tmp_path / "lock", "distill")
        with pytest.raises(UserError, match=r"taken run folder .* over"):  # who was thought dead and is not
            lock.check()
        again.check()
        again.release()
        other.kill()


@pytest.mark.parametrize(("says", "code", "dead"), [
    ("RUNNING", 0, False), ("", 0, True), ("slurm_load_jobs error: Invalid job id specified", 1, True),
    ("slurm_load_jobs error: Unable to contact slurm controller", 1, False)])
def test_slurm_is_asked_whether_a_holder_lives(tmp_path, monkeypatch, says, code, dead):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\necho '{says}' {'>&2' if code else ''}\nexit {code}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    with holder(tmp_path / "lock", env={"SLURM_JOB_ID": "8"}) as other:
        if dead:
            assert "taken over" in Lock(tmp_path / "lock", "distill").remark
        else:
            with pytest.raises(UserError, match="Slurm job 8"):
                Lock(tmp_path / "lock", "distill")
        other.kill()


def test_a_job_of_another_cluster_is_not_dead_because_this_one_does_not_know_it(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(pkd.lock, "PATIENCE", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with holder(tmp_path / "lock", env={"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "one"}) as other:
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "two")
        with pytest.raises(UserError, match="Slurm job 7"):
            Lock(tmp_path / "lock", "distill")
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
        assert "that job is dead" in Lock(tmp_path / "lock", "distill").remark
        other.kill()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(pkd.lock.fcntl, "flock", unsupported)
    assert "has no locks" in Lock(tmp_path / "lock", "distill").remark


def test_of_many_that_come_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, go, end = context.Queue(), context.Event(), context.Event()

    def take():
        pkd.lock.PATIENCE = 0.0
        go.wait()
        try:
            lock = Lock(tmp_path / "lock", "distill")
            queue.put("won")
            end.wait(20)
            lock.release()
        except UserError:
            queue.put("refused")
    processes = [context.Process(target=take) for _ in range(8)]
    for process in processes:
        process.start()
    go.set()
    outcomes = [queue.get(timeout=20) for _ in processes]
    end.set()
    for process in processes:
        process.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]


def test_a_lock_without_a_readable_record_is_held_by_somebody(tmp_path):
    """Such as for a moment on another node: nobody takes it over."""
    with holder(tmp_path / "lock") as other:
        (tmp_path / "lock").write_text("")
        assert held_by(tmp_path / "lock") == {}
        with pytest.raises(UserError, match="an unknown job"):
            Lock(tmp_path / "lock", "distill")
        other.kill()


def test_who_may_only_read_sees_the_holder_too(tmp_path, monkeypatch):
    def read_only(path, mode="r", **options):
        if "+" in mode or "w" in mode:
            raise PermissionError(errno.EACCES, "no")
        return open(path, mode, **options)
    with holder(tmp_path / "lock") as other:
        monkeypatch.setattr(pkd.lock, "open", read_only, raising=False)
        assert held_by(tmp_path / "lock")["pid"] == other.pid
        other.kill()
        other.wait()
        assert held_by(tmp_path / "lock") is None


def test_ranks_without_a_lock_of_their_own_notice_a_take_over(tmp_path):
    lock = Lock(tmp_path / "lock", "teach")
    run = RunFolder(tmp_path)
    run.held_by_rank_0({str(lock.path): lock.inode})
    run.check_locks()
    lock._replace()
    with pytest.raises(UserError, match=r"has taken run folder .* over"):
        run.check_locks()
    lock.release()
