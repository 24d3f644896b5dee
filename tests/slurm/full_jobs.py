"""What befalls jobs as a whole: preemption, other allocations, second jobs, signals at the start; started by full.sh."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from slurm_run import SlurmRun

USR1 = signal.SIGUSR1


def row(record, name: str, mine, expected, noticed, going_on, lost) -> None:
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == expected
    record(name, **{"noticed after s": f"{noticed:.1f}", "training goes on after s": f"{going_on:.1f}",
                    "steps taken again": lost, "students identical": "yes" if same else "NO"})
    assert same


def recovered(record, name: str, mine, expected) -> None:
    recovery = mine.recovery()
    row(record, name, mine, expected, recovery.noticed, recovery.going_on, recovery.steps_lost)


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-deepspeed.sbatch"])
def test_a_preemption(cluster, disturbed, undisturbed, record, script):
    """The urgent job wants all nodes, for three seconds."""
    mine = disturbed("--partition=low", script=script)
    urgent = cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    recovered(record, f"preempted by a job with priority (GraceTime 20 s), {script}", mine, undisturbed)
    assert cluster.state(urgent) == "COMPLETED" and "stopped by a signal, everything is saved" in mine.log


@pytest.mark.parametrize("target", ["batch script", "launcher"])
def test_a_signal_to_a_heterogeneous_job(cluster, disturbed, undisturbed, record, target):
    mine = disturbed(script="slurm-het.sbatch")
    if target == "batch script":
        cluster.slurm("scancel", "--batch", "--signal=USR1", mine.job)
    else:
        os.kill(mine.launcher(), USR1)
    recovered(record, f"SIGUSR1 to {target}, slurm-het.sbatch", mine, undisturbed)


@pytest.mark.parametrize("target", ["batch script", "all of the job"])
def test_a_signal_while_ranks_import(cluster, disturbed, undisturbed, record, target):
    """They stop at their first ballot, and save."""
    mine = disturbed(step=-1)

    def python() -> int:
        names = [Path(f"/proc/{pid}/comm") for host in cluster.nodes for pid in cluster.pids(host, "-m pkd distill ")]
        return sum(path.exists() and path.read_text().startswith("python") for path in names)
    mine._until(lambda: python() == 4, 60, "ranks")
    time.sleep(0.3)
    assert mine.last_step() == -1
    cluster.slurm("scancel", *["--batch"] * (target == "batch script"), "--signal=TERM", mine.job)
    recovered(record, f"SIGTERM to {target} while its ranks import", mine, undisturbed)
    assert cluster.restarts(mine.job) == 1


def test_another_allocation(cluster, disturbed, undisturbed, record):
    """One node in place of two, one teacher rank less; as many student ranks, thus the same to the last bit."""
    mine = disturbed()
    cluster.slurm("scancel", mine.job)
    mine.end()
    hit, began = mine.last_step(), time.monotonic()
    mine.submit("--nodes=1", "--ntasks-per-node=3")
    mine._until(lambda: "resuming from" in mine.log, 60, "resuming")
    start = int(re.search(r"step-(\d+) \(epoch", mine.log)[1])
    mine.wait_for_step(start)
    assert len(cluster.hosts(mine.job)) == 1
    row(record, "cancelled, then submitted to one node with 3 ranks", mine, undisturbed, 0, time.monotonic() - began,
        hit + 1 - start)


def test_a_second_job_on_the_same_run_folder(cluster, disturbed, record):
    """It is refused, queued no more, and the first does not notice."""
    mine = disturbed(words=("distill.epochs=400",))
    second = SlurmRun(cluster, mine.folder, "slurm.sbatch", *mine.words)
    began, before = time.monotonic(), mine.last_step()
    second.submit()
    assert second.end() == "FAILED" and cluster.restarts(second.job) == 0
    seconds = time.monotonic() - began
    assert f"is being written by another job (distill, Slurm job {mine.job}, pid" in second.log, second.log
    mine.wait_for_step(max(before, mine.last_step()) + 5)
    assert cluster.state(mine.job) == "RUNNING" and cluster.restarts(mine.job) == 0
    record("a second job on the same run folder: refused", **{
        "noticed after s": f"{seconds:.1f}", "training goes on after s": "", "steps taken again": 0,
        "students identical": ""})


def test_gpus_of_another_job_are_left_alone(cluster, tiny, new_run, record):
    """Where one job may see the GPUs of another: ranks get those that Slurm gave, whatever DeepSpeed numbers them."""
    node = cluster.nodes[0]
    other = cluster.sbatch(f"--nodelist={node}", "--gpus-per-node=1", "--output=/dev/null", "--wrap", "sleep 600")
    cluster.wait(other, 30, {"RUNNING"})
    folder, teachers_from = new_run("run")
    mine = SlurmRun(cluster, folder, "slurm-deepspeed.sbatch", tiny, teachers_from, "--phases", "distill",
                    "distill.epochs=400").submit(f"--nodelist={node}", "--nodes=1", "--gpus-per-node=1")
    mine.wait_for_step(3)
    seen = [Path(f"/proc/{mine.pid(rank)}/environ").read_text().split("\0") for rank in range(2)]
    cluster.heal()
    assert all("CUDA_VISIBLE_DEVICES=1" in own for own in seen), seen
    record("another job has the node's first GPU: ranks see the second", **{"steps taken again": 0})
