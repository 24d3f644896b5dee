"""This process among the others: store, device, islands and bridges.

An *island* is a group of ranks whose default process group is itself, so DeepSpeed's WORLD is the island. A *bridge* is
a raw gloo group over host memory that joins islands. All addresses go through one store, under the launch's attempt.
"""

import contextlib
import datetime
import errno
import json
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pkd.errors import LocalError, PassingError, UserError
from pkd.launcher import Launch
from pkd.recipe import Timeouts


class LostPeer(Exception):
    """A collective broke: another rank ended, or the network did. Names group, step, rank and role."""


class World:
    def __init__(self, launch: Launch, timeouts: Timeouts):
        _allow_many_files()
        self.launch, self.timeouts = launch, timeouts
        self.rank, self.size = launch.rank, launch.world_size
        self.device = _device(launch.local_rank)
        self.store = self.connect()
        self.bridges: list[dist.ProcessGroupGloo] = []
        self._gloo: dict[bool, Any] = {}  # by `lazy`; each has a thread that wakes a hundred times a second
        self.devices: list[int] = []  # of every rank, numbered, once they are known (hardware.devices)

    def connect(self) -> dist.Store:
        """A connection to the store of its own (one client's waits block its other users)."""
        launch = self.launch
        if launch.port == 0:
            store = getattr(self, "_local", None) or dist.HashStore()
            self._local = store
            return dist.PrefixStore(f"pkd/{launch.attempt}", store)
        mine = _own_address(launch)
        if "GLOO_SOCKET_IFNAME" in os.environ:
            _check_interfaces(os.environ["GLOO_SOCKET_IFNAME"])
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = _interface(mine, launch.address)
        serve = launch.serves_store and not hasattr(self, "store")
        listener = _listen(launch) if serve else None
        try:
            store = dist.TCPStore(launch.address, launch.port, launch.world_size, is_master=serve,
                                  timeout=datetime.timedelta(seconds=self.timeouts.start), wait_for_workers=False,
                                  master_listen_fd=listener)
        except (RuntimeError, ValueError) as error:
            raise LocalError(f"rank {launch.rank} could not reach the store at {launch.address}:{launch.port} within "
                            f"{self.timeouts.start:.0f} s ({str(error).splitlines()[0]}): check that rank 0 runs "
                            "there and that the port is open") from None
        return dist.PrefixStore(f"pkd/{launch.attempt}", store)

    def join_island(self, name: str, ranks: list[int]) -> None:
        """Make `ranks` the default process group of this process; DeepSpeed reads rank and size from the environment."""
        refuse_shared(self.devices, ranks, name)
        me = ranks.index(self.rank)
        os.environ.update(RANK=str(me), WORLD_SIZE=str(len(ranks)), LOCAL_RANK=str(self.device.index or 0),
                          MASTER_ADDR=self.launch.address, MASTER_PORT=str(self.launch.port))
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda" and "GLOO_SOCKET_IFNAME" in os.environ:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "=" + os.environ["GLOO_SOCKET_IFNAME"])
        dist.init_process_group(backend, store=dist.PrefixStore(f"island/{name}", self.store), rank=me,
                                world_size=len(ranks), timeout=datetime.timedelta(seconds=self.timeouts.group))

    def leave_island(self) -> None:
        if not dist.is_initialized():
            return
        import deepspeed

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # releases DeepSpeed's own references to the groups as well
        elif dist.is_initialized():
            dist.destroy_process_group()

    def bridge(self, name: str, ranks: list[int], lazy: bool = False) -> dist.ProcessGroupGloo | None:
        """A gloo group across islands, the first of `ranks` its root; None outside it or for a single rank.

        lazy: two ranks are connected when both first speak to each other, which waits; else every rank to every other, now.
        """
        if self.rank not in ranks or len(ranks) == 1:
            return None
        if lazy not in self._gloo:
            interface = os.environ["GLOO_SOCKET_IFNAME"].split(",")[0]
            self._gloo[lazy] = dist.ProcessGroupGloo.create_device(interface=interface, lazy_init=lazy)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [self._gloo[lazy]]
        options._timeout = datetime.timedelta(seconds=self.timeouts.group)
        group = dist.ProcessGroupGloo(dist.PrefixStore(f"bridge/{name}", self.store), ranks.index(self.rank), len(ranks),
                                      options)
        self.bridges.append(group)
        return group

    def first(self, name: str, decide: Callable[[], Any], by: int = 0) -> Any:
        """decide() on rank `by` alone, its JSON-able answer on every rank that asks; its UserError ends them all.

        `name` must differ between calls.
        """
        key = f"first/{name}"
        if self.rank == by:
            try:
                answer = {"ok": decide()}
            except UserError as error:
                self.store.set(key, json.dumps({"error": str(error)}))
                raise
            self.store.set(key, json.dumps(answer))
            return answer["ok"]
        answer = json.loads(self._wait_for(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["ok"]

    def gather(self, name: str, mine: Any, ranks: list[int] | None = None) -> list[Any] | None:
        """The JSON-able `mine` of `ranks` (None: all), in their order, on rank 0, the first of them; None elsewhere.

        `name` must differ between calls.
        """
        if self.rank:
            self.store.set(f"gather/{name}/{self.rank}", json.dumps(mine))
            return None
        others = ranks[1:] if ranks else range(1, self.size)
        return [mine] + [json.loads(self._wait_for(f"gather/{name}/{rank}")) for rank in others]

    def _wait_for(self, key: str) -> bytes:
        """What another rank sets, however long it works at it: the watchdog sees to those that do not."""
        while not self.store.check([key]):
            time.sleep(0.01)
        return self.store.get(key)

    def meet(self, name: str, stopped: bool, asked: Callable[[], object] = lambda: None) -> bool:
        """Wait, however long, until every rank has called this with `name`; whether any of them was stopped.

        asked: called while this rank waits, to pass on a signal that reaches it alone.
        """
        self.store.add(f"stopped/{name}", int(stopped))
        self.store.add(f"here/{name}", 1)
        while self.store.add(f"here/{name}", 0) < self.size:
            asked()
            time.sleep(0.02)
        return self.store.add(f"stopped/{name}", 0) > 0

    def close(self) -> None:
        """Drop all groups, after all ranks met; the store's server leaves last.

        A raw group that is alive at the interpreter's exit aborts the process at random.
        """
        self.bridges.clear()
        self.leave_island()
        self.leave_store(30.0)

    def leave_store(self, patience: float) -> None:
        """Tell that this rank needs the store no more; who serves it waits so many seconds for all to have said so."""
        self.store.add("left", 1)
        deadline = time.monotonic() + patience
        while self.launch.serves_store and self.store.add("left", 0) < self.size and time.monotonic() < deadline:
            time.sleep(0.02)


def refuse_shared(devices: list[int], ranks: list[int], name: str) -> None:
    """Raises UserError where two of `ranks` are on one GPU: NCCL, by which an island speaks, wants one for each."""
    own = [devices[rank] for rank in ranks] if devices else ranks
    for at, device in enumerate(own):
        if device in own[:at]:
            raise UserError(f"ranks {ranks[own.index(device)]} and {ranks[at]} would train together (island {name}) but are "
                            "on one GPU, and NCCL wants one for each: start at most one rank a GPU, or give them different "
                            "parts (placement.kind=dedicated placement.student_ranks=1, or as many "
                            "placement.student_groups as student ranks), or set CUDA_VISIBLE_DEVICES= for the CPU")


def _allow_many_files() -> None:
    """As many open files as the system lets a process have: of many ranks' sockets most end on rank 0."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2**16) if hard == resource.RLIM_INFINITY else hard, hard))


def _device(local_rank: int) -> torch.device:
    """The visible GPU of this rank (ranks beyond their number share them), or the CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _check_interfaces(wanted: str) -> None:
    there = psutil.net_if_addrs()
    for name in wanted.split(","):
        if name not in there:
            raise LocalError(f"GLOO_SOCKET_IFNAME is {wanted}, but the network interfaces of {socket.gethostname()} are "
                             f"{', '.join(there)}: name one that all nodes have, or unset it")


def _own_address(launch: Launch) -> str:
    """This node's address on the network that reaches rank 0."""
    address = launch.address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, launch.port))
        except OSError as error:
            raise LocalError(f"the master address {address} cannot be reached ({error}): check MASTER_ADDR") from None
        there, mine = probe.getpeername()[0], probe.getsockname()[0]
    if launch.nodes > 1 and there.startswith("127."):
        raise LocalError(f"{launch.nodes} nodes are to reach rank 0 at {address}, but that name is {there} here, which no "
                         f"other node can reach: correct /etc/hosts of {socket.gethostname()}, or set MASTER_ADDR to an "
                         "address of its network")
    return mine


def _interface(mine: str, address: str) -> str:
    """Name of the network interface that has the address `mine`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == mine for a in addresses):
            return name
    raise LocalError(f"no network interface has the address {mine} that reaches {address}: set GLOO_SOCKET_IFNAME")


def _listen(launch: Launch) -> int:
    """A listening socket on the job's own interface only, handed to the store's server."""
    address, port = launch.address, launch.port
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(4096)
    except OSError as error:
        said = f"rank 0, on {socket.gethostname()}, cannot serve the store at {address}:{port} ({error.strerror}): "
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(said + "set MASTER_ADDR to an address of that node") from None
        if launch.by == "srun":
            raise PassingError(said + "the job's next start takes another port") from None
        raise UserError(said + "choose another MASTER_PORT, or end the job that holds it") from None
    return listener.detach()
