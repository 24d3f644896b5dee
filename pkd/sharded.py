"""A frozen network that no rank could hold: ZeRO-3 spreads its weights over the ranks of an island.

Each rank keeps 1/n of every parameter; a layer's are gathered when the forward comes to it and given up behind it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from pkd.ds_config import engine_config, import_deepspeed
from pkd.models import Network
from pkd.watchdog import OWN_WORK
from pkd.weights_file import Weights
from pkd.world import LostPeer


class ShardedNetwork:
    """Called like a network, by all ranks of the island together and with the same images; each gets all the logits.

    network: empty (pkd.models.build), in the dtype that is wanted; weights: what to fill its backbone with, in step with
    the other ranks: the first rank reads a tensor, all get it, and each keeps its part before the next one comes.
    name: what the ranks of the island are called; waits(group): called before this rank may wait for them, and with
    OWN_WORK after.
    """

    def __init__(self, network: Network, weights: Weights, ds_config: dict, device: torch.device, name: str,
                 waits: Callable[[str], None]):
        self.name, self.waits = f"the shards on {name}", waits
        elements = sum(p.numel() for p in network.parameters())
        config = engine_config(ds_config, dist.get_world_size(), 1, elements)
        if next(network.parameters()).dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        deepspeed = import_deepspeed()
        self._together(lambda: self._fill(network.requires_grad_(False).eval(), weights, config, device))
        self.engine = self._together(lambda: deepspeed.initialize(model=network, config=config)[0])
        self.engine.eval()
        # They prepare a backward that never comes, by giving each module copies of its inputs' handles: where query, key and
        # value are one tensor, torch would no longer see it and take other kernels than in a whole network.
        for hook in self.engine.optimizer.backward_hooks:
            hook.remove()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # Not the engine, whose own forward is made for training: the hooks that gather weights are the module's.
        return self._together(lambda: self.engine.module(images))

    def close(self) -> None:
        self.engine.destroy()

    def _together(self, work: Callable):
        self.waits(self.name)
        try:
            result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise LostPeer(f"{self.name} broke: {str(error).splitlines()[0]}") from error
        self.waits(OWN_WORK)
        return result

    def _fill(self, network: Network, weights: Weights, config: dict, device: torch.device) -> None:
        deepspeed = import_deepspeed()
        deepspeed.init_distributed()  # over the island; before its configuration, which counts ranks
        backbone, names = network.backbone, set(weights.names)
        for place, module in backbone.named_modules():
            own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
            for key, empty in own.items():
                values = torch.empty(empty.shape, dtype=empty.dtype, device=device)
                if dist.get_rank() == 0:
                    values.copy_(weights.read(f"{place}.{key}" if place else key))
                module._parameters[key] = nn.Parameter(values, requires_grad=False)
                del values  # or they outlive their partition
                # Broadcasts the first rank's values, keeps this rank's part and frees the rest.
                deepspeed.zero.Init(module=nn.ParameterList([module._parameters[key]]), config_dict_or_path=config)
                self.waits(self.name)
        for name, buffer in backbone.named_buffers():
            if name in names:
                buffer.copy_(weights.read(name))
        for module in network.modules():  # to(device) would touch what stands in for partitioned parameters
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)

