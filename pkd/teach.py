"""Train the pyramid's teachers: the top on many ranks together, each specialist on a rank of its own.

One loop for all of them; a teacher is an ensemble of one under DeepSpeed, resumed like the students.
"""

import shutil
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pkd import checkpoint
from pkd.ballot import Ballot, Vote
from pkd.confusion import group_levels, pyramid_of, waiting_levels
from pkd.cost import network_cost
from pkd.data import DataSet
from pkd.ds_config import load_ds_config
from pkd.engine import Engine
from pkd.errors import UserError, nearest
from pkd.files import read_json, write_json
from pkd.job import Job
from pkd.network_file import derived_seed, fresh, read_teacher, teacher_identity, write_network
from pkd.objective import asked_names
from pkd.pyramid import Pyramid, Teacher, teacher_names
from pkd.rates import Rates
from pkd.schedule import SAMPLES_PER_RANK, Schedule
from pkd.state import WEIGHTS
from pkd.tensor_file import read_tensors
from pkd.transfer import OnItsWay, to_device
from pkd.validate import validate
from pkd.views import Views


def teach(job: Job, limit: int | None) -> str:
    """Train every teacher that the objective asks and that is not there yet, or the one that the job names; "finished" or
    "stopped".
    """
    if job.recipe.teachers_from:
        raise UserError(f"teachers_from is {job.recipe.teachers_from}, whose teachers are used as they are: there is "
                        "nothing to teach here, run pkd distill or leave teachers_from out")
    wanted = [job.teacher] if job.teacher else asked_names(job.recipe.objective.kind, job.recipe.pyramid)
    if not wanted:
        raise UserError(f"objective.kind is {job.recipe.objective.kind}, which asks no teacher: there is nothing to teach, "
                        "run pkd distill, or ask for another objective")
    if job.world.rank == 0 and not waiting_levels(job.recipe):
        write_json(job.run.path / "pyramid.json", job.pyramid.to_json())
    outcome, taught = "finished", set()
    while outcome == "finished":
        teachers = [teacher for teacher in _chosen(job, wanted) if teacher.name not in taught]
        outcome = _teach(job, teachers, limit, f"round {len(taught)}")
        taught.update(teacher.name for teacher in teachers)
        whole = len(job.pyramid.teachers) == len(teacher_names(job.recipe.pyramid))
        done = taught >= set(wanted) and job.teacher != "level0"  # who trains the top by itself groups the others, too
        if outcome == "stopped" or whole or done:
            break
        job.pyramid = _group_the_rest(job)
    return outcome


def _teach(job: Job, teachers: list[Teacher], limit: int | None, name: str) -> str:
    """Train these, as far as they are not there yet; all ranks leave together, with one outcome. limit: steps of each."""
    steps = {}
    for teacher in teachers:
        _samples(job, teacher)  # too few is known before anything is trained
        whole = job.recipe.training(teacher.level).steps
        steps[teacher.name] = min(whole, limit or whole)
    names = job.world.first(f"{name}: to do", lambda: [t.name for t in teachers if _done_steps(job, t) < steps[t.name]])
    job.record()
    outcome = "finished"
    for teacher, ranks in assign([t for t in teachers if t.name in names], _costs(job), job.world.devices,
                                 job.recipe.teachers.batch, named=job.teacher is not None):
        if job.world.rank in ranks and outcome == "finished":
            bridge = job.world.bridge(f"ballot {teacher.name}", ranks)
            job.world.join_island(f"teach {teacher.name}", ranks)
            outcome = Lesson(job, teacher, ranks, bridge, steps[teacher.name]).run()
            job.world.leave_island()
    job.beat("taught", group="the other ranks' teachers")
    return "stopped" if job.world.meet(name, outcome == "stopped", job.stop_wanted) else "finished"


def _group_the_rest(job: Job) -> Pyramid:
    """The whole pyramid, once the top teacher is there to be confused; rank 0 looks, all ranks hear."""
    def beat():
        job.beat("grouping classes by confusion", group=None if job.world.rank == 0 else "rank 0's grouping")

    def decide():
        top = read_teacher(job.run.teachers, job.recipe, job.pyramid.teachers[0], job.data, complete=False)[0]
        group_levels(job.recipe, job.data, job.run.teachers, top, job.world.device, beat)
    beat()
    job.world.first("groups by confusion", decide)
    return pyramid_of(job.recipe, job.data, job.run.teachers)


def assign(teachers: list[Teacher], costs: dict[str, float], devices: list[int], batch: int,
           named: bool = False) -> list[tuple[Teacher, list[int]]]:
    """Who trains where, in the order that every rank goes through: the top (or one that was named) on as many ranks as its
    batch feeds, specialists on one each, longest first onto the rank that is free first. Pure.

    devices: of each rank, numbered; ranks that share one do not train together. How many ranks a teacher gets does not
    depend on which others are left to train: its batch statistics would be others after an interruption.
    """
    world = len(devices)
    free = [0.0] * world
    plan = []
    for teacher in sorted(teachers, key=lambda t: (t.level > 0, -costs[t.name])):
        wide = teacher.level == 0 or named
        count = min(world, max(1, batch // SAMPLES_PER_RANK)) if wide else 1
        first: dict[int, int] = {}  # device -> the rank on it that is free first
        for rank in sorted(range(world), key=lambda rank: (free[rank], rank)):
            first.setdefault(devices[rank], rank)
        ranks = sorted(list(first.values())[:count])
        for rank in ranks:
            free[rank] += costs[teacher.name] / len(ranks)
        plan.append((teacher, ranks))
    return plan


class Lesson:
    """One teacher's training on its island."""

    def __init__(self, job: Job, teacher: Teacher, ranks: list[int], bridge, steps: int):
        self.job, self.teacher, self.ranks, self.steps = job, teacher, ranks, steps
        job.beat(f"building {teacher.name}", 0, f"the island of {teacher.name}")
        job.starting()
        self.settings, self.data, self.device = job.recipe.training(teacher.level), job.data, job.world.device
        self.leader = job.world.rank == ranks[0]
        self.folder = job.run.teachers / f"{teacher.name}.training"
        endless = job.recipe.views.model_copy(update={"finite": None})
        self.views = Views(self.data, endless, derived_seed(job.recipe.seed, "teach", teacher.name) % 2**32)
        self.schedule = Schedule(_samples(job, teacher), self.settings.batch,
                                 derived_seed(job.recipe.seed, "order", teacher.name))
        self.local = torch.full((len(self.data.classes),), -1)
        self.local[list(teacher.classes)] = torch.arange(len(teacher.classes))
        self.rates = Rates([self.settings], self.settings.steps)
        network = fresh(teacher.model, len(teacher.classes), self.data, job.recipe.seed, f"teacher {teacher.name}")
        self.engine = Engine({teacher.name: network}, [self.settings], load_ds_config(job.recipe.deepspeed.teachers),
                             1, self.device, job.recipe.channels_last)
        self.ballot = Ballot(bridge, window=1, every=1)
        self.best: dict = {}
        self.best_weights: dict[str, torch.Tensor] = {}
        self.step, self.saved, self.broken = 0, time.monotonic(), None
        self.unchecked: tuple[int, OnItsWay] | None = None  # whether the last step's loss was finite
        self._restore()

    def run(self) -> str:
        """Stretches of training, each ended by a validation."""
        every = self.settings.evaluate_every
        while self.step < self.steps:
            whole = min(self.settings.steps, (self.step // every + 1) * every)
            stopped = self._stretch(min(self.steps, whole))
            if self.step == whole:  # even if stopped: the next start goes on with the stretch that follows
                self._validate()
            self._save()
            if stopped:
                self.engine.close()
                return "stopped"
        if self.step % every and self.step < self.settings.steps:  # --steps ends within a stretch: this validation is not
            self._validate()  # saved, for a teaching without --steps, which may go on from here, has none at this step
        self._finish()
        self.engine.close()
        return "finished"

    def _stretch(self, last: int) -> bool:
        job, ballot, name = self.job, self.ballot, self.teacher.name
        mine = self.schedule.micro_batches(len(self.ranks), dist.get_rank(), 1)[0]
        ballot.open(self.step, last)
        for step in range(self.step, last):
            job.beat(f"teaching {name}", step, f"the island of {name}")
            if not ballot.permit(step):
                break
            due = self.leader and time.monotonic() - self.saved > 60 * job.recipe.checkpoint_minutes
            ballot.cast(step, Vote(job.stop_wanted(), due, self.broken))
            job.watchdog.works()
            self._train_step(step, mine)
            self.step = step + 1
            if ballot.after(step).save and self.step < last:  # else run() does, after its validation
                self._save()
            job.steady()
            if self.leader:
                job.console.progress(f"teacher {name}", step + 1, self.steps)
        self._notice_broken()
        votes = ballot.close()
        late = -ballot.maximum([-self.broken[0] if self.broken else float("-inf")])[0]
        if votes.broken or late != float("inf"):
            step = min(votes.broken[0], late) if votes.broken else late
            raise UserError(f"the loss of teacher {name} was not finite at step {int(step)}: lower teachers.lr, or set "
                            "teachers.warmup_steps or teachers.clip, and start in another --run-folder")
        return votes.stop

    def _train_step(self, step: int, mine: slice) -> None:
        epoch, within = divmod(step, self.schedule.steps_per_epoch)
        ids = torch.from_numpy(self.schedule.global_batch(epoch, within)[mine])
        images = to_device(self.views.batch(ids, epoch), self.device)
        labels = to_device(self.local[self.data.labels[ids]], self.device)
        self.engine.set_rates(self.rates.at(step))
        torch.manual_seed(derived_seed(self.job.recipe.seed, self.teacher.name, step, dist.get_rank()))
        logits = self.engine.forward(images)[0]
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.settings.label_smoothing)
        loss = loss / self.schedule.batch
        self.job.watchdog.waits(f"the gradients of {self.teacher.name}'s island")
        self.engine.backward(loss)
        self._notice_broken((step, OnItsWay(torch.isfinite(loss))))
        if self.broken is None and self.engine.refused_step:
            self.broken = (step, 0)

    def _notice_broken(self, latest: tuple[int, OnItsWay] | None = None) -> None:
        """Looks at the step before the latest one, which a GPU has finished by now."""
        before, self.unchecked = self.unchecked, latest
        if before and self.broken is None and not bool(before[1].wait()):
            self.broken = (before[0], 0)

    def _validate(self) -> None:
        self.job.beat(f"validating {self.teacher.name}")
        self.engine.refresh_copies()
        network = self.engine.copies[self.teacher.name]
        ids = _of_classes(self.data, "validation", self.teacher)
        scores = validate([network], self.views, ids, self.local[self.data.labels[ids]], self.device,
                          lambda group: self.job.beat(f"validating {self.teacher.name}", group=group))
        self.rates.validated(scores.loss)
        found = {"step": self.step, "accuracy": scores.accuracy[0], "loss": scores.loss[0]}
        if self.leader and not self.job.console.moves and self.step < self.steps:  # the last one is told in the end
            self.job.console.report(f"teacher {self.teacher.name}: step {self.step} of {self.steps}, validation "
                                    f"{100 * found['accuracy']:.1f} %, loss {found['loss']:.4g}")
        if not self.best or (found["accuracy"], -found["loss"]) > (self.best["accuracy"], -self.best["loss"]):
            self.best = found
            self.best_weights = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}

    def _save(self) -> None:
        """Not of weights that are not finite: the ballot is about to stop it all, and the last good checkpoint must stay."""
        finite = all(bool(value.isfinite().all()) for value in self.engine.network_state(0, WEIGHTS).values())
        if self.ballot.maximum([not finite])[0]:  # one rank's device may be at fault, and all of them save or none
            return
        self.job.run.check_locks()
        tensors = {"best": self.best_weights} if self.best else {}
        progress = {"best": self.best, "rates": self.rates.to_json(), "identity": self._identity()}
        checkpoint.save(self.folder, self.step, self.engine, progress, tensors,
                        lambda: self.job.beat(f"saving {self.teacher.name}"))
        self.saved = time.monotonic()

    def _restore(self) -> None:
        def decide():
            path, remarks = checkpoint.newest(self.folder)
            for remark in remarks:
                self.job.console.report(remark)
            found = read_json(path / "state.json")["progress"]["identity"] if path else None
            if path and found != self._identity():
                raise UserError(f"{path} belongs to other data or settings: give another folder with --run-folder, or "
                                f"delete {self.folder}")
            return str(path) if path else None
        path = self.job.world.first(f"resume {self.teacher.name}", decide, by=self.ranks[0])
        if path is None:
            return
        path = self.folder / path.rsplit("/", 1)[-1]
        progress = checkpoint.load(path, self.engine)
        self.step, self.best = int(path.name[5:]), progress["best"]
        self.rates.load_json(progress["rates"])
        if self.best:
            self.best_weights = read_tensors(path / "best.safetensors")
        if self.leader:
            self.job.console.report(f"resuming teacher {self.teacher.name} at step {self.step}")

    def _finish(self) -> None:
        if not self.leader:
            return
        network = self.engine.copies[self.teacher.name]
        network.load_state_dict(self.best_weights)
        names = [self.data.classes[index] for index in self.teacher.classes]
        facts = {"name": self.teacher.name, "level": self.teacher.level, "class_ids": list(self.teacher.classes),
                 "validation": self.best, "steps": self.step, "identity": self._identity()}
        self.job.beat(f"writing {self.teacher.name}")
        write_network(self.job.run.teachers / self.teacher.name, network, self.teacher.model, names, self.data, facts)
        if self.step == self.settings.steps:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.job.console.report(f"teacher {self.teacher.name}: {len(names)} classes, {self.step} steps, validation "
                                f"{100 * self.best['accuracy']:.1f} % (best at step {self.best['step']})")

    def _identity(self) -> str:
        return teacher_identity(self.job.recipe, self.teacher, self.data)


def _chosen(job: Job, wanted: list[str]) -> list[Teacher]:
    """The wanted teachers, as far as their classes are known."""
    every, only = teacher_names(job.recipe.pyramid), job.teacher
    if only is not None and only not in every:
        raise UserError(f"teacher {only} was asked for, but the pyramid has {', '.join(every)}{nearest(only, every)}")
    chosen = [teacher for teacher in job.pyramid.teachers if teacher.name in wanted]
    if not chosen:
        raise UserError(f"teacher {only} gets its classes by the top teacher's confusion, which is not trained yet: run pkd "
                        "teach with --teacher level0 first, or without --teacher")
    return chosen


def _of_classes(data: DataSet, split: str, teacher: Teacher):
    """int64 ids of a split's samples whose label the teacher knows."""
    ids = data.splits[split]
    return ids[torch.isin(data.labels[ids], torch.tensor(teacher.classes))].numpy()


def _samples(job: Job, teacher: Teacher):
    samples = _of_classes(job.data, "train", teacher)
    if len(samples) < job.recipe.teachers.batch:
        raise UserError(f"teacher {teacher.name} has {len(samples)} training images, fewer than teachers.batch "
                        f"{job.recipe.teachers.batch}: lower teachers.batch or give it more classes")
    if len(_of_classes(job.data, "validation", teacher)) == 0:
        raise UserError(f"teacher {teacher.name} has no validation images, by which its best weights are chosen: give the "
                        "validation split some of its classes, or give it more classes")
    return samples


def _done_steps(job: Job, teacher: Teacher) -> int:
    """Steps that a teacher on disk was trained for; 0 if there is none. Raises UserError for one of other settings."""
    path = job.run.teachers / f"{teacher.name}.json"
    if not path.exists():
        return 0
    facts = read_json(path)
    if facts.get("identity") != teacher_identity(job.recipe, teacher, job.data):
        raise UserError(f"teacher {teacher.name} in {job.run.teachers} was trained on other data or by other settings: "
                        "give another folder with --run-folder, or delete that teacher")
    return facts["steps"]


def _costs(job: Job) -> dict[str, float]:
    """Relative training cost; every step is of as many samples."""
    return {t.name: network_cost(t.model, len(t.classes), job.data.channels, job.data.size).flops
            * job.recipe.training(t.level).steps for t in job.pyramid.teachers}
