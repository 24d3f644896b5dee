"""The exchange alone, by many light processes on this machine: time of a step, sockets, bytes and allocations of a rank.

Real gloo, real routes, no networks: teachers answer with numbers that say whose they are. Prints a table, or JSON lines, or
writes RESULTS-exchange.md (four minutes):

    python tests/bench/exchange.py --students 8 --sources 8 --classes 100 --batch 256
    python tests/bench/exchange.py --page
"""

import argparse
import json
import multiprocessing
import os
import socket
import struct
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pkd.exchange import Exchange
from pkd.launcher import Launch
from pkd.placement import Placement, Source
from pkd.pyramid import build_pyramid
from pkd.recipe import Level, Timeouts
from pkd.schedule import Router, Schedule
from pkd.targets import Unpacker
from pkd.wire import KINDS, choose, received, sockets
from pkd.world import World

WARM, PROFILED = 5, 10  # steps before the measured ones, and after them
CASES = (({}, 2, 14), ({}, 8, 8), ({"co_located": True}, 16, 16), ({}, 16, 8), ({}, 12, 12), ({"classes": 1000}, 12, 12),
         ({"pixels": 32, "steps": 20}, 12, 4))  # what is asked, students, sources
BEYOND = (32, 128, 512, 2048)  # students, and as many sources
PAGE = """\
# The exchange alone

Written by `tests/bench/exchange.py --page` at commit {commit}: light processes with real gloo over loopback and real
routes, without networks; {cores} cores for all of them, so times are those of a crowd and say only which kind is dearer.
Batch 256, 100 classes, two levels, window 2, mean of 40 steps (20 with pixels). Sockets are counted in `/proc`, bytes by the
kernel (`tcp_info`), the largest rank each; in brackets what `pkd/wire.py` predicts. Both kinds brought the same bits.

| students + sources | kind | ms a step | sockets a rank | KB received, a student rank and step | KB sent, a rank and step \
| torch allocations a step |
|---|---|---|---|---|---|---|
{cases}

Received bytes may exceed the prediction by what headers take and by steps that are already under way when the kernel is
asked. A broadcast's students pass on what they receive, which is what `sent` shows. Views that are sent have connections of
their own, which the prediction leaves out.

Allocations are those that torch's profiler sees while steps are begun, sent, taken and drained. Left out are the teachers'
own work, the loss, and what groups of students exchange for an ensemble term, which allocate.

## Beyond this machine, by `pkd/wire.py`

Three levels of 1,000 classes, every teacher asked about every sample, 16 samples a student rank.

| students + sources | batch | broadcast: sockets a rank | MB received a step | direct: sockets a rank | MB received a step \
| auto |
|---|---|---|---|---|---|---|
{beyond}

The ballot's group comes on top: a full mesh over all ranks, as many sockets a rank as there are ranks.
"""


class Echo:
    """In place of a TeacherHost: every row is made of its teacher's and its sample's number."""

    def __init__(self, source: int, width: np.ndarray):
        self.source, self.width = source, width

    def answer(self, questions, epoch):
        for question in questions:
            routes, ids, mine = question.routes, question.ids, question.routes.source == self.source
            if question.images is not None:
                asked = ids[np.unique(routes.position[mine])]
                assert np.array_equal(question.images.numpy()[:len(asked), 0, 0, -1], asked % 251), "views of other samples"
            rows = (ids[routes.position[mine]] * 31 + routes.teacher[mine] * 7) % 2039
            question.flat.numpy()[routes.slices[self.source]] = np.repeat(rows, self.width[routes.teacher[mine]])


class Pixels:
    """In place of Views: images of the sample's number, in a buffer that is made once."""

    def __init__(self, side: int, batch: int):
        self.channels, self.size = 3, (side, side)
        self.buffer = torch.zeros(batch, 3, side, side, dtype=torch.uint8)

    def batch(self, ids, epoch):
        self.buffer.numpy()[:len(ids)] = (ids.numpy() % 251)[:, None, None, None]
        return self.buffer[:len(ids)]


def rank(index: int, port: int, kind: str, ask: argparse.Namespace, out) -> None:
    torch.set_num_threads(1)
    levels = Level(model="m", teachers=1), Level(model="m", teachers=max(2, ask.sources - 1))
    pyramid = build_pyramid(levels, tuple(map(str, range(ask.classes))), 0)
    hosted = [list(range(len(pyramid.teachers)))[i::ask.sources] for i in range(ask.sources)]
    world_size = ask.students + (0 if ask.co_located else ask.sources)
    first = 0 if ask.co_located else ask.students
    placement = Placement("co-located" if ask.co_located else "dedicated", world_size, ask.students, 1, tuple(
        Source(first + i, tuple(pyramid.teachers[t].name for t in own), 1.0) for i, own in enumerate(hosted)))
    world = World(Launch("plain", index, world_size, index, "127.0.0.1", port, "0", index == 0), Timeouts())
    world.meet("the start", False)  # whoever serves the store has all its connections
    before = len(connections()[0])
    labels = np.random.default_rng(0).integers(0, ask.classes, ask.batch * 8)
    schedule = Schedule(np.arange(len(labels)), ask.batch, 0)
    router = Router(pyramid, hosted, False, ask.students if kind == "direct" else 1)
    hosts = [Echo(index - first, router.width)] if first <= index < first + ask.sources else []
    exchange = Exchange(world, placement, schedule, router, labels, ask.window, hosts, kind,
                        Pixels(ask.pixels, ask.batch) if ask.pixels else None)
    trains = index < ask.students
    mine = schedule.micro_batches(ask.students, index, 1)[0] if trains else None
    unpacker, crc, ends = Unpacker(pyramid, list(range(len(pyramid.teachers)))), 0, []
    steps = WARM + ask.steps + PROFILED
    opened, traffic = len(connections()[0]) - before, connections()[1]

    def post(step):
        exchange.fill(step // 8, step % 8, 8)
        exchange.transfer(step % 8)

    def one(step):
        nonlocal crc
        if not trains:
            return post(step)
        if step + ask.window < steps:
            post(step + ask.window)
        routes, flat = exchange.take(step % 8)
        if step < WARM:
            for level in unpacker.unpack(routes, flat, mine, torch.device("cpu")):
                crc = zlib.crc32(level.logits.numpy().tobytes(), crc)
    for step in range(ask.window if trains else 0):
        post(step)
    for step in range(WARM + ask.steps):
        if step >= WARM:
            ends.append(time.perf_counter())
        one(step)
    ends.append(time.perf_counter())
    moved = connections()[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.empty(1000)  # the one allocation that must be seen
        for step in range(WARM + ask.steps, steps):
            one(step)
        exchange.drain()
    allocated = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in seen.profiler.kineto_results.events())
    done = WARM + ask.steps + (ask.window if trains else 0)
    out.put({"rank": index, "kind": kind, "crc": crc,
             "sockets": opened, "predicted_sockets": sockets(kind, placement, index), "loops": loops(),
             "received": (moved[0] - traffic[0]) / done if trains else 0, "sent": (moved[1] - traffic[1]) / done,
             "predicted_received": received(kind, placement, router.largest(ask.batch)), "allocations": allocated - 1,
             "steps": PROFILED, "ms": 1000 * float(np.median(np.diff(ends))),
             "mean_ms": 1000 * (ends[-1] - ends[0]) / ask.steps})
    world.meet("the end", False)
    time.sleep(0.5 * (index == 0))
    os._exit(0)


def loops() -> int:
    """Threads in which gloo waits for connections (Linux)."""
    return sum(path.read_text().startswith("gloo_tcp_loop") for path in Path("/proc/self/task").glob("*/comm"))


def connections() -> tuple[list[int], tuple[int, int]]:
    """This process's sockets, and the bytes that its TCP connections received and had acknowledged (Linux: tcp_info)."""
    found, received, sent = [], 0, 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                found.append(int(name))
                if one.type == socket.SOCK_STREAM and one.family != socket.AF_UNIX:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    acknowledged, arrived = struct.unpack_from("QQ", info, 120)
                    received, sent = received + arrived, sent + acknowledged
        except OSError:
            continue
    return found, (received, sent)


def measure(kind: str, ask: argparse.Namespace) -> list[dict]:
    """What every rank found, by rank."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.SimpleQueue()
    size = ask.students + (0 if ask.co_located else ask.sources)
    ranks = [context.Process(target=rank, args=(index, port, kind, ask, out), daemon=True) for index in range(size)]
    for process in ranks:
        process.start()
    deadline, found = time.monotonic() + ask.timeout, []
    while len(found) < size:
        if not out.empty():
            found.append(out.get())
        elif time.monotonic() > deadline or any(process.exitcode for process in ranks):
            sys.exit(f"{size - len(found)} of {size} ranks did not come to their end")
        else:
            time.sleep(0.01)
    for process in ranks:
        process.join()
    return sorted(found, key=lambda one: one["rank"])


def row(kind: str, found: list[dict]) -> str:
    """Of the ranks' findings the largest each, as a table has it."""
    most = {key: max(one[key] for one in found) for key in found[0] if key != "kind"}
    return (f"{kind} | {np.mean([one['mean_ms'] for one in found]):.1f} | {most['sockets']} ({most['predicted_sockets']}) "
            f"| {most['received'] / 1000:.1f} ({most['predicted_received'] / 1000:.1f}) | {most['sent'] / 1000:.1f} "
            f"| {most['allocations'] / most['steps']:g} |")


def beyond(ranks: int) -> str:
    placement = Placement("dedicated", 2 * ranks, ranks, 1, tuple(
        Source(ranks + i, (f"level2-{i}",), 1.0) for i in range(ranks)))
    logits = 3 * 1000 * 16 * ranks
    cells = [cell for kind in KINDS for cell in (
        f"{max(sockets(kind, placement, rank) for rank in (0, ranks)):,}", f"{received(kind, placement, logits) / 1e6:.1f}")]
    return f"| {ranks:,} + {ranks:,} | {16 * ranks:,} | {' | '.join(cells)} | {choose('auto', placement, logits)[0]} |"


def page(ask: argparse.Namespace) -> str:
    from commit import commit  # which lies beside this file: the tests import that as a part of a package

    lines, measured = [], commit()
    for more, students, sources in CASES:
        here = argparse.Namespace(**{**vars(ask), "students": students, "sources": sources, **more})
        name = f"{students} co-located" if here.co_located else f"{students} + {sources}"
        name += ", 1,000 classes" * (here.classes == 1000)
        name += f", views of 3 x {here.pixels} x {here.pixels} sent" if here.pixels else ""
        by_kind = {kind: measure(kind, here) for kind in KINDS}
        first, other = ([one["crc"] for one in found] for found in by_kind.values())
        assert first == other, "both kinds bring the same bits"
        lines += [f"| {name if kind == KINDS[0] else ''} | {row(kind, found)}" for kind, found in by_kind.items()]
        print(*lines[-2:], sep="\n", flush=True)
    return PAGE.format(commit=measured, cores=os.cpu_count(), cases="\n".join(lines),
                       beyond="\n".join(map(beyond, BEYOND)))


def main(*arguments: str) -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--students", type=int, default=8)
    words.add_argument("--sources", type=int, default=8)
    words.add_argument("--classes", type=int, default=100)
    words.add_argument("--batch", type=int, default=256)
    words.add_argument("--window", type=int, default=2)
    words.add_argument("--steps", type=int, default=40)
    words.add_argument("--timeout", type=float, default=120)
    words.add_argument("--pixels", type=int, default=0, help="student ranks send views of this side, three channels")
    words.add_argument("--co-located", action="store_true")
    words.add_argument("--json", action="store_true")
    words.add_argument("--page", action="store_true")
    ask = words.parse_args(arguments or None)
    if ask.page:
        Path(__file__).with_name("RESULTS-exchange.md").write_text(page(ask))
        return
    if not ask.json:
        print(f"{ask.students} student ranks, {ask.sources} sources, batch {ask.batch}, {ask.classes} classes, "
              f"{os.cpu_count()} cores{f', views of {ask.pixels} pixels sent' if ask.pixels else ''}\n\n"
              "| kind | ms a step | sockets a rank (predicted) | KB received a student rank and step (predicted) "
              "| KB sent a rank and step | allocations a step |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        found = measure(kind, ask)
        if ask.json:
            for one in found:
                print(json.dumps(one))
            continue
        print(f"| {row(kind, found)}")


if __name__ == "__main__":
    main()
