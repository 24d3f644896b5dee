"""Invariant 5: what hangs is named by group, step, role and rank, within the limit; what moves is left alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from fork_server import Forked
from PIL import Image
from ranks import REPOSITORY, Ranks, clean_environment, run, wait_for_step

TWO_STUDENTS = "placement={kind: dedicated, student_ranks: 2}"
LIMIT = 4  # seconds of timeouts.step


def others_end(ranks: Ranks, victim: int, within: float = LIMIT + 8) -> str:
    """What the ranks said, all but the victim having ended by themselves in time and without success."""
    for rank, process in enumerate(ranks.processes):
        if rank != victim:
            process.wait(within)
    ranks.processes[victim].kill()
    ended = ranks.wait()
    assert all(one.code != 0 for one in ended)
    said = "".join(one.err for one in ended)
    hang = re.search(r"pkd: hang: rank (\d+) \((student|teacher)\) waited .* s in (.+) at step (\d+) for (.+) without "
                     r"anybody's progress; (.*); raise timeouts.step", said)
    assert hang, said
    return hang


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def start(tiny, new_run, *words, env=lambda rank: {}, cwds=None):
    folder, teachers_from = new_run("run")
    ranks = Ranks(3, "distill", tiny, "--run-folder", folder, teachers_from, "distill.epochs=100", TWO_STUDENTS,
                  f"timeouts={{start: 40, step: {LIMIT}}}", *words, env=env, cwds=cwds)
    return folder, ranks


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_stopped_is_named(tiny, new_run, victim):
    folder, ranks = start(tiny, new_run)
    wait_for_step(folder, 3)
    ranks.processes[victim].send_signal(signal.SIGSTOP)
    hang = others_end(ranks, victim)
    role = "teacher" if victim == 2 else "student"
    if victim == 0:  # it serves the store, too
        assert "stalest is rank 0" in hang[6] or "the store does not answer" in hang[6]
    else:
        assert f"the stalest is rank {victim} ({role}), last in epoch" in hang[6] and "does not answer at all" in hang[6]
    assert hang[1] != str(victim) and int(hang[4]) >= 3 and hang[3].startswith("epoch ")
    assert hang[5] in ("soft targets", "the gradients of the students' island", "the ballot of all ranks")


@pytest.mark.parametrize(("where", "victim"), [("validation", 1), ("saving", 0)])
def test_a_rank_stuck_in_validation_or_in_saving_is_named(tiny, new_run, tmp_path, where, victim):
    stuck = tmp_path / "stuck"
    folder, ranks = start(tiny, new_run, "students.0.model=own_model:Stuck", "checkpoint_minutes=0.01", env=lambda rank: {
        "PKD_TEST_STUCK": where if rank == victim else "", "PKD_TEST_STUCK_FROM": str(stuck)})
    wait_for_step(folder, 3)
    stuck.touch()
    hang = others_end(ranks, victim)
    assert f"the stalest is rank {victim} (student), last in {where} at step" in hang[6], hang[0]
    assert "has stood still for" in hang[6]
    assert hang[5] in ("the other ranks' scores", "the students' island", "its own work", "the ballot of all ranks")


def test_a_rank_stuck_in_decoding_is_named(tiny, new_run, tmp_path):
    """Images that a node cannot read any more: here named pipes that nobody writes."""
    chance = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "0" / "data" / str(label)).mkdir(parents=True)
        for index in range(24):
            picture = Image.fromarray(chance.integers(0, 255, (8, 8), dtype=np.uint8))
            picture.save(tmp_path / "0" / "data" / str(label) / f"{index}.png")
    for rank in (1, 2):
        shutil.copytree(tmp_path / "0", tmp_path / str(rank))
    words = ("data={name: folder, path: data, cache_gib: 0}", "objective.kind=alone", "placement={kind: co-located}")
    folder, ranks = start(tiny, new_run, *words, cwds=[tmp_path / str(rank) for rank in range(3)])
    wait_for_step(folder, 1)
    for path in (tmp_path / "1" / "data").rglob("*.png"):
        os.mkfifo(path.with_suffix(".fifo"))
        os.replace(path.with_suffix(".fifo"), path)
    hang = others_end(ranks, 1)
    assert "the stalest is rank 1 (student), last in epoch" in hang[6] and "has stood still for" in hang[6], hang[0]
    assert hang[5] == "the gradients of the students' island"


def test_a_store_that_hangs_is_named(tiny, new_run):
    """Under torchrun the agent serves it; it is missed where ranks need it, at the latest when they leave together."""
    folder, teachers_from = new_run("run")
    agent = Forked(["--standalone", "--nproc_per_node", "2", "-m", "pkd", "distill", str(tiny), "--run-folder", str(folder),
                    teachers_from, f"timeouts={{start: 40, step: {LIMIT}}}"], clean_environment(), REPOSITORY,
                   module="torch.distributed.run")
    wait_for_step(folder, 3)
    ranks = [rank["pid"] for rank in json.loads((folder / "ranks" / "distill.json").read_text())["ranks"]]
    agent.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT + 20
    while any(running(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    agent.kill()
    out = "".join(agent.communicate(timeout=20))
    assert "pkd: hang: rank" in out and "the store does not answer" in out, out


def test_a_rank_that_waits_while_it_is_suspended_is_no_hang():
    """Its count stands still before and after; the time of which it knows nothing does not count, the rest does."""
    program = ("import sys; import torch.distributed as dist; from pkd.watchdog import Watchdog\n"
               "watchdog = Watchdog(dist.HashStore(), 0, 1, 'student', 3.0, print); watchdog.beat('waiting', 1)\n"
               "print('begun', flush=True); watchdog.start(); watchdog.join(60)")
    process = subprocess.Popen([sys.executable, "-c", program], env=clean_environment(), text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    resumed = time.monotonic()
    assert process.wait(30) == 3 and time.monotonic() - resumed > 2
    process.stdout.close()


def test_a_job_that_is_suspended_and_resumed_is_no_hang(tiny, new_run):
    """As by `scontrol suspend`, for longer than the limit."""
    folder, ranks = start(tiny, new_run)
    wait_for_step(folder, 3)
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM):
        for process in ranks.processes:
            process.send_signal(number)
        time.sleep(LIMIT + 2 if number == signal.SIGSTOP else 1)
    assert [one.code for one in ranks.wait()] == [0, 0, 0]


def test_a_long_validation_that_moves_is_no_hang(tiny, new_run):
    """Three times the limit, with progress all along; the teacher only waits meanwhile."""
    folder, _ = new_run("run")
    start = (tiny, "--run-folder", folder, "data.validation=0.7", "teachers.steps=2", "objective.kind=top",
             "students.0.model=own_model:Slow", "students.1.model=own_model:Slow")
    run(1, "teach", *start, "--teacher", "level0")
    began = time.monotonic()
    run(2, "distill", *start, "--steps", 3, "placement.kind=dedicated", f"timeouts={{start: 60, step: {LIMIT}}}",
        env=lambda rank: {"PKD_TEST_SLOW_VALIDATION": "1"})
    assert time.monotonic() - began > 3 * LIMIT
