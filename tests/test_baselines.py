"""The programs that pkd is measured against compute what it computes: the first losses are the same."""

import json
import runpy
import sys

import numpy as np
import pytest
import yaml
from fork_server import Forked
from ranks import REPOSITORY, Ranks, clean_environment, free_port, run, trace


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory):
    """The recipe with the paper's objective, without augmentation, at rates that keep rounding errors small; and a run
    folder with its teachers.
    """
    folder = tmp_path_factory.mktemp("slow")
    recipe = yaml.safe_load(tiny.read_text())
    recipe |= {"views": {}, "objective": {"kind": "paper"}, "deepspeed": {"students": "zero0"},
               "teachers": recipe["teachers"] | {"steps": 4, "evaluate_every": 4},
               "students": [{**student, "lr": 1e-4, "warmup_steps": 0} for student in recipe["students"]]}
    (folder / "slow.yaml").write_text(yaml.safe_dump(recipe))
    run(1, "teach", folder / "slow.yaml", "--run-folder", folder / "taught")
    return folder / "slow.yaml", folder / "taught"


def baseline(script: str, *words: str) -> None:
    path = REPOSITORY / "tests" / "bench" / "baselines" / f"{script}.py"
    sys.argv, sys.path = [str(path), *words], [str(path.parent), *sys.path]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(("script", "ranks", "kernels"), [("published_loop", 1, "eager"), ("naive_ddp", 2, "ours")])
def test_the_first_losses_are_those_of_pkd(slow, tmp_path, script, ranks, kernels):
    recipe, taught = slow
    words = (recipe, "--taught", taught, "--steps", 4, "--threads", 1, "--kernels", kernels)
    started, port = Ranks(0), str(free_port())
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port} if ranks > 1 else {}
        started.processes.append(Forked([script, *map(str, words)], clean_environment() | place, REPOSITORY,
                                        "test_baselines:baseline"))
    done = started.wait()
    assert [one.code for one in done] == [0] * ranks, done[0].err[-2000:]
    found = json.loads(done[0].out.splitlines()[-1])
    run(ranks, "distill", recipe, "--run-folder", tmp_path / "run", f"teachers_from={taught}", "--steps", 3,
        f"placement.kind={'single' if ranks == 1 else 'co-located'}")
    ours = [list(line["loss"].values()) for line in trace(tmp_path / "run")]
    assert np.shape(ours) == (3, 2) and found["images_per_second"] > 0
    np.testing.assert_allclose(found["losses"], ours, rtol=2e-4)
