"""What every rank tells the others about itself at the start: its node, its process and its device."""

import os
import socket
from dataclasses import asdict, dataclass

import psutil
import torch


@dataclass(frozen=True)
class Hardware:
    host: str
    pid: int
    started: float  # the process's start, seconds since 1970: pids are used again
    device: str
    memory: int  # bytes of the device; on a CPU of the whole host, which its ranks share


def hardware(device: torch.device) -> Hardware:
    """This process's own."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = "cpu", psutil.virtual_memory().total
    return Hardware(socket.gethostname(), os.getpid(), psutil.Process().create_time(), name, memory)


def nodes(ranks: list[Hardware]) -> tuple[int, ...]:
    """The node of each rank, numbered in the order in which ranks first name them; names of hosts may change."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    return tuple(hosts.index(rank.host) for rank in ranks)


def memory_per_rank(ranks: list[Hardware]) -> tuple[int, ...]:
    """Bytes that each rank may count on: ranks of one host share its memory if they run on its CPU."""
    sharing = {host: sum(r.host == host and r.device == "cpu" for r in ranks) for host in {r.host for r in ranks}}
    return tuple(r.memory // sharing[r.host] if r.device == "cpu" else r.memory for r in ranks)


def to_json(ranks: list[Hardware]) -> list[dict]:
    return [{"rank": index, **asdict(rank)} for index, rank in enumerate(ranks)]
