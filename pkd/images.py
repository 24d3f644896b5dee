"""Images in memory or in files, both indexed by sample number and both uint8 [n, channels, height, width]."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pkd.errors import UserError
from pkd.files import raise_passing

SAMPLE = 64  # files whose headers say whether a set is grey


class ArrayImages:
    """array: uint8 [samples, channels, height, width] in memory."""

    def __init__(self, array: torch.Tensor):
        self.array = array
        self.channels, self.size = array.shape[1], tuple(array.shape[2:])

    def __len__(self) -> int:
        return len(self.array)

    @property
    def bytes(self) -> int:
        """Of all of them, decoded."""
        return self.array.nbytes

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.array[ids]


class FileImages:
    """Files decoded when they are asked for, by a pool of threads (Pillow decodes without Python's lock)."""

    def __init__(self, files: list[Path], size: tuple[int, int], grey: bool, workers: int):
        self.files, self.size, self.grey = files, size, grey
        self.channels = 1 if grey else 3
        self.pool = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def bytes(self) -> int:
        """Of all of them, decoded."""
        return len(self.files) * self.channels * self.size[0] * self.size[1]

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        decoded = self.pool.map(lambda index: decode(self.files[index], self.size, self.grey), ids.tolist())
        return torch.stack(list(decoded)) if len(ids) else torch.zeros(0, self.channels, *self.size, dtype=torch.uint8)


def decode(file: Path, size: tuple[int, int], grey: bool) -> torch.Tensor:
    """One image file, uint8 [1 or 3, *size]: the centre of the size's shape, resized. Raises UserError."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # Pillow's own conversion would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):  # whose range nobody knows; a conversion would cut off below 0 and above 255
                raise ValueError(f"its pixels have 32 bits, mode {image.mode}, and pkd takes 8 or unsigned 16")
            image = image.convert("L" if grey else "RGB")
            if (image.height, image.width) != size:
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image))
    except Exception as error:  # a damaged file makes Pillow raise anything from OSError to struct.error
        raise_passing(file, error)
        raise UserError(f"image {file} cannot be decoded ({type(error).__name__}: {error}): replace it or take it out "
                        "of the data") from None
    return pixels[None] if grey else pixels.permute(2, 0, 1).contiguous()


def read_images(files: list[Path], image_size: int | None, workers: int, cache_gib: float,
                works: Callable[[], None] = lambda: None) -> ArrayImages | FileImages:
    """Images of files: decoded at once if all fit in `cache_gib` GiB, else batch by batch; the same bytes either way.

    Grey if SAMPLE files from all over the list are, else in colour, to which grey ones are made; without image_size as
    large as the first file; works: told of progress. Raises UserError for a file that is damaged (if it is decoded now) or,
    without image_size, of another size.
    """
    size, _ = _shape(files[0])
    grey = all(_shape(file)[1] for file in files[::-(-len(files) // SAMPLE)])
    if image_size is None:
        other = None
        for file in files:
            works()
            if _shape(file)[0] != size:
                other = file
                break
        if other:
            raise UserError(f"image {files[0]} is {size[1]} x {size[0]} pixels and {other} is "
                            f"{_shape(other)[0][1]} x {_shape(other)[0][0]}: set data.image_size to the side that all "
                            "shall have")
    images = FileImages(files, (image_size, image_size) if image_size else size, grey, workers)
    if images.bytes > cache_gib * 2**30:
        return images
    array = torch.empty(len(files), images.channels, *images.size, dtype=torch.uint8)
    for part in torch.arange(len(files)).split(256):
        array[part] = images[part]
        works()
    return ArrayImages(array)


def _shape(file: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) and whether it is grey, from the file's header."""
    try:
        with Image.open(file) as image:
            return (image.height, image.width), image.mode in ("L", "1") or image.mode.startswith("I;16")
    except Exception as error:  # as in decode
        raise_passing(file, error)
        raise UserError(f"image {file} cannot be read ({type(error).__name__}: {error}): replace it or take it out of "
                        "the data") from None
