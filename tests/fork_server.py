"""Ranks for the tests, forked from one process that has imported everything before.

Its imports cost a rank three seconds of CPU time, more than most of what is tested, and the suite starts hundreds. All else
is as if each were started afresh: processes, sockets, signals, output and exit codes are real. What matters before the
imports are done (a signal in the first seconds, DeepSpeed's chatter) is tested with ranks that launchers start.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MESSAGE = 2**17  # bytes; an environment is far smaller


class Forked:
    """One `python -m pkd <arguments>`, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, arguments: list[str], env: dict[str, str], cwd: Path):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (read in the end)
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(_server(Path(__file__).resolve().parent.parent))
        request = json.dumps({"arguments": arguments, "env": env, "cwd": str(cwd)}).encode()
        socket.send_fds(self.connection, [request], [self.out.fileno(), self.err.fileno()])
        self.pid = int(self.connection.recv(MESSAGE))

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
        Path(address).unlink(missing_ok=True)
        os.rmdir(folder)
    atexit.register(end)
    return address


def serve(address: str) -> None:
    """Fork for each connection, until standard input ends. Returns only in a forked rank, which then runs pkd."""
    import accelerate  # noqa: F401  (what a command imports when it needs it, too)
    import torch._dynamo  # noqa: F401  (torch.optim imports it at its first step)

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
            return _begin(connection)
        connection.close()


def _begin(connection: socket.socket) -> None:
    """In a fork of the server: fork the rank, tell its pid and in the end its exit code. Returns in the rank only."""
    message, (out, err), *_ = socket.recv_fds(connection, MESSAGE, 2)
    request = json.loads(message)
    pid = os.fork()
    if pid:
        connection.send(str(pid).encode())
        os.close(out)
        os.close(err)
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
    sys.argv = ["pkd", *request["arguments"]]
    sys.path[0] = request["cwd"]


if __name__ == "__main__":
    serve(sys.argv[1])
    runpy.run_module("pkd", run_name="__main__", alter_sys=True)
