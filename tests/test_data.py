"""Data sets: what is read is what was written, splits are fixed by data.seed, damaged files are refused in one line."""

import gzip
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pkd.data import load_data, stratified
from pkd.errors import UserError
from pkd.recipe import Data
from pkd.vision import torchvision

quick = settings(max_examples=30, deadline=None)
FASHION = Path("/usr/share/datasets/fashion-mnist")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10 = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def refusal(**recipe) -> str:
    with pytest.raises(UserError) as caught:
        load_data(Data(**recipe))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, packed: bool = False) -> list[np.ndarray]:
    """40 training and 20 test images, 4 x 5 pixels."""
    arrays = [pixels(40, 4, 5), np.arange(40) % 10, pixels(20, 4, 5), np.arange(20) % 10]
    for name, array in zip(IDX, arrays):
        (folder / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return arrays


def write_cifar(folder: Path, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels), of which the last file's are the test images."""
    files, classes, bytes_ = (["train.bin", "test.bin"], 100, 2) if fine else (CIFAR10, 10, 1)
    each = 300 if fine else 10
    images, labels = pixels(each * len(files), 3, 32, 32), np.arange(each * len(files)) % classes
    rows = np.concatenate([np.repeat(labels[:, None], bytes_, 1).astype(np.uint8), images.reshape(len(images), -1)], 1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(files, np.split(rows, len(files))):
        (folder / name).write_bytes(part.tobytes())
    names = "fine_label_names.txt" if fine else "batches.meta.txt"
    (folder / names).write_text("\n".join(f"class{i}" for i in range(classes)) + "\n\n")
    return images, labels


def write_npz(path: Path, labels: np.ndarray, **more) -> Data:
    np.savez(path, x=pixels(len(labels), 2, 2), y=labels)
    return Data(name="npz", path=str(path), **more)


def write_csv(folder: Path) -> Data:
    """11 images of a and b in turn, and a twelfth that is both."""
    write_images(folder / "images", 12)
    rows = [f"images/{i:02}.png,{'ab'[i % 2] if i < 11 else 'a|b'}" for i in range(12)]
    (folder / "a.csv").write_text("\n".join(["image,label", *rows]))
    return Data(name="csv", path=str(folder / "a.csv"))


def write_images(folder: Path, count: int, *size: int) -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels(count, *(size or (4, 5, 3)))):
        Image.fromarray(image).save(folder / f"{index:02}.png")


# Splits

@quick
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.sampled_from([0.1, 0.25, 0.5, 0.8, 0.99]),
       st.sampled_from([0.1, 0.25, 0.5, 0.8, 0.99]), st.integers(0, 2**63 - 1))
def test_splits_share_out_every_class_or_the_small_class_is_named(tmp_path_factory, counts, test, validation, seed):
    """Disjoint, complete, ascending; of each class the fraction to the nearest whole, but one at least in each split."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    recipe = write_npz(tmp_path_factory.getbasetemp() / "s.npz", labels, seed=seed, test=test, validation=validation)
    if min(counts) < 3:
        sentence = refusal(**recipe.model_dump())
        small = next(index for index, count in enumerate(counts) if count < 3)
        assert f"class '{small}' has {counts[small]} " in sentence and "at least 3" in sentence
        return
    data = load_data(recipe)
    assert torch.equal(torch.cat(list(data.splits.values())).sort().values, torch.arange(len(labels)))
    assert all((ids.diff() > 0).all() and ids.dtype == torch.int64 for ids in data.splits.values())
    shares = {key: torch.bincount(data.labels[ids], minlength=len(counts)).tolist() for key, ids in data.splits.items()}
    for label, count in enumerate(counts):
        held = min(max(1, round(count * test)), count - 2)
        assert shares["test"][label] == held
        assert shares["validation"][label] == min(max(1, round((count - held) * validation)), count - held - 1)
        assert shares["train"][label] >= 1
    again = load_data(recipe)
    assert all(torch.equal(again.splits[key], ids) for key, ids in data.splits.items())
    assert again.fingerprint == data.fingerprint


@quick
@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 0.99), st.integers(0, 99), st.integers(1, 3))
def test_stratified_parts_any_numbers_and_spares_some(labels, fraction, seed, spare):
    labels, ids = np.array(labels, dtype=np.int64), np.arange(len(labels))
    kept, held = stratified(ids, labels, fraction, [seed], spare)
    assert sorted([*kept, *held]) == ids.tolist()
    for label in set(labels.tolist()):
        assert (labels[kept] == label).sum() >= min(spare, (labels == label).sum())


def test_the_split_follows_data_seed():
    first, same, other = (load_data(Data(name="digits", seed=seed)) for seed in (40, 40, 41))
    assert all(torch.equal(first.splits[key], same.splits[key]) for key in first.splits)
    assert not any(torch.equal(first.splits[key], other.splits[key]) for key in first.splits)
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_a_class_without_training_images_is_named(tmp_path):
    labels = np.array([0, 2] * 20)
    np.savez(tmp_path / "a.npz", x=pixels(40, 2, 2), y=labels, classes=np.array(["cat", "dog", "owl"]))
    assert "'dog' has 0 training image" in refusal(name="npz", path=str(tmp_path / "a.npz"))


def test_the_fingerprint_notices_a_pixel_a_label_and_a_name(tmp_path):
    x, y, classes = pixels(40, 2, 2), np.arange(40) % 2, np.array(["a", "b"])
    variants = [(x, y, classes), (x ^ (np.arange(160).reshape(x.shape) == 7), y, classes), (x, 1 - y, classes),
                (x, y, classes[::-1]), (x.reshape(40, 1, 4), y, classes)]
    found = set()
    for images, labels, names in variants:
        np.savez(tmp_path / "a.npz", x=images.astype(np.uint8), y=labels, classes=names)
        found.add(load_data(Data(name="npz", path=str(tmp_path / "a.npz"))).fingerprint)
    assert len(found) == len(variants) and all(len(one) == 64 for one in found)


# What is read is what was written

def test_digits_are_scaled_to_bytes():
    data = load_data(Data(name="digits"))
    assert (data.channels, data.size, len(data.labels), data.classes) == (1, (8, 8), 1797, tuple("0123456789"))
    assert set(data.images.array.unique().tolist()) == {round(value * 255 / 16) for value in range(17)}


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_plain_or_gzipped(tmp_path, packed):
    train, train_labels, test, test_labels = write_idx(tmp_path, packed)
    data = load_data(Data(name="fashion-mnist", path=str(tmp_path)))
    assert torch.equal(data.images.array[:, 0], torch.from_numpy(np.concatenate([train, test])))
    assert data.labels.tolist() == [*train_labels, *test_labels] and data.size == (4, 5)
    assert data.splits["test"].tolist() == list(range(40, 60)) and data.classes[9] == "Ankle boot"


def test_fashion_mnist_is_found_where_torchvision_puts_it(tmp_path):
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    write_idx(tmp_path / "FashionMNIST" / "raw", True)
    assert len(load_data(Data(name="fashion-mnist", path=str(tmp_path))).labels) == 60


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"{FASHION} is not installed (Debian's dataset-fashion-mnist)")
def test_the_real_fashion_mnist_is_found_without_a_path():
    data = load_data(Data(name="fashion-mnist"))
    assert (len(data.labels), data.channels, data.size) == (70000, 1, (28, 28))
    assert {key: len(ids) for key, ids in data.splits.items()} == {"train": 54000, "validation": 6000, "test": 10000}
    assert torch.bincount(data.labels).tolist() == [7000] * 10 and data.labels[0] == 9


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-bin"), ("cifar100", "cifar-100-binary")])
def test_cifar_binary_files(tmp_path, name, folder, inside):
    fine = name == "cifar100"
    images, labels = write_cifar(tmp_path / folder, fine)
    data = load_data(Data(name=name, path=str(tmp_path / folder if inside else tmp_path)))
    assert torch.equal(data.images.array, torch.from_numpy(images)) and data.labels.tolist() == labels.tolist()
    assert data.classes == tuple(f"class{i}" for i in range(100 if fine else 10))
    assert data.splits["test"].tolist() == list(range(len(labels) - (300 if fine else 10), len(labels)))


@pytest.mark.parametrize(("shape", "planes"), [((40, 4, 5), (1, 4, 5)), ((40, 4, 5, 1), (1, 4, 5)),
                                               ((40, 4, 5, 3), (3, 4, 5)), ((40, 3, 4, 5), (3, 4, 5))])
def test_npz_axes_are_told_apart(tmp_path, shape, planes):
    x = pixels(*shape)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 2)
    data = load_data(Data(name="npz", path=str(tmp_path / "a.npz")))
    wanted = x.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else x.reshape(40, *planes)
    assert torch.equal(data.images.array, torch.from_numpy(wanted)) and (data.channels, *data.size) == planes
    assert data.classes == ("0", "1")


def test_npz_with_its_own_test_split_and_names(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=pixels(30, 4, 4), y_train=np.arange(30) % 3, x_test=pixels(9, 4, 4),
             y_test=np.arange(9) % 3, classes=np.array(["ア", "b", "c"]))
    data = load_data(Data(name="npz", path=str(tmp_path / "a.npz")))
    assert data.splits["test"].tolist() == list(range(30, 39)) and data.classes == ("ア", "b", "c")
    assert set(data.splits["validation"].tolist()) < set(range(30))


def test_npz_with_its_own_validation_split(tmp_path):
    x, y = pixels(42, 4, 4), np.arange(42) % 3
    np.savez(tmp_path / "a.npz", x_train=x[:30], y_train=y[:30], x_validation=x[30:33], y_validation=y[30:33],
             x_test=x[33:], y_test=y[33:])
    data = load_data(Data(name="npz", path=str(tmp_path / "a.npz")))
    assert {name: ids.tolist() for name, ids in data.splits.items()} == {
        "train": list(range(30)), "validation": [30, 31, 32], "test": list(range(33, 42))}
    assert torch.equal(data.images.array[:, 0], torch.from_numpy(x)) and data.labels.tolist() == y.tolist()


def test_csv_rows_of_several_labels_are_dropped_and_counted(tmp_path):
    data = load_data(write_csv(tmp_path))
    assert (len(data.labels), data.dropped, data.classes) == (11, 1, ("a", "b"))
    assert torch.equal(data.images.array.permute(0, 2, 3, 1), torch.from_numpy(pixels(12, 4, 5, 3)[:11]))


@pytest.mark.parametrize("name", ["npz", "folder", "csv"])
def test_images_without_a_label_are_told_apart_and_change_no_split(tmp_path, name):
    """They come after all others, so that what is drawn for those stays."""
    x, more, labels = pixels(30, 4, 5, 3), pixels(40, 4, 5, 3)[30:], np.arange(30) % 2
    for index, image in enumerate([*x, *more]):
        folder = f"train/{'ab'[labels[index]]}" if index < 30 else "unlabelled/deep"
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / folder / f"{index:02}.png")
    np.savez(tmp_path / "a.npz", x=x, y=labels, x_unlabelled=more, classes=np.array(["a", "b"]))
    rows = [f"train/{'ab'[label]}/{index:02}.png,{'ab'[label]}" for index, label in enumerate(labels)]
    unlabelled = [f"unlabelled/deep/{index}.png," for index in range(30, 40)]
    (tmp_path / "labelled.csv").write_text("\n".join(["image,label", *rows]))
    (tmp_path / "all.csv").write_text("\n".join(["image,label", *rows, *unlabelled]))
    wish = Data(name=name, path=str(tmp_path / {"npz": "a.npz", "folder": "", "csv": "all.csv"}[name]))
    plain = wish if name != "csv" else wish.model_copy(update={"path": str(tmp_path / "labelled.csv")})
    few, data = load_data(plain), load_data(wish.model_copy(update={"unlabelled": True}))
    assert data.unlabelled.tolist() == list(range(30, 40)) and len(few.unlabelled) == 0
    assert data.labels[30:].tolist() == [2] * 10 and data.classes == ("a", "b") and data.fingerprint != few.fingerprint
    assert torch.equal(data.images[torch.arange(30, 40)].permute(0, 2, 3, 1), torch.from_numpy(more))
    assert all(torch.equal(ids, few.splits[split]) for split, ids in data.splits.items())
    assert torch.equal(data.students_see, torch.cat([few.splits["train"], torch.arange(30, 40)]))
    assert torch.equal(few.students_see, few.splits["train"])


def test_images_without_a_label_are_refused_where_there_are_none_and_where_nobody_said_so(tmp_path):
    recipe = write_npz(tmp_path / "a.npz", np.arange(30) % 2, unlabelled=True)
    assert "holds no image without a label" in refusal(**recipe.model_dump())
    assert "digits has a label for every image" in refusal(name="digits", unlabelled=True)
    write_images(tmp_path / "folder" / "a", 5)
    write_images(tmp_path / "folder" / "b", 5)
    assert "has no train/" in refusal(name="folder", path=str(tmp_path / "folder"), unlabelled=True)
    write_csv(tmp_path)
    table = tmp_path / "a.csv"
    table.write_text(table.read_text() + "\nimages/11.png,")
    assert "set data.unlabelled" in refusal(name="csv", path=str(table))


@pytest.mark.parametrize("splits", [(), ("train",), ("train", "val", "test"), ("train", "validation")])
def test_a_folder_per_class_with_or_without_split_folders(tmp_path, splits):
    """Also for a class that is called as a split; the same wherever the folder is, however it is cached."""
    for place in ("here", "there"):
        for split in splits or ("",):
            for label in ("b", "a", "train"):
                write_images(tmp_path / place / split / label, 5)
    here, lazy = (load_data(Data(name="folder", path=str(tmp_path / place), cache_gib=gib, workers=gib + 1))
                  for place, gib in (("here", 4), ("there", 0)))
    assert here.classes == ("a", "b", "train") and torch.bincount(here.labels).tolist() == [5 * len(splits or "1")] * 3
    assert len(here.splits["test"]) == (15 if "test" in splits else 3)
    assert len(here.splits["validation"]) == (15 if len(splits) > 1 else 3)
    assert here.fingerprint == lazy.fingerprint
    ids = torch.arange(len(here.labels)).flip(0)
    assert not hasattr(lazy.images, "array") and torch.equal(here.images[ids], lazy.images[ids])


def test_of_images_the_centre_is_taken_and_resized(tmp_path):
    """In colour as some of the files are; 16 bits a pixel keep their upper 8."""
    bands = np.repeat(np.array([0, 90, 200, 30], dtype=np.uint8), 4)
    write_images(tmp_path / "b", 4, 8, 8)
    (tmp_path / "a").mkdir()
    for index, image in enumerate([np.tile(bands, (8, 1)), np.tile(bands.astype(np.uint16) << 8, (8, 1)),
                                   np.tile(bands[:, None, None], (1, 8, 3))]):
        Image.fromarray(image).save(tmp_path / "a" / f"{index}.png")
    data = load_data(Data(name="folder", path=str(tmp_path), image_size=8))
    wide, deep, tall = data.images[torch.arange(3)][:, 0]
    assert (data.channels, data.size) == (3, (8, 8)) and torch.equal(wide, torch.from_numpy(bands[4:12]).expand(8, 8))
    assert torch.equal(deep, wide) and torch.equal(tall, wide.T)
    assert "16 x 8" in refusal(name="folder", path=str(tmp_path)) and "data.image_size" in refusal(
        name="folder", path=str(tmp_path))


# Damage

def written(name: str, folder: Path) -> Data:
    """A small whole data set of that name in the folder."""
    if name == "npz":
        return write_npz(folder / "a.npz", np.arange(40) % 2)
    if name == "csv":
        return write_csv(folder)
    if name == "folder":
        for label in "ab":
            write_images(folder / label, 4)
    elif name == "cifar10":
        write_cifar(folder, False)
    else:
        write_idx(folder, name == "gzipped")
    return Data(name=name if name != "gzipped" else "fashion-mnist", path=str(folder))


@pytest.mark.parametrize(("name", "file", "change", "words"), [
    ("fashion-mnist", IDX[1], None, [IDX[1]]), ("cifar10", CIFAR10[1], None, [CIFAR10[1], "data.download"]),
    ("fashion-mnist", IDX[1], idx(np.arange(39) % 10), ["40 images", "39 labels"]),
    ("fashion-mnist", IDX[1], idx(np.arange(40)), ["labels from 0 to 39", "10 classes"]),
    ("fashion-mnist", IDX[0], idx(pixels(40, 4, 5))[:-1], ["800 bytes", "799"]),
    ("cifar10", CIFAR10[0], b"x" * 3074, ["3074 bytes", "3073"]), ("csv", "images/03.png", None, ["images/03.png"]),
    ("csv", "a.csv", b"picture,label\nx.png,a", ["'image'", "picture, label"]),
    ("csv", "a.csv", b"image,label\nx.png,  ", ["row 1"]), ("csv", "a.csv", b"image,label\n", ["no images"]),
    ("csv", "a.csv", b"\xff\xfe", ["a.csv", "utf-8"]), ("folder", "b/02.png", b"no picture", ["b/02.png", "replace it"]),
])
def test_a_refusal_names_the_file_and_the_numbers(tmp_path, name, file, change, words):
    recipe = written(name, tmp_path)
    (tmp_path / file).unlink() if change is None else (tmp_path / file).write_bytes(change)
    sentence = refusal(**recipe.model_dump())
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("path", ["/nowhere", "a\0b", "x" * 5000])
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100", "folder", "npz", "csv"])
def test_a_path_that_cannot_be_read_is_refused(name, path):
    assert "data.path" in refusal(name=name, path=path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_a_download_without_a_network_is_refused(name, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")
    for module in (torchvision.datasets.utils, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    assert "no route to host" in refusal(name=name, path=str(tmp_path / "new"), download=True)
    if name != "fashion-mnist":  # a killed start may have unpacked a part
        (tmp_path / "new" / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]).mkdir(parents=True)
        assert "no route to host" in refusal(name=name, path=str(tmp_path / "new"), download=True)
    assert "data.path" in refusal(name=name, download=True)
