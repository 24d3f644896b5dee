"""Weights on disk as safetensors, in one file or in several with an index, the usual layout of large networks.

They are read by name, a tensor at a time, so that who needs a part never holds the whole. Nothing is unpickled.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pkd.errors import UserError
from pkd.files import raise_passing, read_json, sha256, write_json
from pkd.tensor_file import write_tensors

ONE, INDEX = ".safetensors", ".safetensors.index.json"
FILE_BYTES = 2**30  # what is larger goes into several files: serialising a file takes its size in memory once more


def is_weights_file(name: str) -> bool:
    return name.endswith((ONE, INDEX))


def weights_of(stem: Path) -> Path:
    """<stem>.safetensors.index.json if there is one, else <stem>.safetensors, which need not exist."""
    index = stem.with_name(stem.name + INDEX)
    return index if index.exists() else stem.with_name(stem.name + ONE)


def described_by(path: Path) -> list[Path]:
    """Where the description of a file of weights lies that pkd wrote or exported."""
    stem = path.name.removesuffix(INDEX).removesuffix(ONE)
    return [path.with_name(f"{stem}.json")] + [path.with_name("config.json")] * (stem == "model")


class Weights:
    """The tensors of `path`, a .safetensors file or a .safetensors.index.json beside its files.

    Raises UserError, here and on reading, where something is missing or damaged, or where an index leaves its folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, safe_open] = {}
        if path.name.endswith(INDEX):
            self._where = _weight_map(path)
        else:
            self._where = dict.fromkeys(self._reader(path.name).keys(), path.name)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    @property
    def files(self) -> list[Path]:
        """Those that hold tensors."""
        return [self.path.with_name(name) for name in dict.fromkeys(self._where.values())]

    def shape(self, name: str) -> list[int]:
        return self._from(name, lambda reader: reader.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, with storage of its own."""
        return self._from(name, lambda reader: reader.get_tensor(name).clone())

    def all(self) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in self._where}

    def sha256(self) -> str:
        """Of the one file; of several the hash of their names and hashes, so that none can be exchanged."""
        try:
            if not self.path.name.endswith(INDEX):
                return sha256(self.path)
            lines = [f"{file.name} {sha256(file)}\n" for file in sorted([self.path, *self.files])]
        except OSError as error:
            raise_passing(self.path, error)
            raise UserError(f"the weights of {self.path} cannot be read ({error}): restore them") from None
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _reader(self, file: str):
        if file not in self._open:
            path = self.path.with_name(file)
            try:
                self._open[file] = safe_open(path, "pt")
            except FileNotFoundError:
                raise UserError(f"{path} is needed, but it is not there") from None
            except (OSError, SafetensorError, ValueError) as error:
                raise_passing(path, error)
                raise _damaged(path, error) from None
        return self._open[file]

    def _from(self, name: str, get):
        file = self._where[name]
        try:
            return get(self._reader(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise_passing(self.path.with_name(file), error)
            raise _damaged(self.path.with_name(file), error) from None


def write_weights(stem: Path, tensors: dict[str, torch.Tensor], most: int = FILE_BYTES) -> Path:
    """Write <stem>.safetensors, or where that would be larger than `most` bytes, several files and an index, last of all.

    Returns what weights_of will give. What the other layout left behind is removed.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    one, index = stem.with_name(stem.name + ONE), stem.with_name(stem.name + INDEX)
    if len(parts) == 1:
        write_tensors(one, tensors, {"format": "pt"})
        index.unlink(missing_ok=True)
        return one
    where = {}
    for number, names in enumerate(parts, 1):
        file = f"{stem.name}-{number:05d}-of-{len(parts):05d}{ONE}"
        write_tensors(stem.with_name(file), {name: tensors[name] for name in names}, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    write_json(index, {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where})
    one.unlink(missing_ok=True)
    return index


def _weight_map(path: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path} is no index of safetensors files: it needs a weight_map of tensors' names to files")
    for file in where.values():
        if not file.endswith(ONE) or Path(file).name != file:
            raise UserError(f"{path} names {file[:100]!r}, which is no .safetensors file of its own folder: restore it")
    return where


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged and cannot be read as safetensors ({error}): delete it or restore it")
