"""Real pkd processes for the tests: one a rank, on this machine, each with its own output and exit code."""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fork_server import Forked

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher or Slurm put there."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER and not key.startswith("SLURM_")}
    path = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": _cache()}  # on a GPU: tests/test_gpu.py


@functools.cache
def _cache() -> str:
    """What pkd times on these ranks is kept for this test session only."""
    folder = tempfile.mkdtemp(prefix="pkd-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Ranks:
    """`world` processes of `python -m pkd <arguments>`, as the deepspeed launcher would start them."""

    def __init__(self, world: int, *arguments, cwds: list[Path] | None = None, env=lambda rank: {},
                 prefix: tuple[str, ...] = (), launcher: bool = True):
        port = str(free_port())
        self.processes = []
        for rank in range(world):
            own = {**clean_environment(), **env(rank)}
            if world > 1 and launcher:
                own.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=port)
            words, cwd = list(map(str, arguments)), cwds[rank] if cwds else REPOSITORY
            if prefix:
                self.processes.append(subprocess.Popen(
                    [*prefix, sys.executable, "-m", "pkd", *words], env=own, cwd=cwd, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, stdin=subprocess.DEVNULL))
            else:
                self.processes.append(Forked(words, own, cwd))

    def wait(self, timeout: float = 120.0) -> list[Ended]:
        """What every rank said and how it ended; a rank that outlasts the timeout fails the test."""
        deadline = time.monotonic() + timeout
        ended = []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                ended.append(Ended(process.returncode, out, err))
        finally:
            for process in self.processes:
                process.kill()
        return ended


def run(world: int, *arguments, timeout: float = 120.0, **options) -> list[Ended]:
    """Run pkd on `world` ranks to its end, which must be a success."""
    ended = Ranks(world, *arguments, **options).wait(timeout)
    assert [one.code for one in ended] == [0] * world, [(one.code, one.err[-2000:]) for one in ended]
    return ended


def spawn(function, *arguments, ranks: int) -> None:
    """function(rank, *arguments) in so many processes, which must all succeed; of arguments that JSON has."""
    name = f"{function.__module__}:{function.__name__}"
    started = Ranks(0)
    started.processes = [Forked([rank, *arguments], clean_environment(), REPOSITORY, name) for rank in range(ranks)]
    ended = started.wait(500)
    assert [one.code for one in ended] == [0] * ranks, [(one.code, one.err[-2000:]) for one in ended]


def refused(world: int, *arguments, **options) -> str:
    """Run pkd and return the one sentence with which it must end: exit code 2 everywhere, said once, no traceback."""
    ended = Ranks(world, *arguments, **options).wait()
    assert [one.code for one in ended] == [2] * world, [(one.code, one.out, one.err) for one in ended]
    said = "".join(one.err for one in ended)
    assert said.startswith("pkd: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said.strip()


# Students whose step takes a third of the time, where which network it is makes no difference (tests/own_model.py).
LIGHT = ("students.0.model=own_model:Smooth", "students.1.model=own_model:Smooth")


def wait_for_step(run_folder: Path, step: int, timeout: float = 90.0) -> None:
    """Until steps.jsonl holds the line of optimizer step `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = run_folder / "steps.jsonl"
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines(True)
                                 if line.endswith("\n")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{run_folder} never reached step {step}")


def listens(pid: int) -> bool:
    """Whether a process does something of its own on SIGTERM."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def trace(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "steps.jsonl").read_text().splitlines()]


def students(run_folder: Path) -> dict[str, bytes]:
    """Every student's weights as they lie on disk."""
    files = sorted((run_folder / "students").glob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in files}


def teachers(run_folder: Path) -> dict[str, bytes]:
    files = sorted((run_folder / "teachers").glob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in files}
