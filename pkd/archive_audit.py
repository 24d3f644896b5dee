"""`pkd archive --audit N`: rows of an archive, drawn by chance, are asked of the teachers again and compared.

The hashes of an archive say that nobody changed it since it was written; this says that what was written is right.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pkd.archive import Filling, ready
from pkd.archive_layout import Layout
from pkd.archive_record import fitting, folders, kernels
from pkd.errors import LocalError, UserError
from pkd.job import Job
from pkd.row_format import RowFormat
from pkd.schedule import BLOCK

# Logits may differ by so much where kernels need not repeat to the last bit, by the arithmetic of the teachers.
TOLERANCE = {"fp32": 0.02, "bf16": 0.2}


@dataclass(frozen=True)
class Piece:
    """Rows of one teacher and view that are asked together; ids: int64 of at most BLOCK samples."""

    view: int
    teacher: int
    ids: np.ndarray


def audit(job: Job, count: int) -> str:
    """Compare `count` rows or, if there are fewer, all; "finished". Raises UserError where one differs."""
    filling = Filling(job, *ready(job))
    layout, world = filling.layout, job.world
    here = world.gather("kernels", kernels(job))

    def begin():
        index, record = fitting(job, filling.made_of, layout, filling.views)
        # A CPU repeats to the last bit, a GPU need not.
        return {"index": index, "alike": set(here) == set(record.get("made_on", [])) and len(set(here)) == 1 and
                job.hardware[0].device == "cpu", "seed": secrets.randbits(32)}
    found = world.first("audit begins", begin)
    folder = folders(job.run)[found["index"]]
    tolerance = 0.0 if found["alike"] else TOLERANCE[job.recipe.teachers.forward]
    pieces = draw(layout, count, found["seed"])
    host = filling.host()
    rows, worst = 0, {"excess": 0.0, "difference": 0.0, "bad": 0}
    for number, piece in enumerate(pieces[world.rank::world.size]):
        job.beat("auditing the archive", number)
        job.console.progress("audit", number + 1, -(-len(pieces) // world.size))
        name, form = layout.names[piece.teacher], layout.formats[piece.teacher]
        shard, row = layout.locate(piece.teacher, piece.ids)
        stored = torch.cat([_matrix(folder / layout.file(piece.view * layout.shards + int(k))[0], name)
                            [torch.from_numpy(row[shard == k])] for k in np.unique(shard)])
        images = filling.views.batch(torch.from_numpy(piece.ids), piece.view)
        logits = host.forward(piece.teacher, images).cpu()
        excess, difference = compare(form, stored, form.encode(logits), tolerance)
        rows, bad = rows + len(stored), worst["bad"] + int((excess > 0).sum())
        if float(excess.max()) > worst["excess"]:
            at = int(excess.argmax())
            worst = {"excess": float(excess[at]), "where": f"teacher {name}, sample {piece.ids[at]}, "
                     f"{layout.file(piece.view * layout.shards + int(shard[at]))[0]}"}
        worst = {**worst, "bad": bad, "difference": max(worst.get("difference", 0.0), float(difference.max()))}
    parts = world.gather("audit", [rows, worst])

    def judge():
        total, bad = sum(part[0] for part in parts), sum(part[1]["bad"] for part in parts)
        largest = max(part[1]["difference"] for part in parts)
        how = "bit for bit" if found["alike"] else f"within {tolerance}, as kernels here need not repeat to the last bit"
        if bad:
            where = max((part[1] for part in parts), key=lambda one: one["excess"])["where"]
            raise UserError(f"{bad} of {total} soft targets of the archive in {folder}, drawn by chance, are not what the "
                            f"teachers answer {how} (largest difference {largest:.3g}; first look at {where}): delete that "
                            "folder and run pkd archive again, or set soft_targets=online")
        return f"{total} soft targets of {folder}, drawn by chance, were asked again: all equal {how}, largest difference " \
               f"{largest:.3g}"
    job.console.end_progress()
    job.console.say(world.first("audited", judge))
    return "finished"


def draw(layout: Layout, count: int, seed: int) -> list[Piece]:
    """Different (sample, view, teacher) rows of an archive, each as likely as any other, in pieces of a block at most."""
    each = {teacher: int(layout.first[teacher, -1]) for teacher in layout.formats}  # rows in one view
    total = layout.views * sum(each.values())
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False, shuffle=False))
    pieces, start = [], 0
    for teacher, rows in each.items():
        asked = layout.asked(teacher)
        for view in range(layout.views):
            mine = drawn[(drawn >= start) & (drawn < start + rows)] - start
            start += rows
            pieces += [Piece(view, teacher, asked[mine[first:first + BLOCK]]) for first in range(0, len(mine), BLOCK)]
    return pieces


def compare(form: RowFormat, stored: torch.Tensor, found: torch.Tensor,
            tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each row differs more than it may, and by how much it differs; float64 [rows], inf where it is no number.

    Without a tolerance every bit counts. With one, a step of int8 is allowed as well, and of rows that keep the largest
    logits only the values are compared, as two that are nearly equal may change places.
    """
    one, other = (form.decode(rows).double() for rows in (stored, found))
    if form.sparse and tolerance:
        one, other = one.sort(1).values, other.sort(1).values
    difference = (one - other).abs().amax(1).nan_to_num(nan=float("inf"))
    if not tolerance:
        same = (stored.contiguous().view(torch.uint8) == found.contiguous().view(torch.uint8)).all(1)
        return torch.where(same, 0.0, difference.clamp(min=2.0**-24)), difference
    step = (other.amax(1) - other.amin(1)) / 255 if form.int8 else 0.0
    return (difference - tolerance - step).clamp(min=0.0), difference


def _matrix(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LocalError(f"shard {path} cannot be read ({error}): run pkd archive without --audit, which fills what is not "
                         "whole") from None
