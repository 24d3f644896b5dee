"""The file formats of published data sets: IDX, CIFAR's binary release, npz. Pure readers."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from pkd.errors import UserError
from pkd.files import one_at_a_time

CIFAR = {  # fine?: folder, archive, md5, training files, test file, names, label bytes before each image
    False: ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
            [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1),
    True: ("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
           ["train.bin"], "test.bin", "fine_label_names.txt", 2),
}
PIXELS = 3 * 32 * 32


def read_idx(folder: Path, stem: str, dimensions: int) -> np.ndarray:
    """uint8 array of an IDX file, gzipped or not: a magic number, big-endian sizes, then the bytes (LeCun et al.)."""
    path = next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} lacks {stem} (plain or .gz): give the folder with all four IDX files")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is no IDX file of {dimensions} dimension(s) of bytes (it starts with "
                        f"{content[:4].hex() or 'nothing'}): fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    expected = int(np.prod([int(n) for n in shape], dtype=object))
    if len(content) - header != expected:
        raise UserError(f"{path} should hold {expected} bytes for {' x '.join(map(str, shape))}, found "
                        f"{len(content) - header}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(root: Path, fine: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], int]:
    """Images uint8 [n, 3, 32, 32], labels, class names, number of test images (the last ones)."""
    inside, _, _, training, test, names, label_bytes = CIFAR[fine]
    folder = root / inside if (root / inside).is_dir() else root
    blocks = []
    for name in [*training, test]:
        try:
            content = (folder / name).read_bytes()
        except OSError:
            raise UserError(f"{folder} lacks {name} of CIFAR's binary release: set data.path to its folder, or "
                            "data.download=true") from None
        if len(content) % (label_bytes + PIXELS) or not content:
            raise UserError(f"{folder / name} has {len(content)} bytes, no multiple of {label_bytes + PIXELS} an image: "
                            "fetch it again")
        blocks.append(np.frombuffer(content, np.uint8).reshape(-1, label_bytes + PIXELS))
    try:
        classes = (folder / names).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / names} with the class names cannot be read ({error}): fetch it again") from None
    together = np.concatenate(blocks)
    labels = together[:, label_bytes - 1].astype(np.int64)
    return together[:, label_bytes:].reshape(-1, 3, 32, 32), labels, tuple(classes), len(blocks[-1])


def download_cifar(root: Path, fine: bool) -> None:
    """Fetch the published binary archive into `root`, checked by its md5, unless it is there."""
    from pkd.vision import torchvision

    inside, archive, md5, training, *others, _ = CIFAR[fine]
    try:
        with one_at_a_time(root):
            if not all((root / inside / name).is_file() for name in (*training, *others)):
                torchvision.datasets.utils.download_and_extract_archive(
                    f"https://www.cs.toronto.edu/~kriz/{archive}", str(root), md5=md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{archive} could not be downloaded to {root} ({error}): fetch it where there is a network and "
                        "unpack it there") from None


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], int, int, np.ndarray | None]:
    """Images uint8 [n, channels, h, w], labels, class names, number of test images (the last ones) and of validation images
    (before them); images without labels, if there are any.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged file makes zipfile and numpy raise anything, tokenize.TokenError too
        raise UserError(f"data.path {path} cannot be read as an npz file ({type(error).__name__}: {error}): give one "
                        "that numpy.savez wrote, without objects in it") from None
    pairs = [("x", "y")]
    if "x_train" in arrays:
        parts = ["train", *["validation"] * ("x_validation" in arrays or "y_validation" in arrays), "test"]
        pairs = [(f"x_{part}", f"y_{part}") for part in parts]
    missing = [key for pair in pairs for key in pair if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} and holds {', '.join(arrays) or 'nothing'}: it needs "
                        "x_train, y_train, x_test and y_test (x_validation and y_validation, too, if there are any), or x "
                        "and y")
    other = [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]
    if other:
        raise UserError(f"{path} holds {other[0]!r}, which is no array: give one that numpy.savez wrote")
    images = [_planes(arrays[x], f"{x} of {path}") for x, _ in pairs]
    labels = [_integers(arrays[y], f"{y} of {path}") for _, y in pairs]
    for (x, y), pixels, own in zip(pairs, images, labels):
        if len(pixels) != len(own):
            raise UserError(f"{path}: {x} holds {len(pixels)} images, but {y} holds {len(own)} labels")
    unlabelled = _planes(arrays["x_unlabelled"], f"x_unlabelled of {path}") if "x_unlabelled" in arrays else None
    more = [(("x_unlabelled", None), unlabelled)] * (unlabelled is not None)
    for (x, _), pixels in [*zip(pairs, images), *more]:
        if pixels.shape[1:] != images[0].shape[1:]:
            raise UserError(f"{path}: images of {pairs[0][0]} are {images[0].shape[1:]} and those of {x} {pixels.shape[1:]} "
                            "(channels, height, width): make them equal")
    together = np.concatenate(labels)
    if "classes" in arrays:
        classes = tuple(_name(name, path) for name in np.atleast_1d(arrays["classes"]))
    else:
        largest = int(together.max(initial=-1))
        classes = tuple(str(label) for label in range(largest + 1)) if largest < 2**20 else ()
    counts = {x: len(own) for (x, _), own in zip(pairs, labels)}
    return np.concatenate(images), together, classes, counts.get("x_test", 0), counts.get("x_validation", 0), \
        unlabelled


def _name(name, path: Path) -> str:
    """A class's, which may be bytes."""
    try:
        return name.decode() if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError:
        raise UserError(f"{path}: the class name {name!r} is no UTF-8: give names as text") from None


def _planes(x: np.ndarray, what: str) -> np.ndarray:
    """[n, h, w], [n, h, w, 1 or 3] or [n, 1 or 3, h, w] -> [n, channels, h, w]."""
    if x.dtype != np.uint8:
        raise UserError(f"{what} has dtype {x.dtype}: images must be uint8, 0 to 255")
    shape = list(x.shape)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[1:]:
        raise UserError(f"{what} has shape {shape}: images must be [n, h, w], [n, h, w, 1 or 3] or "
                        "[n, 1 or 3, h, w]")
    return x


def _integers(y: np.ndarray, what: str) -> np.ndarray:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{what} has dtype {y.dtype} and shape {list(y.shape)}: labels must be whole numbers, [n]")
    if len(y) and (y.min() < 0 or y.max() >= 2**31):
        raise UserError(f"{what} holds labels from {y.min()} to {y.max()}: they must start at 0")
    return y.astype(np.int64)
