"""Where a distillation stands: position, sums, schedules, best weights; how it is saved, shown and taken up again."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pkd import __version__, checkpoint
from pkd.distill_setup import Setup
from pkd.engine import Engine
from pkd.files import append_line, read_lines, write_json
from pkd.hardware import hardware
from pkd.metrics import Sums, drop_lines_after
from pkd.network_file import write_network
from pkd.rates import Rates
from pkd.tensor_file import read_tensors
from pkd.tracker import Tracker
from pkd.validate import Scores


class Progress:
    def __init__(self, setup: Setup, engine: Engine):
        recipe = setup.job.recipe
        self.setup, self.job, self.engine, self.recipe, self.joined = setup, setup.job, engine, recipe, setup.joined
        self.names = [student.name for student in recipe.students]
        self.writer = self.job.world.rank == 0
        self.keeper = dist.get_rank() == 0  # of its group's students
        self.epoch = self.step = 0
        self.rates = Rates(list(recipe.students), recipe.distill.epochs * setup.schedule.steps_per_epoch)
        self.best: dict[str, dict] = {}  # student -> {"epoch", "accuracy", "loss"} on validation
        self.best_weights: dict[str, dict[str, torch.Tensor]] = {}  # of the group's students, on its first rank only
        self.memory: dict[str, int] = {}
        self.busy: list[float] = []  # of each rank, its share of the epoch's time
        self.saved = time.monotonic()
        self.tracker = setup.tracker
        self._new_sums()

    @property
    def total_step(self) -> int:
        return self.epoch * self.setup.schedule.steps_per_epoch + self.step

    def save_is_due(self) -> bool:
        """Rank 0's clock; the ballot makes it everybody's decision."""
        return self.writer and time.monotonic() - self.saved > 60 * self.recipe.checkpoint_minutes

    def save(self, phase: str) -> None:
        """Write a checkpoint of this moment; a collective over all student ranks.

        Not if a loss was not finite: the ballot is about to stop the run, and the last good checkpoint must stay.
        """
        self.job.beat(phase, group="the students' island")
        sums = self.sums.gather()
        if not bool(torch.isfinite(sums).all()):
            return
        self.job.run.check_locks()
        tensors = {f"best-{name}": weights for name, weights in self.best_weights.items()}
        tensors.update({"sums": {"sums": sums}} if self.writer else {})
        progress = {
            "epoch": self.epoch, "step": self.step, "best": self.best, "rates": self.rates.to_json(),
            "terms": self.sums.names, "steps": self.sums.steps, "seconds": self.sums.seconds, "wait": self.sums.wait,
            "teachers": self.setup.teacher_hashes, "fingerprint": self.setup.data.fingerprint,
            "identity": self.setup.identity,
        }
        checkpoint.save(self.job.run.checkpoints, self.total_step, self.engine, progress, tensors,
                        lambda: self.job.beat(phase), self._gather)
        self.saved = time.monotonic()

    def _gather(self, mine):
        if self.setup.placement.groups > 1:
            self.job.watchdog.waits(self.joined.name)
        parts = self.joined.gather(mine)
        self.job.watchdog.works()
        return parts

    def restore(self, path: str | None) -> None:
        """Take up a checkpoint, or begin; lines that a later stretch had written are dropped."""
        if path:
            saved = checkpoint.load(Path(path), self.engine)
            self.epoch, self.step = saved["epoch"], saved["step"]
            # By the recipe's names: those of a file are never made into paths.
            self.best = {name: saved["best"][name] for name in self.names if name in saved["best"]}
            self.rates.load_json(saved["rates"])
            self.sums.steps, self.sums.seconds, self.sums.wait = saved["steps"], saved["seconds"], saved["wait"]
            every = read_tensors(Path(path) / "sums.safetensors")["sums"]
            self.sums.restore(saved["terms"], every, self.engine.ranks, dist.get_rank())
            if self.keeper:
                self.best_weights = {name: read_tensors(Path(path) / f"best-{name}.safetensors")
                                     for name in self.engine.names if name in self.best}
        if self.writer:
            drop_lines_after(self.job.run.metrics, self.total_step if self.step == 0 else self.total_step - 1)
            drop_lines_after(self.job.run.steps, self.total_step - 1)
            for line in read_lines(self.job.run.metrics) if self.tracker else ():
                self._track(line)  # unless it has it: it may not have been asked for from the beginning

    def end_epoch(self, scores: Scores) -> None:
        """After validation: schedules, best weights, one line of metrics, a checkpoint."""
        self.rates.validated(scores.loss)
        for index, name in enumerate(self.names):
            found = {"epoch": self.epoch, "accuracy": scores.accuracy[index], "loss": scores.loss[index]}
            before = self.best.get(name)
            if before is None or (found["accuracy"], -found["loss"]) > (before["accuracy"], -before["loss"]):
                self.best[name] = found
                if self.keeper and name in self.engine.copies:
                    copy = self.engine.copies[name].state_dict()
                    self.best_weights[name] = {key: value.detach().cpu().clone() for key, value in copy.items()}
        terms = self.sums.means()
        cut_short = self.setup.cut_short(self.epoch)
        if self.writer:
            self.job.run.check_locks()
            line = self._line(scores, terms)
            append_line(self.job.run.metrics, line)
            if not cut_short:  # that epoch's line is another once the run goes on, and a tracker's cannot be taken back
                self._track(line)
            self._say(line)
        self.epoch, self.step = self.epoch + 1, 0
        self._new_sums()
        if not cut_short:  # else the checkpoint stays at the step where --steps ended, to be gone on from
            self.save("saving")

    def close(self) -> None:
        """Before this process leaves, whether at the end or stopped by a signal."""
        self._with_tracker(Tracker.close)

    def finish(self) -> None:
        """Write the students: the best weights of each by validation."""
        if not self.keeper:
            return
        whole = self.setup.limit is None
        self.setup.job.run.students.mkdir(exist_ok=True)
        for index, name in zip(self.joined.own, self.engine.names):
            self.job.beat("writing students")
            network = self.engine.copies[name]
            network.load_state_dict(self.best_weights[name])
            student = self.recipe.students[index]
            facts = {"name": name, "validation": self.best[name], "recipe": self.recipe.name}
            write_network(self.job.run.students / name, network, student.model, list(self.setup.data.classes),
                          self.setup.data, facts)
        if self._gather("written") is None:
            return
        write_json(self.job.run.students / "students.json", {
            "students": self.names, "complete": whole, "epochs": self.epoch, "teachers": self.setup.teacher_hashes,
            "fingerprint": self.setup.data.fingerprint, "soft_targets": self.setup.soft_targets,
            "world_size": self.job.world.size, "placement": self.setup.placement.to_json(),
            "made_by": f"pkd {__version__}, torch {torch.__version__}, {hardware(self.job.world.device).device}, "
                       f"deepspeed.students {self.recipe.deepspeed.students}"})
        self.job.run.mark("distill", "finished", complete=whole)

    def show(self, epoch: int, step: int, last: int) -> None:
        """Keep the moving line up to date: epoch, images per second, loss, wait for teachers, time left."""
        if not self.writer or not self.job.console.moves:
            return
        sums = self.sums
        rate = sums.steps * self.setup.schedule.batch / max(sums.seconds, 1e-9)
        mean = (sums.values[-1] / sums.steps).mean().item() * self.engine.ranks
        whole = self.setup.schedule.steps_per_epoch
        self.job.console.progress(
            f"epoch {epoch + 1}/{self.setup.epochs}  loss {mean:.3f}  {rate:.0f} img/s  "
            f"waiting {100 * sums.wait / max(sums.seconds, 1e-9):.0f} %", epoch * whole + step + 1,
            self.setup.epochs * whole)

    def trace(self, step: int, losses: torch.Tensor) -> None:
        """With `trace`, this step's loss of every student over all ranks; a collective over all student ranks."""
        if not self.recipe.trace:
            return
        parts = [torch.empty_like(losses) for _ in range(self.engine.ranks)]
        dist.all_gather(parts, losses)
        total = self.joined.everyone(torch.stack(parts).double().sum(0)).tolist()
        if self.writer:
            append_line(self.job.run.steps, {"step": step, "loss": dict(zip(self.names, total))})

    def _new_sums(self) -> None:
        self.sums = Sums(self.joined, self.job.world.device)

    def _line(self, scores: Scores, terms: dict[str, list[float]]) -> dict:
        batch, sums = self.setup.schedule.batch, self.sums
        students = range(len(self.names))
        return {
            "epoch": self.epoch, "step": self.total_step,
            "train": {self.names[i]: {term: values[i] for term, values in terms.items()} for i in students},
            "validation": {self.names[i]: {"accuracy": scores.accuracy[i], "loss": scores.loss[i]} for i in students},
            "ensemble": {"accuracy": scores.ensemble_accuracy, "loss": scores.ensemble_loss},
            "learning_rate": dict(zip(self.names, self.rates.at(max(0, self.total_step - 1)))),
            "images_per_second": sums.steps * batch / max(sums.seconds, 1e-9), "seconds": sums.seconds,
            "steady_images_per_second": sums.steady_steps * batch / sums.steady_seconds if sums.steady_steps else None,
            "wait_seconds": sums.wait, "peak_memory_bytes": self.memory,
            "busy": self.busy,
        }

    def _track(self, line: dict) -> None:
        self._with_tracker(lambda tracker: tracker.log(line))

    def _with_tracker(self, act: Callable[[Tracker], None]) -> None:
        """A tracker that fails is given up: training is worth more, and the next start gives it what it lacks."""
        if self.tracker is None:
            return
        try:
            act(self.tracker)
        except Exception as error:  # whatever the package says
            self.job.console.say(f"tracker {self.recipe.tracker} failed ({type(error).__name__}: {error}): the run goes on "
                                 "without it, metrics.jsonl has every figure")
            self.tracker = None

    def _say(self, line: dict) -> None:
        """One plain line an epoch; the terminal's moving line is not in its way."""
        accuracy = "  ".join(f"{name} {100 * v['accuracy']:.1f}" for name, v in line["validation"].items())
        loss = sum(terms["loss"] for terms in line["train"].values()) / len(self.names)
        wait = 100 * line["wait_seconds"] / max(line["seconds"], 1e-9)
        self.job.console.say(
            f"epoch {line['epoch'] + 1}/{self.recipe.distill.epochs}  loss {loss:.4f}  validation %: {accuracy}  "
            f"ensemble {100 * line['ensemble']['accuracy']:.1f}  {line['images_per_second']:.0f} img/s  "
            f"waiting for teachers {wait:.0f} %")
