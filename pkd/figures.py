"""What was measured of a recipe's parts, in the user's cache: a JSON file each, named by the hash of what decides it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pkd.data import DataSet
from pkd.ds_config import load_ds_config
from pkd.errors import PassingError, UserError
from pkd.files import read_json, write_json
from pkd.hardware import cpu_model
from pkd.images import ArrayImages
from pkd.objective import asked
from pkd.pyramid import Pyramid, Teacher
from pkd.recipe import Recipe, part
from pkd.recipe_file import digest
from pkd.schedule import SAMPLES_PER_RANK
from pkd.timings import Timings


@dataclass(frozen=True)
class Keys:
    """What each measured part of a recipe depends on. Its values are JSON data; digest() of one names its figures."""

    recipe: Recipe
    pyramid: Pyramid
    data: DataSet
    where: dict  # of surroundings()
    world: int
    online: bool  # whether teachers are asked

    def forward(self, teacher: Teacher) -> dict:
        """Seconds of a forward of one block."""
        return {"part": "forward", "model": self._model(teacher.model), "classes": len(teacher.classes),
                "forward": self.recipe.teachers.forward, "channels_last": self.recipe.teachers.forward_channels_last,
                "rows": self.recipe.answer_rows, **self._common()}

    def train(self) -> dict:
        """Seconds of a students' step of each of two micro batches, the standard deviation of the larger one's as a share
        of it, seconds of a step's routes, and each student's part of the work, of 1 in all.
        """
        students = [{**part(s, free=False), "model": self._model(s.model)} for s in self.recipe.students]
        return {"part": "train", "students": students, "classes": len(self.pyramid.classes), "rows": self.rows(),
                "batch": self.recipe.distill.batch, "objective": part(self.recipe.objective, free=False),
                "teachers": [len(teacher.classes) for teacher in self.pyramid.teachers],
                "deepspeed": load_ds_config(self.recipe.deepspeed.students), "channels_last": self.recipe.channels_last,
                "sync_batch_norm": self.recipe.distill.sync_batch_norm,
                "compile": self.recipe.distill.compile, **self._common()}

    def sync(self) -> dict:
        """Seconds of a students' step of the smaller micro batch: of each measuring rank alone, and with gradients
        all-reduced.
        """
        return {**self.train(), "part": "sync", "ranks": self.where["ranks"]}

    def view(self) -> dict:
        """Seconds to read, decode and augment one image."""
        return {"part": "view", "data": self.data.fingerprint, "memory": isinstance(self.data.images, ArrayImages),
                "views": part(self.recipe.views, free=False), **self._common()}

    def links(self) -> dict:
        """Seconds of an all-reduce of a small and of a large message over all ranks, and bytes of the large one."""
        return {"part": "links", "world": self.world, **self.where}

    def rows(self) -> list[int]:
        """Two sizes of micro batch, between which those that could be needed lie, as far as that is not too much work."""
        most = self.recipe.distill.batch // self.recipe.placement.accumulation
        halvings = (self.world - 1).bit_length()  # so that what was timed serves as many other worlds as possible
        few = min(most // 2, max(SAMPLES_PER_RANK, most >> halvings))
        return [few, min(most, 4 * few)]

    def all(self) -> list[dict]:
        """Without repetition, in an order that all ranks share."""
        names = asked(self.recipe.objective.kind, self.pyramid) if self.online else []
        keys = [self.view(), self.links(), *(self.forward(self.pyramid.teachers[index]) for index in names), self.train()]
        if self.where["ranks"] > 1 and self.where["devices"] == ["cpu"]:  # NCCL wants a GPU for each rank
            keys.append(self.sync())
        return list({digest(key): key for key in keys}.values())

    def timings(self, figures: dict[str, list[float]], otherwise: Timings) -> Timings:
        """The measured seconds; `otherwise` stands in for what was not measured, which their source then names."""
        blocks, sync, jitter, parts = dict(otherwise.blocks), None, 0.0, otherwise.parts
        view, links = otherwise.view, otherwise.links
        for teacher in self.pyramid.teachers:
            name = digest(self.forward(teacher))
            blocks[teacher.name] = figures[name][0] if name in figures else blocks[teacher.name]
        if digest(self.train()) in figures:
            few, many, jitter, routes, *parts = figures[digest(self.train())]
            rows = self.rows()
            row = max(0.0, (many - few) / (rows[1] - rows[0]))
            micro = max(0.0, few - row * rows[0])
            if digest(self.sync()) in figures:
                alone, together = figures[digest(self.sync())]
                sync = self.where["ranks"], max(0.0, together - alone)
        else:
            micro, row, routes = otherwise.micro, otherwise.row, otherwise.step
        if digest(self.view()) in figures:
            view = figures[digest(self.view())][0]
        if digest(self.links()) in figures:
            small, large, size = figures[digest(self.links())]
            rate = 2 * (self.world - 1) / self.world * size / max(large - small, 1e-9)
            hops = 2 * max(1, (self.world - 1).bit_length())
            links = replace(links, bandwidth=rate, latency=small / hops)
        lacking = dict.fromkeys(key["part"] for key in self.all() if digest(key) not in figures)
        source = "measured" + f", but for {' and '.join(lacking)}" * bool(lacking)
        return Timings(blocks, micro, row, tuple(parts), view, routes, links, sync, jitter, source)

    def _model(self, model) -> dict:
        return {**part(model, free=False), "weights": None}

    def _common(self) -> dict:
        return {"channels": self.data.channels, "size": list(self.data.size), "threads": self.recipe.threads,
                "torch": torch.__version__, "figures": 2,  # the second form that these figures have
                **{key: value for key, value in self.where.items() if key != "ranks"}}  # other nodes slow nobody down


def surroundings(devices: list[str], busy: int, ranks: int) -> dict:
    """What all figures depend on. busy: ranks of a node that measure at the same time; ranks: of all nodes together."""
    return {"devices": devices, "cpu": cpu_model(), "busy": busy, "ranks": ranks}


def cached(keys: list[dict]) -> dict[str, list[float]]:
    """The figures that are there, by digest of their keys."""
    found = {}
    for key in keys:
        name = digest(key)
        try:
            found[name] = read_json(_folder() / f"{name}.json")["seconds"]
        except (UserError, PassingError, KeyError):  # not there, or damaged: it is measured again
            continue
    return found


def keep(keys: list[dict], figures: dict[str, list[float]]) -> None:
    """Write those of `keys` down. Raises UserError where the cache cannot be written."""
    for key in keys:
        write_json(_folder() / f"{digest(key)}.json", {"key": key, "seconds": figures[digest(key)]})


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkd" / "calibration"
