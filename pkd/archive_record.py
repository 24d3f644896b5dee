"""What an archive of soft targets was made of, and whether it is what a distillation asks for.

`soft-targets/archive.json` carries the hashes of teachers, data and views, and each shard's sha256. What is stale, damaged
or missing is refused, or with `soft_targets: auto` passed over with a sentence; it is never read.
"""

import json
from pathlib import Path

import torch

from pkd.archive_layout import Layout
from pkd.errors import UserError
from pkd.files import read_json, sha256
from pkd.hardware import cpu_model, hardware
from pkd.job import Job
from pkd.objective import Constants
from pkd.placement import possible_groups
from pkd.recipe import part
from pkd.recipe_file import difference
from pkd.run_folder import RunFolder
from pkd.teacher import images_last
from pkd.views import Views

FOLDER, RECORD = "soft-targets", "archive.json"
EXAMPLES = 8  # samples whose views are compared, of each view
ONLINE = "or set soft_targets=online"


def folders(run: RunFolder) -> list[Path]:
    """Where a run looks for an archive: in its own folder, then in the one that its teachers come from."""
    return list(dict.fromkeys([run.path / FOLDER, run.teachers.parent / FOLDER]))


def made_of(job: Job, teachers: dict[str, str], constants: Constants) -> dict:
    """All that decides the soft targets. teachers: sha256 of each asked one's weights, from the top down."""
    recipe = job.recipe
    key = {"teachers": teachers, "data": job.data.fingerprint, "views": part(recipe.views, free=False),
           "seed": recipe.seed, "routes": "own" if constants.own else "all", "forward": recipe.teachers.forward,
           "archive": part(recipe.archive, free=False)}
    if recipe.archive.top_k:
        key["temperature"] = 1.0 if constants.kind == "composed" else constants.temperature
    return json.loads(json.dumps(key))


def kernels(job: Job) -> str:
    """What decides the last bits of this rank's answers."""
    recipe, device = job.recipe, hardware(job.world.device).device
    device = f"cpu ({cpu_model()})" if device == "cpu" else device
    last = images_last(recipe.teachers.forward_channels_last, job.world.device)
    return (f"{device}, torch {torch.__version__}, {recipe.threads} thread(s), blocks of {recipe.answer_rows} rows"
            + ", channels last" * last)


def pixels(job: Job, views: Views, count: int) -> list[int]:
    """Checksums of some samples in each of `count` views: other versions of torchvision or Pillow may draw others."""
    out = []
    for view in range(count):
        out.append(views.checksum(job.data.splits["train"][:EXAMPLES], view))
        job.beat("comparing views")
    return out


def fitting(job: Job, key: dict, layout: Layout, views: Views) -> tuple[int, dict]:
    """The index among folders() of the archive that fits, and its record; for one rank. Raises UserError."""
    places = folders(job.run)
    index = next((i for i, place in enumerate(places) if (place / RECORD).exists()), None)
    if index is None:
        raise UserError(f"an archive of soft targets was asked for, but {' and '.join(map(str, places))} hold(s) none: run "
                        f"pkd archive first, {ONLINE}")
    folder, record = places[index], read_json(places[index] / RECORD)
    old = record.get("made_of", {})
    again = f"run pkd archive (again), {ONLINE}"
    for name, now in key["teachers"].items():
        then = old.get("teachers", {}).get(name, "no such teacher")
        if then != now:
            raise UserError(f"the archive in {folder} was made by another teacher {name} (sha256 {then[:12]} there, "
                            f"{now[:12]} now): {again}")
    if old != key:
        raise UserError(f"the archive in {folder} is of other soft targets: {difference(key, old)}; {again}")
    if not record.get("complete"):
        raise UserError(f"the archive in {folder} is not finished: {again}")
    if record["views"] < layout.views or record["samples_per_shard"] != layout.per_shard:
        raise UserError(f"the archive in {folder} holds {record['views']} view(s) of a sample in shards of "
                        f"{record['samples_per_shard']}, but {layout.views} in shards of {layout.per_shard} are needed: "
                        f"{again}")
    if record["pixels"][:layout.views] != pixels(job, views, layout.views):
        raise UserError(f"the archive in {folder} was made of other pixels than this machine's views of the same samples: "
                        f"use the same versions of torchvision and Pillow, or {again}")
    return index, record


def open_archive(job: Job, key: dict, layout: Layout, views: Views) -> Path | None:
    """The folder of the archive to read, None to ask the teachers online; asked of all ranks, which read all shards
    together once to check them. Raises UserError where the recipe insists on an archive and there is none that fits.
    """
    recipe, world = job.recipe, job.world

    def decide():
        try:
            if layout.views == 0:
                raise UserError("views are drawn anew in every epoch, so there is nothing to archive: set views.finite to a "
                                f"number of views, leave the augmentation out, {ONLINE}")
            index, record = fitting(job, key, layout, views)
            possible_groups(recipe, world.size)  # every rank trains
            made = set(record.get("made_on", [])) - {kernels(job)}
            return {"index": index, "shards": record["shards"], "other": sorted(made)}
        except UserError as error:
            if recipe.soft_targets == "archive":
                raise
            return {"why": str(error)}
    found = world.first("archive", decide)
    if "index" in found:
        folder = folders(job.run)[found["index"]]
        damaged = world.gather("archive checked", _damage(job, folder, layout, found["shards"]))

        def judge():
            worst = next((one for one in damaged if one), None)
            if worst and recipe.soft_targets == "archive":
                raise UserError(worst)
            return worst
        found["why"] = world.first("archive whole", judge)
    if found["why"]:
        job.console.say(f"soft_targets is auto, and teachers are asked online: {found['why']}")
        return None
    job.console.say(f"soft targets are read from {folder}: {layout.views} view(s) of {len(layout.order)} samples")
    if found["other"]:
        job.console.say(f"they were made on {', '.join(found['other'])}: not bit-identical to teachers asked here")
    return folder


def _damage(job: Job, folder: Path, layout: Layout, hashes: dict[str, str]) -> str | None:
    """The first damage in this rank's share of the shards, as a sentence."""
    for index in range(job.world.rank, layout.files, job.world.size):
        job.beat("checking the archive")
        name = layout.file(index)[0]
        found = sha256(folder / name) if (folder / name).is_file() else None
        if found is None or found != hashes.get(name):
            what = "is missing" if found is None else "does not have the sha256 that was written"
            return (f"shard {name} of the archive in {folder} {what}: run pkd archive again, which fills what is not whole, "
                    f"{ONLINE}")
    return None
