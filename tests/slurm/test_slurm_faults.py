"""A preemption, a rank's death and a node's: the job goes on by itself, to the same students to the last byte."""

import os
import signal

import pytest
from virtual_hosts import listening

pytestmark = pytest.mark.timeout(900)


def test_a_job_outlives_a_preemption_a_killed_rank_and_a_dead_node(cluster, disturbed, undisturbed):
    """One after another in one run; each of them, and all others, in a run of its own: full_faults.py and full_jobs.py.

    Preempted by a job of a partition with priority: SIGTERM to all ranks, then a time of grace. Until it is killed every
    rank listens on the interface that the job uses, and on no other.
    """
    mine = disturbed("--partition=low")
    cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    preempted = mine.recovery()
    assert preempted.steps_lost == 0 and "stopped by a signal, everything is saved" in mine.log
    nodes = cluster.hosts(mine.job)
    for rank in range(4):
        assert listening(mine.pid(rank)) == {cluster.address(nodes[rank // 2])}, rank
    os.kill(mine.pid(1), signal.SIGKILL)
    killed = mine.recovery()
    cluster.kill_node(cluster.hosts(mine.job)[1])
    dead = mine.recovery()
    print("preemption:", preempted, "kill -9 of a student rank:", killed, "node killed:", dead)
    assert cluster.restarts(mine.job) == 3, "the run was over before its faults were"
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == undisturbed
    mine.two_nodes()
