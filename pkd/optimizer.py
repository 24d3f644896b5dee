"""One optimizer for several networks, each with its own algorithm: SGD or AdamW, clipping, averaged weights.

DeepSpeed takes one optimizer for one engine. It swaps each parameter group's tensors for its own fp32 master weights
(whole in ZeRO 0, this rank's flat partition in ZeRO 1 to 3) and calls step() with one group at a time, so everything
here is per group and elementwise, but for the norm that clipping needs.
"""

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from pkd.recipe import Optimisation


def parameter_group(name: str, parameters: list[torch.nn.Parameter], settings: Optimisation) -> dict:
    """A parameter group of GroupOptimizer for one network."""
    keys = ("optimizer", "lr", "momentum", "nesterov", "betas", "weight_decay", "clip", "ema")
    return {"name": name, "params": parameters, **{key: getattr(settings, key) for key in keys}}


def state_keys(group: dict) -> list[str]:
    """Names of the elementwise states of a group; each is as large as its weights."""
    own = {"sgd": ["momentum_buffer"] if group["momentum"] else [], "adamw": ["exp_avg", "exp_avg_sq"]}
    return own[group["optimizer"]] + (["ema"] if group["ema"] else [])


class GroupOptimizer(torch.optim.Optimizer):
    """groups: from parameter_group(). `ready` is off while DeepSpeed builds its engine (see step)."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, defaults={"lr": 0.0})
        self.ready = False
        self.partitioned = False  # whether a group's tensors are this rank's share of it (ZeRO 1 to 3)

    def state_of(self, weight: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        """The states of one master tensor, made on first use: zeros, and a copy of the weight for the average."""
        state = self.state[weight]
        for key in state_keys(group):
            if key not in state:
                state[key] = weight.detach().clone() if key == "ema" else torch.zeros_like(weight)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure=None):
        if not self.ready:  # DeepSpeed's ZeRO 0 and 3 step once with zero gradients while they start: that would decay
            return  # weights and count as a step
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(group, weights, [self.state_of(weight, group) for weight in weights])

    def _update(self, group: dict, weights: list, states: list[dict]) -> None:
        gradients = [weight.grad for weight in weights]
        if group["clip"]:
            _clip(gradients, group["clip"], self.partitioned)
        if group["optimizer"] == "sgd":
            buffers = [state["momentum_buffer"] for state in states] if group["momentum"] else [None] * len(states)
            for state in states:
                state["step"] += 1
            # Fused: one pass over memory for what are three, a twentieth of a small network's step on a CPU.
            sgd(weights, [_laid_out_as(w, g) for w, g in zip(weights, gradients)], buffers, fused=True, lr=group["lr"],
                momentum=group["momentum"], dampening=0.0, weight_decay=group["weight_decay"], nesterov=group["nesterov"],
                maximize=False)
        else:
            adamw(weights, gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
                  [s["step"] for s in states], lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                  weight_decay=group["weight_decay"], eps=1e-8, amsgrad=False, maximize=False)
        if group["ema"]:
            for weight, state in zip(weights, states):
                # The warm-up keeps the first random weights from dominating the average (Tarvainen & Valpola 2017).
                decay = min(group["ema"], (1 + state["step"].item()) / (10 + state["step"].item()))
                state["ema"].lerp_(weight, 1 - decay)


def _laid_out_as(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the weight's memory format, which torch's fused kernel takes for granted."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _clip(gradients: list[torch.Tensor], limit: float, partitioned: bool) -> None:
    """Scale this network's gradients so that their common norm, over all ranks' shares, is at most `limit`."""
    square = sum(gradient.double().square().sum() for gradient in gradients)
    if partitioned:
        dist.all_reduce(square)
    scale = limit / square.sqrt().clamp(min=limit)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
