"""Views: what a model sees of sample i in epoch e depends on (seed, epoch, i) and on nothing else."""

import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.data import DataSet
from pkd.images import ArrayImages
from pkd.recipe import Views as Policy
from pkd.views import Views

quick = settings(max_examples=25, deadline=None)
SAMPLES, HEIGHT, WIDTH = 12, 6, 9

FULL = dict(crop=2, flip=True, resized_crop=(0.3, 1.0), affine=dict(degrees=20, translate=0.1, scale=0.2, shear=5),
            colour=0.4, randaugment=dict(operations=2, magnitude=9))
POLICIES = {"nothing": {}, "crop": {"crop": 2}, "flip": {"flip": True}, "both": {"crop": 1, "flip": True},
            **{name: {name: FULL[name]} for name in ("resized_crop", "affine", "colour", "randaugment")}, "all": FULL}

policies = st.sampled_from(sorted(POLICIES)).map(lambda name: Policy(**POLICIES[name]))
channels_of = st.sampled_from([1, 3])
seeds, epochs = st.integers(0, 2**63 - 1), st.integers(0, 1000)


def data_set(channels: int, samples: int = SAMPLES) -> DataSet:
    pixels = np.random.default_rng(channels).integers(1, 256, (samples, channels, HEIGHT, WIDTH), dtype=np.uint8)
    labels = torch.zeros(samples, dtype=torch.int64)
    return DataSet(ArrayImages(torch.from_numpy(pixels)), labels, ("a",), {}, labels[:0], "", 0)


def views_of(channels: int, policy: Policy, seed: int = 0, samples: int = SAMPLES) -> Views:
    return Views(data_set(channels, samples), policy, seed)


def global_states() -> tuple:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()


@quick
@given(channels_of, policies, seeds, epochs, st.lists(st.integers(0, SAMPLES - 1), max_size=8))
def test_a_view_does_not_depend_on_its_batch(channels, policy, seed, epoch, ids):
    """Any batch, repeats included, is its samples one by one, each from an object that has seen nothing else."""
    batch = views_of(channels, policy, seed).batch(torch.tensor(ids, dtype=torch.int64), epoch)
    assert batch.dtype == torch.uint8 and batch.shape == (len(ids), channels, HEIGHT, WIDTH)
    for view, index in zip(batch, ids):
        assert torch.equal(view, views_of(channels, policy, seed).batch(torch.tensor([index]), epoch)[0])


@quick
@given(channels_of, st.sampled_from(sorted(POLICIES)), seeds, epochs, st.integers(1, 5))
def test_finite_views_come_again_in_order_and_are_the_first_ones_of_endless_views(channels, name, seed, epoch, finite):
    ids = torch.arange(SAMPLES)
    found = views_of(channels, Policy(**POLICIES[name], finite=finite), seed).batch(ids, epoch)
    assert torch.equal(found, views_of(channels, Policy(**POLICIES[name]), seed).batch(ids, epoch % finite))


@quick
@given(channels_of, policies)
def test_views_lie_in_memory_like_any_new_tensor_of_their_shape(channels, policy):
    """Kernels go by strides, those of a single channel too; views that are sent must be as good as rebuilt ones."""
    batch = views_of(channels, policy).batch(torch.arange(SAMPLES), 0)
    assert batch.stride() == torch.empty(batch.shape).stride()


@quick
@given(channels_of, policies, seeds, st.lists(epochs, min_size=1, max_size=3), seeds)
def test_a_view_depends_on_no_history_and_no_global_generator(channels, policy, seed, visited, noise):
    ids, views = torch.arange(SAMPLES), views_of(channels, policy, seed)
    wanted = views_of(channels, policy, seed).batch(ids, 7)
    for epoch in visited:
        views.batch(ids, epoch)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(noise)
        assert torch.equal(views.batch(ids, 7), wanted)


@quick
@given(channels_of, policies, seeds, epochs)
def test_global_generators_and_the_images_are_left_as_they_were(channels, policy, seed, epoch):
    views = views_of(channels, policy, seed)
    states, pixels = global_states(), views.images.array.clone()
    views.batch(torch.arange(SAMPLES), epoch).fill_(0)
    assert global_states() == states
    assert torch.equal(views.images.array, pixels)


def test_the_generators_of_gpus_are_left_alone(monkeypatch):
    """Dropout on a GPU draws from them; torch.manual_seed would set them as well, even where there is no GPU yet."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    views_of(3, Policy(**FULL)).batch(torch.arange(SAMPLES), 0)
    assert not seeded


def test_another_process_sees_the_same():
    program = ("import torch, test_views as t\n"
               "views = t.views_of(3, t.Policy(**t.FULL), 5)\n"
               "torch.rand(3); print(views.checksum(torch.arange(t.SAMPLES).flip(0), 3))")
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=60, check=True,
                          env={"PYTHONPATH": f"{tests}:{tests.parent}", "PYTHONHASHSEED": "9"})
    assert int(done.stdout) == views_of(3, Policy(**FULL), 5).checksum(torch.arange(SAMPLES).flip(0), 3)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"nothing"}))
@pytest.mark.parametrize("channels", [1, 3])
def test_epochs_seeds_and_samples_draw_apart(name, channels):
    """The same picture again and again: the views differ among samples, and again in another epoch or with another seed."""
    policy, ids = Policy(**POLICIES[name]), torch.arange(40)
    data = data_set(channels, 40)
    data.images.array[:] = data.images.array[:1].clone()
    first = Views(data, policy, 0).batch(ids, 0)
    assert len({view.numpy().tobytes() for view in first}) > 1
    assert not torch.equal(first, Views(data, policy, 0).batch(ids, 1))
    assert not torch.equal(first, Views(data, policy, 1).batch(ids, 0))


@quick
@given(channels_of, seeds, epochs, st.permutations(range(SAMPLES)))
def test_without_augmentation_a_batch_is_the_images_by_one_index(channels, seed, epoch, ids):
    views, ids = views_of(channels, Policy(), seed), torch.tensor(ids)
    asked, images = [], views.images

    class Counting:
        def __getitem__(self, ids):
            asked.append(ids)
            return images[ids]
    views.images = Counting()
    assert torch.equal(views.batch(ids, epoch), images.array[ids])
    assert len(asked) == 1
    assert torch.equal(views.plain(ids), images.array[ids])


@quick
@given(policies, seeds, st.integers(0, SAMPLES - 1))
def test_plain_views_are_never_augmented(policy, seed, index):
    views = views_of(3, policy, seed)
    assert torch.equal(views.plain(torch.tensor([index])), views.images.array[index:index + 1])


@quick
@given(channels_of, st.integers(0, 4), st.booleans(), seeds, epochs)
def test_crop_and_flip_give_a_window_of_the_padded_image_or_its_mirror(channels, pad, flip, seed, epoch):
    """Against a search over every window: each view is one of them; mirrored only where flip is on."""
    views = views_of(channels, Policy(crop=pad, flip=flip), seed)
    for image, view in zip(views.images.array, views.batch(torch.arange(SAMPLES), epoch)):
        padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
        windows = [padded[:, top:top + HEIGHT, left:left + WIDTH]
                   for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
        windows += [window[:, :, ::-1] for window in windows] if flip else []
        assert any(np.array_equal(view.numpy(), window) for window in windows)


def test_crop_offsets_and_flips_are_uniform():
    """Padding 1 and a mirror: 18 windows, each with 1/18 of 9,000 samples; 5 standard deviations allowed."""
    samples, pad = 9000, 1
    image = torch.arange(1, HEIGHT * WIDTH + 1, dtype=torch.uint8).view(1, 1, HEIGHT, WIDTH)
    data = DataSet(ArrayImages(image.expand(samples, -1, -1, -1)), torch.zeros(samples), ("a",), {}, torch.zeros(0), "", 0)
    views = Views(data, Policy(crop=pad, flip=True), 3).batch(torch.arange(samples), 2)
    counts = np.unique(views.flatten(1).numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 18
    spread = (samples / 18 * (1 - 1 / 18)) ** 0.5
    assert np.abs(counts - samples / 18).max() < 5 * spread


@quick
@given(channels_of, policies, seeds, epochs)
def test_a_checksum_is_the_crc_of_the_batch(channels, policy, seed, epoch):
    views, ids = views_of(channels, policy, seed), torch.tensor([3, 1, 11])
    checksum = views.checksum(ids, epoch)
    assert checksum == zlib.crc32(views.batch(ids, epoch).numpy().tobytes()) and 0 <= checksum < 2**32


def test_a_checksum_notices_one_pixel_by_one_value():
    views, ids = views_of(1, Policy()), torch.arange(SAMPLES)
    before = views.checksum(ids, 0)
    views.images.array[5, 0, 2, 2] ^= 1
    assert views.checksum(ids, 0) != before


def test_colour_on_grey_images_changes_brightness_and_contrast_only():
    """Both are affine in the pixel: equal pixels stay equal, and the order of grey values is kept."""
    data = data_set(1)
    ramp = torch.arange(HEIGHT * WIDTH, dtype=torch.uint8).view(1, HEIGHT, WIDTH) // 6 * 6 + 60
    data.images.array[:] = ramp
    views = Views(data, Policy(colour=0.4), 0).batch(torch.arange(SAMPLES), 0)
    assert not torch.equal(views, data.images.array)
    for view in views:
        values = view.flatten().to(torch.int64)
        assert (values.diff() >= 0).all()
        assert (values.diff()[ramp.flatten().to(torch.int64).diff() == 0] == 0).all()


@settings(deadline=None, max_examples=40)
@given(pad=st.integers(0, 20), flip=st.booleans(), channels=channels_of, seed=seeds, epoch=epochs)
def test_crop_and_flip_equal_a_loop_over_samples(pad, flip, channels, seed, epoch):
    views = views_of(channels, Policy(crop=pad, flip=flip), seed)
    found = views.batch(torch.arange(SAMPLES), epoch).numpy()
    # The draws as pkd/views.py documents them: three numbers in [0, 1) a sample, one array an epoch.
    draws = np.random.default_rng([seed, epoch, 0xF1]).random((SAMPLES, 3), dtype=np.float32)
    for image, view, (down, across, turn) in zip(views.images.array.numpy(), found, draws):
        top, left = (min(int(draw * np.float32(2 * pad + 1)), 2 * pad) for draw in (down, across))
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        window = padded[:, top:top + image.shape[1], left:left + image.shape[2]]
        assert np.array_equal(view, window[..., ::-1] if flip and turn < 0.5 else window)
