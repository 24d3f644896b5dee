"""A network of a user's own, smooth on purpose.

A ReLU whose input is within rounding of zero turns a last-bit difference into one of 1e-5: one process with 1 and with 2
threads differs as much. Where the tests compare losses to 1e-6, the network has no such corners.
"""

import errno
import os
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from pkd.files import raise_passing
from pkd.vision import torchvision


class Smooth(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
                                  nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Plain(Smooth):
    """Without batch statistics, so that micro batches of any size see the same network."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.body[1] = self.body[4] = nn.Identity()


class Cusp(Smooth):
    """Finite logits whose gradient is not: the root of nothing."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits + 0 * (0 * logits).sqrt()


class Greedy(Smooth):
    """Wants more in training than any device has."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")
        return super().forward(images)


class Fading(Smooth):
    """Learns for six steps."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        return super().forward(images) * (float("nan") if self.seen > 6 else 1.0)


class Stale(Smooth):
    """Meets a file server that is away after fifteen steps, while a test's file is there."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        if self.seen > 15 and os.path.exists(os.environ["PKD_TEST_STALE"]):
            raise_passing(Path("far-away.png"), OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
        return super().forward(images)


class Slow(Smooth):
    """Takes 2.5 seconds over each batch that it is shown for evaluation, where a test asks for it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training and os.environ.get("PKD_TEST_SLOW_VALIDATION") and len(images) > 2:
            time.sleep(2.5)
        return super().forward(images)


class Stuck(Smooth):
    """Hangs for good in "validation" or in "saving", whichever a test asks for, from the moment when its file is there."""

    def _hang(self, where: str) -> None:
        while os.environ.get("PKD_TEST_STUCK") == where and os.path.exists(os.environ["PKD_TEST_STUCK_FROM"]):
            time.sleep(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self._hang("validation")
        return super().forward(images)

    def state_dict(self, *arguments, **options):
        if any(frame.filename.endswith("checkpoint.py") for frame in traceback.extract_stack()):
            self._hang("saving")
        return super().state_dict(*arguments, **options)


class Attention(torchvision.models.VisionTransformer):
    """3 million parameters, the largest tensor 1 MB."""

    def __init__(self, num_classes: int):
        super().__init__(image_size=8, patch_size=4, num_layers=4, num_heads=4, hidden_dim=256, mlp_dim=1024,
                         num_classes=num_classes)
        nn.init.normal_(self.heads.head.weight)


class Vision(nn.Module):
    """torchvision's transformer under a name of one's own."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = torchvision.models.vit_b_32(num_classes=num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)
