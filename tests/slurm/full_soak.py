"""Twenty random faults over one run, unattended; started by full.sh. PKD_SOAK_SEED and PKD_SOAK_FAULTS change it."""

import os
import random
import signal
import time

import pytest
from slurm_run import LONG, SlurmRun

SEED, FAULTS = int(os.environ.get("PKD_SOAK_SEED", "0")), int(os.environ.get("PKD_SOAK_FAULTS", "20"))
EPOCHS = f"distill.epochs={8 + 5 * FAULTS}"


@pytest.mark.timeout(5400)
def test_nothing_is_lost_by_random_faults(cluster, tiny, taught, tmp_path, record):
    words = (tiny, f"teachers_from={taught}", "--phases", "distill", *LONG, EPOCHS)
    whole = SlurmRun(cluster, tmp_path / "whole", "slurm.sbatch", *words).submit()
    assert whole.end(1200) == "COMPLETED", whole.log
    chance = random.Random(SEED)
    mine = SlurmRun(cluster, tmp_path / "mine", "slurm.sbatch", *words).submit()
    mine.wait_for_step(5)
    for number in range(FAULTS):
        time.sleep(chance.uniform(0.2, 4.0))
        kind = chance.choice(["SIGKILL", "SIGSTOP", "SIGUSR1", "SIGTERM", "kill_node", "cut_node", "unplug", "requeue"])
        if mine.cluster.state(mine.job) != "RUNNING":
            break  # the run is over before the faults are
        victim = chance.randrange(4)
        hosts = cluster.hosts(mine.job)
        began, done = time.monotonic(), mine.last_step()
        try:
            if kind.startswith("SIG"):
                os.kill(mine.pid(victim), getattr(signal, kind))
            elif kind == "requeue":
                cluster.slurm("scontrol", "requeue", mine.job)
            else:
                getattr(cluster, kind)(hosts[victim // 2])
            recovery = mine.recovery(240)
        finally:
            if not kind.startswith("SIG") and kind != "requeue":
                # Back only now, when Slurm has noticed. What ran on an unplugged node must be gone by then: a job that Slurm
                # starts where an earlier start of it still lives ("Duplicate jobid") is held until somebody releases it.
                if kind == "unplug":
                    cluster.kill_node(hosts[victim // 2])
                cluster.start_node(hosts[victim // 2])
        record(f"{number + 1}: {kind} of " + (f"rank {victim}" if kind.startswith("SIG") else
                                              "the job" if kind == "requeue" else f"node {victim // 2} of the job"),
               **{"noticed after s": f"{recovery.noticed:.1f}", "training goes on after s": f"{recovery.going_on:.1f}",
                  "steps taken again": recovery.steps_lost, "at step": done})
        print(number, kind, victim, recovery, f"{time.monotonic() - began:.0f} s", flush=True)
    else:
        number = FAULTS
    assert mine.end(1200) == "COMPLETED", mine.log
    assert number == FAULTS, "the run was over too early: lengthen EPOCHS"
    assert mine.result() == whole.result()
    record(f"the run's {24 * (8 + 5 * FAULTS)} steps and its students, after {FAULTS} faults: identical to an undisturbed "
           "run's")
