"""Small image classifiers, quick on a single CPU thread: a residual net, a MobileNet-like and a ShuffleNet-like one.

All take float images [n, channels, h, w] and return logits [n, classes] in the same dtype. `size` is the shorter side
of the images in pixels; it sets how often the maps are halved, so that the last ones are about 4 x 4. `width` scales
the numbers of feature maps, thus parameters grow about as its square.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn


def _strides(size: int) -> tuple[int, int, int, int]:
    """Strides of the stem and the three stages. 8 pixels: one halving; 32 pixels: three; the second stage comes first.

    The stem takes all halvings beyond two, for the maps after it are where the time goes.
    """
    halvings = max(0, round(math.log2(size / 4)))
    return 2 ** max(0, halvings - 2), 1, 2 if halvings > 0 else 1, 2 if halvings > 1 else 1


def _scaled(features: int, width: float) -> int:
    """An even number, which channel split needs, of at least 4."""
    return max(4, 2 * round(features * width / 2))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
              nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def _stem(channels: int, outputs: int, stride: int):
    return _conv(channels, outputs, max(3, 2 * stride - 1), stride)  # no pixel is skipped, whatever the stride


def _stages(unit, inputs: int, outputs: tuple[int, ...], strides: tuple[int, ...], units: tuple[int, ...]):
    """Stages of so many units, each a `unit(inputs, outputs, stride)`; the first unit of a stage has its stride."""
    layers = []
    for features, stride, count in zip(outputs, strides, units, strict=True):
        for number in range(count):
            layers.append(unit(inputs, features, stride if number == 0 else 1))
            inputs = features
    return layers


def _initialise(network: nn.Module) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers": variance kept through convolutions with rectifiers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Classifier(nn.Module):
    """Features, mean over the map, linear layer."""

    def __init__(self, features: nn.Sequential, outputs: int, classes: int):
        super().__init__()
        self.features = features
        self.head = nn.Linear(outputs, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


class _Residual(nn.Module):
    """The basic block of He et al. 2016, "Deep Residual Learning for Image Recognition"."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3, relu=False))
        self.stride = stride
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        # The pixels that a 1 x 1 convolution with a stride would look at: pkd.models tells what is wrong with that one.
        return torch.relu(self.body(x) + self.shortcut(x[..., ::self.stride, ::self.stride]))


class SmallResNet(_Classifier):
    """Three stages of `blocks` residual blocks, of `width`, 2 `width` and 4 `width` feature maps."""

    def __init__(self, classes: int, channels: int, width: int, blocks: int, size: int = 32):
        stem, *strides = _strides(size)
        stages = _stages(_Residual, width, (width, 2 * width, 4 * width), strides, (blocks,) * 3)
        super().__init__(nn.Sequential(_stem(channels, width, stem), *stages), 4 * width, classes)


class _Inverted(nn.Module):
    """The inverted residual of Sandler et al. 2018, "MobileNetV2": expand, depthwise, project without a rectifier."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 2):
        super().__init__()
        wide = expansion * inputs
        self.body = nn.Sequential(_conv(inputs, wide), _conv(wide, wide, 3, stride, groups=wide),
                                  _conv(wide, outputs, relu=False))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class MobileLike(_Classifier):
    """One, two and two inverted residuals, after MobileNetV2, and a 1 x 1 convolution before the mean."""

    def __init__(self, classes: int, channels: int, width: float = 1.0, size: int = 32):
        first, *outputs, last = (_scaled(features, width) for features in (16, 16, 40, 64, 128))
        stem, *strides = _strides(size)
        units = _stages(_Inverted, first, outputs, strides, (1, 2, 2))
        super().__init__(nn.Sequential(_stem(channels, first, stem), *units, _conv(outputs[-1], last)), last, classes)


class _Shuffled(nn.Module):
    """The unit of Ma et al. 2018, "ShuffleNet V2".

    Half of the features pass by, half are convolved, and the halves interleave; a unit that changes stride or number
    of features convolves two copies of all of them instead.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.split = stride == 1 and inputs == outputs
        half, taken = outputs // 2, inputs // 2 if self.split else inputs
        self.passing = nn.Identity() if self.split else nn.Sequential(
            _conv(inputs, inputs, 3, stride, groups=inputs, relu=False), _conv(inputs, half))
        self.body = nn.Sequential(_conv(taken, half), _conv(half, half, 3, stride, groups=half, relu=False),
                                  _conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.split else (x, x)
        return torch.stack([self.passing(left), self.body(right)], dim=2).flatten(1, 2)


class ShuffleLike(_Classifier):
    """One, two and two shuffle units, after ShuffleNet V2, and a 1 x 1 convolution before the mean."""

    def __init__(self, classes: int, channels: int, width: float = 1.0, size: int = 32):
        first, *outputs, last = (_scaled(features, width) for features in (16, 32, 80, 112, 160))
        stem, *strides = _strides(size)
        units = _stages(_Shuffled, first, outputs, strides, (1, 2, 2))
        super().__init__(nn.Sequential(_stem(channels, first, stem), *units, _conv(outputs[-1], last)), last, classes)


def _resnet(features: int, blocks: int, classes: int, channels: int, width: float = 1.0, size: int = 32):
    return SmallResNet(classes, channels, _scaled(features, width), blocks, size)


SMALL_MODELS = {  # name -> (classes, channels, width, size) -> network
    "pkd_resnet_s": partial(_resnet, 12, 1),
    "pkd_resnet_m": partial(_resnet, 16, 2),
    "pkd_resnet_l": partial(_resnet, 32, 2),
    "pkd_mobile": MobileLike,
    "pkd_shuffle": ShuffleLike,
}
