"""What a launcher's command line does before pkd begins."""

import os
import subprocess
from pathlib import Path

import pytest

from pkd.ways import RANK, command, environment

HET = {"SLURM_HET_SIZE": "2", "SLURM_CPUS_PER_TASK_HET_GROUP_0": "6", "SLURM_CPUS_PER_TASK_HET_GROUP_1": "2",
       "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu-h[1-2]", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu-a[1-2]"}


@pytest.mark.parametrize(("given", "seen"), [("2,3", "2,3"), ("", ""), (None, "0,1")])
def test_ranks_see_the_gpus_that_the_job_was_given_whatever_deepspeed_numbers_them(given, seen):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1",
           **environment("deepspeed", {} if given is None else {"CUDA_VISIBLE_DEVICES": given})}
    done = subprocess.run([*RANK, "printenv", "CUDA_VISIBLE_DEVICES"], env=env, capture_output=True, text=True)
    assert done.stdout == f"{seen}\n"


def test_the_components_of_a_heterogeneous_job_have_their_own_cpus_and_meet_on_the_first_ones_node():
    """Slurm lists the nodes of all of them by name, gpu-a1 first."""
    found = command("srun", ["distill", "r"], 8, HET, Path("hosts"))
    one, other = found[:found.index(":")], found[found.index(":") + 1:]
    assert one[0] == "srun" and one[3:5] == ["--het-group=0", "--cpus-per-task=6"]
    assert other[:2] == one[1:3] and "--kill-on-bad-exit=1" in other, "for each component"
    assert other[2:4] == ["--het-group=1", "--cpus-per-task=2"]
    assert other[4:] == one[5:] and other[-2:] == ["distill", "r"]
    assert environment("srun", HET)["MASTER_ADDR"] == "gpu-h1"
    for env in ({**HET, "MASTER_ADDR": "ib-h1"}, {}):
        assert "MASTER_ADDR" not in environment("srun", env)


def test_deepspeeds_one_task_a_node_has_the_cpus_of_all_its_ranks():
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "PKD_FIRST_HOST": "a"}
    assert "--cpus-per-task=32" in command("srun-deepspeed", ["distill"], 16, env, Path("hosts"))
    assert "--cpus-per-task=4" in command("srun", ["distill"], 16, env, Path("hosts"))
    assert not any(word.startswith("--cpus-per-task") for word in command("srun", ["distill"], 16, {}, Path("hosts")))
