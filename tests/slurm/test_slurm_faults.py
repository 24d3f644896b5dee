"""A preemption, a node's death and a rank's: the job goes on by itself, to the same students to the last byte."""

import os
import signal
import time


def test_a_preempted_job_makes_room_and_goes_on_at_the_very_step(cluster, disturbed, undisturbed):
    """By a job of a partition with priority: SIGTERM to all ranks, then a time of grace."""
    mine = disturbed("--partition=low")
    urgent = cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    began = time.monotonic()
    cluster.wait(urgent, 60, {"RUNNING", "COMPLETED"})
    print(f"preemption: the urgent job started after {time.monotonic() - began:.1f} s")
    assert mine.end() == "COMPLETED", mine.log
    assert "stopped by a signal, everything is saved" in mine.log and cluster.restarts(mine.job) >= 1
    assert mine.result() == undisturbed


def test_a_killed_rank_ends_the_step_at_once_and_the_job_goes_on(disturbed, undisturbed):
    mine = disturbed()
    os.kill(mine.pid(1), signal.SIGKILL)
    print("kill -9 of a student rank:", mine.recovery())
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == undisturbed


def test_a_dead_node_is_replaced(cluster, disturbed, undisturbed):
    mine = disturbed()
    cluster.kill_node(cluster.hosts(mine.job)[1])
    print("node killed:", mine.recovery())
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == undisturbed
