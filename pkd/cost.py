"""What a teacher's forward costs, counted by torch on the meta device, without arithmetic."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pkd.data import DataSet
from pkd.models import build
from pkd.pyramid import Pyramid
from pkd.recipe import Model, Recipe


def forward_flops(model: Model, classes: int, channels: int, size: tuple[int, int]) -> tuple[float, int]:
    """FLOPs of one image's forward, and the number of parameters."""
    bare = model.model_copy(update={"weights": None})
    device = "cpu" if ":" in model.name else "meta"  # a network of the user's own may not work on meta
    with torch.random.fork_rng(devices=[]):
        network = build(bare, classes, channels, size).eval().to(device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros((1, channels, *size), dtype=torch.uint8, device=device))
    return float(counter.get_total_flops()), sum(p.numel() for p in network.parameters())


def teacher_costs(recipe: Recipe, pyramid: Pyramid, data: DataSet, asked: list[int],
                  own: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Of each asked teacher: forward FLOPs per training sample (per row, times the share of samples it is asked about),
    and bytes of its fp32 weights.
    """
    labels = data.labels[data.splits["train"]]
    counts = torch.bincount(labels, minlength=len(data.classes)).double()
    costs, sizes = {}, {}
    for index in asked:
        teacher = pyramid.teachers[index]
        flops, parameters = forward_flops(teacher.model, len(teacher.classes), data.channels, data.size)
        share = counts[list(teacher.classes)].sum().item() / len(labels) if own else 1.0
        costs[teacher.name] = flops * share
        sizes[teacher.name] = 4 * parameters
    return costs, sizes
