"""The table of speeds: pkd against the baselines, every program in turn; writes RESULTS.md. See launch/bench.sh.

python tests/bench/speed.py [--rounds 9] [--steps 16] [--folder PATH] [--only online ...]
"""

import argparse
import hashlib
import json
import os
import shutil
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
from commit import changed, commit
from tables import machine, ratios, speeds

from pkd.bench import Program, Trial, spread, take_turns
from pkd.data import load_data
from pkd.metrics import enough, steady
from pkd.models import build
from pkd.placement import Placement, outline
from pkd.recipe import Model
from pkd.recipe_file import load_recipe
from pkd.teacher import TeacherHost, images_last

HEAD = """\
Written by `launch/bench.sh speed` at commit {commit}: {machine}.
{rounds} rounds; in each, every program runs once: {steps} steps of 64 images (the published loop: half of them), the first
quarter of which warms up; pkd beside teachers {ours}, of which {timed} count that neither warm up nor have teachers that
are done already, and for which teachers answer as many. A ratio compares two runs of one round. ResNet-101 / 2 x ResNet-50
/ 4 x ResNet-18 teachers, 2 x MobileNetV2 and 2 x ShuffleNetV2 students, the paper's objective, 32 pixels, 100 classes, no
augmentation: one view of an image, for which the archive is filled once; that was timed once, before the rounds, and a
whole run is reckoned from it and from the speed of an epoch after the first (below is one by the clock). Two cores for each
program: two threads in one process, or two ranks of one thread. pkd is placed by auto, the default, which chose for students
alone: {alone}; from the archive: {archive}; online: {online}. In groups, each rank
trains some of the students on whole batches, as the published loop does; "in one group", which auto may not leave there,
both ranks train all four on half of each batch and average their gradients. The steady state leaves out that at an epoch's
start students wait for the first answers. Our kernels: students fp32, channels last, with pkd.depthwise; teachers {kernels}.
pkd's teachers answer {answer_steps} steps at once in blocks of {rows} rows. "Co-located": both ranks answer for teachers,
too, and each trains some of the students. With a core each the teachers are lighter, ResNet-50 / 2 x ResNet-18, so that
their work is at most 0.8 of the students'.
"""
ONE_GROUP = "placement.student_groups=1"
ANSWERS = {"window": 16, "answer_steps": 16}
ROWS = 64, 128  # of a block; the first unless the last takes a twentieth less time for as many: it pads more
AHEAD = ANSWERS["window"] + ANSWERS["answer_steps"]  # steps that teachers may be ahead
EPOCHS = 30  # of a whole run
PACKAGES = ("torch", "torchvision", "deepspeed")
NO_WARM_UP = {"schedule": "constant", "warmup_steps": 0}


def noise(folder: Path, count: int) -> dict:
    """A data set of so many images: nobody's speed depends on what they show."""
    chance, path = np.random.default_rng(0), folder / f"noise-{count}.npz"
    np.savez(path, x_train=chance.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), y_train=np.arange(count) % 100,
             x_test=chance.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8), y_test=np.arange(100) % 100,
             classes=np.array([f"{c:02}" for c in range(100)]))
    return {"name": "npz", "path": str(path)}


def recipes(folder: Path, forward: str, rows: int) -> dict[str, Path]:
    """The paper's pyramid, objective and students from torchvision, 32 pixels, 100 classes, batch 64; and one teacher with
    one student. forward: the teachers' arithmetic; rows: of a block.
    """
    base = {"data": noise(folder, 4800), "views": {}, "compare_views": False,
            "teachers": {"steps": 10, "lr": 1e-4, "batch": 32, "forward": forward}, "distill": {"epochs": 1, "batch": 64},
            "deepspeed": {"students": "zero0"}, "checkpoint_minutes": 1000, **ANSWERS, "answer_rows": rows}
    nets = ("mobilenet_v2", "shufflenet_v2_x1_0")
    students = [{"name": f"{net[:6]}{i}", "model": net, "lr": lr, "momentum": 0.9, "weight_decay": 2e-4, **NO_WARM_UP}
                for i in (0, 1) for net, lr in zip(nets, (0.06, 0.08))]
    kinds = {
        "paper": {"pyramid": [{"teachers": 1, "model": "resnet101"}, {"teachers": 2, "model": "resnet50"},
                              {"teachers": 4, "model": "resnet18"}], "students": students, "objective": {"kind": "paper"}},
        "light": {"pyramid": [{"teachers": 1, "model": "resnet50"}, {"teachers": 2, "model": "resnet18"}],
                  "students": students, "objective": {"kind": "paper"}},
        "pair": {"pyramid": [{"teachers": 1, "model": "resnet50"}], "students": students[:1],
                 "objective": {"kind": "top"}},
    }
    # For the comparison of losses: at the paper's rates a rounding error of 5e-6 is one of 1e-2 after two steps.
    slow = [{**student, "lr": student["lr"] / 100} for student in students]
    kinds["paper-slow"] = {**kinds["paper"], "students": slow}
    kinds["paper-whole"] = {**kinds["paper"], "data": noise(folder, 1200), "distill": {"epochs": EPOCHS, "batch": 64}}
    eager = {**base["teachers"], "forward": "fp32", "forward_channels_last": False}
    kinds["pair-eager"] = {**kinds["pair"], "channels_last": False, "teachers": eager}
    out = {}
    for name, own in kinds.items():
        out[name] = folder / f"{name}.yaml"
        out[name].write_text(yaml.safe_dump({"name": name, **base, **own}, sort_keys=False))
    return out


def seconds_of_forwards() -> dict[tuple[str, int], float]:
    """Seconds of one thread for 128 rows of each of the three teachers, by their arithmetic and the rows of a block."""
    images, out = torch.zeros(ROWS[-1], 3, 32, 32, dtype=torch.uint8), {}
    torch.set_num_threads(1)
    for forward, rows in (("fp32", ROWS[0]), ("fp32", ROWS[1]), ("bf16", ROWS[1])):
        nets = [build(Model(name=name), 100, 3, (32, 32)) for name in ("resnet101", "resnet50", "resnet18")]
        host = TeacherHost(0, dict(enumerate(nets)), None, torch.device("cpu"), forward == "bf16", block=rows)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            for index in host.networks:
                host.forward(index, images)
            times.append(time.perf_counter() - began)
        out[forward, rows] = min(times)
    return out


class Bench:
    """The programs, by name, each with the teachers of its recipe."""

    def __init__(self, folder: Path, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.commit = commit()  # of what is measured: let nobody edit it meanwhile
        asked = json.dumps([steps, ANSWERS]).encode()
        name = f"{self.commit}-{hashlib.sha256(asked + changed()).hexdigest()[:8]}.json"
        self.kept, forwards = folder / f"rates-{name}", folder / f"forwards-{name}"
        if not forwards.exists():  # else what an earlier start chose by holds for all rounds
            forwards.write_text(json.dumps([[*kind, seconds] for kind, seconds in seconds_of_forwards().items()]))
        self.seconds = {(forward, rows): seconds for forward, rows, seconds in json.loads(forwards.read_text())}
        self.forward, self.rows = min(self.seconds, key=self.seconds.__getitem__)
        if self.forward == "fp32" and self.seconds["fp32", ROWS[0]] < 1.05 * self.seconds["fp32", ROWS[1]]:
            self.rows = ROWS[0]
        self.folder, self.steps, self.recipes = folder, steps, recipes(folder, self.forward, self.rows)
        self.ours = enough(2 * steps + AHEAD, AHEAD, ANSWERS["answer_steps"])
        self.timed = steady(0, self.ours, AHEAD, ANSWERS["answer_steps"])
        self.memory: dict[str, dict[str, int]] = {}  # program -> role -> peak bytes of the largest rank
        self.holds: dict[str, dict[str, list[list[str]]]] = {}  # program -> role -> rank -> its teachers
        self.kinds: dict[str, str] = {}  # program -> its placement

    def taught(self, recipe: str) -> Path:
        """The run folder with the teachers of a recipe, which those of the same teachers share."""
        run = self.folder / recipe.removesuffix("-slow")
        if not run.exists():
            Trial(self.folder, [str(self.recipes[run.name])], 2).phase("teach", run=run)
        return run

    @property
    def kernels(self) -> str:
        last = images_last(None, torch.device("cpu"))
        name = {"fp32": "fp32, channels last" if last else "fp32 as they are", "bf16": "bf16, channels last"}
        times = "; ".join(f"{1000 * seconds:.0f} ms {name[forward]} in blocks of {rows}"
                          for (forward, rows), seconds in self.seconds.items())
        return f"{name[self.forward]} (one of each on {ROWS[-1]} rows: {times})"

    def fill(self) -> float:
        """Images per second while the archive of the paper's pyramid is filled anew by two ranks, without their start."""
        folder = self.taught("paper") / "soft-targets"
        shutil.rmtree(folder, ignore_errors=True)
        Trial(self.folder, [str(self.recipes["paper"])], 2).phase("archive", run=self.taught("paper"))
        record = json.loads((folder / "archive.json").read_text())
        written = sorted(path.stat().st_mtime for path in folder.glob("*.safetensors"))
        # Two ranks: the first two shards are there after the start and one shard each.
        return (record["samples"] - 2 * record["samples_per_shard"]) / (written[-1] - written[1])

    def pkd(self, recipe: str, ranks: int, *changes: str, threads: int = 2, name: str = "") -> float:
        alone = "objective.kind=alone" in changes or "soft_targets=archive" in changes
        trial = Trial(self.folder, self._words(recipe, ranks, threads), ranks)
        line = trial.distill(self.steps if alone else self.ours, *changes)
        self._remember(name, {role: int(peak) for role, peak in line["peak_memory_bytes"].items() if peak})
        placement = Placement.from_json(line["placement"])
        self.holds[name] = {role: [placement.answers_for(rank) for rank in range(ranks) if placement.role(rank) == role]
                            for role in ("student", "teacher")}
        self.kinds[name] = outline(placement)
        return line["steady_images_per_second"]

    def _words(self, recipe: str, ranks: int, threads: int) -> list[str]:
        return [str(self.recipes[recipe]), f"teachers_from={self.taught(recipe)}", f"threads={max(1, threads // ranks)}"]

    def baseline(self, script: str, recipe: str, kernels: str, ranks: int, threads: int, name: str = "") -> float:
        found = self.losses_and_rate(script, recipe, kernels, ranks, threads)
        self._remember(name, {"student": found["peak_memory_bytes"]})
        return found["images_per_second"]

    def _remember(self, name: str, peaks: dict[str, int]) -> None:
        known = self.memory.setdefault(name, {})
        known.update({role: max(peak, known.get(role, 0)) for role, peak in peaks.items()})

    def teachers_not_held(self, name: str, role: str) -> int:
        """Bytes of the weights that a program's ranks of a role do not hold, of the one that holds the most."""
        bytes_of = {path.stem: path.stat().st_size for path in self.taught("paper").glob("teachers/*.safetensors")}
        return sum(bytes_of.values()) - max(sum(bytes_of[one] for one in held) for held in self.holds[name][role])

    def beside_teachers(self) -> float:
        """The students of `light` alone on one core while its teachers, without any exchange, run on the other."""
        argv = self._argv("teachers_only", "light", "ours", 1, steps=100_000, threads=1)
        busy = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            if not busy.stdout.readline():
                raise RuntimeError("the teachers beside which students were to be timed did not start")
            rate = self.pkd("light", 1, "objective.kind=alone", threads=1)
            if busy.poll() is not None:
                raise RuntimeError("the teachers beside which students were timed ended before they did")
            return rate
        finally:
            busy.kill()
            busy.wait()

    def losses_and_rate(self, script: str, recipe: str, kernels: str, ranks: int = 1, threads: int = 2) -> dict:
        steps = self.steps // 2 if script == "published_loop" else self.steps  # which takes four times as long for each
        argv = self._argv(script, recipe, kernels, ranks, steps, threads)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads // ranks)}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.strip().splitlines()[-1])

    def _argv(self, script: str, recipe: str, kernels: str, ranks: int, steps: int, threads: int) -> list[str]:
        start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      "--nproc_per_node", str(ranks)]
        return [*start, str(HERE / "baselines" / f"{script}.py"), str(self.recipes[recipe]), "--taught",
                str(self.taught(recipe)), "--steps", str(steps), "--threads", str(threads // ranks), "--kernels", kernels]

    def check_equal_math(self) -> list[str]:
        """The first losses of baselines and pkd, which agree as far as rounding lets them: fp16 soft targets alone differ by
        5e-6 and the networks make it 2e-4 within two steps; half the learning rate differs by 4e-3.
        """
        out = []
        for script, ranks in (("published_loop", 1), ("naive_ddp", 2)):
            theirs = self.losses_and_rate(script, "paper-slow", "ours", ranks)["losses"]
            trial = Trial(self.folder, self._words("paper-slow", ranks, 2), ranks)
            run = Path(tempfile.mkdtemp(prefix="traced-", dir=self.folder))
            kind = "single" if ranks == 1 else "co-located"
            trial.phase("distill", "trace=true", f"placement.kind={kind}", "--steps", "3", run=run)
            ours = [list(json.loads(line)["loss"].values()) for line in (run / "steps.jsonl").read_text().splitlines()]
            worst = float(np.abs(np.array(ours) / np.array(theirs) - 1).max())
            out.append(f"{script} and pkd on {ranks} rank(s): the first three steps' losses differ by {worst:.1e} at most")
            if worst > 1e-3:
                raise RuntimeError(f"{out[-1]}: {ours} against {theirs}")
        return out

    def whole_run(self) -> list[float]:
        """Seconds by the clock, from the start of the processes to their end, of filling an archive and of EPOCHS epochs of
        distilling from it.
        """
        taught, run = self.taught("paper-whole"), Path(tempfile.mkdtemp(prefix="whole-", dir=self.folder))
        shutil.rmtree(taught / "soft-targets", ignore_errors=True)
        began = time.perf_counter()
        Trial(self.folder, [str(self.recipes["paper-whole"])], 2).phase("archive", run=taught)
        filled = time.perf_counter()
        Trial(self.folder, self._words("paper-whole", 2, 2), 2).phase("distill", "soft_targets=archive", run=run)
        return [filled - began, time.perf_counter() - filled]

    def in_one_group(self) -> None:
        """Online, as naive data parallelism has the students: on every rank, all of them. For its memory only."""
        self.pkd("paper", 2, "placement={kind: co-located, student_groups: 1}", name="pkd online, in one group")


def programs(bench: Bench) -> dict[str, Program]:
    def pkd(name: str, recipe: str, ranks: int, *changes: str, threads: int = 2) -> Program:
        return Program(name, lambda: bench.pkd(recipe, ranks, *changes, threads=threads, name=name))

    def other(name: str, script: str, recipe: str, kernels: str, ranks: int = 1, threads: int = 2) -> Program:
        return Program(name, lambda: bench.baseline(script, recipe, kernels, ranks, threads, name=name))
    # What one ratio compares lies side by side, as far as that is possible.
    all_of_them = [
        pkd("students alone, in one group", "paper", 2, "objective.kind=alone", ONE_GROUP),
        pkd("pkd archive, in one group", "paper", 2, "soft_targets=archive", ONE_GROUP),
        pkd("students alone", "paper", 2, "objective.kind=alone"),
        pkd("pkd archive", "paper", 2, "soft_targets=archive"),
        other("published loop, our kernels", "published_loop", "paper", "ours"),
        other("published loop, eager", "published_loop", "paper", "eager"),
        pkd("pkd online, co-located", "paper", 2, "placement={kind: co-located, student_groups: 2}"),
        pkd("pkd online", "paper", 2),
        other("naive data parallel, our kernels", "naive_ddp", "paper", "ours", 2),
        other("one core: teachers alone", "teachers_only", "light", "ours", threads=1),
        Program("one core: students alone, teachers on the other", bench.beside_teachers),
        pkd("one core: students alone", "light", 1, "objective.kind=alone", threads=1),
        pkd("one core: students, the other: their teachers", "light", 2, "placement.kind=dedicated"),
    ]
    return {program.name: program for program in all_of_them}


def rows(rates: dict[str, list[float]], filled: float) -> list[tuple[str, str, list[float]]]:
    """Figure, what was asked for, and the ratio in each round."""
    def over(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(rates[one], rates[other])]

    def whole(other: str, one: str = "pkd archive", epochs: int = 30) -> list[float]:
        return [epochs / b / (1 / filled + epochs / a) for a, b in zip(rates[one], rates[other])]
    one_group = ", in one group"
    return [
        ("archive, 2nd epoch on, against students alone", "0.95", over("pkd archive", "students alone")),
        (f"the same{one_group}", "", over(f"pkd archive{one_group}", f"students alone{one_group}")),
        *((f"{what} against published loop, {kernels}{where}", asked if not where else "",
           ratio(f"published loop, {kernels}", f"{program}{where}"))
          for where, what, program, ratio, every in (
              ("", "archive, 30 epochs with its filling,", "pkd archive", whole, ("5.5", "2.8")),
              (one_group, "archive, 30 epochs with its filling,", "pkd archive", whole, ("5.5", "2.8")),
              ("", "online", "pkd online", lambda other, one: over(one, other), ("3.5", "2.0")),
              (", co-located", "online", "pkd online", lambda other, one: over(one, other), ("3.5", "2.0")))
          for kernels, asked in zip(("eager", "our kernels"), every)),
        ("online against naive data parallel, our kernels", "1.0", over("pkd online", "naive data parallel, our kernels")),
        ("a teacher rank and a student rank, a core each: students against alone on one core", "0.92",
         over("one core: students, the other: their teachers", "one core: students alone")),
        ("its ceiling: teachers on the other core, no exchange", "", over("one core: students alone, teachers on the other",
                                                                       "one core: students alone")),
        ("its teachers' work over its students' work", "at most 0.8", over("one core: students alone",
                                                                           "one core: teachers alone")),
    ]


def by_the_clock(bench: Bench, rates: dict[str, list[float]], filled: float, whole: list[float]) -> str:
    steps = len(load_data(load_recipe(str(bench.recipes["paper-whole"]), []).data).splits["train"]) // 64
    theirs = {kernels: EPOCHS * steps * 64 / spread(rates[f"published loop, {kernels}"])[1]
              for kernels in ("eager", "our kernels")}
    return (f"A whole run of {EPOCHS} epochs of {steps} steps by the clock: {whole[0]:.0f} s to fill the archive and "
            f"{whole[1]:.0f} s to distill from it, from the start of the processes to their end, with {EPOCHS} validations "
            "and the archive's hashes; the published loop's steps alone take "
            + ", ".join(f"{seconds:.0f} s at its median speed, {kernels} ({seconds / sum(whole):.1f} times as long)"
                        for kernels, seconds in theirs.items())
            + f". The archive of the table was filled at {filled:.0f} images/s by two ranks.")


def memory(bench: Bench) -> list[str]:
    naive = bench.memory["naive data parallel, our kernels"]["student"]
    out = []
    for name in ("pkd online, in one group", "pkd online", "pkd online, co-located"):
        peaks = sorted(bench.memory[name].items(), key=lambda one: -one[1])
        said = [f"{(naive - peak) / 1e6:.0f} MB less for its largest {role} rank, where teachers of "
                f"{bench.teachers_not_held(name, role) / 1e6:.0f} MB are not held" for role, peak in peaks]
        out.append(f"Memory (peak resident set) of {name} against naive data parallelism's, whose ranks hold all teachers: "
                   f"{'; '.join(said)}. The largest rank of all is a {peaks[0][0]} rank.")
    return out


def page(bench: Bench, rates: dict[str, list[float]], equal: list[str], rounds: int, filled: float,
         whole: list[float]) -> str:
    lines = ["# Speed", "",
        HEAD.format(commit=bench.commit, machine=machine(*PACKAGES), rounds=rounds, steps=bench.steps,
                    ours=bench.ours, timed=len(bench.timed), kernels=bench.kernels,
                    alone=bench.kinds["students alone"], archive=bench.kinds["pkd archive"],
                    online=bench.kinds["pkd online"], rows=bench.rows, **ANSWERS),
        *ratios(rows(rates, filled)), "", *speeds(rates, bench.memory), "", by_the_clock(bench, rates, filled, whole), "",
        *memory(bench), "", "Equal mathematics:", *equal]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where teachers, their archive and finished rounds are kept")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="programs whose names contain one of them; writes no page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pkd-speed-") as folder:
        bench = Bench(arguments.folder or Path(folder), arguments.steps)
        chosen = [program for name, program in programs(bench).items()
                  if not arguments.only or any(word in name for word in arguments.only)]
        if arguments.only:
            if any("archive" in program.name for program in chosen):
                bench.fill()
            rates = take_turns(chosen, arguments.rounds, lambda text: print(text, flush=True))
            for name, own in rates.items():
                print(name, bench.kinds.get(name, ""), *(f"{value:.1f}" for value in spread(own)))
            return
        equal = bench.check_equal_math()
        print("\n".join(equal), flush=True)
        if bench.kept.exists():  # of an earlier start with the same --folder
            rates, bench.memory, bench.holds, bench.kinds, filled, whole = json.loads(bench.kept.read_text())
        else:
            rates, filled, whole = {program.name: [] for program in chosen}, bench.fill(), bench.whole_run()
            bench.in_one_group()
        for number in range(len(rates["pkd online"]), arguments.rounds):
            order = chosen if number % 2 == 0 else chosen[::-1]
            for name, own in take_turns(order, 1, lambda text: print(text, flush=True)).items():
                rates[name] += own
            bench.kept.write_text(json.dumps([rates, bench.memory, bench.holds, bench.kinds, filled, whole]))
            (HERE / "RESULTS.md").write_text(page(bench, rates, equal, number + 1, filled, whole))


if __name__ == "__main__":
    main()
