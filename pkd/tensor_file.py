"""Tensors on disk as safetensors: whole or absent, and never unpickled."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pkd.errors import UserError
from pkd.files import raise_passing, write_bytes


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of tensors on any device."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is needed, but it is not there") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise_passing(path, error)
        raise UserError(f"{path} is damaged and cannot be read as safetensors ({error}): delete it or restore "
                        "it") from None
