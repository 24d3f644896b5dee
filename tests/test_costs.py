"""What a network costs by count and by data sheet, and what a recipe's step then is."""

from math import ceil, comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.cost import network_cost
from pkd.devices import DEVICES, device_like, device_named
from pkd.errors import UserError
from pkd.recipe import Model
from pkd.timings import mean_blocks


def test_a_resnet_18_has_its_published_flops_and_parameters():
    """1.8 billion multiply-adds (He et al. 2016, table 1), two operations each."""
    cost = network_cost(Model(name="resnet18"), 1000, 3, (224, 224))
    assert cost.flops == pytest.approx(2 * 1.8e9, rel=0.02) and cost.parameters == 11_689_512
    assert sum(layer.flops for layer in cost.layers) == pytest.approx(cost.flops)


def test_flops_between_modules_are_counted_too():
    cost = network_cost(Model(name="vit_b_16"), 1000, 3, (224, 224))
    assert cost.layers[-1].flops > 0 and sum(layer.flops for layer in cost.layers) == pytest.approx(cost.flops)


def test_a_transformer_of_ones_own_costs_what_torchvisions_does():
    """It is counted on the CPU, where attention has fused operators for inference."""
    own, same = (network_cost(Model(name=name), 10, 3, (224, 224)) for name in ("own_model:Vision", "vit_b_32"))
    assert own.flops == same.flops and own.parameters == same.parameters


def test_a_depthwise_network_waits_for_memory_more_than_its_flops_say():
    mobile, residual = (network_cost(Model(name=name), 1000, 3, (224, 224)) for name in ("mobilenet_v2", "resnet18"))
    h200 = DEVICES["h200"]
    by_time = h200.forward(mobile, 256, half=True) / h200.forward(residual, 256, half=True)
    assert by_time > 2 * mobile.flops / residual.flops


def test_devices_are_known_by_torchs_names_and_ours():
    assert device_like("NVIDIA H100 80GB HBM3") is DEVICES["h100"] and device_like("Tesla V100-SXM2-32GB") is DEVICES["v100"]
    assert device_like("cpu") is device_named("CPU")
    with pytest.raises(UserError, match=r"'h20' is not in the table \(did you mean 'h200'\?\)"):
        device_named("h20")


@given(batch=st.integers(1, 150), share=st.floats(0.01, 0.99), block=st.sampled_from([8, 32, 128]))
@settings(max_examples=40, deadline=None)
def test_mean_blocks_is_the_mean_over_all_numbers_of_rows(batch, share, block):
    chance = [comb(batch, rows) * share**rows * (1 - share)**(batch - rows) for rows in range(batch + 1)]
    assert mean_blocks(batch, share, block) == pytest.approx(sum(p * ceil(rows / block) for rows, p in enumerate(chance)))
    assert mean_blocks(batch, 1.0, block) == ceil(batch / block)
