"""Ask every teacher about every view of the training samples once, and keep the answers: `pkd archive`.

All ranks fill shards, each with all teachers; a ballot for each piece of work lets them stop together. A shard appears
whole, with a hash of its content and of what it was made of; what a killed job has finished is checked and kept.
"""

import shutil

import numpy as np
import torch

from pkd.archive_layout import Layout
from pkd.archive_record import FOLDER, RECORD, fitting, folders, kernels, made_of, pixels
from pkd.archive_shards import Shards
from pkd.ballot import Ballot, Vote
from pkd.cost import network_cost
from pkd.errors import UserError
from pkd.files import read_json, sha256, write_json
from pkd.hardware import memory_per_rank
from pkd.job import Job
from pkd.network_file import read_teacher, teacher_hash
from pkd.objective import Constants, asked, constants
from pkd.rank_map import USABLE
from pkd.recipe_file import digest
from pkd.row_format import row_formats
from pkd.schedule import Router
from pkd.teacher import Question, TeacherHost
from pkd.views import Views


def archive(job: Job) -> str:
    """Fill what is missing; "finished" or "stopped" (by a signal, finished shards being kept). Raises UserError."""
    return Filling(job, *ready(job)).run()


def ready(job: Job) -> tuple[list[int], Constants]:
    """Indices of the asked teachers, and the objective's constants. Raises UserError where nothing can be archived."""
    recipe = job.recipe
    fixed, wanted = constants(recipe, job.pyramid.levels), asked(recipe.objective.kind, job.pyramid)
    if not wanted:
        raise UserError("objective.kind is alone, which asks no teacher, so there are no soft targets to archive: choose "
                        "another objective, or run pkd distill at once")
    if recipe.views.different is None:
        raise UserError("views are drawn anew in every epoch, so no soft target would be read twice: set views.finite to a "
                        "number of views, or leave the augmentation out")
    return wanted, fixed


class Filling:
    """The archive of a run, on one of the ranks that fill it. wanted: indices of the asked teachers."""

    def __init__(self, job: Job, wanted: list[int], fixed: Constants):
        recipe, world = job.recipe, job.world
        self.job, self.wanted, self.folder = job, wanted, job.run.path / FOLDER
        teachers = [job.pyramid.teachers[index] for index in wanted]
        hashes = world.first("teachers", lambda: {t.name: teacher_hash(job.run.teachers, recipe, t, job.data, True)
                                                  for t in teachers})
        self.made_of = made_of(job, hashes, fixed)
        self.labels = job.data.labels.numpy()
        self.layout = Layout(job.pyramid, job.data.students_see.numpy(), self.labels,
                             row_formats(recipe.archive, job.pyramid, wanted, fixed), fixed.own,
                             min(recipe.views.different, recipe.distill.epochs))
        self.shards = Shards(self.folder, self.layout, digest(self.made_of))
        self.views = Views(job.data, recipe.views, recipe.seed)
        self.router = Router(job.pyramid, [wanted], fixed.own)
        self.piece = 4 * recipe.answer_rows  # samples between two ballots
        self.made_on: set[str] = set()  # of rank 0: kernels() of all ranks that filled it
        self.ballot = Ballot(world.bridge("ballot", list(range(world.size))), window=1, every=1)

    def run(self) -> str:
        world, layout = self.job.world, self.layout
        if world.first("archive elsewhere", self._fits_elsewhere):
            return "finished"
        world.first("archive begins", self._prepare)
        self.job.record()
        self._compare_views()
        hashes, missing = self._keep()
        self.made_on |= set(world.gather("kernels", kernels(self.job)) or []) if missing else set()
        if missing:
            world.first("archive goes on", lambda: self._write_record({}))
        written, stopped = self._fill(missing)
        parts = world.gather("shards written", written)
        for part in parts or []:
            hashes.update(part)
        if world.rank == 0 and len(hashes) == layout.files:
            self._write_record(hashes)
            self.job.console.say(f"soft targets are in {self.folder}: {layout.files - len(missing)} shards were there, "
                                 f"{len(missing)} are new")
        return "stopped" if stopped else "finished"

    def _fits_elsewhere(self) -> bool:
        """Whether the folder that the teachers come from has an archive that serves, and this run has none of its own."""
        if (self.folder / RECORD).exists() or len(folders(self.job.run)) == 1:
            return False
        try:
            index, record = fitting(self.job, self.made_of, self.layout, self.views)
        except UserError:
            return False
        folder = folders(self.job.run)[index]
        for name, then in record["shards"].items():
            self.job.beat("checking the archive")
            if not (folder / name).is_file() or sha256(folder / name) != then:
                self.job.console.say(f"the archive in {folder} is damaged ({name}): this run makes one of its own")
                return False
        self.job.console.say(f"the archive in {folder} fits and is used: nothing is left to do")
        return True

    def _prepare(self) -> None:
        """Say how large it will be; take away what is there of other soft targets. Raises UserError."""
        job, layout = self.job, self.layout
        teachers = [job.pyramid.teachers[index] for index in self.wanted]
        weight = 2 if job.recipe.teachers.forward == "bf16" else 4  # bytes
        sizes = [weight * network_cost(t.model, len(t.classes), job.data.channels, job.data.size).parameters
                 for t in teachers]
        need, room = sum(sizes), USABLE * min(memory_per_rank(job.hardware, job.recipe.placement.memory_gib))
        if need > room:
            raise UserError(f"every rank answers for all {len(sizes)} teachers, whose weights need {need / 2**30:.2f} GiB, "
                            f"but a rank has {room / 2**30:.2f}: start fewer ranks a node, take larger devices, or distill "
                            "online, where a teacher may lie in shards")
        before = read_json(self.folder / RECORD) if (self.folder / RECORD).exists() else None
        wanted = self.made_of, layout.per_shard
        if before is not None and (before.get("made_of"), before.get("samples_per_shard")) != wanted:
            job.console.say(f"the archive in {self.folder} is of other teachers, data, views or sizes of shards, and is "
                            "made anew")
            shutil.rmtree(self.folder)
        if (self.folder / RECORD).exists():
            self.made_on = set(read_json(self.folder / RECORD).get("made_on", []))
        there = self.shards.prepare()
        job.console.say(f"soft targets of {len(sizes)} teacher(s), {layout.views} view(s) of {len(layout.order)} samples: "
                        f"{layout.bytes / 2**30:.3f} GiB in {layout.files} shards, {there / 2**30:.3f} GiB are there")
        need, free = layout.bytes - there, shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(f"the archive needs {need / 2**30:.1f} GiB more in {self.folder}, but {free / 2**30:.1f} GiB "
                            "are free: make room, lower views.finite, set archive.dtype=int8 or archive.top_k, or keep to "
                            "soft_targets=online")

    def _compare_views(self) -> None:
        self.pixels = pixels(self.job, self.views, self.layout.views)
        mine = int(digest(self.pixels)[:12], 16)
        largest, smallest = self.ballot.maximum([mine, -mine])
        if largest != -smallest:
            raise UserError("ranks see different views of the same samples: give every node the same data and the same "
                            "versions of torchvision and Pillow")

    def _keep(self) -> tuple[dict[str, str], list[int]]:
        """sha256 of the shards that are there and whole (on rank 0), and the numbers of all others. Ranks share the work."""
        world, mine = self.job.world, {}
        for index in range(world.rank, self.layout.files, world.size):
            self.job.beat("checking shards")
            mine[index] = self.shards.whole(index)
        parts = world.gather("shards there", list(mine.items()))
        found = dict(pair for part in parts or [] for pair in part)
        missing = world.first("shards to fill", lambda: sorted(index for index, whole in found.items() if whole is None))
        return {self.layout.file(index)[0]: whole for index, whole in found.items() if whole}, missing

    def _fill(self, missing: list[int]) -> tuple[dict[str, str], bool]:
        """Work on the missing shards, piece by piece: sha256 of what this rank wrote, and whether a signal came."""
        job, layout, ballot, world = self.job, self.layout, self.ballot, self.job.world
        written: dict[str, str] = {}
        if not missing:
            return written, False
        host = self.host()
        pieces = -(-layout.per_shard // self.piece)
        last = -(-len(missing) // world.size) * pieces
        parts: dict[int, list[torch.Tensor]] = {}
        ballot.open(0, last)
        for step in range(last):
            job.beat("filling the archive", step, "the ballot of all ranks")
            if not ballot.permit(step):
                break
            ballot.cast(step, Vote(stop=job.stop_wanted()))
            turn, piece = divmod(step, pieces)
            mine = turn * world.size + world.rank
            if mine < len(missing):
                name, view, shard = layout.file(missing[mine])
                if piece == 0:
                    parts = {index: [] for index in self.wanted}
                self._answer(host, view, layout.samples(shard)[piece * self.piece:(piece + 1) * self.piece], parts)
                if piece == pieces - 1:
                    job.run.check_locks()
                    rows = {layout.names[index]: torch.cat(own) for index, own in parts.items()}
                    written[name] = self.shards.write(missing[mine], rows)
            job.steady()
            job.console.progress(f"archive of {len(missing)} shards", step + 1, last)
        return written, ballot.close().stop

    def host(self) -> TeacherHost:
        """All asked teachers, on this rank."""
        job, networks = self.job, {}
        for index in self.wanted:
            networks[index] = read_teacher(job.run.teachers, job.recipe, job.pyramid.teachers[index], job.data, True)[0]
            job.beat("reading teachers")
        host = TeacherHost(0, networks, self.views, job.world.device, job.recipe.teachers.forward == "bf16",
                           works=job.watchdog.works, names=[teacher.name for teacher in job.pyramid.teachers],
                           block=job.recipe.answer_rows, channels_last=job.recipe.teachers.forward_channels_last)
        block = self.views.batch(torch.from_numpy(self.layout.order[:job.recipe.answer_rows].copy()), 0)
        for index in host.networks if job.world.rank == 0 else ():
            here, there = (host.forward(index, block.roll(shift, 0)).roll(-shift, 0) for shift in (0, 1))
            if not torch.equal(here, there):
                job.console.say(f"the logits of teacher {self.layout.names[index]} depend on a sample's place in its block "
                                f"on {job.hardware[0].device}: losses will differ from those online in their last bits")
        return host

    def _answer(self, host: TeacherHost, view: int, ids: np.ndarray, parts: dict[int, list[torch.Tensor]]) -> None:
        """Every teacher's rows for some samples, as they are stored, added to its parts."""
        routes = self.router.routes(self.labels[ids])
        flat = torch.zeros(routes.size, dtype=torch.float16)
        host.answer([Question(routes, ids, flat)], view)
        start = 0
        for index, form in self.layout.formats.items():  # ascending, as the routes are
            rows = flat[start:start + int(routes.count[index]) * form.width].view(-1, form.width)
            parts[index].append(form.encode(rows))
            start += rows.numel()

    def _write_record(self, hashes: dict[str, str]) -> None:
        """The JSON, by rank 0: complete with the hashes of all shards, before that without any."""
        layout = self.layout
        for path in self.folder.glob("*.safetensors"):  # of more views or other shards
            if hashes and path.name not in hashes:
                path.unlink()
        write_json(self.folder / RECORD, {
            "complete": bool(hashes), "made_of": self.made_of, "views": layout.views, "samples": len(layout.order),
            "samples_per_shard": layout.per_shard, "bytes": layout.bytes, "pixels": self.pixels, "files": layout.files,
            "made_on": sorted(self.made_on), "shards": hashes})
