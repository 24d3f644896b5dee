"""Data sets: what each reader refuses, and what damage does."""

import contextlib
import gzip
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pkd.data import load_data
from pkd.errors import UserError
from pkd.recipe import Data

IDX = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def load(name, path=None, **own):
    return load_data(Data(name=name, path=path and str(path), **own))


def pictures(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def content(data):
    """All images and all labels, in the order of the sample numbers."""
    return data.images[torch.arange(len(data.labels))].numpy(), data.labels.numpy()


def assert_holds(data, images, labels, classes):
    """The data set holds exactly these, and no sample is in two splits or in none."""
    found, found_labels = content(data)
    assert found.dtype == np.uint8 and np.array_equal(found, images)
    assert data.labels.dtype == torch.int64 and np.array_equal(found_labels, labels)
    assert data.classes == tuple(classes) and data.channels == images.shape[1] and data.size == images.shape[2:]
    assert sorted(torch.cat(list(data.splits.values())).tolist()) == list(range(len(labels)))


def write_idx(folder, packed=False, train=30, test=10):
    """Fashion-MNIST's four files with small images; returns their images and labels, training first."""
    folder.mkdir(exist_ok=True)
    images, labels = pictures(train + test, 4, 5), np.arange(train + test) % 10
    arrays = [images[:train], labels[:train], images[train:], labels[train:]]
    for name, array in zip(IDX, arrays):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        whole = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(whole) if packed else whole)
    return images[:, None], labels


def write_cifar(folder, fine):
    """CIFAR's binary release, of three classes; the coarse label of CIFAR-100 is a wrong one on purpose."""
    folder.mkdir(exist_ok=True)
    names = ["train.bin"] if fine else [f"data_batch_{i}.bin" for i in range(1, 6)]
    images, labels = pictures(6 * (len(names) + 1), 3, 32, 32), np.arange(6 * (len(names) + 1)) % 3
    for i, name in enumerate([*names, "test.bin" if fine else "test_batch.bin"]):
        rows = [bytes([19, label] if fine else [label]) + image.tobytes()
                for image, label in zip(images[6 * i:6 * i + 6], labels[6 * i:6 * i + 6].tolist())]
        (folder / name).write_bytes(b"".join(rows))
    (folder / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text("apple\nbeaver\ncloud\n\n")
    return images, labels


def write_folder(root, counts=5, grey=False, size=(6, 7)):
    """A folder of PNG files per class; returns the images in order."""
    images = pictures(2 * counts, *size) if grey else pictures(2 * counts, *size, 3)
    for i, image in enumerate(images):
        folder = root / "cat" if i < counts else root / "dog"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return images[:, None] if grey else images.transpose(0, 3, 1, 2)


def write_table(path, rows, header="image,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def write_npz(path, labels, images=None, **own):
    labels = np.asarray(labels)
    np.savez(path, x=pictures(len(labels), 4, 4) if images is None else images, y=labels, **own)
    return path


def test_lazy_decoding_gives_the_same_bytes(tmp_path):
    for i, size in enumerate([(6, 7), (9, 5), (12, 12)]):
        write_folder(tmp_path / "train" / f"part{i}", 3, size=size)
    lazy, cached = (load("folder", tmp_path / "train", image_size=6, cache_gib=gib, workers=2) for gib in (0, 1))
    assert type(lazy.images) is not type(cached.images) and lazy.fingerprint == cached.fingerprint
    ids = torch.tensor([5, 0, 17, 5])
    assert torch.equal(lazy.images[ids], cached.images[ids]) and np.array_equal(content(lazy)[0], content(cached)[0])
    assert lazy.images[ids[:0]].shape == cached.images[ids[:0]].shape == (0, 3, 6, 6)


def test_a_file_name_that_is_no_utf8_is_a_name_like_any_other(tmp_path):
    images = write_folder(tmp_path)
    try:
        (tmp_path / "dog" / "009.png").rename(tmp_path / "dog" / "009\udce9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert_holds(load("folder", tmp_path), images, [0] * 5 + [1] * 5, ["cat", "dog"])


@pytest.mark.parametrize("grey", [False, True])
def test_folder_without_split_folders(tmp_path, grey):
    images = write_folder(tmp_path, grey=grey)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert_holds(load("folder", tmp_path), images, [0] * 5 + [1] * 5, ["cat", "dog"])


def test_one_grey_picture_does_not_make_a_set_grey(tmp_path):
    images = write_folder(tmp_path)
    Image.fromarray(images[0, 0]).save(tmp_path / "cat" / "000.png")
    grey = np.repeat(images[:1, :1], 3, axis=1)
    assert_holds(load("folder", tmp_path), np.concatenate([grey, images[1:]]), [0] * 5 + [1] * 5, ["cat", "dog"])


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folder_with_split_folders(tmp_path, validation):
    images = [write_folder(tmp_path / split, count) for split, count in (("train", 3), (validation, 2), ("test", 1))]
    data = load("folder", tmp_path)
    assert_holds(data, np.concatenate(images), [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1], ["cat", "dog"])
    assert {split: ids.tolist() for split, ids in data.splits.items()} == {
        "train": [0, 1, 2, 3, 4, 5], "validation": [6, 7, 8, 9], "test": [10, 11]}


def test_csv_drops_and_counts_rows_of_several_labels(tmp_path):
    images = write_folder(tmp_path / "files", grey=True)
    files = [f"files/cat/{i:03}.png" for i in range(5)] + [f"files/dog/{i:03}.png" for i in range(5, 10)]
    rows = [f"{file},ab {i}, {'fish' if i % 2 else 'bird'}" for i, file in enumerate(files)]
    rows[4:4] = [f"{files[0]},ab,bird|fish", f"{files[1]},ab,fish|bird"]
    table = write_table(tmp_path / "table.csv", rows, "picture,patient,finding")
    data = load("csv", table, image_column="picture", label_column="finding")
    assert_holds(data, images, np.arange(10) % 2, ["bird", "fish"])
    assert data.dropped == 2


def test_splits_depend_on_data_seed_and_labels_only(tmp_path):
    labels = np.arange(200) % 4
    (tmp_path / "elsewhere").mkdir()
    first = load("npz", write_npz(tmp_path / "a.npz", labels))
    other = load("npz", write_npz(tmp_path / "elsewhere" / "b.npz", labels, pictures(200, 9, 9, 3, seed=1)), workers=1)
    again = load("npz", tmp_path / "a.npz", seed=41)
    for split in ("train", "validation", "test"):
        assert torch.equal(first.splits[split], other.splits[split])
        assert not torch.equal(first.splits[split], again.splits[split])


def test_the_official_test_split_is_kept_for_every_seed(tmp_path):
    write_idx(tmp_path, train=200)
    for seed in range(3):
        data = load("fashion-mnist", tmp_path, seed=seed, test=0.5)
        assert data.splits["test"].tolist() == list(range(200, 210))
        assert len(data.splits["validation"]) == 20 and int(data.splits["validation"].max()) < 200


def test_fingerprint_of_files_is_by_relative_names_and_sizes(tmp_path):
    write_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    base = load("folder", tmp_path / "here").fingerprint
    assert load("folder", tmp_path / "there").fingerprint == base
    assert load("folder", tmp_path / "there", image_size=5).fingerprint != base
    (tmp_path / "there" / "dog" / "009.png").rename(tmp_path / "there" / "dog" / "010.png")
    assert load("folder", tmp_path / "there").fingerprint != base


# Refusals

def refused(words, name, path=None, **own):
    with pytest.raises(UserError) as error:
        load(name, path, **own)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


@pytest.mark.parametrize("name,file,change,words", [  # change: of the file's bytes; None: the file is gone
    ("fashion-mnist", IDX[3], None, ["lacks t10k-labels-idx1-ubyte", "all four IDX files"]),
    ("fashion-mnist", IDX[0], lambda old: b"\1" + old[1:], ["no IDX file of 3", "01000803", "fetch it again"]),
    ("fashion-mnist", IDX[0], lambda old: b"", ["no IDX file of 3", "nothing"]),
    ("fashion-mnist", IDX[0], lambda old: old[:-1], ["should hold 600 bytes for 30 x 4 x 5, found 599"]),
    ("fashion-mnist", IDX[1], lambda old: old[:-1] + b"\n", ["labels from 0 to 10", "mend the labels"]),
    ("fashion-mnist", IDX[1], lambda old: old[:7] + b"\x1d" + old[8:-1], ["30 images for 29 labels"]),
    ("cifar10", "test_batch.bin", None, ["lacks test_batch.bin", "data.path", "data.download=true"]),
    ("cifar10", "data_batch_2.bin", lambda old: old[:-1], ["no multiple of 3073", "fetch it again"]),
    ("cifar10", "data_batch_2.bin", lambda old: b"\3" + old[1:], ["labels from 0 to 3, but 3 classes"]),
    ("cifar100", "fine_label_names.txt", None, ["fine_label_names.txt", "class names", "fetch it again"])])
def test_broken_published_files_are_refused(tmp_path, name, file, change, words):
    write_idx(tmp_path) if name == "fashion-mnist" else write_cifar(tmp_path, name == "cifar100")
    old = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if change:
        (tmp_path / file).write_bytes(change(old))
    refused(words, name, tmp_path)


X, Y = pictures(8, 4, 4), np.arange(8) % 2


@pytest.mark.parametrize("arrays,words", [
    ({"x": X}, ["lacks y", "x_train"]),
    ({"x_train": X, "y_train": Y}, ["lacks x_test, y_test"]),
    ({"x": X / 255, "y": Y}, ["float64", "uint8"]),
    ({"x": X, "y": Y / 1}, ["float64", "whole numbers"]),
    ({"x": X, "y": Y[:, None]}, ["[8, 1]", "whole numbers"]),
    ({"x": X, "y": Y[:7]}, ["8 images", "7 labels"]),
    ({"x": X, "y": Y - 1}, ["from -1 to 0", "start at 0"]),
    ({"x": X, "y": Y, "classes": np.array(["a", "b"])[:1]}, ["labels from 0 to 1", "name all classes"]),
    ({"x": X, "y": Y * 0}, ["1 classes", "at least 2"]),
    ({"x": X[:0], "y": Y[:0]}, ["0 images"]),
    ({"x": X[:, :2, :0], "y": Y}, ["[8, 2, 0]", "must be [n, h, w]"]),
    ({"x": X.reshape(8, 2, 2, 4), "y": Y}, ["[8, 2, 2, 4]", "must be [n, h, w]"]),
    ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y}, ["(1, 4, 4)", "(1, 3, 4)", "make them equal"]),
    ({"x_train": X, "y_train": Y, "x_validation": X, "x_test": X, "y_test": Y}, ["lacks y_validation"]),
    ({"x_train": X, "y_train": Y, "x_validation": X[:, :3], "y_validation": Y, "x_test": X, "y_test": Y},
     ["those of x_validation (1, 3, 4)", "make them equal"]),
    ({"x": X, "y": Y.astype(object)}, ["without objects"]),
    ({"x": X, "y": Y, "classes": np.array(["cat", "cat"])}, ["2 classes of the name 'cat'"]),
    ({"x": X, "y": Y, "classes": np.array([b"cat", b"\xff"])}, ["no UTF-8"]),
    ({"x": X[:5], "y": Y[:5]}, ["class '1' has 2", "at least 3", "add images"])])
def test_npz_that_cannot_be_used_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    refused(words, "npz", tmp_path / "set.npz")


def test_class_names_of_an_npz_may_be_bytes(tmp_path):
    names = np.array(["caf\u00e9".encode(), b"tea"])
    np.savez(tmp_path / "set.npz", x=pictures(40, 4, 4), y=np.arange(40) % 2, classes=names)
    assert load("npz", tmp_path / "set.npz").classes == ("caf\u00e9", "tea")


def test_folders_and_tables_that_cannot_be_used_are_refused(tmp_path):
    for name in ("npz", "folder", "csv", "cifar10", "fashion-mnist"):
        refused(["none"], name, tmp_path / "none")
        if name != "fashion-mnist":  # whose path has a default
            refused(["needs data.path"], name)
    refused(["holds no images", "check data.path"], "folder", tmp_path)
    write_folder(tmp_path / "train")
    files = [f"train/cat/{i:03}.png,a" for i in range(5)] + [f"train/dog/{i:03}.png,b" for i in range(5, 10)]
    table = tmp_path / "table.csv"
    refused(["data.label_column", "'label'", "labels", "did you mean"], "csv", write_table(table, files, "image,labels"))
    refused(["data.image_column", "(none)"], "csv", write_table(table, [], ""))
    refused(["row 11", "complete it"], "csv", write_table(table, [*files, "train/cat/000.png,"]))
    refused(["absent.png", "no such file", "mend"], "csv", write_table(table, [*files, "absent.png,a"]))
    for again in ("train/cat/000.png", "./train/../train/cat/000.png", str(table.parent / "train/cat/000.png")):
        refused(["train/cat/000.png is in 2 rows", "one row"], "csv", write_table(table, [*files, f"{again},b"]))
    with contextlib.suppress(OSError):  # a file system that takes UTF-8 names only
        (tmp_path / "train" / "caf\udce9").mkdir()
        refused(["no UTF-8", "rename it"], "folder", tmp_path)
        (tmp_path / "train" / "caf\udce9").rmdir()
    (tmp_path / "test" / "dgo").mkdir(parents=True)
    refused(["'dgo'", "did you mean 'dog'"], "folder", tmp_path)
    (tmp_path / "train").rename(tmp_path / "training")
    refused(["test/ with folders in it", "name the training images' folder train"], "folder", tmp_path)


def test_images_of_several_sizes_need_image_size(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(pictures(1, 9, 5, 3)[0]).save(tmp_path / "dog" / "009.png")
    refused(["7 x 6", "5 x 9", "009.png", "set data.image_size"], "folder", tmp_path)
    assert load("folder", tmp_path, image_size=4).size == (4, 4)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_a_range_that_nobody_knows_are_refused(tmp_path, kind):
    write_folder(tmp_path)
    Image.fromarray(pictures(1, 6, 7)[0].astype(kind)).save(tmp_path / "dog" / "009.tiff")
    refused(["009.tiff", "32 bits", "8 or unsigned 16"], "folder", tmp_path)


def test_a_damaged_image_is_refused_before_training_or_when_it_is_asked_for(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "dog" / "009.png"
    file.write_bytes(file.read_bytes()[:60])  # the header is whole, the pixels are not
    refused(["009.png", "cannot be decoded", "replace it"], "folder", tmp_path)
    lazy = load("folder", tmp_path, cache_gib=0)
    with pytest.raises(UserError, match=r"009\.png cannot be decoded"):
        lazy.images[torch.tensor([9])]


# Damage anywhere

@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """What can be damaged: by the name of a kind, (data set, its path, the file)."""
    root = tmp_path_factory.mktemp("intact")
    write_idx(root / "idx"), write_idx(root / "gz", packed=True)
    write_cifar(root / "cifar", fine=False), write_folder(root / "png", 3, size=(20, 20))
    x, y = pictures(60, 12, 12), np.arange(60) % 2  # more than zipfile reads at once, so that CRCs come last
    np.savez(root / "plain.npz", x=x, y=y), np.savez_compressed(root / "packed.npz", x=x, y=y)
    table = write_table(root / "table.csv", [f"png/{'cat' if i < 3 else 'dog'}/00{i}.png,{'ab'[i % 2]}" for i in range(6)])
    return {"idx images": ("fashion-mnist", root / "idx", root / "idx" / IDX[0]),
            "idx labels": ("fashion-mnist", root / "idx", root / "idx" / IDX[3]),
            "idx gzipped": ("fashion-mnist", root / "gz", root / "gz" / f"{IDX[1]}.gz"),
            "cifar": ("cifar10", root / "cifar", root / "cifar" / "data_batch_3.bin"),
            "cifar names": ("cifar10", root / "cifar", root / "cifar" / "batches.meta.txt"),
            "npz": ("npz", root / "plain.npz", root / "plain.npz"),
            "npz packed": ("npz", root / "packed.npz", root / "packed.npz"),
            "csv": ("csv", table, table), "png": ("folder", root / "png", root / "png" / "dog" / "003.png")}


# (place, bits): the byte there is changed, or the file ends there if there are no bits. Headers and ends count most.
places = st.integers(0, 200) | st.integers(-400, -1) | st.integers(0, 10**5)
damages = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
@pytest.mark.parametrize("kind", ["idx images", "idx labels", "idx gzipped", "cifar", "cifar names", "npz", "npz packed",
                                  "csv", "png"])
@settings(deadline=None, max_examples=100)
@given(damage=damages)
def test_damage_is_loaded_or_refused_in_one_sentence(intact, kind, damage):
    name, path, file = intact[kind]
    whole = file.read_bytes()
    content_now = bytearray(whole)
    for place, bits in damage:
        if content_now and bits:
            content_now[place % len(content_now)] ^= bits
        elif content_now:
            del content_now[place % len(content_now):]
    file.write_bytes(content_now)
    try:
        data = load(name, path)
        images, labels = content(data)
        assert images.dtype == np.uint8 and len(images) == len(labels)
        assert 0 <= labels.min() <= labels.max() < len(data.classes)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(whole)
