"""Images per second and the reached share of a GPU's arithmetic for the ImageNet pyramid; writes RESULTS-gpu.md.

python tests/bench/gpu.py [--rounds 3] [--steps 12] [--batch 256] [--size 224] [--images 8700] [--folder PATH]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
import yaml

from pkd.bench import Program, Trial, spread, take_turns
from pkd.cost import network_cost
from pkd.devices import device_like
from pkd.files import write_json
from pkd.metrics import enough, steady
from pkd.recipe import Model
from pkd.vision import torchvision

HEAD = """\
Written by `tests/bench/gpu.py --rounds {rounds} --steps {steps} --batch {batch} --size {size}` at commit {commit}: {device},
{cores} CPU cores, torch {torch}, torchvision {vision}. ResNet-101 / 2 x ResNet-50 / 4 x ResNet-18 teachers, MobileNetV2 and
ShuffleNetV2 students, 1,000 classes, the paper's objective, batches of {batch} images of {size} pixels, noise, held in
memory, no augmentation. {rounds} rounds; in each, every program runs once: {steps} steps, the first quarter of which warms
up; pkd beside teachers {ours}, of which {timed} count. Students: {students}, channels last; teachers: bf16, channels last,
{answer_steps} steps at once in blocks of {answer_rows} rows. "Published loop" asks every teacher anew for each student: "our
kernels" are bf16 autocast and channels last for students and pkd's for teachers, "eager" is fp32 as torch comes (TF32 in
convolutions). FLOP: two a multiplication and addition of convolutions and linear layers, a backward pass as two forward
ones; the share is of the data sheet's {peak:.0f} TFLOP/s (dense, 16 bit).
"""
ANSWERS = {"window": 4, "answer_steps": 2, "answer_rows": 128}
AHEAD = ANSWERS["window"] + ANSWERS["answer_steps"]
PYRAMID = (("resnet101", 1), ("resnet50", 2), ("resnet18", 4))
STUDENTS = {"mobilenet_v2": 0.06, "shufflenet_v2_x1_0": 0.08}  # learning rates
CLASSES = 1000
NO_TEACHERS = "objective={kind: alone}"


def write_recipe(folder: Path, ask: argparse.Namespace) -> Path:
    chance, shape = np.random.default_rng(0), (3, ask.size, ask.size)
    np.savez(folder / "noise.npz", x_train=chance.integers(0, 256, (ask.images, *shape), dtype=np.uint8),
             y_train=np.arange(ask.images) % CLASSES, x_test=chance.integers(0, 256, (CLASSES, *shape), dtype=np.uint8),
             y_test=np.arange(CLASSES), classes=np.array([f"{c:03}" for c in range(CLASSES)]))
    recipe = {
        "name": "gpu", "data": {"name": "npz", "path": str(folder / "noise.npz")}, "views": {}, "compare_views": False,
        "pyramid": [{"teachers": count, "model": name} for name, count in PYRAMID],
        "teachers": {"steps": 4, "lr": 1e-4, "batch": 64, "forward": "bf16"}, "objective": {"kind": "paper"},
        "students": [{"name": name.split("_")[0], "model": name, "lr": lr, "momentum": 0.9, "weight_decay": 2e-4,
                      "schedule": "constant", "warmup_steps": 0} for name, lr in STUDENTS.items()],
        "distill": {"epochs": 1, "batch": ask.batch}, "deepspeed": {"students": ask.students}, "threads": 8,
        "checkpoint_minutes": 1000, **ANSWERS,
    }
    path = folder / "gpu.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def flops(size: int) -> tuple[float, float]:
    """Of one image: all students' steps, and one forward of the teachers that are asked about it."""
    def forward(name: str, classes: int) -> float:
        return network_cost(Model(name=name), classes, 3, (size, size)).flops
    return (3 * sum(forward(name, CLASSES) for name in STUDENTS),
            sum(forward(name, CLASSES // count) for name, count in PYRAMID))


class Bench:
    def __init__(self, folder: Path, ask: argparse.Namespace):
        self.folder, self.ask, self.taught = folder, ask, folder / "taught"
        self.recipe = folder / "gpu.yaml"
        if not self.recipe.exists():
            write_recipe(folder, ask)
        self.ours = enough(2 * ask.steps + AHEAD, AHEAD, ANSWERS["answer_steps"])
        self.memory: dict[str, int] = {}
        began = time.perf_counter()
        for phase in ("teach", "archive"):  # what is there is kept
            Trial(folder, [str(self.recipe)], 1).phase(phase, run=self.taught)
        print(f"taught and archived in {time.perf_counter() - began:.0f} s", flush=True)

    def pkd(self, name: str, ranks: int, *changes: str) -> Program:
        def run() -> float:
            alone = NO_TEACHERS in changes or "soft_targets=archive" in changes
            trial = Trial(self.folder, [str(self.recipe), f"teachers_from={self.taught}"], ranks)
            line = trial.distill(self.ask.steps if alone else self.ours, *changes)
            self.memory[name] = int(sum(line["peak_memory_bytes"].values()))  # of the ranks on the one GPU
            return line["steady_images_per_second"]
        return Program(name, run)

    def loop(self, name: str, kernels: str) -> Program:
        def run() -> float:
            argv = [sys.executable, str(HERE / "baselines" / "published_loop.py"), str(self.recipe), "--taught",
                    str(self.taught), "--steps", str(self.ask.steps), "--threads", "8", "--kernels", kernels,
                    "--device", self.ask.device]
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found = json.loads(done.stdout.strip().splitlines()[-1])
            self.memory[name] = found["peak_memory_bytes"]
            return found["images_per_second"]
        return Program(name, run)

    def programs(self) -> list[Program]:
        return [
            self.pkd("students alone", 1, NO_TEACHERS),
            self.pkd("pkd archive", 1, "soft_targets=archive"),
            self.pkd("pkd online, one rank", 1),
            self.pkd("pkd online, teachers on a second rank of the same GPU", 2, "placement.kind=dedicated"),
            self.loop("published loop, our kernels", "ours"),
            self.loop("published loop, eager", "eager"),
        ]


def page(bench: Bench, rates: dict[str, list[float]], device: str, rounds: int) -> str:
    ask, peak = bench.ask, device_like(device).half
    train, forward = flops(ask.size)
    work = {name: train + forward * (0 if name in ("students alone", "pkd archive") else
                                     len(STUDENTS) if name.startswith("published") else 1) for name in rates}
    lines = ["# On a GPU", "",
             HEAD.format(rounds=rounds, steps=ask.steps, batch=ask.batch, size=ask.size, commit=ask.commit, device=device,
                         cores=os.cpu_count(), torch=torch.__version__, vision=torchvision.__version__, ours=bench.ours,
                         timed=len(steady(0, bench.ours, AHEAD, ANSWERS["answer_steps"])), students=ask.students,
                         peak=peak / 1e12, **ANSWERS),
             "| program | images/s: min | median | max | of students alone: min | median | max | GFLOP an image | "
             "TFLOP/s, median | share of the peak | GPU memory, GB |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(own, rates["students alone"])]
        speed = spread(own)[1] * work[name]
        lines.append(f"| {name} | " + " | ".join(f"{value:.0f}" for value in spread(own)) + " | "
                     + " | ".join(f"{value:.2f}" for value in spread(ratios))
                     + f" | {work[name] / 1e9:.2f} | {speed / 1e12:.1f} | {100 * speed / peak:.1f} % | "
                     f"{bench.memory[name] / 1e9:.1f} |")
    lines += ["", "| ratio, round by round | min | median | max |", "|---|---|---|---|"]
    for one in ("pkd archive", "pkd online, one rank", "pkd online, teachers on a second rank of the same GPU"):
        for other in ("published loop, our kernels", "published loop, eager"):
            ratios = spread([a / b for a, b in zip(rates[one], rates[other])])
            lines.append(f"| {one} / {other} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 3), ("steps", 12), ("batch", 256), ("size", 224), ("images", 8700)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--students", default="zero0-autocast", help="their DeepSpeed configuration")
    parser.add_argument("--folder", type=Path, help="where images, teachers and their archive are kept")
    parser.add_argument("--device", default="cuda", help="of the baselines; pkd takes a GPU where there is one")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to tell")
    ask = parser.parse_args()
    ask.commit = ask.commit or subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, text=True,
                                              capture_output=True).stdout.strip()
    device = torch.cuda.get_device_name() if ask.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory(prefix="pkd-gpu-") as temporary:
        folder = ask.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, ask)
        kept = folder / "rates.json"  # of an earlier start with the same --folder
        what = {key: value for key, value in vars(ask).items() if key not in ("rounds", "folder")}
        rates = {program.name: [] for program in bench.programs()}
        if kept.exists():
            before, rates, bench.memory = json.loads(kept.read_text())
            if before != what:
                sys.exit(f"{folder} holds figures of {before}: give another --folder")

        def write(rounds: int) -> None:
            (HERE / "RESULTS-gpu.md").write_text(page(bench, rates, device, rounds))
        for number in range(min(map(len, rates.values())), ask.rounds):
            for program in bench.programs()[::-1 if number % 2 else 1]:
                if len(rates[program.name]) == number:
                    rates[program.name] += take_turns([program], 1, lambda text: print(text, flush=True))[program.name]
                    write_json(kept, [what, rates, bench.memory])
            write(number + 1)
        write(min(map(len, rates.values())))  # also where all rounds were there before


if __name__ == "__main__":
    main()
