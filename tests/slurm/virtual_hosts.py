"""Hosts made of Linux namespaces on this one machine, joined by a bridge; its own network is not touched."""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TOOLS = ("ip", "unshare", "setpriv", "mount", "umount")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # often not in the PATH of a user who became root
RUN, NAMED, NETNS = Path("/run"), Path("/run/netns"), Path("/etc/netns")

# What the hosts need of the kernel, tried in namespaces that vanish with the probe.
PROBE = "mount -t tmpfs none /dev/shm && ip link add veth type veth peer name peer && ip link add name bridge type bridge"
# The shell stays as the first process of the pid namespace: it reaps orphans, which a daemon in its place would not.
# Each host has its own /dev/shm: equal pids of different hosts must not meet in one file there.
FIRST = 'hostname "$1" && mount -t tmpfs tmpfs /dev/shm && shift && { "$@" & wait $!; }'


def search_path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def missing(*tools: str) -> str | None:
    """Why no hosts with these tools can be made here, or None if they can."""
    if os.geteuid():
        return "virtual hosts need root"
    absent = [tool for tool in (*tools, *TOOLS) if not shutil.which(tool, path=search_path())]
    if absent:
        return f"not installed: {', '.join(absent)} (in Debian's packages slurm-wlm, munge, iproute2, util-linux, mount)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", PROBE],
                           capture_output=True, text=True, env={**os.environ, "PATH": search_path()})
    return f"network namespaces are not permitted here: {' '.join(probe.stderr.split())}" if probe.returncode else None


def call(*command, check: bool = True) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env={**os.environ, "PATH": search_path()})
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(done.args)}: {done.stderr.strip()}")


def until(done: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def read(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""  # ended meanwhile


def parent(pid: int) -> int:
    found = re.search(r"PPid:\s+(\d+)", read(pid, "status"))
    return int(found[1]) if found else 0


def listening(pid: int) -> set[str]:
    """The addresses on which a process accepts connections, in the network namespace that it is in."""
    own, found = set(), set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:
            pass  # closed meanwhile
    for words in map(str.split, [*read(pid, "net/tcp").splitlines(), *read(pid, "net/tcp6").splitlines()]):
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            number = bytes.fromhex(words[1].split(":")[0])  # in words of four bytes, each the wrong way round
            packed = b"".join(number[at:at + 4][::-1] for at in range(0, len(number), 4))
            found.add(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed))
    return found


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # ended meanwhile


def members(namespace: str) -> list[int]:
    """Every process in a named network namespace, whatever its pid namespace, by the pids of this machine."""
    try:
        wanted = os.stat(NAMED / namespace)
    except FileNotFoundError:
        return []
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.path.samestat(os.stat(f"/proc/{entry}/ns/net"), wanted):
                found.append(int(entry))
        except OSError:
            pass  # ended meanwhile
    return found


class Hosts:
    """The first host is the hub: it holds the bridge. The hosts die with the thread that started them."""

    def __init__(self, folder: Path, names: list[str]):
        digest = hashlib.sha256(str(folder).encode()).digest()
        # The tag is in the name of every namespace, mount and folder, so leftovers are found without a record.
        self.key = f"pkd-{digest.hex()[:8]}"
        self.tag = f"{self.key}-{os.getpid()}"
        self.scratch = RUN / self.tag  # a socket's path has room for 107 characters: too few below most test folders
        subnet = f"10.{64 + digest[0] % 128}.{digest[1]}"
        self.addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, 1)}
        self.hub = names[0]
        self.running: dict[str, subprocess.Popen] = {}

    def space(self, host: str) -> str:
        return f"{self.tag}-{host}"

    def inside(self, host: str) -> list[str]:
        """The prefix of a command that is to run in a host's network, with its /etc/hosts, but with this machine's pids."""
        return ["ip", "netns", "exec", self.space(host)]

    def ip(self, host: str, *arguments: str) -> None:
        call("ip", "-netns", self.space(host), *arguments)

    def create(self) -> None:
        # Host names must lead to these addresses, or gloo binds to localhost; the IPv6 forms and "files" keep c10d's reverse
        # look-ups from asking a name server that is not there.
        lines = [f"{at} {name}\n::ffff:{at} {name}\n" for name, at in self.addresses.items()]
        for name, at in self.addresses.items():
            space = self.space(name)
            (NETNS / space).mkdir(parents=True)  # ip netns exec lays these files over those of /etc
            (NETNS / space / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
            (NETNS / space / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
            call("ip", "netns", "add", space)
            self.ip(name, "link", "set", "lo", "up")
            if name == self.hub:
                self.ip(name, "link", "add", "name", "eth0", "type", "bridge")
            else:
                self.ip(self.hub, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", space)
                self.ip(self.hub, "link", "set", name, "master", "eth0", "up")
            self.ip(name, "addr", "add", f"{at}/24", "dev", "eth0")
            self.ip(name, "link", "set", "eth0", "up")

    def mount(self, folder: Path, mib: int) -> None:
        """A small tmpfs; only processes started later see it."""
        call("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", self.tag, folder)

    def spawn(self, name: str, host: str, log: Path, *command) -> None:
        """Start a daemon on a host, in hostname, pid and mount namespaces of its own."""
        # Each link of the chain kills the next: this thread, unshare, the first process of the pid namespace, all others.
        with open(log, "ab") as out:
            self.running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.inside(host), "unshare", "--uts", "--mount", "--pid", "--fork",
                 "--kill-child=SIGKILL", "--mount-proc", "sh", "-c", FIRST, "sh", host, *map(str, command)], cwd="/",
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={"PATH": search_path(), "LC_ALL": "C"},
                start_new_session=True)  # Ctrl-C must leave the end to remove()

    def alive(self, name: str) -> bool:
        return self.running[name].poll() is None

    def kill(self, host: str) -> None:
        """Everything on the host dies; its kernel lives on, so peers see their connections closed."""
        self.running[host].kill()
        self.running[host].wait()
        if not until(lambda: not members(self.space(host)), 10, 0.02):
            raise RuntimeError(f"{host} did not die: {[read(pid, 'cmdline') for pid in members(self.space(host))]}")

    def plug(self, host: str, on: bool) -> None:
        """The cable's end at the bridge, so that the host keeps its routes and just hears nothing."""
        self.ip(self.hub, "link", "set", host, "up" if on else "down")

    def pids(self, host: str, pattern: str = "") -> list[int]:
        """Without the two processes that hold the host up, whose command lines contain those of others."""
        top = self.running[host].pid
        return [pid for pid in members(self.space(host))
                if top not in (pid, parent(pid)) and pattern in read(pid, "cmdline")]

    def listens(self, host: str, port: int) -> bool:
        """Does a process on the host accept connections there?"""
        sockets = next((text for pid in self.pids(host) if (text := read(pid, "net/tcp"))), "")
        return bool(re.search(rf":{port:04X} \S+ 0A ", sockets))

    def signal(self, host: str, number: int, spare: tuple[str, ...]) -> None:
        """To every process on the host but those of these names."""
        for pid in self.pids(host):
            if read(pid, "comm") not in spare:
                send(pid, number)

    def remove(self) -> None:
        """All that carries this folder's mark, whoever started it, and what other owners left who were killed."""
        names = [entry.name for place in (RUN, NAMED, NETNS) if place.exists() for entry in place.iterdir()]
        names += Path("/proc/mounts").read_text().split()
        for tag in sorted({found[0] for name in names if (found := re.match(r"pkd-[0-9a-f]{8}-\d+", name))}):
            if tag.startswith(f"{self.key}-") or not Path(f"/proc/{tag.rsplit('-', 1)[1]}").exists():
                self._remove(tag)
        for process in self.running.values():
            process.kill()
            process.wait()
        self.running.clear()

    def _remove(self, tag: str) -> None:
        spaces = {entry.name for place in (NAMED, NETNS) if place.exists() for entry in place.glob(f"{tag}-*")}

        def empty() -> bool:
            pids = [pid for space in spaces for pid in members(space)]
            for pid in pids:
                send(pid, signal.SIGKILL)
            for process in self.running.values():
                process.poll()  # a zombie is still a member
            return not pids
        until(empty, 10, 0.05)
        for space in spaces:
            call("ip", "netns", "del", space, check=False)
            shutil.rmtree(NETNS / space, ignore_errors=True)
        for line in Path("/proc/mounts").read_text().splitlines():
            source, target = line.split()[:2]
            if source == tag:
                call("umount", "--lazy", target)
        shutil.rmtree(RUN / tag, ignore_errors=True)
