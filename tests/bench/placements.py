"""Predicted against measured steps and idle time, and `auto` against placements made by hand, by real runs on this
machine's cores.

PYTHONPATH=tests python tests/bench/placements.py FOLDER [CASE ...]     ten minutes a case on two quiet cores; writes
RESULTS-placements.md beside itself, with the planner's own figures on worlds that are not here
"""

import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import yaml
from commit import commit
from planner import table
from ranks import clean_environment, run

from pkd.console import Console
from pkd.plan import plan
from pkd.recipe_file import load_recipe

HERE = Path(__file__).resolve().parent
ROUNDS = 3
AUTO = "placement.kind=auto"
TWO, THREE, FOUR = (("placement.kind=co-located",
                     *(f"placement={{kind: dedicated, student_ranks: {n}}}" for n in range(1, world)),
                     *(f"placement={{kind: dedicated, student_ranks: {n}, student_groups: 2}}" for n in range(2, world, 2)),
                     *["placement={kind: co-located, student_groups: 2}"] * (world % 2 == 0)) for world in (2, 3, 4))
HEAVY, LIGHT = "pyramid.0.model={name: pkd_resnet_l, width: 2}", "pyramid.0.model={name: pkd_resnet_s, width: 1}"
PAPER, SMALL = "paper", "small"
CASES = {  # recipe, ranks, what is changed, placements made by hand
    "the paper's, two ranks": (PAPER, 2, (), TWO),
    "the paper's, three ranks": (PAPER, 3, (), THREE),
    "small, two ranks": (SMALL, 2, (), TWO),
    "small, heavy top": (SMALL, 2, (HEAVY,), TWO),
    "small, light top": (SMALL, 2, (LIGHT,), TWO),
    "small, four ranks": (SMALL, 4, (), FOUR),
}
KINDS = {  # images, classes, epochs, of which the first is not counted, recipe
    PAPER: (1300, 100, 2, {
        "pyramid": [{"teachers": 1, "model": "resnet101"}, {"teachers": 2, "model": "resnet50"},
                    {"teachers": 4, "model": "resnet18"}], "objective": {"kind": "paper"}, "views": {},
        "students": [{"name": f"{net[:6]}{n}", "model": net} for n in (0, 1) for net in ("mobilenet_v2",
                                                                                       "shufflenet_v2_x1_0")]}),
    SMALL: (2000, 20, 3, {
        "pyramid": [{"teachers": 1, "model": "pkd_resnet_m"}, {"teachers": 2, "model": "pkd_resnet_s"}],
        "students": [{"name": "mobile", "model": "pkd_mobile"}, {"name": "shuffle", "model": "pkd_shuffle"}],
        "views": {"crop": 4, "flip": True}}),
}


def recipe_file(folder: Path, kind: str) -> Path:
    """Noise serves as images: nobody's speed depends on them."""
    chance, (images, classes, epochs, own) = np.random.default_rng(0), KINDS[kind]
    np.savez(folder / f"{kind}.npz", x=chance.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8),
             y=np.arange(images) % classes)
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({
        "name": "bench", "data": {"name": "npz", "path": str(folder / f"{kind}.npz")},
        "teachers": {"steps": 10, "batch": 16, "lr": 1e-4, "schedule": "constant", "evaluate_every": 10},
        "distill": {"epochs": epochs, "batch": 64}, **own}))
    return path


def distilled(world: int, recipe: Path, folder: Path, taught: Path, timed: Path, *words) -> None:
    """timed: where the times of parts are kept."""
    run(world, "distill", recipe, "--run-folder", folder, f"teachers_from={taught}", *words, timeout=400,
        env=lambda rank: {"XDG_CACHE_HOME": str(timed)})


def lines_of(folder: Path) -> list[dict]:
    """A run's metrics, of the epochs after the first."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]


def who_is_where(placement: dict) -> str:
    """What makes two placements the same: neither the seconds that were predicted nor why it was chosen."""
    sources = [[source["rank"], source["teachers"], source["group"]] for source in placement["sources"]]
    return json.dumps([placement["kind"], placement["student_ranks"], placement["groups"], sources])


class Figures:
    """Of one placement, over the rounds in which it was run."""

    def __init__(self, placement: dict):
        self.placement = placement
        self.predicted: list[float] = []  # ms a step
        self.measured: list[float] = []
        self.idle: dict[str, list[tuple[float, float]]] = defaultdict(list)  # role -> shares, predicted and measured

    def add(self, found: dict, lines: list[dict]) -> None:
        """found: what `pkd plan` says."""
        self.predicted.append(found["step_ms"])
        self.measured.append(statistics.median(64_000 / line["images_per_second"] for line in lines))
        for role, share in found["idle"].items():
            of = [rank["rank"] for rank in found["ranks"] if rank["role"] == role]
            self.idle[role].append((share, 1 - statistics.fmean(line["busy"][rank] for line in lines for rank in of)))

    def row(self, name: str, by: str) -> str:
        placement, guess, real = self.placement, statistics.median(self.predicted), statistics.median(self.measured)
        hosts = ", ".join("+".join(source["teachers"]) for source in placement["sources"])
        groups = f" in {placement['groups']} groups" if placement["groups"] > 1 else ""
        idle = "; ".join(f"{role}s " + " / ".join(f"{100 * statistics.median(shares):.0f}" for shares in zip(*both))
                         for role, both in self.idle.items())
        trains = f"{placement['student_ranks']} of {placement['world']} train{groups}"
        cells = (name, by, f"{placement['kind']}, {trains}; {hosts}",
                 f"{guess:.1f}", f"{real:.1f}", f"{min(self.measured):.1f} to {max(self.measured):.1f}",
                 f"{100 * (guess / real - 1):+.0f} %", idle)
        return "| " + " | ".join(cells) + " |"


def case(name: str, folder: Path) -> tuple[list[str], list[float]]:
    """Rows of the table, and in each round auto's step over that of the placement by hand whose median is the best."""
    kind, world, changes, by_hand = CASES[name]
    folder = folder / name.replace(" ", "-").replace("'", "").replace(",", "")
    folder.mkdir(parents=True)
    recipe, taught = recipe_file(folder, kind), folder / "teachers"
    run(1, "teach", recipe, "--run-folder", taught, *changes, timeout=400)
    figures: dict[str, Figures] = {}  # of each placement; the same one may be auto's and one by hand
    steps: dict[str, list[float]] = defaultdict(list)  # of each wish, round by round: teachers are shared out in each anew
    chosen, hand = [], set()
    for number in range(ROUNDS):
        timed = folder / f"timed-{number}"  # parts are timed in each round anew
        os.environ["XDG_CACHE_HOME"] = str(timed)
        distilled(world, recipe, folder / f"timing-{number}", taught, timed, *changes, AUTO, "--steps", 1)
        plans, wishes = {}, {}
        for wish in (AUTO, *by_hand):
            found = plan(load_recipe(str(recipe), [*changes, wish]), world, Console(quiet=True))
            key = who_is_where(found["placement"])
            figures.setdefault(key, Figures(found["placement"]))
            wishes.setdefault(key, []).append(wish)
            plans[key] = found
            chosen += [key] * (wish == AUTO)
            hand |= {key} if wish != AUTO else set()
        for key in list(wishes) if number % 2 == 0 else list(wishes)[::-1]:
            to = folder / f"{number}-{list(wishes).index(key)}"
            distilled(world, recipe, to, taught, timed, *changes, wishes[key][0])
            placed = json.loads((to / "placement.json").read_text())["placement"]
            if who_is_where(placed) != key:
                raise RuntimeError(f"{to} ran as {placed}, which is not what was planned: {key}")
            figures[key].add(plans[key], lines_of(to))
            for wish in wishes[key]:
                steps[wish].append(figures[key].measured[-1])
            print(name, number, wishes[key], f"{plans[key]['step_ms']:.0f} {figures[key].measured[-1]:.0f}", flush=True)
    rows = []
    for key, own in figures.items():
        by = " and ".join([f"auto ({chosen.count(key)} of {ROUNDS})"] * (key in chosen) + ["hand"] * (key in hand))
        rows.append(own.row(name, by))
        print(rows[-1], flush=True)
    best = min(by_hand, key=lambda wish: statistics.median(steps[wish]))
    over = [auto / other for auto, other in zip(steps[AUTO], steps[best])]
    print(name, best, over, flush=True)
    return rows, over


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    measured = commit()
    found = {name: case(name, folder) for name in names}
    if names != list(CASES):
        return
    (HERE / "RESULTS-placements.md").write_text("\n".join([
        "# Placements: predicted and measured", "",
        f"Written by `tests/bench/placements.py` at commit {measured} on {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, ranks of one thread each. The paper's: ResNet-101 / 2 x ResNet-50 / 4 x ResNet-18, 2 x "
        "MobileNetV2, 2 x ShuffleNetV2, the paper's objective; small: networks for small images, the composed objective. "
        f"{ROUNDS} rounds; in each, all parts are timed anew and every placement runs 3 epochs of 25 steps (the "
        "paper's: 2 of 16) of 64 views of 32 pixels, the first not counted; medians over rounds, of medians over epochs. "
        "Idle: predicted / measured, in % of the time; a student rank's measured share is what it waits for soft targets, "
        "its predicted one holds its waiting for other students, too.", "",
        "| case | by | who is where | predicted ms | measured ms | of rounds | off by | idle % |",
        "|---|---|---|---|---|---|---|---|",
        *(row for rows, _ in found.values() for row in rows), "",
        "`auto`'s step over that of the placement by hand with the best median, round by round:", "",
        "| case | min | median | max |", "|---|---|---|---|",
        *(f"| {name} | {min(over):.3f} | {statistics.median(over):.3f} | {max(over):.3f} |"
          for name, (_, over) in found.items()), "",
        "# Worlds that are not here", "", "A binary tree of teachers all asked about every sample, 80 GiB a rank, 8 ranks a "
        "node, 8 samples a student rank at least; busy by the planner's own simulation.", "", *table(), ""]))


if __name__ == "__main__":
    os.environ.update(clean_environment())
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
