"""A preemption, a node's death and a rank's: the job goes on by itself, to the same students to the last byte."""

import os
import signal

import pytest
from virtual_hosts import listening

pytestmark = pytest.mark.timeout(900)  # the first test waits for a whole run that nothing disturbs, too


def test_a_preempted_job_makes_room_and_goes_on_at_the_very_step(cluster, disturbed, undisturbed):
    """By a job of a partition with priority: SIGTERM to all ranks, then a time of grace."""
    mine = disturbed("--partition=low")
    cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    recovery = mine.recovery()
    print("preemption:", recovery)
    assert recovery.steps_lost == 0 and "stopped by a signal, everything is saved" in mine.log
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == undisturbed


def test_a_killed_rank_ends_the_step_at_once_and_the_job_goes_on(cluster, disturbed, undisturbed):
    """Also: until then every rank listens on the interface that the job uses, and on no other."""
    mine = disturbed()
    nodes = cluster.hosts(mine.job)
    for rank in range(4):
        assert listening(mine.pid(rank)) == {cluster.address(nodes[rank // 2])}, rank
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
