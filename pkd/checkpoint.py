"""Save and resume, for any number of ranks and any ZeRO stage.

A checkpoint `step-N/` is self-contained: fp32 weights and optimizer states by name (one file a network), every rank's
batch statistics, whatever tensors the loop adds, `state.json`, and `sha256.json` over all of them. It is written in a
hidden folder and appears by one rename; the last but one goes only after the next is complete. Networks are gathered
and written one at a time, so no rank ever holds more than one network's states beside its own share.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pkd.engine import Engine, statistics
from pkd.errors import UserError
from pkd.files import read_json, sha256, sync_folder, unwritable, write_json
from pkd.tensor_file import read_tensors, write_tensors

KEEP = 2


def save(folder: Path, step: int, engine: Engine, progress: dict, tensors: dict[str, dict[str, torch.Tensor]],
         beat: Callable[[], None]) -> None:
    """Write folder/step-<step>. A collective over the island; rank 0 writes.

    progress: JSON-able; tensors: file stem -> tensors by name, taken from rank 0.
    """
    writer = dist.get_rank() == 0
    target, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
    for index, name in enumerate(engine.names):
        values = engine.network_state(index)
        if writer:
            write_tensors(partial / f"network-{name}.safetensors", values)
        beat()
    gathered = _gather_statistics(engine, beat)
    if not writer:
        return
    write_tensors(partial / "batch-statistics.safetensors", gathered)
    for stem, values in tensors.items():
        write_tensors(partial / f"{stem}.safetensors", values)
        beat()
    state = {"step": step, "ranks": engine.ranks, "steps_taken": engine.steps_taken(),
             "loss_scale": engine.loss_scale, "progress": progress}
    write_json(partial / "state.json", state)
    write_json(partial / "sha256.json", {path.name: sha256(path) for path in sorted(partial.iterdir())})
    try:
        shutil.rmtree(target, ignore_errors=True)  # of the same step, left by a run that was then resumed from before it
        os.replace(partial, target)
        sync_folder(folder)
    except OSError as error:
        raise unwritable(target, error, 0) from None
    for old in numbered(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first by step; clocks are not asked."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and a remark for each that was passed over.

    Raises UserError if there are checkpoints, but none is whole.
    """
    remarks = []
    for path in numbered(folder):
        damage = _damage(path)
        if damage is None:
            return path, remarks
        remarks.append(f"checkpoint {path} is damaged ({damage}), the one before it is used")
    if remarks:
        raise UserError(f"no whole checkpoint is left in {folder} ({len(remarks)} found, the newest: "
                        f"{_damage(numbered(folder)[0])}): restore one, or delete that folder to start afresh")
    return None, remarks


def load(path: Path, engine: Engine) -> dict:
    """Put a checkpoint into a fresh engine and return its progress. A collective over the island."""
    saved = read_json(path / "state.json")
    for index, name in enumerate(engine.names):
        values = read_tensors(path / f"network-{name}.safetensors")
        engine.load_network_state(index, values, saved["steps_taken"][index])
    engine.loss_scale = saved["loss_scale"]
    values = read_tensors(path / "batch-statistics.safetensors")
    own = saved["ranks"] == engine.ranks
    for index in range(len(engine.names)):
        for name, buffer in statistics(engine.ds.module.networks[index]).items():
            of_ranks = [values[f"{rank}/{index}/{name}"] for rank in range(saved["ranks"])]
            mean = torch.stack(of_ranks).double().mean(0).to(buffer.dtype)
            buffer.data.copy_(of_ranks[dist.get_rank()] if own else mean)
    return saved["progress"]


def _gather_statistics(engine: Engine, beat: Callable[[], None]) -> dict[str, torch.Tensor]:
    out, mine = {}, [statistics(network) for network in engine.ds.module.networks]
    beat()
    for index, buffers in enumerate(mine):
        for name, buffer in buffers.items():
            shares = [torch.empty_like(buffer) for _ in range(engine.ranks)]
            dist.all_gather(shares, buffer.contiguous())
            out.update({f"{rank}/{index}/{name}": share for rank, share in enumerate(shares)})
    return out


def _damage(path: Path) -> str | None:
    try:
        sums = read_json(path / "sha256.json")
    except UserError as error:
        return str(error)
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} does not have the sha256 that was written"
    return None
