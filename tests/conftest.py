"""A small real problem for the tests with real processes: 480 of scikit-learn's digits, tiny networks."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranks import run

from pkd.files import one_at_a_time

torch.set_num_threads(1)  # what runs in this process is small, and other workers and their ranks have the other cores
settings.register_profile("shared machine", deadline=None)  # an example may take long where others compute, too
settings.load_profile("shared machine")

# First, so that no worker is left with one of them.
LONGEST = ("slurm", "test_archive", "test_invariants", "test_launch", "test_study", "test_export", "test_student_groups",
           "test_commands", "test_calibration", "test_hangs", "test_tracker", "test_shards", "test_baselines",
           "test_unlabelled", "test_bench", "test_confusion", "test_engine")


def group(nodeid: str) -> str:
    """Tests that one worker runs: those of a file, for its fixtures; and all that use the Slurm cluster."""
    path = Path(nodeid.partition("::")[0])
    return "slurm" if path.parent.name == "slurm" else path.stem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(group(item.nodeid)) if group(item.nodeid) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)
    return Groups(config, log)


@pytest.fixture(scope="session")
def once(tmp_path_factory, request) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) -> a folder that the first of all workers to ask for it fills; not to be changed."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with one_at_a_time(shared / name):
            if not (shared / name / "made").exists():
                make(shared / name)
                (shared / name / "made").touch()
        return shared / name
    return get


@pytest.fixture(scope="session")
def tiny(once) -> Path:
    """A recipe file: 10 classes, three levels, two students, 12 steps an epoch."""
    return once("tiny", write_tiny) / "tiny.yaml"


def write_tiny(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)
    np.savez(folder / "digits.npz", x=images[:480], y=digits.target[:480].astype(np.int64))
    small = {"name": "pkd_resnet_s", "width": 0.25}
    recipe = {
        "name": "tiny", "data": {"name": "npz", "path": str(folder / "digits.npz")}, "views": {"crop": 1},
        "pyramid": [{"teachers": 1, "model": small}, {"teachers": 2, "model": small},
                    {"classes": [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]], "model": small}],
        "teachers": {"steps": 30, "batch": 32, "evaluate_every": 10, "lr": 0.1},
        "students": [{"name": "mobile", "model": {"name": "pkd_mobile", "width": 0.25}, "lr": 0.05},
                     {"name": "shuffle", "model": {"name": "pkd_shuffle", "width": 0.25}, "lr": 0.1}],
        "distill": {"epochs": 2, "batch": 32}, "trace": True, "timeouts": {"start": 60, "step": 30},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture(scope="session")
def taught(once, tiny) -> Path:
    """A run folder whose teachers are trained; other runs read them by teachers_from."""
    return once("taught", lambda folder: run(2, "teach", tiny, "--run-folder", folder / "run")) / "run"


@pytest.fixture(scope="session")
def finished(once, tiny, taught) -> Path:
    """A run on two ranks, teachers apart, that nothing disturbed."""
    return once("finished", lambda folder: run(2, "distill", tiny, "--run-folder", folder / "run", f"teachers_from={taught}",
                                               "placement.kind=dedicated")) / "run"


@pytest.fixture
def new_run(taught, tmp_path):
    """new_run(name) -> (folder, override): a run folder of that name that uses the trained teachers."""
    return lambda name: (tmp_path / name, f"teachers_from={taught}")
