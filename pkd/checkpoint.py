"""Save and resume, for any number of ranks and any ZeRO stage.

A checkpoint `step-N/` is self-contained: fp32 weights and optimizer states by name (a file for each state of a network),
every rank's batch statistics, whatever tensors the loop adds, `state.json`, and `sha256.json` over all of them. It is
written in a hidden folder and appears by one rename; the last but one goes only after the next is complete. States are
gathered and written, read and shared out one at a time: beside what it holds anyway, no rank ever needs more than four
times the fp32 weights of the largest network, however many networks and states there are. Where groups of students have
engines of their own, the first rank of each writes what is of its students.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pkd.engine import Engine, statistics
from pkd.errors import UserError
from pkd.files import read_json, sha256, sync_folder, unwritable, write_json
from pkd.tensor_file import read_tensors, write_tensors

KEEP = 2


def save(folder: Path, step: int, engine: Engine, progress: dict, tensors: dict[str, dict[str, torch.Tensor]],
         beat: Callable[[], None], gather: Callable[[Any], list[Any] | None] = lambda mine: [mine]) -> None:
    """Write folder/step-<step>. A collective over the island, and over all islands that write it together.

    progress: JSON-able, the same on all islands; tensors: file stem -> tensors by name, taken from the first rank of each
    island. gather: from those ranks' JSON-able objects to a list of all, on the one that is to finish; None on the others.
    """
    writer = dist.get_rank() == 0
    target, partial, before = folder / f"step-{step}", folder / f".step-{step}.partial", folder / f".step-{step}.before"
    sums: dict[str, str] = {}

    def write(stem: str, values: dict[str, torch.Tensor]) -> None:
        if writer:
            path = partial / f"{stem}.safetensors"
            write_tensors(path, values)
            sums[path.name] = sha256(path)
        beat()
    for index, name in enumerate(engine.names):
        for key in engine.state_keys(index):
            write(f"network-{name}-{key}", engine.network_state(index, key))
        write(f"statistics-{name}", _gather_statistics(engine, index))
    if not writer:
        return
    for stem, values in tensors.items():
        write(stem, values)
    taken = dict(zip(engine.names, engine.steps_taken()))
    scales = {name: engine.loss_scale for name in engine.names}
    parts = gather([sums, taken, scales])
    if parts is None:
        return
    sums, taken, scales = ({key: value for part in parts for key, value in part[which].items()} for which in range(3))
    state = {"step": step, "ranks": engine.ranks, "steps_taken": taken, "loss_scale": scales, "progress": progress}
    write_json(partial / "state.json", state)
    sums["state.json"] = sha256(partial / "state.json")
    write_json(partial / "sha256.json", sums)
    try:
        for path in partial.iterdir():  # a process that was killed at this step may have left others
            if path.name not in sums and path.name != "sha256.json":
                path.unlink()
        if target.exists():  # of the same step: the end of an epoch is also the beginning of the next
            shutil.rmtree(before, ignore_errors=True)
            os.rename(target, before)
        os.rename(partial, target)
        sync_folder(folder)
    except OSError as error:
        raise unwritable(target, error, 0) from None
    for old in [*numbered(folder)[KEEP:], *folder.glob(".step-*")]:  # hidden: what saves left that were killed
        shutil.rmtree(old, ignore_errors=True)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first by step; clocks are not asked."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and a remark for each that was passed over.

    For the holder of the folder's lock: what saves left that were killed goes. Raises UserError if there are checkpoints,
    but none is whole.
    """
    remarks = []
    for partial in folder.glob(".step-*.partial"):  # it may be what the disk lacks for the next
        shutil.rmtree(partial, ignore_errors=True)
    for before in folder.glob(".step-*.before"):  # a save was killed between its two renames
        if not (target := folder / before.name[1:].removesuffix(".before")).exists():
            os.rename(before, target)
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
    """Put a checkpoint into a fresh engine of some or all of its networks and return its progress. A collective over the
    island."""
    saved = read_json(path / "state.json")
    own = saved["ranks"] == engine.ranks
    for index, network in enumerate(engine.names):
        for key in engine.state_keys(index):
            engine.load_network_state(index, key, read_tensors(path / f"network-{network}-{key}.safetensors"))
        values = read_tensors(path / f"statistics-{network}.safetensors")
        for name, buffer in statistics(engine.ds.module.networks[index]).items():
            of_ranks = [values[f"{rank}/{name}"] for rank in range(saved["ranks"])]
            mean = torch.stack(of_ranks).double().mean(0).to(buffer.dtype)
            buffer.data.copy_(of_ranks[dist.get_rank()] if own else mean)
    engine.set_steps_taken([saved["steps_taken"][name] for name in engine.names])
    engine.loss_scale = saved["loss_scale"][engine.names[0]]  # one an engine; groups that are now one may have had several
    return saved["progress"]


def _gather_statistics(engine: Engine, index: int) -> dict[str, torch.Tensor]:
    """{"<rank>/<name>": tensor} of a network's batch statistics on every rank of the island."""
    out = {}
    for name, buffer in statistics(engine.ds.module.networks[index]).items():
        shares = [torch.empty_like(buffer) for _ in range(engine.ranks)]
        dist.all_gather(shares, buffer.contiguous())
        out.update({f"{rank}/{name}": share for rank, share in enumerate(shares)})
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
