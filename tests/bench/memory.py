"""Persistent memory of a student rank, predicted by `pkd plan`'s formula and measured, for every ZeRO stage.

    python tests/bench/memory.py        # writes RESULTS-memory.md beside itself

Measured: bytes of the live storages of weights, gradients, fp32 masters and optimizer states, each storage once, between
the second step's backward and its update, for gradients are let go in the update; where a step has two micro batches, after
the first one's backward, which is what lies there beside the activations of the second.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from live_storages import storages
from ranks import free_port

from pkd import state
from pkd.ds_config import load_ds_config, precision, stage
from pkd.engine import Engine
from pkd.launcher import read_launch
from pkd.models import build
from pkd.recipe import Model, Optimisation, Timeouts
from pkd.workload import student_bytes
from pkd.world import World

HERE = Path(__file__).resolve().parent
MIB = 2**20
MODELS = (("pkd_resnet_l", 2.0), ("pkd_mobile", 4.0))
CASES = [(f"zero{stage}{dtype}", 1) for dtype in ("", "-bf16") for stage in range(4)]  # and micro batches of a step
CASES += [("zero1", 2), ("zero2", 2)]


def parts(engine: Engine) -> dict[str, int]:
    """Bytes by kind; a storage that serves two kinds counts for the first."""
    ds, zero = engine.ds, engine.ds.optimizer
    parameters = list(ds.module.parameters())
    weights = [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for name in ("averaged_gradients", "all_grad_tensors"):  # of ZeRO 2: the step's, and its micro batches' so far
        found = getattr(zero, name, {})
        for kept in found.values() if isinstance(found, dict) else found:
            gradients += [one for one in kept or [] if one is not None]
    for name in ("_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",):
        gradients += list(getattr(zero, name, {}).values())
    masters = [master for group in range(len(engine.names)) for piece in state.pieces(ds, group) for master in piece.masters]
    gradients += [master.grad for master in masters if master.grad is not None]
    states = [value for own in engine.optimizer.state.values() for value in own.values() if torch.is_tensor(value)]
    seen, out = [], {}
    for kind, tensors in (("weights", weights), ("gradients", gradients), ("masters", masters), ("states", states)):
        before = storages(seen)
        seen += tensors
        out[kind] = storages(seen) - before
    return out


def element_and_stage(config: str) -> tuple[int, int]:
    """Bytes of a weight in forward and backward, and the ZeRO stage."""
    found = load_ds_config(config)
    return 4 if precision(found) == "fp32" else 2, stage(found)


def name_of(config: str, accumulation: int) -> str:
    return config if accumulation == 1 else f"{config}, {accumulation} micro batches"


def worker(rank: int, ranks: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    world = World(read_launch(os.environ), Timeouts(start=60))
    found = {}
    for config, accumulation in CASES:
        world.join_island(f"{config} {accumulation}", list(range(ranks)))
        torch.manual_seed(0)
        networks = {name: build(Model(name=name, width=width), 10, 1, (8, 8)) for name, width in MODELS}
        count = sum(p.numel() for network in networks.values() for p in network.parameters())
        engine = Engine(networks, [Optimisation() for _ in networks], load_ds_config(config), accumulation, world.device,
                        False)
        images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
        for _ in range(accumulation):
            engine.backward(engine.forward(images).square().mean())
        engine.ds.backward(engine.forward(images).square().mean())
        copies = storages(tensor for copy in engine.copies.values() for tensor in copy.state_dict().values())
        found[name_of(config, accumulation)] = {"count": count, **parts(engine), "copies": copies}
        engine.ds.step()
        engine.close()
        del engine, networks
        world.leave_island()
    if rank == 0:
        Path(folder, f"{ranks}").write_text(json.dumps(found))
    world.close()


def main() -> None:
    from commit import commit  # which lies beside this file: the tests import that as a part of a package

    rows, worst, measured = [], 0.0, commit()
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            mp.spawn(worker, (ranks, free_port(), folder), nprocs=ranks)
            measured_here = json.loads(Path(folder, f"{ranks}").read_text())
            for config, accumulation in CASES:
                name, (element, own) = name_of(config, accumulation), element_and_stage(config)
                found = measured_here[name]
                predicted = student_bytes(found["count"], element, own, ranks, 1, accumulation)
                kinds = [found[kind] for kind in ("weights", "gradients", "masters", "states")]
                ratio = predicted / sum(kinds)
                worst = max(worst, abs(ratio - 1))
                rows.append(f"| {name} | {ranks} | {predicted / MIB:.2f} | {sum(kinds) / MIB:.2f} | {ratio:.3f} | "
                            + " | ".join(f"{kind / MIB:.2f}" for kind in kinds)
                            + f" | {found['copies'] / MIB:.2f} |")
                print(rows[-1], flush=True)
    count = found["count"]
    (HERE / "RESULTS-memory.md").write_text("\n".join([
        "# Persistent memory of a student rank, predicted and measured", "",
        f"Written by `python tests/bench/memory.py` at commit {measured}: torch {torch.__version__}, gloo; {count:,} "
        f"parameters ({', '.join(f'{name} of width {width:g}' for name, width in MODELS)}), SGD with momentum. MiB of live "
        f"storages on rank 0. The prediction is at most {worst:.1%} away.", "",
        "| configuration | ranks | predicted | measured | ratio | weights | gradients | masters | states | "
        "evaluation copies |",
        "|" + "---|" * 10, *rows, ""]))


if __name__ == "__main__":
    main()
