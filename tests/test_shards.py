"""Teachers that no rank can hold: several ranks hold one together, and nothing else changes."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from live_storages import live_storages, storages
from ranks import LIGHT, Ranks, free_port, refused, run, spawn, students, trace, wait_for_step

from pkd.models import build
from pkd.recipe import Model, Timeouts
from pkd.weights_file import write_weights

DEDICATED, CO_LOCATED = "placement.kind=dedicated", "placement.kind=co-located"
ONE_STUDENT = "placement.student_ranks=1"


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *LIGHT, *overrides)
    return trace(folder), students(folder)


@pytest.fixture(scope="module")
def whole(tiny, taught, tmp_path_factory):
    """What students become whose teachers are whole, on a rank of their own."""
    return distilled(2, tiny, (tmp_path_factory.mktemp("whole") / "run", f"teachers_from={taught}"), DEDICATED)


def test_losses_are_equal_bit_for_bit_whether_a_teacher_is_whole_or_in_shards(tiny, new_run, whole):
    """Invariant 1: on ranks of its own, by itself and beside whole teachers, offloaded or not, and on all ranks."""
    assert distilled(3, tiny, new_run("apart"), DEDICATED, ONE_STUDENT, "placement.shards.level0=2") == whole
    every = "placement.shards={level0: 2, level1-0: 2, level1-1: 2, level2-0: 2, level2-1: 2, level2-2: 2}"
    assert distilled(3, tiny, new_run("every teacher"), DEDICATED, ONE_STUDENT, every,
                     "deepspeed.shards=teacher-zero3-offload") == whole
    last = CO_LOCATED, "teachers.forward_channels_last=true"  # weights lie otherwise in shards
    both = distilled(2, tiny, new_run("co-located"), *last)
    assert distilled(2, tiny, new_run("over all"), *last, "placement.shards.level0=2") == both


def test_what_no_rank_has_room_for_lies_in_shards_and_trains_under_zero_3(tiny, tmp_path):
    """placement auto, with ranks that may use so much: a teacher of 42 MiB, then a student whose weights, gradients and
    states are 127 MiB and its copies 85; half a GB of each rank is the libraries'.
    """
    def gib(mib: float) -> str:
        return f"placement.memory_gib={mib / 0.9 / 1024}"
    top = ("pyramid=[{teachers: 1, model: {name: pkd_resnet_m, width: 8}}]", "objective.kind=top", "teachers.steps=1",
           *LIGHT)
    run(1, "teach", tiny, "--run-folder", tmp_path / "top", *top)
    said = run(3, "distill", tiny, "--run-folder", tmp_path / "top", *top, gib(510), "--steps", 2)[0].out
    assert "no rank has room for the teachers whole" in said and "ranks 1-2: level0 in 2 shards" in said
    assert all(not source["group"] for source in sources(tiny, *top)), "all of this machine's memory is enough"
    assert [source["group"] for source in sources(tiny, *top, gib(510))] == [[1, 2]]
    students = ("students=[{name: large, model: {name: pkd_resnet_l, width: 4}, lr: 0.1}]", "objective.kind=alone", gib(670))
    words = ("distill", tiny, "--run-folder", tmp_path / "large", *students, "deepspeed.students=zero0")
    assert "does not fit on 2 rank(s)" in refused(2, *words) and not (tmp_path / "large" / "placement.json").exists()
    assert "epoch 1/2" in run(2, *words[:-1], "deepspeed.students=zero3", "--steps", 2)[0].out
    assert "does not fit on 2 rank(s)" in refused(2, *words), "the placement of ZeRO 3 is none of ZeRO 0"


def sources(tiny, *words) -> list[dict]:
    return json.loads(run(1, "plan", tiny, "--world", 3, "--json", *words)[0].out)["placement"]["sources"]


def test_a_killed_rank_of_a_shard_group_ends_the_job_and_it_comes_to_the_same_students(tiny, new_run, whole):
    """Invariant 5 and 6: kill -9 of the rank that does not send, which only its own group talks to."""
    place = (DEDICATED, ONE_STUDENT, "placement.shards.level0=2", *LIGHT)
    folder, teachers_from = new_run("disturbed")
    ranks = Ranks(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    wait_for_step(folder, 3)
    ranks.processes[2].kill()
    began = time.monotonic()
    ended = ranks.wait()
    assert time.monotonic() - began < 20, "a dead rank ends the job within seconds"
    assert all(one.code != 0 for one in ended)
    run(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    assert (trace(folder), students(folder)) == whole


@pytest.mark.parametrize(("world", "overrides", "words"), [
    (3, (CO_LOCATED, "placement.shards.level0=2"), ["placement.shards.level0 is 2", "3 co-located ranks"]),
    (2, (DEDICATED, "placement.shards.level0=2", "deepspeed.shards=zero1"), ["deepspeed.shards is zero1", "teacher-zero3"]),
])
def test_what_cannot_be_sharded_is_refused(tiny, new_run, world, overrides, words):
    folder, teachers_from = new_run("run")
    sentence = refused(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    assert all(word in sentence for word in words), sentence


def worker(rank, port, folder):
    """One of two ranks that hold a network together; leaves what it measured, in bytes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from pkd.ds_config import load_ds_config
    from pkd.launcher import read_launch
    from pkd.sharded import ShardedNetwork
    from pkd.weights_file import Weights
    from pkd.world import World

    folder = Path(folder)
    index = folder / "w.safetensors.index.json"
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = build(BIG.model_copy(update={"weights": str(index)}), 10, 1, (8, 8)).eval()
    with torch.inference_mode():
        expected = whole(images)  # before DeepSpeed is there
    del whole
    world = World(read_launch(os.environ), Timeouts(start=60))
    world.join_island("shards", [0, 1])
    before, while_loading = live_storages(), []
    network = ShardedNetwork(build(BIG, 10, 1, (8, 8), empty=True), Weights(index),
                             load_ds_config("teacher-zero3"), world.device, "ranks 0-1",
                             lambda group: while_loading.append(live_storages() - before))
    with torch.no_grad():
        logits = [network(images) for _ in range(3)]  # the first forward records in which order weights are needed
    equal = all(torch.equal(one, expected) for one in logits)
    torch.save({"equal": equal, "resident": live_storages() - before - storages(logits), "loading": max(while_loading)},
               folder / f"found-{rank}")
    network.close()
    world.close()


BIG = Model(name="own_model:Attention")  # 12 MB; linear layers and attention, whose kernels depend on more than the weights


def test_a_rank_holds_its_part_of_the_weights_and_never_all_of_them(tmp_path):
    """Measured as live storages; and the logits are those of the whole network, bit for bit."""
    torch.manual_seed(0)
    state = build(BIG, 10, 1, (8, 8)).backbone.state_dict()
    size, largest = storages(state.values()), max(tensor.nbytes for tensor in state.values())
    write_weights(tmp_path / "w", state, most=size // 3)
    spawn(worker, free_port(), str(tmp_path), ranks=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"found-{rank}", weights_only=True)
        assert found["equal"]
        assert size / 2 < found["resident"] < 0.55 * size, (size, found)
        assert found["loading"] < size / 2 + 2 * largest + size / 20, (size, found)
