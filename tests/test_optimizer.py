"""One optimizer for several networks: each goes the way of torch's own optimizer for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.optimizer import GroupOptimizer, parameter_group
from pkd.recipe import Optimisation

SHAPES = ((8, 4, 3, 3), (8, 1, 3, 3), (5, 8, 1, 1), (7,), (3, 5))


def weights(seed: int, form: torch.memory_format) -> list[torch.nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    every = [torch.randn(shape, generator=chance) for shape in SHAPES]
    return [torch.nn.Parameter(w.to(memory_format=form) if w.dim() == 4 else w) for w in every]


@given(st.integers(0, 1000), st.floats(0, 0.95), st.booleans(), st.floats(0, 0.1), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_sgd_is_torchs_whatever_the_memory_formats_of_weights_and_gradients(seed, momentum, nesterov, decay, last, mixed):
    nesterov = nesterov and momentum > 0
    form = torch.channels_last if last else torch.contiguous_format
    mine, theirs = weights(seed, form), weights(seed, form)
    settings = Optimisation(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    own = GroupOptimizer([parameter_group("net", mine, settings)])
    own.ready = True
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay, foreach=False)
    for step in range(3):
        for index, (one, other) in enumerate(zip(mine, theirs)):
            gradient = torch.randn(one.shape, generator=torch.Generator().manual_seed(step + 10 * index))
            other.grad = gradient.clone()
            one.grad = gradient if mixed else torch.empty_like(one).copy_(gradient)
        own.step()
        reference.step()
    for one, other in zip(mine, theirs):
        assert one.detach() == pytest.approx(other.detach(), rel=1e-5, abs=1e-6)
