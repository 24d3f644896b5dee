"""The engine under every ZeRO stage: the same numbers by name, and any stage goes on from any other's state.

One launch of two ranks does all of it, island after island, and the tests read what it found.
"""

import itertools
import os

import pytest
import torch
from ranks import free_port, spawn

STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 2  # the second is the first with momentum


def settings():
    """Two algorithms, an average, a clip that bites and one that does not."""
    from pkd.recipe import Optimisation

    return [Optimisation(lr=0.1, clip=0.05, nesterov=True), Optimisation(optimizer="adamw", lr=0.01, ema=0.9),
            Optimisation(lr=0.05, momentum=0.0, weight_decay=0.0, clip=1e6)]


def networks():
    from pkd.models import build
    from pkd.recipe import Model

    torch.manual_seed(0)
    return {name: build(Model(name=kind, width=0.25 if name == "b" else 1), 4, 1, (8, 8))
            for name, kind in (("a", "own_model:Smooth"), ("b", "pkd_shuffle"), ("c", "own_model:Smooth"))}


def steps(engine, first, last, rank):
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 4, (16,), generator=generator)
        mine = slice(0, 9) if rank == 0 else slice(9, 16)
        logits = engine.forward(images[mine])
        loss = torch.stack([torch.nn.functional.cross_entropy(own, labels[mine], reduction="sum") for own in logits])
        engine.backward(loss.sum() / 16)
        losses.append((loss / 16).tolist())
    return losses


def states(engine):
    return [{f"{key}/{name}": value for key in engine.state_keys(index)
             for name, value in engine.network_state(index, key).items()} for index in range(3)]


def everything(engine):
    engine.refresh_copies()
    return {"state": states(engine), "taken": engine.steps_taken(),
            "copies": {name: copy.state_dict() for name, copy in engine.copies.items()}}


def worker(rank, port, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from pkd.ds_config import load_ds_config
    from pkd.engine import Engine
    from pkd.launcher import read_launch
    from pkd.recipe import Timeouts
    from pkd.world import World

    world = World(read_launch(os.environ), Timeouts(start=60))
    found = {}

    def made(name, config):
        world.join_island(name, [0, 1])
        return Engine(networks(), settings(), load_ds_config(config), 1, world.device, channels_last=False)

    def left(engine):
        engine.close()
        world.leave_island()

    for config in (*STAGES, *(f"{stage}-bf16" for stage in STAGES)):
        engine = made(config, config)
        found.setdefault("start", states(engine))
        losses = steps(engine, 0, STEPS, rank)
        saved = everything(engine)
        saved["statistics"] = [{name: buffer.clone() for name, buffer in network.named_buffers()}
                               for network in engine.ds.module.networks]
        found[config] = {"losses": losses, **saved, "on": steps(engine, STEPS, 2 * STEPS, rank)}
        left(engine)
    pairs = [*itertools.product(STAGES, STAGES), ("zero2-bf16", "zero3-bf16"), ("zero3-bf16", "zero0-bf16"),
             ("zero0-bf16", "zero1-bf16")]
    for before, after in pairs:
        engine = made(f"{before} to {after}", after)
        for index, saved in enumerate(found[before]["state"]):
            for key in engine.state_keys(index):
                engine.load_network_state(index, key, {name.removeprefix(f"{key}/"): value for name, value in saved.items()
                                                       if name.startswith(f"{key}/")})
        engine.set_steps_taken(found[before]["taken"])
        for network, statistics in zip(engine.ds.module.networks, found[before]["statistics"]):
            for name, buffer in network.named_buffers():
                buffer.data.copy_(statistics[name])
        again = {"state": states(engine), "taken": engine.steps_taken()}
        found[before, after] = {"again": again, "on": steps(engine, STEPS, 2 * STEPS, rank)}
        left(engine)
    for config in ("zero0-autocast", "zero1-autocast"):  # the last: DeepSpeed remembers autocast for the whole process
        engine = made(config, config)
        found[config] = {"losses": steps(engine, 0, STEPS, rank), **everything(engine)}
        left(engine)
    if rank == 0:
        with open(path, "wb") as file:
            torch.save(found, file)
    world.close()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "found"
    spawn(worker, free_port(), str(path), ranks=2)
    with open(path, "rb") as file:
        return torch.load(file, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_has_the_same_numbers_by_name(found, stage):
    """In fp32, to rounding: clipping, averaging and both algorithms included."""
    for own, other in zip(found["zero0"]["state"], found[stage]["state"]):
        assert own.keys() == other.keys()
        for key, value in own.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)
    assert found[stage]["taken"] == [STEPS] * 3


@pytest.mark.parametrize("stage", [f"{stage}-bf16" for stage in STAGES])
def test_bf16_keeps_fp32_masters_that_move_as_in_fp32(found, stage):
    weights = [{k: v for k, v in own.items() if k.startswith("weights/")} for own in found[stage]["state"]]
    exact = [{k: v for k, v in own.items() if k.startswith("weights/")} for own in found["zero0"]["state"]]
    for own, other, start in zip(weights, exact, found["start"]):
        assert any((value != value.bfloat16().float()).any() for value in own.values()), "masters are rounded"
        distance = sum((own[k] - other[k]).square().sum() for k in own).sqrt()
        assert distance < 0.8 * sum((other[k] - start[k]).square().sum() for k in own).sqrt(), "of the way that they went"


@pytest.mark.parametrize("stage", ["zero0", "zero1"])
def test_autocast_keeps_fp32_weights_that_move_about_as_in_fp32(found, stage):
    """Losses differ by what bf16 rounds."""
    cast, exact = found[f"{stage}-autocast"], found[stage]
    assert cast["losses"] != exact["losses"]
    for own, other in zip(cast["losses"], exact["losses"]):
        assert own == pytest.approx(other, rel=0.05)
    values = [value for own in cast["state"] for key, value in own.items() if key.startswith("weights/")]
    assert any((value != value.bfloat16().float()).any() for value in values), "weights are rounded"


def test_the_averaged_weights_are_what_is_evaluated(found):
    state, copy = found["zero2"]["state"][1], found["zero2"]["copies"]["b"]
    averaged = {key.removeprefix("ema/"): value for key, value in state.items() if key.startswith("ema/")}
    assert averaged and all(torch.equal(copy[key], value) for key, value in averaged.items())
    plain = found["zero2"]["state"][0]
    assert all(torch.equal(found["zero2"]["copies"]["a"][k.removeprefix("weights/")], v)
               for k, v in plain.items() if k.startswith("weights/"))


@pytest.mark.parametrize(("before", "after"), [*itertools.product(STAGES, STAGES), ("zero2-bf16", "zero3-bf16"),
                                               ("zero3-bf16", "zero0-bf16"), ("zero0-bf16", "zero1-bf16")])
def test_any_stage_goes_on_from_any_other(found, before, after):
    """What is written in is what is read back; at the same stage the next losses are equal to the last bit."""
    moved = found[before, after]
    assert moved["again"]["taken"] == found[before]["taken"]
    for own, other in zip(found[before]["state"], moved["again"]["state"]):
        assert same(own, other)
    if before == after:
        assert moved["on"] == found[before]["on"]
    for one, other in zip(found[before]["on"], moved["on"]):
        assert one == pytest.approx(other, rel=2e-2 if "bf16" in before else 1e-4)
