"""The programs that pkd is measured against compute what it computes: the first losses are the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from ranks import REPOSITORY, clean_environment, run, trace


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory):
    """The recipe with the paper's objective, without augmentation, at rates that keep rounding errors small; and a run
    folder with its teachers.
    """
    folder = tmp_path_factory.mktemp("slow")
    recipe = yaml.safe_load(tiny.read_text())
    recipe |= {"views": {}, "objective": {"kind": "paper"}, "deepspeed": {"students": "zero0"},
               "students": [{**student, "lr": 1e-4, "warmup_steps": 0} for student in recipe["students"]]}
    (folder / "slow.yaml").write_text(yaml.safe_dump(recipe))
    run(1, "teach", folder / "slow.yaml", "--run-folder", folder / "taught")
    return folder / "slow.yaml", folder / "taught"


@pytest.mark.parametrize(("script", "ranks", "kernels"), [("published_loop", 1, "eager"), ("naive_ddp", 2, "ours")])
def test_the_first_losses_are_those_of_pkd(slow, tmp_path, script, ranks, kernels):
    recipe, taught = slow
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 "--nproc_per_node", str(ranks)]
    words = (recipe, "--taught", taught, "--steps", 4, "--threads", 1, "--kernels", kernels)
    done = subprocess.run([*start, str(REPOSITORY / "tests" / "bench" / "baselines" / f"{script}.py"), *map(str, words)],
                          env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    run(ranks, "distill", recipe, "--run-folder", tmp_path / "run", f"teachers_from={taught}", "--steps", 3,
        f"placement.kind={'single' if ranks == 1 else 'co-located'}")
    ours = [list(line["loss"].values()) for line in trace(tmp_path / "run")]
    assert np.shape(ours) == (3, 2) and found["images_per_second"] > 0
    np.testing.assert_allclose(found["losses"], ours, rtol=2e-4)
