"""What a launcher's command line does before pkd begins."""

import os
import subprocess

import pytest

from pkd.ways import RANK, environment


@pytest.mark.parametrize(("given", "seen"), [("2,3", "2,3"), ("", ""), (None, "0,1")])
def test_ranks_see_the_gpus_that_the_job_was_given_whatever_deepspeed_numbers_them(given, seen):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1",
           **environment("deepspeed", {} if given is None else {"CUDA_VISIBLE_DEVICES": given})}
    done = subprocess.run([*RANK, "printenv", "CUDA_VISIBLE_DEVICES"], env=env, capture_output=True, text=True)
    assert done.stdout == f"{seen}\n"
