"""A DeepSpeed engine over the current island for an ensemble: one parameter group a network, states by name.

Used by both loops that train: students in `distill`, a teacher in `teach`.
"""

import copy

import torch
import torch.distributed as dist
from pydantic import ValidationError

from pkd import state
from pkd.depthwise import use_tall_depthwise
from pkd.ds_config import check_clip, engine_config, import_deepspeed, precision, stage
from pkd.ensemble import Ensemble
from pkd.errors import UserError
from pkd.models import Network
from pkd.norm import set_group
from pkd.optimizer import GroupOptimizer, parameter_group, state_keys
from pkd.recipe import Optimisation


class Engine:
    """networks: name -> network, freshly built and equal on every rank; settings: one a network."""

    def __init__(self, networks: dict[str, Network], settings: list[Optimisation], ds_config: dict,
                 accumulation: int, device: torch.device, channels_last: bool, sync_batch_norm: bool = False,
                 compiled: bool = False):
        deepspeed = import_deepspeed()
        self.names = tuple(networks)
        # What is validated, kept and exported: fp32 weights (averaged ones where asked) and mean batch statistics.
        self.copies = {name: copy.deepcopy(network).to(device).eval() for name, network in networks.items()}
        for network in self.copies.values() if channels_last else ():
            network.use_channels_last()
        ensemble = Ensemble(networks)
        if sync_batch_norm:
            set_group(ensemble, dist.group.WORLD)
        groups = [parameter_group(name, list(network.parameters()), own)
                  for (name, network), own in zip(networks.items(), settings)]
        elements = sum(p.numel() for p in ensemble.parameters())
        self.optimizer = GroupOptimizer(groups)
        self.ranks = dist.get_world_size()
        check_clip(ds_config, any(own.clip for own in settings), elements)
        config = engine_config(ds_config, self.ranks, accumulation, elements)
        try:
            self.ds = deepspeed.initialize(model=ensemble, optimizer=self.optimizer, config=config)[0]
        except ValidationError as error:
            found = error.errors()[0]
            raise UserError(f"DeepSpeed refuses {'.'.join(map(str, found['loc']))} in its configuration of {error.title} "
                            f"({found['msg']}): mend that key in the file that the recipe's deepspeed names") from None
        for network in networks.values() if channels_last else ():
            use_tall_depthwise(network)
            # Where there are shards or other dtypes, weights are views of DeepSpeed's flat buffers.
            network.use_channels_last(weights=stage(ds_config) == 0 and precision(ds_config) == "fp32")
        if compiled:
            self.ds.compile(compile_kwargs={"dynamic": False})  # micro batches have one or two sizes
        self.optimizer.partitioned = stage(ds_config) > 0
        self.optimizer.ready = True
        # A rank that trains alone has nobody to average with: DeepSpeed would flatten all gradients and copy them back, a
        # twentieth of a step.
        self.alone = self.ranks == 1 and stage(ds_config) == 0 and precision(ds_config) == "fp32"
        self.ds.enable_backward_allreduce = not self.alone
        self.scale = self.ranks * accumulation  # DeepSpeed averages over ranks and micro batches; our losses are sums

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Forward of one micro batch: logits, fp32 [networks, samples, classes]."""
        return self.ds(images)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradient of one micro batch's share of the step's loss; the last micro batch's call also takes the step."""
        self.ds.backward(loss * self.scale)
        for weight in self.ds.module.parameters() if self.alone else ():
            if weight.grad is None and weight.requires_grad:  # not used: as where gradients are averaged, it decays
                weight.grad = torch.zeros_like(weight)
        self.ds.step()

    @property
    def refused_step(self) -> bool:
        """Whether DeepSpeed left the last step out because a gradient was not finite: ZeRO 3 does, for all networks at once.
        With fp16 that is how it finds its loss scale, and no fault.
        """
        return not self.ds.fp16_enabled() and bool(getattr(self.ds.optimizer, "overflow", False))

    def set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.ds.optimizer.param_groups, rates):
            group["lr"] = rate

    def refresh_copies(self) -> None:
        """Bring self.copies up to date with the training weights; a collective."""
        for index, name in enumerate(self.names):
            key = "ema" if self.optimizer.param_groups[index]["ema"] else state.WEIGHTS
            weights = state.read(self.ds, self.optimizer, index, key)
            prefix = f"networks.{index}."
            values = {k.removeprefix(prefix): v for k, v in weights.items()}
            self.copies[name].load_state_dict({**values, **mean_statistics(self.ds.module.networks[index])})

    def state_keys(self, index: int) -> list[str]:
        """"weights", "momentum_buffer", ...: what a network's training state is made of, each as large as its weights."""
        return [state.WEIGHTS, *state_keys(self.optimizer.param_groups[index])]

    def network_state(self, index: int, key: str) -> dict[str, torch.Tensor]:
        """{parameter: fp32 tensor on the CPU} of one of a network's state_keys; a collective."""
        prefix = f"networks.{index}."
        values = state.read(self.ds, self.optimizer, index, key)
        return {name.removeprefix(prefix): value for name, value in values.items()}

    def load_network_state(self, index: int, key: str, saved: dict[str, torch.Tensor]) -> None:
        """The inverse of network_state. A collective."""
        values = {f"networks.{index}.{name}": value for name, value in saved.items()}
        state.write(self.ds, self.optimizer, index, key, values)

    def steps_taken(self) -> list[int]:
        return [state.steps_taken(self.ds, self.optimizer, index) for index in range(len(self.names))]

    def set_steps_taken(self, steps: list[int]) -> None:
        """One number a network, as steps_taken gave them."""
        for index, own in enumerate(steps):
            state.set_steps_taken(self.ds, self.optimizer, index, own)

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of fp16's dynamic loss scale, or None."""
        scaler = getattr(self.ds.optimizer, "loss_scaler", None)
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {k: getattr(scaler, k) for k in keys if hasattr(scaler, k)} if self.ds.fp16_enabled() else None

    @loss_scale.setter
    def loss_scale(self, saved: dict[str, float] | None) -> None:
        for key, value in (saved or {}).items():
            setattr(self.ds.optimizer.loss_scaler, key, value)

    def close(self) -> None:
        self.ds.destroy()


def statistics(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This rank's own batch statistics (the buffers of a network that its state dict holds)."""
    kept = network.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in network.named_buffers() if name in kept}


def mean_statistics(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The mean over ranks of every batch statistic, for evaluation; nothing is written back. A collective."""
    out = {}
    for name, buffer in statistics(network).items():
        shares = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, buffer.contiguous())
        # In rank order and float64, so that the mean does not depend on how the reduction travels.
        out[name] = torch.stack(shares).double().mean(0).to(buffer.dtype)
    return out
