"""What a model sees of sample i in epoch e: a pure function of (seed, epoch, i), uint8.

Independent of the batch, the process and every global generator, so that ranks which never exchange pixels see the same.
"""

import zlib

import numpy as np
import torch
import torch.nn.functional as F

from pkd.data import DataSet
from pkd.recipe import Views as Augmentation
from pkd.vision import torchvision  # noqa: F401 - makes torchvision.transforms importable

DRAWS = 3  # per sample and epoch: vertical offset, horizontal offset, flip


class Views:
    """recipe: which augmentations; seed: of the draws."""

    def __init__(self, data: DataSet, recipe: Augmentation, seed: int):
        self.images, self.recipe, self.seed = data.images, recipe, seed
        self.samples, self.channels, self.size = len(data.labels), data.channels, data.size
        self.transform = _transform(recipe, data.channels, data.size)
        self._epoch, self._draws = -1, np.empty(0)

    def plain(self, ids: torch.Tensor) -> torch.Tensor:
        """uint8 [n, channels, height, width] without augmentation: what validation and test see."""
        return self.images[ids]

    def batch(self, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """uint8 [n, channels, height, width]: the augmented views of samples `ids` in an epoch."""
        if self.recipe.finite:
            epoch %= self.recipe.finite
        views = self.images[ids]
        if self.recipe.crop or self.recipe.flip:
            views = self._crop_and_flip(views, self._of_epoch(epoch)[ids.numpy()])
        if self.transform:
            views = self._transformed(views, ids, epoch)
        return views

    def checksum(self, ids: torch.Tensor, epoch: int) -> int:
        """CRC-32 of these views, for comparing ranks."""
        return zlib.crc32(self.batch(ids, epoch).contiguous().numpy().tobytes())

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Uniform draws in [0, 1), float32 [samples, DRAWS], of every sample in an epoch at once."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch, 0xF1])
            self._draws = generator.random((self.samples, DRAWS), dtype=np.float32)
            self._epoch = epoch
        return self._draws

    def _crop_and_flip(self, views: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Zero padding, a random window of the old size, mirrored for half of the draws; the whole batch by one index."""
        height, width = self.size
        pad = self.recipe.crop
        offset = torch.from_numpy((draws[:, :2] * (2 * pad + 1)).astype(np.int64)).clamp(max=2 * pad)
        rows = offset[:, :1] + torch.arange(height)
        columns = offset[:, 1:] + torch.arange(width)
        if self.recipe.flip:
            mirrored = torch.from_numpy(draws[:, 2] < 0.5)[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(views, (pad, pad, pad, pad))
        sample = torch.arange(len(views))[:, None, None]
        # Advanced indices around a slice put channels last.
        found = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        # A single channel's stride may still be that of channels last, for which kernels round otherwise.
        return found.view(-1).view(found.shape)

    def _transformed(self, views: torch.Tensor, ids: torch.Tensor, epoch: int) -> torch.Tensor:
        """torchvision's transforms sample by sample, each under the seed of its (seed, epoch, i)."""
        with torch.random.fork_rng(devices=[]):
            out = []
            for view, index in zip(views, ids.tolist()):
                state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
                # torch.manual_seed would seed the GPUs' generators too, which fork_rng does not restore here.
                torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
                out.append(self.transform(view))
        return torch.stack(out) if out else views


def _transform(recipe: Augmentation, channels: int, size: tuple[int, int]):
    """torchvision's transforms that the recipe asks for, or None. Source of their meaning: torchvision's documentation."""
    from torchvision.transforms import v2

    steps = []
    if recipe.resized_crop:
        steps.append(v2.RandomResizedCrop(size, scale=recipe.resized_crop, antialias=True))
    if recipe.affine:
        own = recipe.affine
        steps.append(v2.RandomAffine(own.degrees, (own.translate, own.translate), (1 - own.scale, 1 + own.scale),
                                     own.shear or None, interpolation=v2.InterpolationMode.BILINEAR))
    if recipe.colour:
        strength = recipe.colour
        steps.append(v2.ColorJitter(strength, strength, strength if channels == 3 else 0))
    if recipe.randaugment:
        own = recipe.randaugment
        augment = v2.RandAugment(own.operations, own.magnitude)
        if channels == 1:  # some of its operations know colour only
            steps += [v2.Lambda(lambda view: view.expand(3, -1, -1)), augment, v2.Lambda(lambda view: view[:1])]
        else:
            steps.append(augment)
    return v2.Compose(steps) if steps else None
