"""How a teacher's soft targets are rounded and stored: fp16, int8, the largest logits only.

Whatever the recipe's `archive` section asks for decides the result, so teachers that answer online round in the same way:
decode(encode(rows)). Always on the CPU, where an archive is read, so that both have the same bits.
"""

import math

import torch

from pkd.objective import Constants
from pkd.pyramid import Pyramid
from pkd.recipe import Archive

LOWEST = 4  # bytes of a row's minimum and scale: a row of no more logits is not made smaller by int8


class RowFormat:
    """The rows of one teacher.

    plain: fp16 [n, width], as on the wire. Else uint8 [n, columns], a row's bytes being: its kept logits (fp16, or one
    byte each and then their minimum and scale in fp16); where some are left out, the kept ones' columns and the one
    logit that stands for each of the others. That one keeps their share of the probability at `temperature`.
    """

    def __init__(self, width: int, wish: Archive, temperature: float):
        self.width, self.temperature = width, temperature
        self.sparse = wish.top_k is not None and wish.top_k < width - 1
        self.kept = wish.top_k if self.sparse else width
        self.int8 = wish.dtype == "int8" and self.kept > LOWEST
        self.plain = not self.sparse and not self.int8
        self.index = torch.int16 if width <= 2**15 else torch.int32
        self.value_bytes = self.kept + LOWEST if self.int8 else 2 * self.kept
        self.row_bytes = self.value_bytes + (self.kept * self.index.itemsize + 2 if self.sparse else 0)
        self.columns = width if self.plain else self.row_bytes
        self.dtype = torch.float16 if self.plain else torch.uint8

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, columns] of centred fp16 rows [n, width]; both on the CPU."""
        if self.plain:
            return rows
        values, parts = rows, []
        if self.sparse:
            # In float64, whose last bits are lost in fp16: they may depend on how many rows there are.
            ordered, column = torch.sort(rows.double(), dim=1, descending=True, stable=True)
            values = ordered[:, :self.kept].half()
            left = torch.logsumexp(ordered[:, self.kept:] / self.temperature, 1) - math.log(self.width - self.kept)
            parts = [column[:, :self.kept].to(self.index), (self.temperature * left).half()[:, None]]
        if self.int8:
            low, high = values.float().aminmax(dim=1, keepdim=True)
            scale = ((high - low) / 255).half()
            codes = ((values.float() - low) / scale.float().clamp(min=1e-9)).round().clamp(0, 255).to(torch.uint8)
            parts = [codes, low.half(), scale, *parts]
        else:
            parts = [values, *parts]
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """fp16 rows [n, width] of stored ones."""
        if self.plain:
            return stored
        if self.int8:
            codes = stored[:, :self.kept].float()
            low, scale = _seen_as(torch.float16, stored[:, self.kept:self.value_bytes]).float().split(1, 1)
            values = codes * scale
            values = (values + low).half()
        else:
            values = _seen_as(torch.float16, stored[:, :self.value_bytes])
        if not self.sparse:
            return values
        column = _seen_as(self.index, stored[:, self.value_bytes:-2]).long()
        rows = _seen_as(torch.float16, stored[:, -2:]).repeat(1, self.width)
        return rows.scatter_(1, column, values)


def _seen_as(dtype: torch.dtype, stored: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers, from a copy: a slice of rows need not lie where numbers may."""
    return torch.empty(stored.shape, dtype=torch.uint8).copy_(stored).view(dtype)


def row_formats(wish: Archive, pyramid: Pyramid, asked: list[int], constants: Constants) -> dict[int, RowFormat]:
    """Of each asked teacher, by its index. The chain rule of the composed objective takes rows as they are, at 1."""
    temperature = 1.0 if constants.kind == "composed" else constants.temperature
    return {index: RowFormat(len(pyramid.teachers[index].classes), wish, temperature) for index in asked}
