"""Depthwise convolutions of low images: the same sums by another way, and no other way but in training."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pkd.depthwise import TallDepthwise, use_tall_depthwise
from pkd.models import build
from pkd.recipe import Model


@given(height=st.integers(1, 6), width=st.integers(1, 6), kernel=st.sampled_from([2, 3, 5]), stride=st.integers(1, 3),
       padding=st.integers(0, 2), channels=st.sampled_from([2, 16, 33]), bias=st.booleans(), last=st.booleans())
@settings(max_examples=60, deadline=None)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(height, width, kernel, stride, padding, channels, bias,
                                                                  last):
    if min(height, width) + 2 * padding < kernel:
        return
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=bias)
    tall = nn.Sequential(copy.deepcopy(plain)).train()
    use_tall_depthwise(tall)
    assert type(tall[0]) is TallDepthwise
    exact = copy.deepcopy(plain).double()
    images = torch.randn(3, channels, height, width)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for layer, dtype in ((tall, torch.float32), (exact, torch.float64)):
        seen = images.clone().to(dtype).requires_grad_(True)
        out = layer(seen)
        out.square().sum().backward()
        found.append([out, seen.grad, *(weight.grad for weight in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0", "pkd_mobile", "pkd_shuffle"])
def test_weights_keep_their_names_and_evaluation_its_bits(name):
    network = build(Model(name=name), 10, 3, (32, 32)).eval()
    images, names = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), list(network.state_dict())
    before = network(images)
    use_tall_depthwise(network)
    assert list(network.state_dict()) == names and torch.equal(network(images), before)
    assert any(type(layer) is TallDepthwise for layer in network.modules())
    assert all(type(layer) is not TallDepthwise for layer in network.modules() if getattr(layer, "groups", 1) == 1)
