"""What a rank needs in memory while it saves and resumes, as the kernel counts it; a save that is killed."""

import json
import os
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port

from pkd import checkpoint
from pkd.files import sha256, write_json

PEAK = Path("/proc/self/clear_refs")
STAGES = ("zero1", "zero3")


def peak_of(action) -> int:
    """Bytes by which this process's resident memory rises at most while `action` runs."""
    PEAK.write_text("5")  # the peak starts anew at what is resident now
    before = psutil.Process().memory_info().rss
    action()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) - before


def measured(folder: Path, stage: str, device: torch.device) -> dict:
    """Of one rank of the current island: an ensemble is saved and read back."""
    from pkd.ds_config import load_ds_config
    from pkd.engine import Engine
    from pkd.models import build
    from pkd.recipe import Model, Optimisation

    networks = {name: build(Model(name="own_model:Attention"), 10, 1, (8, 8)) for name in ("a", "b")}
    largest = 4 * sum(p.numel() for p in networks["a"].parameters())
    settings = [Optimisation(optimizer="adamw", ema=0.9) for _ in networks]
    engine = Engine(networks, settings, load_ds_config(stage), 1, device, False)

    def save(step):
        checkpoint.save(folder / stage, step, engine, {}, {}, lambda: None)
        dist.barrier()
    save(1)  # makes the optimizer's states
    found = {"largest": largest, "states": sum(len(engine.state_keys(index)) for index in range(2)),
             "saving": peak_of(lambda: save(2)),
             "loading": peak_of(lambda: checkpoint.load(folder / stage / "step-2", engine))}
    engine.close()
    return found


def worker(rank: int, port: int, folder: Path) -> None:
    """One of two ranks; leaves what it measured in bytes, stage by stage."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from pkd.launcher import read_launch
    from pkd.recipe import Timeouts
    from pkd.world import World

    world, found = World(read_launch(os.environ), Timeouts(start=60)), {}
    for stage in STAGES:
        world.join_island(stage, [0, 1])
        found[stage] = measured(folder, stage, world.device)
        world.leave_island()
    (folder / f"found-{rank}").write_text(json.dumps(found))
    world.close()


def whole(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {})
    write_json(folder / "sha256.json", {"state.json": sha256(folder / "state.json")})


def test_a_save_that_is_killed_between_its_renames_loses_nothing(tmp_path):
    """A step is saved twice where an epoch ends; then the first one is set aside until the second is in its place."""
    whole(tmp_path / ".step-7.before")
    whole(tmp_path / ".step-7.partial")
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-7", [])
    assert not list(tmp_path.glob(".step-*")), "nor does it keep room that the next save may need"
    whole(tmp_path / ".step-7.before")
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-7", []) and (tmp_path / ".step-7.before").exists()


@pytest.mark.skipif(not os.access(PEAK, os.W_OK), reason="the kernel does not tell a process's peak of memory")
def test_no_rank_needs_more_than_four_times_the_largest_networks_weights(tmp_path, monkeypatch):
    """Of an ensemble whose weights and optimizer states are eight times as much."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back at once
    mp.spawn(worker, (free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        for stage, found in json.loads((tmp_path / f"found-{rank}").read_text()).items():
            assert found["states"] == 8
            for what in ("saving", "loading"):
                assert 0 < found[what] < 4 * found["largest"], (rank, stage, what, found)
