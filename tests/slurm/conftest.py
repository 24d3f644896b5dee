"""One Slurm cluster of four virtual nodes for all tests of this folder; skipped where none can be started."""

import os
from pathlib import Path

import pytest
from cluster import Cluster, missing
from ranks import run, students, trace
from slurm_run import LONG, SlurmRun

ROWS = pytest.StashKey[list[dict]]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm cluster: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(tiny, taught, tmp_path_factory):
    """What LONG becomes on four ranks of this machine, without Slurm: its losses and its students."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(4, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", *LONG)
    return trace(folder), students(folder)


@pytest.fixture
def disturbed(cluster, tiny, new_run):
    """begin(*options of sbatch, words=overrides) -> a run of LONG in its second epoch, to be hit by something."""
    folder, teachers_from = new_run("run")

    def begin(*options, script="slurm.sbatch", folder=folder, step=30, words=()):
        mine = SlurmRun(cluster, folder, script, tiny, teachers_from, "--phases", "distill", *LONG, *words)
        mine.submit(*options)
        mine.wait_for_step(step)
        return mine
    yield begin
    cluster.heal()


@pytest.fixture
def record(request):
    """record(fault, what happened): a row of the results page, which full.sh asks for."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda fault, **columns: rows.append({"fault": fault, **columns})


def pytest_sessionfinish(session):
    rows, page = session.config.stash.get(ROWS, []), os.environ.get("PKD_RESULTS")
    if page and rows:
        keys = list(rows[0])
        lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
        with open(Path(page), "a") as file:
            file.write("\n".join(lines) + "\n\n")
