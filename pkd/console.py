"""What a person sees: progress and results from one rank, errors once, everybody's chatter in a log file a rank.

torch, DeepSpeed and their C++ parts write to the process's own output. It is kept in memory from the start and sent to
logs/ in the run folder as soon as there is one, while pkd keeps the real output for itself.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Console:
    """quiet: this rank reports nothing but errors. With `capture`, other output of the process goes to its log."""

    def __init__(self, quiet: bool = False, capture: bool = False):
        self.quiet, self.log, self._bar, self._task = quiet, None, None, None
        self._early: int | None = None
        self._out, self._err = sys.stdout, sys.stderr
        if capture:
            self._out = os.fdopen(os.dup(1), "w", buffering=1)
            self._err = os.fdopen(os.dup(2), "w", buffering=1)
            # Where there are no files in memory (macOS), one without a name.
            in_memory = hasattr(os, "memfd_create")
            self._early = os.memfd_create("pkd") if in_memory else \
                os.dup(tempfile.TemporaryFile().fileno())  # noqa: SIM115
            self._redirect(self._early)
        self.rich = RichConsole(file=self._out, highlight=False, width=None if self._out.isatty() else 120)

    def log_into(self, path: Path) -> None:
        """Move the chatter so far to `path` and send the rest there."""
        if self._early is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._redirect(handle, self._take_early())
        os.close(handle)
        self.log = path
        print(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}", flush=True)

    def show_early(self) -> None:
        """Let the user see what was said before there was a run folder to log into: something went wrong at once."""
        if self._early is not None:
            self._err.write(self._take_early().decode(errors="replace"))

    def say(self, text: str) -> None:
        if not self.quiet:
            self.rich.print(text, markup=False, soft_wrap=True)  # lines of a log are not cut

    def show(self, table) -> None:
        if not self.quiet:
            self.rich.print(table)

    def report(self, text: str) -> None:
        """A line from whichever rank did the work, in one write, so that ranks do not mix."""
        self._out.write(f"{text}\n")
        self._out.flush()

    def error(self, sentence: str) -> None:
        self._err.write(f"{sentence}\n")
        self._err.flush()

    @property
    def moves(self) -> bool:
        """Whether there is a terminal to show a moving line on."""
        return not self.quiet and self._out.isatty()

    def progress(self, text: str, done: int, total: int) -> None:
        """The moving line of a terminal; nothing elsewhere."""
        if not self.moves:
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.rich, transient=True)
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=done, total=total)

    def end_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _take_early(self) -> bytes:
        sys.stdout.flush()
        sys.stderr.flush()
        os.lseek(self._early, 0, os.SEEK_SET)
        with os.fdopen(self._early, "rb") as file:
            self._early = None
            return file.read()

    def _redirect(self, handle: int, before: bytes = b"") -> None:
        if before:
            os.write(handle, before)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
