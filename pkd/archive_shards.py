"""The files of an archive: each a matrix for each teacher, and a label that says what it holds and of what it was made."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pkd.archive_layout import Layout
from pkd.errors import PassingError, UserError
from pkd.files import sha256
from pkd.tensor_file import read_tensors, write_tensors


class Shards:
    """made_of: hash of all that decides the soft targets."""

    def __init__(self, folder: Path, layout: Layout, made_of: str):
        self.folder, self.layout, self.made_of = folder, layout, made_of

    def write(self, index: int, tensors: dict[str, torch.Tensor]) -> str:
        """Write the index-th file; its sha256."""
        path = self.folder / self.layout.file(index)[0]
        write_tensors(path, tensors, self._label(index, tensors))
        return sha256(path)

    def whole(self, index: int) -> str | None:
        """sha256 of the index-th file if it is there, undamaged and of these very soft targets."""
        name, _, shard = self.layout.file(index)
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            tensors = read_tensors(path)
            with safe_open(path, framework="pt") as file:
                found = file.metadata()
        except (UserError, PassingError, OSError, SafetensorError):
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        same = shapes == self.layout.shapes(shard) and found == self._label(index, tensors)
        return sha256(path) if same else None

    def prepare(self) -> int:
        """Make the folder, clear away what killed jobs left half written; bytes of the shards that are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.partial"):
            left.unlink()
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _label(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        _, view, shard = self.layout.file(index)
        return {"made_of": self.made_of, "view": str(view), "shard": str(shard), "sha256": content(tensors)}


def content(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 (hex) of tensors, their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()
