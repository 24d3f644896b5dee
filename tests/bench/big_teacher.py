"""A teacher of 1.5 GB in sharded safetensors, held by several ranks together: what each holds, and that it teaches.

    python tests/bench/big_teacher.py        # one to three minutes; writes RESULTS-big-teacher.md beside itself

Held: bytes of live tensor storages of a rank (tests/live_storages.py), above what there was before the teacher came.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
import yaml
from commit import commit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from live_storages import live_storages, storages
from ranks import free_port, run

from pkd.data import load_data
from pkd.network_file import fresh, open_teacher, teacher_identity, write_network
from pkd.pyramid import build_pyramid
from pkd.recipe_file import parse_recipe
from pkd.run_folder import RunFolder
from pkd.vision import torchvision

HERE = Path(__file__).resolve().parent
RECIPE = {
    "name": "big-teacher", "data": {"name": "digits"},
    "pyramid": [{"teachers": 1, "model": {"name": "big_teacher:Transformer", "input_size": 32}}],
    "teachers": {"steps": 1}, "objective": {"kind": "top"},
    "students": [{"name": "mobile", "model": {"name": "pkd_mobile", "width": 0.25}}],
    "distill": {"epochs": 1, "batch": 32}, "trace": True,
}
MIB = 2**20


class Transformer(torchvision.models.VisionTransformer):
    """A ViT of 375 million parameters on five patches, so that its weights are large and its forward is not."""

    def __init__(self, num_classes: int):
        super().__init__(image_size=32, patch_size=16, num_layers=19, num_heads=16, hidden_dim=1280, mlp_dim=5120,
                         num_classes=num_classes)


def prepare(_, folder: Path) -> None:
    """The teacher's files in a run folder, its logits of one block, bytes of its weights and of the largest tensor."""
    torch.set_num_threads(1)
    recipe = parse_recipe(RECIPE)
    data = load_data(recipe.data)
    teacher = build_pyramid(recipe.pyramid, data.classes, recipe.seed).teachers[0]
    network = fresh(teacher.model, len(teacher.classes), data, recipe.seed, teacher.name).eval()
    with torch.no_grad():  # torchvision starts the head at zero
        torch.nn.init.normal_(network.backbone.heads.head.weight, std=0.02)
    facts = {"name": teacher.name, "level": 0, "class_ids": list(teacher.classes), "steps": 1,
             "identity": teacher_identity(recipe, teacher, data)}
    write_network(RunFolder(folder).teachers / teacher.name, network, teacher.model, list(data.classes), data, facts)
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        torch.save({"images": images, "logits": network(images)}, folder / "block")
    state = network.backbone.state_dict()
    whole = {"size": storages(state.values()), "largest": max(tensor.nbytes for tensor in state.values())}
    (folder / "whole").write_text(json.dumps(whole))


def worker(rank: int, ranks: int, port: int, folder: Path, config: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from pkd.ds_config import load_ds_config
    from pkd.launcher import read_launch
    from pkd.sharded import ShardedNetwork
    from pkd.world import World

    recipe = parse_recipe(RECIPE)
    world = World(read_launch(os.environ), recipe.timeouts)
    world.join_island("shards", list(range(ranks)))
    data = load_data(recipe.data)
    teacher = build_pyramid(recipe.pyramid, data.classes, recipe.seed).teachers[0]
    block = torch.load(folder / "block", weights_only=True)
    before, loading, began = live_storages(), [], time.perf_counter()
    network, weights = open_teacher(RunFolder(folder).teachers, recipe, teacher, data, True)
    network = ShardedNetwork(network, weights, load_ds_config(config), world.device, f"ranks 0-{ranks - 1}",
                             lambda group: loading.append(live_storages() - before))
    loaded = time.perf_counter()
    with torch.no_grad():
        logits = [network(block["images"]) for _ in range(3)]
    forwards = time.perf_counter()
    assert all(torch.equal(one, block["logits"]) for one in logits), "other logits than the whole teacher's"
    found = {"held": live_storages() - before - storages(logits), "loading": max(loading), "load": loaded - began,
             "forward": (forwards - loaded) / 3}
    (folder / f"found-{rank}").write_text(json.dumps(found))
    network.close()
    world.close()


def main() -> None:
    rows, began, measured = [], time.perf_counter(), commit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(prepare, (folder,))
        whole = json.loads((folder / "whole").read_text())
        for ranks, config in ((2, "teacher-zero3"), (4, "teacher-zero3"), (2, "teacher-zero3-offload")):
            mp.spawn(worker, (ranks, free_port(), folder, config), nprocs=ranks)
            found = [json.loads((folder / f"found-{rank}").read_text()) for rank in range(ranks)]
            held, loading = (max(one[key] for one in found) for key in ("held", "loading"))
            rows.append(f"| {config} | {ranks} | {held / MIB:,.1f} | {held / whole['size']:.4f} | {1 / ranks:.4f} | "
                        f"{loading / MIB:,.1f} | {max(one['load'] for one in found):.1f} | "
                        f"{max(one['forward'] for one in found):.2f} | yes |")
            print(rows[-1], flush=True)
            assert abs(held * ranks / whole["size"] - 1) < 0.02 and loading < whole["size"]
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        started = time.perf_counter()
        run(3, "distill", recipe, "--run-folder", folder / "run", f"teachers_from={folder}", "--steps", 3,
            "placement={kind: dedicated, student_ranks: 1, shards: {level0: 2}}", timeout=240, prefix=("env",),
            env=lambda rank: {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}"})
        seconds = time.perf_counter() - started
        files = sorted(path.name for path in RunFolder(folder).teachers.glob("*safetensors*"))
    (HERE / "RESULTS-big-teacher.md").write_text("\n".join([
        "# A teacher that several ranks hold together", "",
        f"Written by `python tests/bench/big_teacher.py` at commit {measured} in {time.perf_counter() - began:.0f} s: torch "
        f"{torch.__version__}, "
        f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, one thread a rank, gloo.", "",
        f"A vision transformer, {whole['size'] / MIB:,.1f} MiB of fp32 weights (the largest tensor "
        f"{whole['largest'] / MIB:.1f}) in {', '.join(files)}. MiB are of live tensor storages, the largest rank's; "
        "logits are compared with those of the whole teacher in one process, a block of 32 rows.", "",
        "| configuration | ranks | MiB held | of the whole | 1/n | most while loading | s to load | s a forward | "
        "logits equal bit for bit |", "|---|---|---|---|---|---|---|---|---|", *rows, "",
        f"`pkd distill` with it for three steps, one student rank and two ranks for the teacher: {seconds:.0f} s from start "
        "to end, the start of three Pythons and the hash of all weights included.", ""]))


if __name__ == "__main__":
    main()
