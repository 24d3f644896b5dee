"""What pkd.norm promises: torch's batch norm, but with fp32 statistics and shared between uneven batches."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn
from torch.testing import assert_close

from pkd.errors import UserError
from pkd.norm import BatchNorm, convert, set_group

FEATURES = 4


def _filled(norm):
    """The same arbitrary parameters and statistics in any norm."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in [*norm.parameters(), *(buffer for buffer in norm.buffers() if buffer.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def _run(norm, images, pull):
    """Output, input gradient and parameter gradients of the loss sum(pull * output)."""
    images = images.clone().requires_grad_()
    out = norm(images)
    gradients = torch.autograd.grad((out * pull).sum(), [images, *norm.parameters()])
    return [out.detach(), *gradients]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None, "eps": 1e-3}, {"affine": False},
                                     {"track_running_stats": False}])
def test_alone_it_is_torchs_batch_norm(options, train):
    ours, theirs = _filled(BatchNorm(FEATURES, **options)), _filled(nn.BatchNorm2d(FEATURES, **options))
    for seed in range(3):
        torch.manual_seed(seed)
        images, pull = torch.randn(6, FEATURES, 3, 5) * 3 + 2, torch.randn(6, FEATURES, 3, 5)
        for found, wanted in zip(_run(ours.train(train), images, pull), _run(theirs.train(train), images, pull)):
            assert_close(found, wanted)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_state_dicts_are_exchangeable_with_torchs():
    ours, theirs = _filled(BatchNorm(FEATURES)), nn.BatchNorm2d(FEATURES)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    BatchNorm(FEATURES).load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [True, False])
def test_16_bit_parameters_and_images_keep_fp32_statistics_and_arithmetic(dtype, train):
    exact = _filled(BatchNorm(FEATURES)).train(train)
    before = exact.running_mean.clone()
    ours = nn.Sequential(copy.deepcopy(exact)).to(dtype)[0]
    assert ours.weight.dtype == dtype
    assert_close(ours.running_mean, before, rtol=0, atol=0)
    images = torch.randn(8, FEATURES, 3, 3).to(dtype)
    exact.weight.data, exact.bias.data = ours.weight.data.float(), ours.bias.data.float()
    assert_close(ours(images), exact(images.float()).to(dtype), rtol=0, atol=0)
    assert_close(ours.running_var, exact.running_var, rtol=0, atol=0)
    assert ours.running_var.dtype == torch.float32


def test_statistics_stay_fp32_through_every_cast_and_follow_the_device():
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda module: module.to("cpu", torch.bfloat16)):
        norm = cast(_filled(BatchNorm(FEATURES)))
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        assert norm.weight.dtype != torch.float32 and norm.num_batches_tracked.dtype == torch.int64
    moved = BatchNorm(FEATURES).to("meta", torch.bfloat16)
    assert moved.running_mean.is_meta and moved.running_mean.dtype == torch.float32
    assert moved.to_empty(device="cpu").running_mean.device.type == "cpu"


def test_one_value_per_channel_is_refused_and_an_empty_batch_changes_nothing():
    norm = BatchNorm(FEATURES)
    with pytest.raises(UserError, match="1 value per channel"):
        norm(torch.randn(1, FEATURES, 1, 1))
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.empty(0, FEATURES, 2, 2)).shape == (0, FEATURES, 2, 2)
    assert_close(norm.state_dict(), before)


def test_convert_replaces_every_kind_and_keeps_what_it_held():
    shared = _filled(nn.BatchNorm2d(FEATURES, eps=0.01, momentum=0.3))
    module = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3, affine=False), shared).eval(),
                           nn.SyncBatchNorm(2, track_running_stats=False), nn.LayerNorm(2), BatchNorm(7))
    parameters, state, own = list(module.parameters()), module.state_dict(), module[4]
    assert convert(module) is module
    found = module[0], module[1][0], module[2], module[4]
    assert all(type(norm) is BatchNorm for norm in found) and module[1][1] is found[0] and found[3] is own
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))
    assert_close(module.state_dict(), state)
    assert (found[0].eps, found[0].momentum) == (0.01, 0.3)
    assert found[1].weight is None and not found[1].training
    assert found[2].running_mean is None and found[2].training
    assert type(convert(nn.BatchNorm1d(3))) is BatchNorm
    assert_close(found[1].train()(torch.randn(5, 3)).mean(0), torch.zeros(3))


def _same_as_one_process(rank, group, sizes, offset, options):
    torch.manual_seed(len(sizes))
    whole = torch.randn(sum(sizes), FEATURES, 3, 2) * 2 + offset
    pull = torch.randn_like(whole)
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    ours, theirs = _filled(BatchNorm(FEATURES, **options)), _filled(nn.BatchNorm2d(FEATURES, **options)).double()
    set_group(nn.Sequential(ours), group)
    for _ in range(2):
        out, images_gradient, *gradients = _run(ours, whole[own], pull[own])
        wanted, wanted_images_gradient, *wanted_gradients = _run(theirs, whole.double(), pull.double())
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 + 1e-6 * offset, "check_dtype": False}
        assert_close(out, wanted[own], **tolerance)
        assert_close(images_gradient, wanted_images_gradient[own], **tolerance)
        assert_close(gradients, wanted_gradients, **tolerance)
    assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)


def _rank_of_three(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3,
                            timeout=datetime.timedelta(seconds=60))
    pair = dist.new_group([0, 1])
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        _same_as_one_process(rank, dist.group.WORLD, (5, 1, 3), 0.5, options)
        if rank < 2:
            _same_as_one_process(rank, pair, (2, 7), 0.5, options)
    _same_as_one_process(rank, dist.group.WORLD, (4, 0, 2), 0.5, {})
    _same_as_one_process(rank, dist.group.WORLD, (40, 2, 30), 1000.0, {})

    norm = BatchNorm(FEATURES)
    set_group(norm, pair)
    if rank == 0:  # alone: a collective would wait for rank 1 until the group's timeout
        norm.eval()(torch.randn(2, FEATURES, 2, 2))
        assert copy.deepcopy(norm).group is None and norm.group is pair
        norm.train()
    if rank < 2:  # a single value in the whole group has no variance, and is no news of it
        before = norm.running_var.clone()
        assert_close(norm(torch.ones(1 - rank, FEATURES, 1, 1)), torch.zeros(1 - rank, FEATURES, 1, 1))
        assert_close(norm.running_var, before)
    dist.destroy_process_group()


def test_over_a_group_uneven_batches_are_one_batch(tmp_path):
    spawn(_rank_of_three, str(tmp_path), ranks=3)
