"""What the phases of many ranks need around them: signals, the watchdog, the run folder, the data, this rank's console."""

import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pkd.confusion import pyramid_of
from pkd.console import Console
from pkd.data import DataSet, load_data
from pkd.ds_config import check_compiler, check_device
from pkd.errors import PassingError, UserError
from pkd.files import write_json
from pkd.hardware import Hardware, devices, hardware, to_json
from pkd.launcher import Launch
from pkd.models import check_model, models_of, own_code
from pkd.objective import asked
from pkd.pyramid import Pyramid, build_pyramid, foreseen
from pkd.recipe import Recipe
from pkd.run_folder import RunFolder
from pkd.stop import signalled
from pkd.watchdog import Watchdog
from pkd.world import World


class Job:
    """One rank of `teach`, `archive` or `distill`, from its start to its end."""

    def __init__(self, recipe: Recipe, path: Path, phase: str, launch: Launch, console: Console,
                 teacher: str | None = None):
        self.recipe, self.phase, self.console, self.teacher = recipe, phase, console, teacher
        self.name = f"{phase}-{teacher}" if teacher else phase
        self.opened = False
        self.run = RunFolder(path, recipe.teachers_from)
        self.world = World(launch, recipe.timeouts)
        self.watchdog = Watchdog(self.world.connect(), launch.rank, launch.world_size, phase, recipe.timeouts.start,
                                 console.error)
        self.watchdog.start()

    def open(self) -> None:
        """The run folder and the data. Raises UserError."""
        torch.set_num_threads(self.recipe.threads)
        if self.recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        opened = self.world.first("open", self._open_folder)
        self.run.held_by_rank_0(opened["locks"])
        for remark in opened["remarks"]:
            self.console.say(remark)
        self.opened = True
        self.console.log_into(self.run.path / "logs" / f"{self.name}-rank{self.world.rank}.log")
        self._introduce()
        if self.phase == "teach":
            check_device(self.recipe.deepspeed.teachers, self.world.device.type)
        check_compiler(self.recipe.distill.compile and self.phase == "distill")
        for model in models_of(self.recipe):  # weights that are missing or misspelt, before anything is trained
            check_model(model)
        self.beat("reading data")
        self.data: DataSet = load_data(self.recipe.data, self.watchdog.works)
        self.beat("data read")
        # As far as it is known before the top is trained, that the pyramid suits the data and the objective.
        asked(self.recipe.objective.kind,
              build_pyramid(foreseen(self.recipe.pyramid), self.data.classes, self.recipe.seed))
        self.pyramid: Pyramid = pyramid_of(self.recipe, self.data, self.run.teachers, partial=self.phase == "teach")
        if self.data.dropped:
            self.console.say(f"{self.data.dropped} rows with several labels were dropped")

    def _open_folder(self) -> dict:
        remarks = self.run.open(self.recipe, self.phase, self.teacher)
        self.mark("running")
        remarks += [f"the recipe names code of its own, which is run: {where}" for where in own_code(self.recipe)]
        return {"remarks": remarks, "locks": {str(lock.path): lock.inode for lock in self.run.locks}}

    def mark(self, state: str, **more) -> None:
        """Record where the phase stands. That all students are there stays true, whatever becomes of a start after that."""
        if not self._is_complete():
            self.run.mark(self.name, state, **more)

    def _is_complete(self) -> bool:
        found = self.run.state(self.name)
        return self.phase == "distill" and found["state"] == "finished" and found.get("complete", False)

    def _introduce(self) -> None:
        """Ranks tell each other their node, process and device; rank 0 keeps it and writes it down."""
        found = self.world.gather("hardware", asdict(hardware(self.world.device)))
        if found is not None:
            self.hardware = [Hardware(**one) for one in found]
            write_json(self.run.path / "ranks" / f"{self.name}.json", {"ranks": to_json(self.hardware)})
        self.world.devices = self.world.first("devices", lambda: list(devices(self.hardware)))

    def record(self) -> None:
        """All that could refuse this call has been checked: what the folder says of the recipe's free part is its own."""
        if self.world.rank == 0:
            self.run.check_locks()
            self.run.record(self.recipe)

    def beat(self, phase: str, step: int | None = None, group: str | None = None) -> None:
        self.watchdog.beat(phase, self.watchdog.step if step is None else step, group)

    def starting(self) -> None:
        """Something new is built, for which the longer limit holds, until steady()."""
        self.watchdog.steady(self.recipe.timeouts.start, "timeouts.start")

    def steady(self) -> None:
        """The first step is done: from now on the shorter limit holds."""
        self.watchdog.steady(self.recipe.timeouts.step)

    def stop_wanted(self) -> bool:
        """Whether a signal reached this rank, or any rank that told the store."""
        if signalled.yes and not self.watchdog.stop_requested.is_set():
            self.world.store.set("stop", "1")
            self.watchdog.stop_requested.set()
        return self.watchdog.stop_requested.is_set()

    def give_up(self, sentence: str, code: int) -> int:
        """After a failure on this rank: say it, if no other rank was first, and leave. Returns the exit code.

        When one rank fails, the others' collectives break moments later: they leave with the first one's code, silently.
        What broke without a word is given a moment for the word to arrive. The rank that serves the store stays until
        the others have read it: after a mistake of the user's they all come, after a death some may never.
        """
        store, patience = self.world.store, 3.0 if code != 2 else 0.0
        try:
            deadline = time.monotonic() + patience
            while not store.check(["abort"]) and time.monotonic() < deadline:
                time.sleep(0.05)
            if store.check(["abort"]):
                code = int(store.get("abort").decode())
            else:
                if store.add("abort/claims", 1) == 1:
                    self.console.error(f"pkd: {sentence}")
                    if code == 2 and self.opened:
                        # The disk may be full: then nobody can be told there. Another job's word is not overwritten.
                        with contextlib.suppress(UserError, PassingError):
                            self.run.check_locks()
                            self.mark("refused", why=sentence)
                store.set("abort", str(code))
            self.world.leave_store(30.0 if code == 2 else 5.0)
        except RuntimeError:  # the store's server is gone: say what this rank knows
            self.console.error(f"pkd: {sentence}")
        return code

    def finished_before(self) -> bool:
        """Whether this phase had already come to its end, so that there is nothing left to do."""
        return self.world.first("finished before", self._is_complete)

    def close(self, outcome: str) -> None:
        """Leave together with all ranks; "stopped" on any of them is everybody's outcome."""
        self.console.end_progress()
        self.beat("leaving", group="the other ranks' end")
        stopped = self.world.meet("the end", outcome == "stopped")
        if self.world.rank == 0 and stopped:
            self.mark("stopped")
            self.console.say("stopped by a signal, everything is saved: the same command goes on from here")
        elif self.world.rank == 0 and self.phase in ("teach", "archive"):
            self.mark("finished")
        elif self.world.rank == 0 and outcome == "finished before":
            self.console.say(f"distill is finished already: the students are in {self.run.students}")
        self.world.close()
        self.watchdog.stop()
        self.watchdog.join()
