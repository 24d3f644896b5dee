"""What the environment says, launcher by launcher; pure."""

import pytest

from pkd.errors import UserError
from pkd.launcher import first_host, read_launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
            "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "64", "SLURM_NODELIST": "cpu[1-9]"}


def test_torchrun_serves_the_store_itself_and_counts_its_restarts():
    launch = read_launch(TORCHRUN)
    assert (launch.by, launch.rank, launch.world_size, launch.local_rank) == ("torchrun", 3, 8, 1)
    assert launch.attempt == "2" and not launch.serves_store
    assert not read_launch({**TORCHRUN, "RANK": "0"}).serves_store


def test_under_deepspeed_rank_0_serves_the_store():
    env = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert read_launch(env).by == "deepspeed"
    assert not read_launch(env).serves_store and read_launch({**env, "RANK": "0"}).serves_store


@pytest.mark.parametrize(("more", "nodes"), [({}, 1), ({"GROUP_WORLD_SIZE": "3"}, 3), ({"CROSS_SIZE": "2"}, 2)])
def test_launchers_tell_how_many_nodes_there_are(more, nodes):
    """By which a master address that only its own node can reach is refused at once."""
    assert read_launch({**TORCHRUN, **more}).nodes == nodes


def test_a_single_task_needs_no_port():
    """Of an array of them many may be on one node."""
    assert read_launch({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).port == 0 < read_launch(SRUN).port


def test_srun_is_read_from_the_step_not_the_job():
    launch = read_launch(SRUN)
    assert (launch.by, launch.rank, launch.world_size, launch.local_rank) == ("srun", 5, 8, 1)
    assert launch.address == "gpu07"
    assert 1024 < launch.port < 32768
    others = {read_launch({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(20)}
    assert len(others) > 15, "steps of one job must not meet on one port"


def test_a_master_address_of_a_batch_script_serves_under_srun():
    """Many export it, and a port, without starting torchrun or deepspeed."""
    launch = read_launch({**SRUN, "MASTER_ADDR": "gpu08-ib", "MASTER_PORT": "29500"})
    assert (launch.by, launch.address, launch.port) == ("srun", "gpu08-ib", read_launch(SRUN).port)
    assert read_launch({**SRUN, **TORCHRUN}).by == "torchrun", "started by srun itself"


def test_a_batch_script_without_srun_is_a_plain_start():
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}).world_size == 1
    plain = read_launch({})
    assert (plain.by, plain.rank, plain.world_size, plain.port) == ("plain", 0, 1, 0)


@pytest.mark.parametrize(("env", "words"), [
    ({"RANK": "0"}, ["RANK", "WORLD_SIZE"]),
    ({**TORCHRUN, "RANK": "8"}, ["RANK", "8", "7"]),
    ({**TORCHRUN, "WORLD_SIZE": "many"}, ["WORLD_SIZE", "many"]),
    ({**SRUN, "SLURM_PROCID": "9"}, ["SLURM_PROCID", "9", "7"]),
    ({**SRUN, "SLURM_LOCALID": ""}, ["SLURM_LOCALID"]),
    ({**SRUN, "SLURM_STEP_NODELIST": ""}, ["node list"]),
])
def test_contradictions_are_refused_by_name(env, words):
    with pytest.raises(UserError) as refusal:
        read_launch(env)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(("nodes", "host"), [
    ("a", "a"), ("a,b", "a"), ("n[3]", "n3"), ("n[03-05,9]", "n03"), ("n[1,7-9],m2", "n1"),
    ("rack1-n[2-3]-x,b", "rack1-n2-x"),
    ("login,gpu[1-2]", "login"),
])
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host
