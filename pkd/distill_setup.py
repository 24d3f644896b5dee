"""Everything that both loops of a distillation share, made in the same order on every rank."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pkd import checkpoint
from pkd.archive_layout import Layout
from pkd.archive_reader import ArchiveReader
from pkd.archive_record import made_of, open_archive
from pkd.ballot import STUDENTS, Ballot
from pkd.calibration import calibrated
from pkd.devices import device_like
from pkd.ds_config import check_device, load_ds_config, precision, stage
from pkd.errors import UserError
from pkd.exchange import Exchange
from pkd.files import read_json, read_lines, write_json
from pkd.hardware import known_ranks, nodes
from pkd.job import Job
from pkd.joined import Joined
from pkd.models import Network
from pkd.network_file import fresh, open_teacher, read_teacher, teacher_hash
from pkd.objective import asked, constants
from pkd.placement import Placement, Source, chooses, describe, group_options, place, without_teachers
from pkd.pyramid import Teacher
from pkd.recipe_file import digest, identity
from pkd.row_format import row_formats
from pkd.schedule import Router, Schedule, student_parts
from pkd.sharded import ShardedNetwork
from pkd.student_groups import Grouping
from pkd.targets import Unpacker
from pkd.teacher import TeacherHost, as_it_answers, images_last
from pkd.timings import estimated, workload
from pkd.tracker import Tracker, check_tracker
from pkd.views import Views
from pkd.wire import choose

EXAMPLES = 8  # samples whose views the ranks compare


class Setup:
    """steps: the limit of --steps, or None."""

    def __init__(self, job: Job, steps: int | None):
        self.job, self.data, self.limit = job, job.data, steps
        recipe, world = job.recipe, job.world
        self.identity = digest(identity(recipe))
        self.ds_config = load_ds_config(recipe.deepspeed.students)
        self.labels = self.data.labels
        self.views = Views(self.data, recipe.views, recipe.seed)
        self.schedule = Schedule(self.data.students_see.numpy(), recipe.distill.batch, recipe.seed)
        if self.schedule.steps_per_epoch == 0:
            raise UserError(f"distill.batch is {recipe.distill.batch}, but there are only {len(self.schedule.samples)} "
                            "training images: lower it")
        self.epochs = recipe.distill.epochs if steps is None else self._epochs_of(steps)
        self.tracker = self._tracker()
        self.constants = constants(recipe, job.pyramid.levels)
        self.asked = asked(recipe.objective.kind, job.pyramid)
        self.formats = row_formats(recipe.archive, job.pyramid, self.asked, self.constants)
        self.teacher_hashes = self._check_teachers()
        self.archive, self.soft_targets = self._open_archive()
        self.ballot = Ballot(world.bridge("ballot", list(range(world.size))), recipe.window, recipe.ballot_every)
        if chooses(recipe, world.size):  # any rank may become a student's, and times students first
            check_device(recipe.deepspeed.students, world.device.type)
        self.placement = self._place()
        self.role = self.placement.role(world.rank)
        if self.role == "student":
            check_device(recipe.deepspeed.students, world.device.type)
        job.watchdog.role = self.role
        self.sends_views = recipe.teacher_views == "sent" and not self.archive and bool(self.asked)
        self.unpacker = Unpacker(job.pyramid, self.asked, recipe.distill.batch if self.constants.per_batch else None)
        self._join_island()
        self.exchange = self._reader() if self.archive else self._exchange()
        job.beat("placed")

    def _tracker(self) -> Tracker | None:
        """On rank 0, where the recipe asks for one. If it cannot be started, all ranks learn so."""
        recipe, started = self.job.recipe, []

        def start():
            check_tracker(recipe.tracker)
            if recipe.tracker:
                started.append(Tracker(recipe.tracker, self.job.run.path, recipe))
        self.job.world.first("tracker", start)
        return started[0] if started else None

    def resume_point(self) -> dict:
        """Where to start: {"checkpoint": path or None, "epoch", "step"}; decided by rank 0."""
        def decide():
            path, remarks = checkpoint.newest(self.job.run.checkpoints)
            for remark in remarks:
                self.job.console.say(remark)
            if path is None:
                return {"checkpoint": None, "epoch": 0, "step": 0}
            progress = read_json(path / "state.json")["progress"]
            for key, what, mine in (("teachers", "teachers than there are", self.teacher_hashes),
                                    ("fingerprint", "data than there are", self.data.fingerprint),
                                    ("identity", "settings than the recipe has", self.identity)):
                if progress.get(key, mine) != mine:
                    raise UserError(f"checkpoint {path} was made with other {what} now: restore them, or give another "
                                    "folder with --run-folder")
            self.job.console.say(f"resuming from {path} (epoch {progress['epoch']}, step {progress['step']})")
            return {"checkpoint": str(path), "epoch": progress["epoch"], "step": progress["step"]}
        return self.job.world.first("resume", decide)

    def student_networks(self) -> dict[str, Network]:
        """Those that this rank trains."""
        recipe = self.job.recipe
        return {s.name: fresh(s.model, len(self.data.classes), self.data, recipe.seed, f"student {s.name}")
                for s in (recipe.students[index] for index in self.joined.own)}

    def last_step(self, epoch: int) -> int:
        """Steps of an epoch: all of them, or what --steps leaves."""
        whole = self.schedule.steps_per_epoch
        return whole if self.limit is None else max(0, min(whole, self.limit - epoch * whole))

    def cut_short(self, epoch: int) -> bool:
        return self.last_step(epoch) < self.schedule.steps_per_epoch

    def counted(self, ids: np.ndarray) -> int:
        """Samples of a step that its loss is a mean over: all, or where nothing is said of those without a label the others.
        """
        if self.asked:
            return self.schedule.batch
        return max(1, int((self.labels[ids] < len(self.data.classes)).sum()))

    def compare_views(self, epoch: int) -> None:
        """Refuse to train where ranks see different pixels for the same samples."""
        if not self.job.recipe.compare_views:
            return
        examples = torch.from_numpy(self.schedule.order(epoch)[:EXAMPLES].copy())
        unseen = self.sends_views and self.role == "teacher"  # it sees what the student ranks send
        mine = [float("-inf")] * 2
        if not unseen:
            mine[0] = self.views.checksum(examples, epoch)
            mine[1] = -mine[0]
        self.job.beat(f"epoch {epoch}: comparing views", 0, "the ballot of all ranks")
        largest, smallest = self.ballot.maximum(mine)
        if largest != -smallest:
            raise UserError(f"ranks see different views of the same {EXAMPLES} samples in epoch {epoch} (checksums from "
                            f"{int(-smallest):08x} to {int(largest):08x}): give every node the same data and the same "
                            "versions of torchvision and Pillow")

    def refuse_broken(self, epoch: int, voted: tuple[int, int] | None, late: float) -> None:
        """End the run, on every rank alike, if a student's loss was not finite; the earliest one is named."""
        found = [voted] if voted else []
        if late != float("inf"):
            found.append(divmod(int(late), STUDENTS))
        if found:
            step, student = min(found)
            step += epoch * self.schedule.steps_per_epoch
            students = self.job.recipe.students
            whose = f"the loss of student {students[student].name}" if student < len(students) else "a student's gradient"
            raise UserError(f"{whose} was not finite at step {step}, so all ranks stopped: lower its "
                            "lr, or set warmup_steps or clip, and start in another --run-folder")

    def _epochs_of(self, steps: int) -> int:
        return min(self.job.recipe.distill.epochs, -(-steps // self.schedule.steps_per_epoch))

    def _place(self) -> Placement:
        job, recipe, world, path = self.job, self.job.recipe, self.job.world, self.job.run.path / "placement.json"

        def wish():
            return digest([recipe.placement.model_dump(mode="json"), recipe.distill.batch, recipe.answer_rows,
                           recipe.together, recipe.teacher_views, nodes(job.hardware),
                           [rank.device for rank in job.hardware], world.devices, self.archive is not None,
                           stage(self.ds_config), precision(self.ds_config), recipe.data.cache_gib])  # what needs room

        def before():
            tree = read_json(path) if path.exists() else {}
            known = tree.get("placement", {})
            fits = tree.get("wish") == wish() and known.get("world") == world.size and "dealt" in known
            return tree["placement"] if fits else None
        found = world.first("placement before", before)
        if found is None:
            measured, online = None, bool(self.asked) and self.archive is None
            decides = chooses(recipe, world.size) if online else len(group_options(without_teachers(recipe), world.size)) > 1
            if world.size > 1 and (online or decides):
                measured = calibrated(job, self.schedule, self.views, self.ballot, online, decides)

            def decide():
                device = device_like(job.hardware[0].device)
                timings = estimated(recipe, job.pyramid, self.data, device)
                timings = measured(timings) if measured else timings
                work = workload(recipe, job.pyramid, self.data, timings, device)
                work = replace(work, teachers={}) if self.archive else work
                wanted = without_teachers(recipe) if self.archive else recipe
                known = known_ranks(job.hardware, recipe.threads, recipe.placement.memory_gib)
                placement = place(wanted, world.size, work, known).to_json()
                write_json(path, {"wish": wish(), "placement": placement, "since_epoch": len(read_lines(job.run.metrics))})
                return placement
            found = world.first("placement", decide)
        placement = Placement.from_json(found)
        job.console.say(describe(placement, [student.name for student in recipe.students]))
        return placement

    def _check_teachers(self) -> dict[str, str]:
        """sha256 of every asked teacher's weights, checked by rank 0 before anything is trained."""
        teachers = [self.job.pyramid.teachers[index] for index in self.asked]

        def decide():
            return {t.name: teacher_hash(*self._asked_for(t)) for t in teachers}  # no network is made: it may not fit
        return self.job.world.first("teachers", decide)

    def _asked_for(self, teacher) -> tuple:
        return self.job.run.teachers, self.job.recipe, teacher, self.data, self.limit is None

    def _join_island(self) -> None:
        """Each group of students is one, and so are ranks apart that hold teachers together; others need none."""
        world, together = self.job.world, self.placement.shard_group(self.job.world.rank)
        if self.role == "student":
            grouping = Grouping(self.placement.dealt, self.placement.student_ranks)
            self.joined = Joined(world, grouping)
            world.join_island(f"students {self.joined.group}", grouping.island(self.joined.group))
        elif together:
            world.join_island(f"teachers on {together.where}", list(together.group))

    def _open_archive(self) -> tuple[Path | None, dict]:
        """The archive to read, if any, and where soft targets come from, for students.json."""
        recipe, job = self.job.recipe, self.job
        if recipe.soft_targets == "online" or not self.asked:
            return None, {"from": "teachers"}
        views = min(recipe.views.different or 0, recipe.distill.epochs)
        self.layout = Layout(job.pyramid, self.schedule.samples, self.labels.numpy(), self.formats, self.constants.own,
                             views)
        key = made_of(job, self.teacher_hashes, self.constants)
        folder = open_archive(job, key, self.layout, self.views)
        if folder is None:
            return None, {"from": "teachers"}
        return folder, {"from": "archive", "folder": str(folder), "made_of": digest(key)}

    def _reader(self) -> ArchiveReader:
        world, recipe = self.job.world, self.job.recipe
        mine = student_parts(recipe.distill.batch, world.size, self.placement.groups)[world.rank]
        router = Router(self.job.pyramid, [self.asked], self.constants.own)
        return ArchiveReader(self.archive, self.layout, self.schedule, router, self.labels.numpy(), mine, recipe.window,
                             world.device.type == "cuda")

    def _exchange(self) -> Exchange:
        names = [teacher.name for teacher in self.job.pyramid.teachers]
        sources = [[names.index(name) for name in source.teachers] for source in self.placement.sources]
        recipe, world = self.job.recipe, self.job.world
        logits = Router(self.job.pyramid, sources, self.constants.own).largest(self.schedule.batch)
        if sources and recipe.answer_rows > recipe.together * self.schedule.batch:
            self.job.console.say(f"answer_rows is {recipe.answer_rows}, but teachers are asked about "
                                 f"{recipe.together * self.schedule.batch} samples at once: the rest of a block is wasted")
        kind, why = choose(recipe.exchange, self.placement, logits)
        if kind == "direct":
            self.job.console.say(why)
        parts = self.placement.student_ranks // self.placement.groups if kind == "direct" else 1
        router = Router(self.job.pyramid, sources, self.constants.own, parts, recipe.answer_rows)
        return Exchange(world, self.placement, self.schedule, router, self.labels.numpy(), recipe.window,
                        self._hosts(sources, names), kind, self.views if self.sends_views else None, recipe.together)

    def _hosts(self, sources: list[list[int]], names: list[str]) -> list[TeacherHost]:
        world, bf16 = self.job.world, self.job.recipe.teachers.forward == "bf16"
        hosts = []
        for index, source in enumerate(self.placement.sources):
            if world.rank in source.ranks:
                networks = {}
                for teacher in sources[index]:
                    self.job.beat("reading teachers")
                    networks[teacher] = self._network(source, self.job.pyramid.teachers[teacher])
                hosts.append(TeacherHost(index, networks, self.views, world.device, bf16, self.formats,
                                         world.rank == source.rank, self.job.watchdog.works, names,
                                         self.job.recipe.answer_rows, self.job.recipe.teachers.forward_channels_last))
        return hosts

    def _network(self, source: Source, teacher: Teacher) -> Network | ShardedNetwork:
        """A teacher of a source that this rank belongs to."""
        if not source.group:
            return read_teacher(*self._asked_for(teacher))[0]
        recipe = self.job.recipe
        network, weights = open_teacher(*self._asked_for(teacher))
        last = images_last(recipe.teachers.forward_channels_last, self.job.world.device)
        # Its weights become views of DeepSpeed's flat buffers, whatever they are laid out as.
        network = as_it_answers(network, recipe.teachers.forward == "bf16", last, whole=False)
        return ShardedNetwork(network, weights, load_ds_config(recipe.deepspeed.shards), self.job.world.device, source.where,
                              self.job.watchdog.waits)
