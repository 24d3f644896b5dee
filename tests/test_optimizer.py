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


@given(st.integers(0, 1000), st.floats(0, 0.1), st.sampled_from([None, 0.5, 1e6]))
@settings(max_examples=20)
def test_adamw_clipping_and_the_average_are_torchs(seed, decay, clip):
    """Each network's gradients are clipped by their own norm; the average is torch's swa_utils', with the warm-up."""
    settings = Optimisation(optimizer="adamw", lr=0.01, weight_decay=decay, clip=clip, ema=0.9)
    mine, theirs = (weights(seed, torch.contiguous_format) for _ in range(2))
    other = weights(seed + 1, torch.contiguous_format)  # a second network, whose gradients are large
    own = GroupOptimizer([parameter_group("net", mine, settings), parameter_group("other", other, settings)])
    own.ready = True
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=decay)
    average = [weight.detach().clone() for weight in theirs]
    for step in range(4):
        for index, (one, two, large) in enumerate(zip(mine, theirs, other)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(seed + step + 10 * index))
            two.grad, large.grad = one.grad.clone(), 1e3 * one.grad
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        own.step()
        reference.step()
        decay_now = min(0.9, (2 + step) / (11 + step))
        average = [decay_now * before + (1 - decay_now) * now.detach() for before, now in zip(average, theirs)]
    for one, two, mean in zip(mine, theirs, average):
        assert one.detach() == pytest.approx(two.detach(), rel=1e-4, abs=1e-5)
        assert own.state[one]["ema"] == pytest.approx(mean, rel=1e-4, abs=1e-5)


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
