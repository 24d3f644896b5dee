"""What a network's forward costs, counted layer by layer by torch on the meta device, without arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pkd.models import build
from pkd.recipe import Model


@dataclass(frozen=True)
class Layer:
    """A module without children. Per image, but for the weights."""

    flops: float
    read: int  # numbers that it takes in
    written: int
    weights: int


# Layers that keep their input's shape and cost no FLOP of torch's counting: on the meta device, where nothing is computed,
# torch goes through Python for them, for most of the time that a count takes.
_NOTHING = (nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid)


def _same(images: torch.Tensor) -> torch.Tensor:
    return images


@dataclass(frozen=True)
class NetworkCost:
    layers: tuple[Layer, ...]  # in the order of their calls
    flops: float  # of one image's forward
    parameters: int

    @property
    def activations(self) -> int:
        """Numbers that all layers write for one image: what a backward pass keeps, roughly."""
        return sum(layer.written for layer in self.layers)


@contextmanager
def _countable() -> Iterator[None]:
    """Attention by operators that torch counts, not by the fused ones that a CPU takes for inference."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@lru_cache(maxsize=256)
def network_cost(model: Model, classes: int, channels: int, size: tuple[int, int]) -> NetworkCost:
    """Of `model` for views [channels, *size]. Raises UserError where the network cannot be built."""
    bare = model.model_copy(update={"weights": None})
    device = "cpu" if ":" in model.name else "meta"  # a network of the user's own may not work on meta
    with torch.random.fork_rng(devices=[]):
        network = build(bare, classes, channels, size, empty=device == "meta").eval().to(device)
    layers: list[Layer] = []
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        def begin(module, inputs):
            module.flops_before = counter.get_total_flops()

        def end(module, inputs, output):
            read, written = (sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
                             for tensors in (inputs, [output]))
            layers.append(Layer(counter.get_total_flops() - module.flops_before, read, written,
                                sum(p.numel() for p in module.parameters())))
        for module in network.modules():
            if isinstance(module, _NOTHING):
                module.forward = _same
            if next(module.children(), None) is None:
                module.register_forward_pre_hook(begin)
                module.register_forward_hook(end)
        with _countable():
            network(torch.zeros((1, channels, *size), dtype=torch.uint8, device=device))
    total = float(counter.get_total_flops())
    layers.append(Layer(total - sum(layer.flops for layer in layers), 0, 0, 0))  # between modules, such as attention
    return NetworkCost(tuple(layers), total, sum(parameter.numel() for parameter in network.parameters()))


def training_flops(cost: NetworkCost, batch: int, steps: int) -> float:
    """Of `steps` optimizer steps of `batch` samples, a backward pass being as much as two forward ones."""
    return 3 * cost.flops * batch * steps
