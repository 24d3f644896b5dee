"""Which kernels students' steps and teachers' forwards are fastest with here, network by network; what part the loss is.

python tests/bench/kernels.py [--rounds 9] [--rows 32] [--classes 100] [--size 32] [--compile] [--only WORD ...]

One process, one thread on a CPU (whose seconds at work count), or the GPU where there is one. In each round every variant
takes its turn, so a ratio compares steps that lie side by side. Writes RESULTS-kernels-<device>.md beside itself; what
takes TOO_LONG times as long as the first variant is left out of it.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import torch
from commit import commit

from pkd.bench import spread
from pkd.ds_config import load_ds_config
from pkd.engine import Engine
from pkd.hardware import cpu_model
from pkd.launcher import Launch
from pkd.loss import pyramid_loss
from pkd.models import build
from pkd.objective import Constants
from pkd.pyramid import build_pyramid
from pkd.recipe import Level, Model, Optimisation, Timeouts
from pkd.schedule import Router
from pkd.targets import Unpacker
from pkd.teacher import TeacherHost
from pkd.world import World

STUDENTS = ("mobilenet_v2", "shufflenet_v2_x1_0")
VARIANTS = {  # DeepSpeed configuration, channels_last, distill.compile
    "fp32": ("zero0", False, False),
    "fp32, channels last": ("zero0", True, False),
    "fp32, channels last, ZeRO 1": ("zero1", True, False),
    "bf16 autocast": ("zero0-autocast", False, False),
    "bf16 autocast, channels last": ("zero0-autocast", True, False),
    "bf16 autocast, channels last, ZeRO 1": ("zero1-autocast", True, False),
    "bf16 weights, channels last, ZeRO 1": ("zero1-bf16", True, False),
    "fp32, channels last, compiled": ("zero0", True, True),
    "bf16 autocast, channels last, compiled": ("zero0-autocast", True, True),
}
TEACHERS = ("resnet101", "resnet50", "resnet18")
FORWARDS = {  # bf16, channels last, rows at a time
    "fp32, blocks of 32": (False, False, 32),
    "fp32, blocks of 128": (False, False, 128),
    "fp32, channels last, blocks of 32": (False, True, 32),
    "fp32, channels last, blocks of 128": (False, True, 128),
    "bf16, channels last, blocks of 32": (True, True, 32),
    "bf16, channels last, blocks of 128": (True, True, 128),
    "bf16, channels last, blocks of 256": (True, True, 256),
}
STEPS = 3  # of a turn; the median counts
TOO_LONG = 4


class Step:
    """One optimizer step of some students under one variant."""

    def __init__(self, nets: tuple[str, ...], variant: tuple[str, bool, bool], ask: argparse.Namespace, device):
        torch.manual_seed(0)
        networks = {net: build(Model(name=net), ask.classes, 3, (ask.size, ask.size)) for net in nets}
        config, channels_last, compiled = variant
        self.engine = Engine(networks, [Optimisation(lr=1e-9)] * len(nets), load_ds_config(config), 1, device, channels_last,
                             compiled=compiled)
        self.images = torch.randint(0, 256, (ask.rows, 3, ask.size, ask.size), dtype=torch.uint8, device=device)
        self.device = device

    def seconds(self, steps: int = STEPS) -> float:
        found = []
        for _ in range(steps):
            began = now(self.device)
            logits = self.engine.forward(self.images)
            self.engine.backward(logits.square().mean())
            found.append(now(self.device) - began)
        return statistics.median(found)


class Answer:
    """A teacher's forward of 256 rows in blocks under one variant of FORWARDS."""

    def __init__(self, net: str, variant: tuple[bool, bool, int], ask: argparse.Namespace, device: torch.device):
        bf16, channels_last, rows = variant
        network = build(Model(name=net), ask.classes, 3, (ask.size, ask.size)).to(device)
        self.images = torch.randint(0, 256, (256, 3, ask.size, ask.size), dtype=torch.uint8)
        for norm in network.modules():
            norm.momentum = None  # statistics of the one batch that follows, with which a deep network's logits stay finite
        with torch.no_grad():
            network(self.images[:16].to(device))
        network = network.eval()
        self.host = TeacherHost(0, {0: network}, None, device, bf16, block=rows, channels_last=channels_last)
        self.device = device

    def seconds(self, steps: int = STEPS) -> float:
        found = []
        for _ in range(steps):
            began = now(self.device)
            self.host.forward(0, self.images)
            found.append(now(self.device) - began)
        return statistics.median(found)


def now(device: torch.device) -> float:
    """Seconds: on a CPU those that this process computed, which others on the machine hardly change."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Loss:
    """The loss of a step with the paper's or the composed objective: soft targets unpacked, forward and backward."""

    def __init__(self, kind: str, ask: argparse.Namespace, device: torch.device):
        levels = tuple(Level(model="m", teachers=count) for count in (1, 2, 4))
        pyramid = build_pyramid(levels, tuple(map(str, range(ask.classes))), 0)
        asked, own = list(range(7)), kind == "paper"
        labels = np.random.default_rng(0).integers(0, ask.classes, ask.rows)
        self.routes = Router(pyramid, [asked], own).routes(labels)
        self.unpacker, self.device, self.rows = Unpacker(pyramid, asked), device, ask.rows
        self.flat = torch.randn(self.routes.size).half()
        self.labels = torch.from_numpy(labels).to(device)
        self.constants = Constants(kind, 4.0, (0.6, 0.6, 1.0) if own else (1.0,), (0.2, 0.8) if own else (0.0, 0.0),
                                   (0.0, 0.0), own)
        self.logits = torch.randn(len(STUDENTS), ask.rows, ask.classes, device=device, requires_grad=True)

    def seconds(self, steps: int = STEPS) -> float:
        found = []
        for _ in range(5 * steps):
            began = now(self.device)
            levels = self.unpacker.unpack(self.routes, self.flat, slice(0, self.rows), self.device)
            loss, _ = pyramid_loss(self.logits, self.labels, levels, self.rows, self.constants)
            loss.backward()
            found.append(now(self.device) - began)
        return statistics.median(found)


def measured(programs: dict, rounds: int) -> dict:
    """Seconds of every program in every round."""
    first = {name: program.seconds(1) and program.seconds(1) for name, program in programs.items()}  # kernels are chosen
    left = [name for name in programs if first[name] < TOO_LONG * next(iter(first.values()))]
    found = {name: [] for name in left}
    for number in range(rounds):
        for name in left if number % 2 == 0 else reversed(left):
            found[name].append(programs[name].seconds())
    return found


def cells(values) -> str:
    return " | ".join(f"{value:.3g}" for value in spread(list(values)))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 9), ("rows", 32), ("classes", 100), ("size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""],
                        help="students' kernels beside fp32 whose names contain one of them; writes no page")
    ask = parser.parse_args()
    torch.set_num_threads(1)
    world = World(Launch("plain", 0, 1, 0, "", 0, "0", True), Timeouts())
    world.join_island("bench", [0])
    device = world.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_model()}, one thread"
    lines = ["# Kernels of students' steps and teachers' forwards", "",
             f"Written by `tests/bench/kernels.py` at commit {commit()} on {where}, torch {torch.__version__}: "
             f"{ask.rows} rows of {ask.size} pixels, {ask.classes} classes, {ask.rounds} rounds in which every variant "
             f"takes its turn; a ratio is of one round. What takes {TOO_LONG} times as long as the first variant has no row."
             + " Seconds are those that the process computed." * (device.type == "cpu"), "",
             "| students | kernels | ms a step: min | median | max | of fp32's time: min | median | max |",
             "|---|---|---|---|---|---|---|---|"]
    for nets in (STUDENTS[:1], STUDENTS[1:]):
        steps = {name: Step(nets, variant, ask, device) for name, variant in VARIANTS.items()
                 if (ask.compile or not variant[2]) and (name == "fp32" or any(word in name for word in ask.only))}
        found = measured(steps, ask.rounds)
        for name, seconds in found.items():
            ratios = [a / b for a, b in zip(seconds, found["fp32"])]
            lines.append(f"| {nets[0]} | {name} | {cells(1000 * s for s in seconds)} | {cells(ratios)} |")
            print(lines[-1], flush=True)
        for step in steps.values():
            step.engine.close()
    if ask.only != [""]:
        return world.close()
    lines += ["", "Frozen teachers, 256 rows, with their way to the device:", "",
              "| teacher | kernels | ms: min | median | max | of the first one's time: min | median | max |",
              "|---|---|---|---|---|---|---|---|"]
    for net in TEACHERS:
        found = measured({name: Answer(net, variant, ask, device) for name, variant in FORWARDS.items()}, ask.rounds)
        for name, seconds in found.items():
            ratios = [a / b for a, b in zip(seconds, found[next(iter(FORWARDS))])]
            lines.append(f"| {net} | {name} | {cells(1000 * s for s in seconds)} | {cells(ratios)} |")
            print(lines[-1], flush=True)
    best = Step(STUDENTS, VARIANTS["fp32, channels last"], ask, device)
    programs = {"step": best, **{kind: Loss(kind, ask, device) for kind in ("paper", "composed")}}
    found = measured(programs, ask.rounds)
    lines += ["", "The loss of both students (soft targets of seven teachers on three levels unpacked, forward, backward) "
              "beside their step in fp32, channels last:", "",
              "| objective | ms: min | median | max | share of the step in %: min | median | max |",
              "|---|---|---|---|---|---|---|"]
    for kind in ("paper", "composed"):
        shares = [100 * a / (a + b) for a, b in zip(found[kind], found["step"])]
        lines.append(f"| {kind} | {cells(1000 * s for s in found[kind])} | {cells(shares)} |")
        print(lines[-1], flush=True)
    kind = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    if device.type == "cuda":
        kind = where.lower().split()[:2][-1]  # h100 of "NVIDIA H100 80GB HBM3"
    (HERE / f"RESULTS-kernels-{kind}.md").write_text("\n".join(lines) + "\n")
    best.engine.close()
    world.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
