"""Distillation: one loop for teacher ranks, one for student ranks; in other placements the student loop does both.

One batch on a student rank: Distillation.train_epoch -> train_step -> Engine.forward -> pyramid_loss -> Engine.backward.
One teacher's logits: TeacherHost.answer, called by Exchange.fill -> Exchange.transfer -> Exchange.take -> Unpacker.unpack ->
pyramid_loss.
"""

import time

import torch
import torch.distributed as dist

from pkd.ballot import STUDENTS, Vote
from pkd.distill_setup import Setup
from pkd.engine import Engine
from pkd.loss import pyramid_loss
from pkd.metrics import busy_shares, peak_memory, steady
from pkd.network_file import derived_seed
from pkd.progress import Progress
from pkd.transfer import OnItsWay, to_device
from pkd.validate import validate


def distill(setup: Setup) -> str:
    """Run this rank's role to the end; "finished" or "stopped" (by a signal on any rank, and resumable)."""
    start = setup.resume_point()
    setup.job.record()
    if setup.role == "teacher":
        return teach_along(setup, start["epoch"], start["step"])
    return Distillation(setup, start).run()


def teach_along(setup: Setup, epoch: int, first: int) -> str:
    """The loop of a rank that only answers for teachers."""
    job, ballot, exchange = setup.job, setup.ballot, setup.exchange
    while epoch < setup.epochs:
        last = setup.last_step(epoch)
        setup.compare_views(epoch)
        ballot.open(first, last)
        began, answering = time.perf_counter(), 0.0
        for step in range(first, last):
            job.beat(f"epoch {epoch}", step)
            if setup.sends_views and not receive_views(setup, epoch, step, last):
                break
            asked = time.perf_counter()
            exchange.fill(epoch, step, last)  # may run ahead of the students; only sending needs their consent
            answering += time.perf_counter() - asked
            job.watchdog.waits("the ballot of all ranks")
            if not ballot.permit(step):
                break
            ballot.cast(step, Vote(stop=job.stop_wanted()))
            exchange.transfer(step)
            if ballot.all_began:  # the students' first step may compile and take long
                job.steady()
        votes = ballot.close()
        exchange.drain()
        shares = busy_shares(job.world.rank, job.world.size, answering, time.perf_counter() - began)
        broken = -ballot.maximum([0.0, peak_memory(job.world.device), float("-inf"), 0.0, *shares])[2]
        setup.refuse_broken(epoch, votes.broken, broken)
        if votes.stop:
            return "stopped"
        epoch, first = epoch + 1, 0
    return "finished"


def receive_views(setup: Setup, epoch: int, step: int, last: int) -> bool:
    """Wait for a step's views while the next step's are on their way; False if the ranks agreed not to run the step."""
    job, ballot, exchange = setup.job, setup.ballot, setup.exchange
    job.watchdog.waits("the ballot of all ranks")
    if not ballot.permit(step):
        return False
    exchange.begin(epoch, step)
    if step + 1 < last and ballot.permit(step + 1):
        exchange.begin(epoch, step + 1)
    job.watchdog.waits("the students' views")
    exchange.await_views(step)
    job.watchdog.works()
    return True


class Distillation:
    """The loop of a student rank."""

    def __init__(self, setup: Setup, start: dict):
        self.setup, self.job, self.recipe = setup, setup.job, setup.job.recipe
        self.device = self.job.world.device
        self.joined = setup.joined
        settings = [self.recipe.students[index] for index in self.joined.own]
        self.constants = setup.constants.of(self.joined.own)
        self.engine = Engine(setup.student_networks(), settings, setup.ds_config,
                             setup.placement.accumulation, self.device, self.recipe.channels_last,
                             self.recipe.distill.sync_batch_norm, self.recipe.distill.compile)
        self.progress = Progress(setup, self.engine)
        self.progress.restore(start["checkpoint"])
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.micro = setup.schedule.micro_batches(self.ranks, self.rank, setup.placement.accumulation)
        self.broken: tuple[int, int] | None = None  # (step, student) of a loss that was not finite
        self.unchecked: tuple[int, OnItsWay] | None = None  # whether the last step's losses were finite

    def run(self) -> str:
        setup, progress = self.setup, self.progress
        while progress.epoch < setup.epochs:
            setup.compare_views(progress.epoch)
            stopped = self.train_epoch(progress.epoch, progress.step, setup.last_step(progress.epoch))
            if stopped or setup.cut_short(progress.epoch):
                progress.save("saving")
            if stopped:
                progress.close()
                return "stopped"
            self.end_epoch()
        progress.finish()
        progress.close()
        return "finished"

    def train_epoch(self, epoch: int, first: int, last: int) -> bool:
        """Steps [first, last) of an epoch, or fewer if the ranks agree to stop; whether they did."""
        setup, job, ballot, exchange = self.setup, self.job, self.setup.ballot, self.setup.exchange
        window, sums = self.recipe.window, self.progress.sums
        timed = steady(first, last, *exchange.ahead)
        before = sums.seconds, sums.wait  # of an epoch that is gone on with
        began = time.perf_counter()
        ballot.open(first, last)
        for step in range(first, min(first + window, last)):
            self.post(epoch, step, last)
        for step in range(first, last):
            job.beat(f"epoch {epoch}", step, "the ballot of all ranks")
            if not ballot.permit(step):
                break
            ballot.cast(step, Vote(job.stop_wanted(), self.progress.save_is_due(), self.broken))
            ahead = step + window
            if ahead < last and ballot.permit(ahead):
                job.watchdog.works()
                self.post(epoch, ahead, last)
            job.watchdog.waits("soft targets")
            waited = time.perf_counter()
            routes, flat = exchange.take(step)
            sums.wait += time.perf_counter() - waited
            job.watchdog.works()
            self.train_step(epoch, step, routes, flat)
            self.progress.step = step + 1
            sums.took(time.perf_counter() - began, step in timed)
            began = time.perf_counter()
            if ballot.after(step).save:
                self.progress.save("saving")
                began = time.perf_counter()
            if setup.placement.groups == 1 or ballot.all_began:  # another group's first step may still compile
                job.steady()
            self.progress.show(epoch, step, last)
        self.notice_broken()
        votes = ballot.close()
        exchange.drain()
        code = -(self.broken[0] * STUDENTS + self.broken[1]) if self.broken else float("-inf")
        seconds, wait = sums.seconds - before[0], sums.wait - before[1]
        shares = busy_shares(job.world.rank, job.world.size, seconds - wait, seconds)
        memory_student, memory_teacher, broken, longest, *busy = ballot.maximum(
            [peak_memory(self.device), 0.0, code, wait, *shares])
        sums.wait = before[1] + longest  # of the rank that waited the longest, not of rank 0
        self.progress.memory = {"student": int(memory_student), "teacher": int(memory_teacher)}
        self.progress.busy = [round(share, 4) for share in busy]
        setup.refuse_broken(epoch, votes.broken, -broken)
        return votes.stop

    def post(self, epoch: int, step: int, last: int) -> None:
        """Everything of a step that may be done before the students compute it."""
        exchange = self.setup.exchange
        if self.setup.sends_views:
            exchange.begin(epoch, step)
            self.job.watchdog.waits("the other students' views")
            exchange.await_views(step)
            self.job.watchdog.works()
        exchange.fill(epoch, step, last)
        exchange.transfer(step)

    def train_step(self, epoch: int, step: int, routes, flat: torch.Tensor) -> None:
        """One optimizer step: every micro batch of this rank."""
        setup, engine = self.setup, self.engine
        ids = setup.schedule.global_batch(epoch, step)
        total_step = epoch * setup.schedule.steps_per_epoch + step
        rates = self.progress.rates.at(total_step)
        engine.set_rates([rates[index] for index in self.joined.own])
        self.progress.sums.steps += 1
        losses, counted = 0, setup.counted(ids)
        for index, micro in enumerate(self.micro):
            mine = torch.from_numpy(ids[micro])
            images = setup.exchange.views_of(step, micro) if setup.sends_views else setup.views.batch(mine, epoch)
            images, labels = to_device(images, self.device), to_device(setup.labels[mine], self.device)
            levels = setup.unpacker.unpack(routes, flat, micro, self.device)
            # Dropout and the like: the same draws however the run was interrupted.
            torch.manual_seed(derived_seed(self.recipe.seed, total_step, index, self.rank))
            logits = engine.forward(images)
            loss, terms = pyramid_loss(logits, labels, levels, counted, self.constants,
                                       self.all_logits(logits), self.joined.own)
            self.job.watchdog.waits("the gradients of the students' island")
            engine.backward(loss)
            self.progress.sums.add(terms)
            losses = losses + terms["loss"]
        self.progress.trace(total_step, losses)
        self.notice_broken((step, OnItsWay(torch.isfinite(losses))))
        if self.broken is None and engine.refused_step:
            self.broken = (step, len(self.recipe.students))

    def all_logits(self, logits: torch.Tensor) -> torch.Tensor | None:
        """What the ensemble term needs of the students that other groups train; None where it needs nothing."""
        if self.setup.placement.groups == 1 or not any(self.setup.constants.ensemble):
            return None
        self.job.watchdog.waits(self.joined.name)
        everyone = self.joined.everyone(logits)
        self.job.watchdog.works()
        return everyone

    def notice_broken(self, latest: tuple[int, OnItsWay] | None = None) -> None:
        """Remember a student whose loss was not finite; the next ballot tells everyone.

        Looks at the step before the latest one, which a GPU has finished by now: looking at the latest would wait for it.
        """
        before, self.unchecked = self.unchecked, latest
        if before and self.broken is None:
            step, finite = before[0], before[1].wait().tolist()
            if not all(finite):
                self.broken = (step, self.joined.own[finite.index(False)])

    def end_epoch(self) -> None:
        """Validation, schedules, best weights, one line of metrics, a checkpoint."""
        setup, progress = self.setup, self.progress
        self.job.beat("validation", group="the students' island")
        self.engine.refresh_copies()
        networks = list(self.engine.copies.values())
        validation = setup.data.splits["validation"]
        scores = validate(networks, setup.views, validation.numpy(), setup.labels[validation], self.device,
                          lambda group: self.job.beat("validation", group=group),
                          joined=self.joined if setup.placement.groups > 1 else None)
        progress.end_epoch(scores)


