"""A real Slurm cluster of virtual nodes on this one machine, with faults on demand. Needs root and Slurm, no systemd."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from subprocess import DEVNULL, run

import virtual_hosts
from slurm_conf import CGROUP_CONF, SLURMD_PORT, slurm_conf
from virtual_hosts import Hosts, call, search_path, until

TERMINAL = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                      "PREEMPTED", "TIMEOUT"})
LAUNCHER = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|PMI)_|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")


def missing() -> str | None:
    """Why no cluster can be started here, or None if one can."""
    return virtual_hosts.missing("slurmctld", "slurmd", "sbatch", "munged", "mknod")


class Cluster:
    """`with Cluster(folder) as cluster:` is up inside the block. Keep to one thread: the nodes die with the thread that
    started them, so that a killed pytest leaves no processes behind."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 16, gpus: int = 2, small_mib: int = 64):
        self.folder = Path(folder).resolve()
        if re.search(r"\s", str(self.folder)):
            raise ValueError(f"slurm.conf has no way to write a path with spaces: {self.folder}")
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.small_mib = cpus, gpus, small_mib
        self.small = self.folder / "small"
        self.conf = self.folder / "etc/slurm.conf"
        self._hosts = Hosts(self.folder, ["control", *self.nodes])

    def __enter__(self) -> "Cluster":
        self.up()
        return self

    def __exit__(self, *_) -> None:
        self.down()

    # ---- up and down

    def up(self) -> None:
        """Start everything and wait until every node is idle."""
        self.down()
        try:
            self._prepare()
            self._hosts.create()
            munge = self._hosts.scratch / "munge"
            self._start("munged", "control", "munged", "--foreground", f"--socket={munge}/socket",
                        *(f"--{name}-file={munge}/{name}" for name in ("key", "pid", "seed")),
                        f"--log-file={self.folder}/log/munged.log")
            if not until((munge / "socket").exists, 10, 0.02):
                raise RuntimeError("munged did not start")
            self._start("control", "control", "slurmctld", "-D", "-c", "-f", self.conf)
            for name in self.nodes:
                self._slurmd(name)
            self.ready()
        except BaseException as error:
            tails = self._tails()
            self.down()
            if isinstance(error, RuntimeError):
                raise RuntimeError(f"no Slurm cluster in {self.folder}: {error}\n{tails}") from error
            raise

    def down(self) -> None:
        """Kill what this cluster, or an earlier one of the same folder, started; keep logs and configuration only."""
        self._hosts.remove()
        shutil.rmtree(self.small, ignore_errors=True)

    def ready(self, timeout: float = 60.0) -> None:
        """Wait until every node is idle."""
        def idle() -> bool:
            try:
                states = self._states()
            except RuntimeError:
                return False  # the controller is not up yet
            # a node that died and boots again may still be idle in the controller's eyes
            return states == dict.fromkeys(self.nodes, "idle") and all(self._hosts.listens(name, SLURMD_PORT)
                                                                       for name in self.nodes)
        if not until(idle, timeout):
            raise RuntimeError(f"not all nodes idle after {timeout:.0f} s:\n" + self.slurm("sinfo", "--Node", "--long"))

    def heal(self, timeout: float = 60.0) -> None:
        """Between tests: cancel every job, undo every fault, wait until every node is idle."""
        for name in self.nodes:
            self.start_node(name)
        self.slurm("scancel", "--user=root")

        def busy() -> list[str]:
            return [name for name in self.nodes if self.pids(name, "slurmstepd")]
        until(lambda: not self.slurm("squeue", "--noheader"), timeout)  # jobs that ignore SIGTERM take 8 s
        until(lambda: not busy(), 2)
        for name in busy():  # steps that outlived their job on an unplugged node: Slurm ends them up to half a minute later
            self.kill_node(name)
            self.start_node(name)
        for name, state in self._states().items():
            if re.match("down|drain", state):
                try:
                    self.slurm("scontrol", "update", f"nodename={name}", "state=resume")
                except RuntimeError:
                    pass  # it came back meanwhile
        self.ready(timeout)

    def _states(self) -> dict[str, str]:
        """idle, mixed, allocated, ...; with * for a node that does not answer."""
        out = self.slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return dict(line.split() for line in out.splitlines())

    def _prepare(self) -> None:
        scratch = self._hosts.scratch
        for folder in (self.small, self.folder / "etc", self.folder / "log", scratch / "munge", scratch / "spool"):
            folder.mkdir(parents=True, exist_ok=True)
        key = scratch / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for gpu in range(self.gpus):  # with regular files in place of devices, jobs see no CUDA_VISIBLE_DEVICES
            call("mknod", scratch / f"gpu{gpu}", "c", 1, 3)
        conf, gres = slurm_conf(self.folder, scratch, self._hosts.addresses, self.cpus, self.gpus)
        self.conf.write_text(conf)
        (self.folder / "etc/gres.conf").write_text(gres)
        (self.folder / "etc/cgroup.conf").write_text(CGROUP_CONF)
        self._hosts.mount(self.small, self.small_mib)

    def _start(self, name: str, host: str, *command) -> None:
        self._hosts.spawn(name, host, self.folder / f"log/{name}.out", *command)

    def _slurmd(self, name: str, *options: str) -> None:
        self._start(name, name, "slurmd", "-D", "-c", *options, "-N", name, "-f", self.conf)

    def _tails(self) -> str:
        def tail(path: Path) -> str:
            return "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-6:]])
        return "\n".join(tail(path) for path in sorted((self.folder / "log").glob("*")) if path.stat().st_size)

    # ---- jobs

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        """What clients get, and by sbatch the jobs: this process's environment, this Python first, nothing of a launcher."""
        kept = {key: value for key, value in os.environ.items() if not LAUNCHER.match(key)}
        # the directory as it is: in a virtual environment python is a link to one that lacks its packages
        path = f"{os.path.dirname(sys.executable)}:{search_path()}"
        cache = str(self.folder / "cache")  # timings of this session, and of no other
        return {**kept, "PATH": path, "XDG_CACHE_HOME": cache, **(extra or {}), "SLURM_CONF": str(self.conf)}

    def slurm(self, *arguments, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """The output of a client (squeue, scontrol, srun, ...) run on the controller's host; its failure is an error."""
        done = run([*self._hosts.inside("control"), *map(str, arguments)], env=self.environment(env), cwd=cwd,
                   capture_output=True, text=True, stdin=DEVNULL, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *arguments, env: dict[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submit; the job's id. `env` is added to the environment that the job gets."""
        return int(self.slurm("sbatch", "--parsable", *arguments, env=env, cwd=cwd).split(";")[0])

    def show(self, job: int) -> list[dict[str, str]]:
        """`scontrol show job` as dictionaries: one, or one for each element of an array or part of a heterogeneous job."""
        for attempt in range(5):
            try:
                out = self.slurm("scontrol", "--oneliner", "show", "job", job)
                return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in out.splitlines() if line.strip()]
            except RuntimeError as error:
                # the controller waits for nodes that do not answer, and may then answer late itself
                if attempt == 4 or not re.search("timed out|Unable to contact", str(error)):
                    raise
        raise AssertionError

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, ...; the set of its elements' states, joined by commas, for an array."""
        return ",".join(sorted({one["JobState"] for one in self.show(job)}))

    def wait(self, job: int, timeout: float, until: Collection[str] = TERMINAL) -> str:
        """Poll until all elements are in one of these states; `sbatch --wait` would notice half a minute late."""
        wanted = {until} if isinstance(until, str) else set(until)
        state, end = self.state(job), time.monotonic() + timeout
        while not set(state.split(",")) <= wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state} after {timeout:.0f} s, not {' or '.join(sorted(wanted))}:\n"
                                   + self.slurm("scontrol", "show", "job", job) + self.slurm("sinfo", "--Node", "--long"))
            time.sleep(1.0)
            state = self.state(job)
        return state

    def restarts(self, job: int) -> int:
        """How often the job was requeued."""
        return max(int(one["Restarts"]) for one in self.show(job))

    def start_time(self, job: int) -> float | None:
        """When the job started last, in whole seconds since 1970; of a pending one, when it may start; None if unknown."""
        at = self.show(job)[0]["StartTime"]
        return None if at == "Unknown" else time.mktime(time.strptime(at, "%Y-%m-%dT%H:%M:%S"))

    def batch_host(self, job: int) -> str:
        """The node that runs the job's script."""
        return self.show(job)[0]["BatchHost"]

    def hosts(self, job: int) -> list[str]:
        """The nodes of a job that has started."""
        return self.slurm("scontrol", "show", "hostnames", self.show(job)[0]["NodeList"]).split()

    def address(self, name: str) -> str:
        """A node's own, on the network that it shares with the others."""
        return self._hosts.addresses[name]

    # ---- faults

    def pids(self, name: str, pattern: str = "") -> list[int]:
        """This machine's pids of the processes on a node, also Slurm's, whose command lines contain the pattern."""
        return self._hosts.pids(name, pattern)

    def kill_node(self, name: str) -> None:
        """Everything on the node dies at once, and its peers see their connections closed."""
        self._hosts.kill(name)

    def unplug(self, name: str) -> None:
        """The node's processes go on, but no packet passes."""
        self._hosts.plug(name, False)

    def cut_node(self, name: str) -> None:
        """A power cut: unplugged first, so that peers hear nothing of the death."""
        self.unplug(name)
        self.kill_node(name)

    def start_node(self, name: str) -> None:
        """Undo any fault: plug in, continue what was stopped, boot if dead. ready() waits until Slurm has noticed."""
        self._hosts.plug(name, True)
        if self._hosts.alive(name):
            self.cont_node(name)
        else:
            self._slurmd(name, "-b")

    def stop_node(self, name: str) -> None:
        """All processes of jobs on the node hang; Slurm's own go on."""
        for _ in range(3):  # again for what was forked meanwhile
            self._hosts.signal(name, signal.SIGSTOP, spare=("slurmd", "slurmstepd"))

    def cont_node(self, name: str) -> None:
        """End what stop_node() began."""
        self._hosts.signal(name, signal.SIGCONT, spare=("slurmd", "slurmstepd"))
