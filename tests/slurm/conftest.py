"""One Slurm cluster of four virtual nodes for all tests of this folder; skipped where none can be started."""

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm cluster: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
