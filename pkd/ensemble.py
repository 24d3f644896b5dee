"""The students as one module, so that one DeepSpeed engine trains them all; a teacher in training is an ensemble of one."""

import torch
from torch import nn

from pkd.errors import UserError
from pkd.models import Network


class Ensemble(nn.Module):
    """Networks side by side on the same views."""

    def __init__(self, networks: dict[str, Network]):
        super().__init__()
        self.names = tuple(networks)
        # Names may hold dots, which module names may not.
        self.networks = nn.ModuleList(networks.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: uint8 [samples, channels, height, width] -> logits, fp32 [students, samples, classes]."""
        logits = [network(images) for network in self.networks]
        for name, own in zip(self.names, logits):
            if not isinstance(own, torch.Tensor):  # a user's class may answer otherwise in training than in evaluation
                raise UserError(f"the network of {name} returns a {type(own).__name__} in training: it must return its "
                                "logits alone, a tensor")
        return torch.stack([own.float() for own in logits])
