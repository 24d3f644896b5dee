"""What every rank tells the others about itself at the start: its node, its process and its device."""

import os
import platform
import socket
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from pkd.rank_map import Ranks


@dataclass(frozen=True)
class Hardware:
    host: str
    pid: int
    started: float  # the process's start, seconds since 1970: pids are used again
    device: str
    memory: int  # bytes of the device; on a CPU of the whole host, which its ranks share
    cores: str  # that this process may run on, a hexadecimal mask
    unit: str  # which of the host's devices it is: ranks may share one


def hardware(device: torch.device) -> Hardware:
    """This process's own."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, unit = properties.name, properties.total_memory, str(properties.uuid)
    else:
        name, memory, unit = "cpu", min(psutil.virtual_memory().total, _allowance()), "cpu"
    process = psutil.Process()
    return Hardware(socket.gethostname(), process.pid, process.create_time(), name, memory, f"{_cores():x}", unit)


def _allowance(mine: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a job or a container may use, by the control group (version 2) that this process is in, or those above."""
    least = 2**63
    try:
        folder = groups / mine.read_text(encoding="utf-8").rpartition("::/")[2].strip()
        for group in (folder, *folder.parents):
            limit = group / "memory.max"
            if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
                least = min(least, int(text))
    except OSError:
        pass
    return least


def _cores() -> int:
    """A mask of the cores that this process may run on; launchers give each rank some, or all to all."""
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << core for core in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def nodes(ranks: list[Hardware]) -> tuple[int, ...]:
    """The node of each rank, numbered in the order in which ranks first name them; names of hosts may change."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    return tuple(hosts.index(rank.host) for rank in ranks)


def memory_per_rank(ranks: list[Hardware], most_gib: float | None = None) -> tuple[int, ...]:
    """Bytes that each rank may count on: ranks on one device, such as a host's CPU, share its memory. most_gib: the recipe's
    placement.memory_gib.
    """
    sharing = Counter((rank.host, rank.unit) for rank in ranks)
    most = int(2**30 * most_gib) if most_gib else 2**63
    return tuple(min(most, rank.memory // sharing[rank.host, rank.unit]) for rank in ranks)


def devices(ranks: list[Hardware]) -> tuple[int, ...]:
    """The GPU of each rank, numbered in the order in which ranks first name them; on CPUs every rank counts as one apart."""
    names = [(rank.host, rank.unit if rank.device != "cpu" else index) for index, rank in enumerate(ranks)]
    known = list(dict.fromkeys(names))
    return tuple(known.index(name) for name in names)


def cores_per_node(ranks: list[Hardware]) -> tuple[float, ...]:
    """Cores of each node that its ranks compute on, in the order of nodes(); no limit where they compute on GPUs."""
    out = []
    for host in dict.fromkeys(rank.host for rank in ranks):
        mask = 0
        for rank in ranks:
            if rank.host == host:
                mask |= int(rank.cores, 16)
        out.append(float(mask.bit_count()) if all(r.device == "cpu" for r in ranks if r.host == host) else float("inf"))
    return tuple(out)


def known_ranks(ranks: list[Hardware], threads: int, most_gib: float | None = None) -> Ranks:
    return Ranks(memory_per_rank(ranks, most_gib), nodes(ranks), cores_per_node(ranks), threads, devices(ranks))


def to_json(ranks: list[Hardware]) -> list[dict]:
    return [{"rank": index, **asdict(rank)} for index, rank in enumerate(ranks)]
