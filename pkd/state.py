"""Weights and optimizer states by parameter name, whatever the ZeRO stage: the same numbers in all stages.

DeepSpeed's own checkpoints tie a run to its stage and world size, and its universal ones know no SGD. What is read here
by name can be written back into an engine of another stage on another number of ranks. Every function is a collective
over the island.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from pkd.optimizer import GroupOptimizer

WEIGHTS = "weights"  # the fp32 master weights, beside the optimizer's own keys


@dataclass(frozen=True)
class Piece:
    """Parameters and the fp32 tensors that DeepSpeed updates in their place.

    whole (ZeRO 0): one master a parameter.  partition (ZeRO 1, 2): one flat master, this rank's part of all parameters
    one after the other.  sharded (ZeRO 3): one flat master that holds this rank's padded slice of each parameter.
    """

    kind: str
    parameters: list[torch.nn.Parameter]
    masters: list[torch.Tensor]


def pieces(engine, group: int) -> list[Piece]:
    """The pieces of parameter group `group` of a DeepSpeed engine; one, or one for each sub-group under ZeRO 3."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        mine = [i for i, owner in optimizer.sub_group_to_group_id.items() if owner == group]
        return [Piece("sharded", list(optimizer.fp16_groups[i]), [optimizer.fp32_partitioned_groups_flat[i]])
                for i in mine]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        order = optimizer.round_robin_bit16_groups[group]
        return [Piece("partition", list(order), [optimizer.single_partition_of_fp32_groups[group]])]
    if hasattr(optimizer, "fp32_groups"):
        return [Piece("whole", list(optimizer.fp16_groups[group]), list(optimizer.fp32_groups[group]))]
    parameters = list(optimizer.param_groups[group]["params"])
    return [Piece("whole", parameters, parameters)]


def read(engine, optimizer: GroupOptimizer, group: int, key: str) -> dict[str, torch.Tensor]:
    """{parameter name: fp32 tensor of full shape, on the CPU} of WEIGHTS or one of state_keys(), on every rank."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    out = {}
    for piece in pieces(engine, group):
        tensors = _tensors(optimizer, piece, group, key)
        values = tensors if piece.kind == "whole" else _join(piece, _gather(tensors[0]))
        for p, value in zip(piece.parameters, values):
            out[names[id(p)]] = value.detach().reshape(_shape(p)).to("cpu", torch.float32, copy=True)
    return out


def write(engine, optimizer: GroupOptimizer, group: int, key: str, values: dict[str, torch.Tensor]) -> None:
    """Put values as read() gave them into the engine; of WEIGHTS the working copies are brought up to date too."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    for piece in pieces(engine, group):
        full = [values[names[id(p)]] for p in piece.parameters]
        tensors = _tensors(optimizer, piece, group, key)
        local = full if piece.kind == "whole" else [_share(piece, full)]
        for tensor, value in zip(tensors, local):
            tensor.data.copy_(value.reshape(tensor.shape))
        if key == WEIGHTS:
            _refresh(piece, full)


def steps_taken(engine, optimizer: GroupOptimizer, group: int) -> int:
    """Optimizer steps that a group has taken; fewer than were asked where fp16 overflowed."""
    first = pieces(engine, group)[0].masters[0]
    return int(optimizer.state_of(first, optimizer.param_groups[group])["step"])


def set_steps_taken(engine, optimizer: GroupOptimizer, group: int, steps: int) -> None:
    for piece in pieces(engine, group):
        for master in piece.masters:
            optimizer.state_of(master, optimizer.param_groups[group])["step"].fill_(steps)


def _tensors(optimizer: GroupOptimizer, piece: Piece, group: int, key: str) -> list[torch.Tensor]:
    if key == WEIGHTS:
        return piece.masters
    return [optimizer.state_of(master, optimizer.param_groups[group])[key] for master in piece.masters]


def _shape(p: torch.nn.Parameter) -> torch.Size:
    return p.ds_shape if hasattr(p, "ds_shape") else p.shape


def _gather(flat: torch.Tensor) -> list[torch.Tensor]:
    shares = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, flat.detach().contiguous())
    return shares


def _join(piece: Piece, shares: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters' values, flat, from all ranks' shares of a piece."""
    values, start = [], 0
    if piece.kind == "partition":
        whole = torch.cat(shares)  # padding is at its end
        for p in piece.parameters:
            values.append(whole[start:start + p.numel()])
            start += p.numel()
    else:
        for p in piece.parameters:
            each = p.ds_tensor.ds_numel
            values.append(torch.cat([share[start:start + each] for share in shares])[:p.ds_numel])
            start += each
    return values


def _share(piece: Piece, full: list[torch.Tensor]) -> torch.Tensor:
    """This rank's share of a piece, from the parameters' values: the inverse of _join."""
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), piece.masters[0].numel()
    if piece.kind == "partition":
        return _padded(torch.cat([value.flatten() for value in full])[rank * size:(rank + 1) * size], size)
    slices = []
    for p, value in zip(piece.parameters, full):
        each = p.ds_tensor.ds_numel
        slices.append(_padded(value.flatten(), each * ranks)[rank * each:(rank + 1) * each])
    return _padded(torch.cat(slices), size)


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _refresh(piece: Piece, full: list[torch.Tensor]) -> None:
    """Copy new master weights into the weights that forward and backward use."""
    if piece.kind != "sharded":
        for p, value in zip(piece.parameters, full):
            p.data.copy_(value.reshape(p.shape))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(piece.parameters, modifier_rank=0):
        if dist.get_rank() == 0:
            for p, value in zip(piece.parameters, full):
                p.data.copy_(value.reshape(p.shape))
