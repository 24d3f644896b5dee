"""Ranks for the tests, forked from one process that has imported everything before.

Its imports cost a rank three seconds of CPU time, more than most of what is tested, and the suite starts hundreds. All else
is as if each were started afresh: processes, sockets, signals, output and exit codes are real; but its interpreter is not
taken down, unless it leaves a process group open. What matters before the imports are done (a signal in the first seconds,
DeepSpeed's chatter) is tested with ranks that launchers start.

What a forked rank starts with `python -m`, pkd or torch's launcher, is forked by the same server: sys.executable is a script
there that asks for it.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MESSAGE = 2**17  # bytes; an environment is far smaller
RANKS = ["teach"], ["archive"], ["distill"]  # a process group that they leave open aborts them when all is taken down


class Forked:
    """One `python -m pkd <arguments>`, with the methods of subprocess.Popen that the tests use.

    function: "module:name" of what is called with the arguments instead; module: what is run in pkd's place.
    """

    def __init__(self, arguments: list, env: dict[str, str], cwd: Path, function: str | None = None, module: str = "pkd"):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (read in the end)
        self.returncode: int | None = None
        asked = {"module": module, "function": function, "arguments": arguments, "env": env, "cwd": str(cwd)}
        self.connection, self.pid = _ask(_server(Path(__file__).resolve().parent.parent), asked, self.out, self.err)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(MESSAGE))
            except TimeoutError:
                raise subprocess.TimeoutExpired("pkd", timeout) from None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in (self.out, self.err):
            file.seek(0)
        return self.out.read(), self.err.read()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # ended meanwhile

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def folder_of_forks() -> Path:
    """Where a `pkd` and a `python` lie that are forked when they are started."""
    return Path(_server(Path(__file__).resolve().parent.parent)).parent


def _ask(address: str, asked: dict, out, err) -> tuple[socket.socket, int]:
    """A connection over which the rank's exit code comes, and whose end is the rank's; and the rank's pid."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(asked).encode()], [out.fileno(), err.fileno()])
    return connection, int(connection.recv(MESSAGE))


@functools.cache
def _server(repository: Path) -> str:
    """The address of this process's server; it ends when its standard input does, thus with this process."""
    folder = tempfile.mkdtemp(prefix="pkd-fork-")
    address = f"{folder}/socket"
    path = os.pathsep.join(filter(None, [str(repository), str(repository / "tests"), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                                   "PYTHONPATH": path})
    while (line := server.stdout.readline()) != "ready\n":  # DeepSpeed may say something first
        if not line:
            raise RuntimeError("the server of forked ranks did not start")

    def end() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)
    atexit.register(end)
    return address


def serve(address: str) -> dict:
    """Fork for each connection, until standard input ends. Returns only in a forked rank: what it is to run."""
    import accelerate  # noqa: F401  (what a command imports when it needs it, too)
    import torch._dynamo  # torch.optim imports it at its first step
    import torch.distributed.run  # noqa: F401

    import pkd.archive
    import pkd.bench
    import pkd.cli
    import pkd.distill
    import pkd.evaluate
    import pkd.export
    import pkd.launch
    import pkd.plan
    import pkd.predict
    import pkd.status
    import pkd.study.command
    import pkd.teach  # noqa: F401
    from pkd.ds_config import import_deepspeed

    import_deepspeed()
    python = Path(address).with_name("python")
    python.write_text('#!/bin/sh\n[ "$1" = -u ] && [ "$2" = -m ] && shift\n'
                      f'if [ "$1" = -m ]; then shift; exec {sys.executable} -S {__file__} {address} "$@"; fi\n'
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    pkd_script = python.with_name("pkd")  # for launch scripts that find it on their PATH
    pkd_script.write_text(f'#!/bin/sh\nexec {python} -m pkd "$@"\n')
    pkd_script.chmod(0o755)
    gc.freeze()  # or every rank's collector, and its end, would look at all that was imported, and so copy it
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a rank is forked, too, and nobody waits for it
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
            os._exit(0)
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.executable = str(python)
            return _begin(connection)
        connection.close()


def _begin(connection: socket.socket) -> dict:
    """In a fork of the server: fork the rank, tell its pid and in the end its exit code. Returns in the rank only."""
    message, (out, err), *_ = socket.recv_fds(connection, MESSAGE, 2)
    request = json.loads(message)
    pid = os.fork()
    if pid:
        connection.send(str(pid).encode())
        os.close(out)
        os.close(err)
        if connection in select.select([connection, os.pidfd_open(pid)], [], [])[0]:
            os.kill(pid, signal.SIGKILL)  # who asked for the rank is gone
            os._exit(1)
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    connection.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    return request


def leave(code: int) -> None:
    """End without tearing down all that was imported, which costs as much as the shorter commands do."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def groups_are_open() -> bool:
    """Whether gloo's threads still run, which end with the last process group."""
    gc.collect()
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            if path.read_text().startswith(("pt_gloo", "gloo_")):
                return True
        except OSError:
            pass  # a thread that has just ended
    return False


def stand_in(address: str, module: str, arguments: list[str]) -> int:
    """Be the process that was started in a rank's place: signals go on to it, and its exit code is this one's."""
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    asked = {"module": module, "function": None, "arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}
    connection, pid = _ask(address, asked, sys.stdout, sys.stderr)

    def pass_on(number: int, _) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # its exit code is on its way

    for number in passed_on:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = int(connection.recv(MESSAGE))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(stand_in(sys.argv[1], sys.argv[2], sys.argv[3:]))
    asked = serve(sys.argv[1])
    if asked["function"]:
        module, name = asked["function"].split(":")
        getattr(importlib.import_module(module), name)(*asked["arguments"])
    else:
        sys.argv = [asked["module"], *asked["arguments"]]
        try:
            runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            open_still = asked["arguments"][:1] in RANKS and groups_are_open()
            if asked["module"] != "pkd" or open_still or not isinstance(end.code, int):
                raise
            leave(end.code)
