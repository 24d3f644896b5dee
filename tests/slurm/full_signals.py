"""A signal to the batch script, to the launcher or to one rank, for each Slurm way: stop, save, queue again, go on."""

import os
import signal

import pytest
from slurm_run import LONG, SlurmRun

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-deepspeed.sbatch"])
@pytest.mark.parametrize(("target", "number"), [
    ("batch script", USR1), ("batch script", TERM), ("launcher", USR1), ("launcher", TERM), ("one rank", USR1),
    ("one rank", TERM), ("all of the job (scancel --signal)", USR1), ("all of the job (scancel --signal)", TERM)])
def test_a_signal(cluster, disturbed, undisturbed, record, script, target, number):
    mine = disturbed(script=script)
    if target == "batch script":
        cluster.slurm("scancel", "--batch", f"--signal={number.name[3:]}", mine.job)
    elif target == "launcher":
        os.kill(mine.launcher(), number)
    elif target == "one rank":
        os.kill(mine.pid(2), number)
    else:
        cluster.slurm("scancel", f"--signal={number.name[3:]}", mine.job)
    recovery = mine.recovery()
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == undisturbed
    record(f"{number.name} to {target}, {script}", **{
        "noticed after s": f"{recovery.noticed:.1f}", "training goes on after s": f"{recovery.going_on:.1f}",
        "steps taken again": recovery.steps_lost, "students identical": "yes" if same else "NO"})
    assert same


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-deepspeed.sbatch"])
def test_the_time_limit(cluster, tiny, taught, tmp_path, record, script):
    """A run of several limits: Slurm sends --signal, up to a minute early, and the job queues itself again each time.
    Of the two minutes at least half a minute is left to train in."""
    words = (tiny, f"teachers_from={taught}", "--phases", "distill", *LONG, "distill.epochs=40")
    whole = SlurmRun(cluster, tmp_path / "whole", "slurm.sbatch", *words).submit()
    assert whole.end(400) == "COMPLETED", whole.log
    mine = SlurmRun(cluster, tmp_path / "mine", script, *words).submit("--time=2", "--signal=USR1@30")
    assert mine.end(800) == "COMPLETED", mine.log
    same, restarts = mine.result() == whole.result(), cluster.restarts(mine.job)
    record(f"time limit, {script}: {restarts} times", **{
        "noticed after s": "before it", "training goes on after s": "", "steps taken again": 0,
        "students identical": "yes" if same else "NO"})
    assert same and restarts >= 1


def test_a_heterogeneous_job(disturbed, undisturbed, record):
    """All components are queued again together."""
    mine = disturbed(script="slurm-het.sbatch")
    os.kill(mine.pid(1), USR1)
    recovery = mine.recovery()
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == undisturbed
    record("SIGUSR1 to one rank, slurm-het.sbatch", **{
        "noticed after s": f"{recovery.noticed:.1f}", "training goes on after s": f"{recovery.going_on:.1f}",
        "steps taken again": recovery.steps_lost, "students identical": "yes" if same else "NO"})
    assert same
