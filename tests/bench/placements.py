"""Predicted against measured step time, and `auto` against placements made by hand, by real runs on this machine's cores.

PYTHONPATH=tests python tests/bench/placements.py FOLDER     a few minutes a case on two quiet cores; writes
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
from planner import table
from ranks import clean_environment, run

from pkd.console import Console
from pkd.plan import plan
from pkd.recipe_file import load_recipe

HERE = Path(__file__).resolve().parent
ROUNDS, EPOCHS = 3, 3  # epochs of 25 steps; the first is not counted
AUTO = "placement.kind=auto"
TWO, THREE, FOUR = (("placement.kind=co-located",
                     *(f"placement={{kind: dedicated, student_ranks: {n}}}" for n in range(1, world)),
                     *(f"placement={{kind: dedicated, student_ranks: {n}, student_groups: 2}}" for n in range(2, world, 2)),
                     *["placement={kind: co-located, student_groups: 2}"] * (world % 2 == 0)) for world in (2, 3, 4))
HEAVY, LIGHT = "pyramid.0.model={name: pkd_resnet_l, width: 2}", "pyramid.0.model={name: pkd_resnet_s, width: 1}"
CASES = {  # ranks, what is changed, placements made by hand
    "two ranks": (2, (), TWO),
    "heavy top": (2, (HEAVY,), TWO),
    "light top": (2, (LIGHT,), TWO),
    "own routes": (2, ("objective.kind=paper",), TWO),
    "three ranks": (3, (), THREE),
    "four ranks": (4, (), FOUR),
}


def recipe_file(folder: Path) -> Path:
    chance = np.random.default_rng(0)
    np.savez(folder / "noise.npz", x=chance.integers(0, 256, (2000, 3, 32, 32), dtype=np.uint8), y=np.arange(2000) % 20)
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({
        "name": "bench", "data": {"name": "npz", "path": str(folder / "noise.npz")}, "views": {"crop": 4, "flip": True},
        "pyramid": [{"teachers": 1, "model": "pkd_resnet_m"}, {"teachers": 2, "model": "pkd_resnet_s"}],
        "teachers": {"steps": 1, "batch": 8, "evaluate_every": 1},
        "students": [{"name": "mobile", "model": "pkd_mobile"}, {"name": "shuffle", "model": "pkd_shuffle"}],
        "distill": {"epochs": EPOCHS, "batch": 64}}))
    return path


def distilled(world: int, recipe: Path, folder: Path, taught: Path, timed: Path, *words) -> None:
    """timed: where the times of parts are kept."""
    run(world, "distill", recipe, "--run-folder", folder, f"teachers_from={taught}", *words, timeout=250,
        env=lambda rank: {"XDG_CACHE_HOME": str(timed)})


def step_of(folder: Path) -> float:
    """Median milliseconds of a run's steps, over the epochs after the first."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(1000 * 64 / line["images_per_second"] for line in lines[1:])


def who_is_where(placement: dict) -> str:
    """What makes two placements the same: neither the seconds that were predicted nor why it was chosen."""
    sources = [[source["rank"], source["teachers"], source["group"]] for source in placement["sources"]]
    return json.dumps([placement["kind"], placement["student_ranks"], placement["groups"], sources])


def case(name: str, recipe: Path, folder: Path) -> tuple[list[str], float]:
    """Rows of the table, and auto's step over the best by hand."""
    world, changes, by_hand = CASES[name]
    folder = folder / name.replace(" ", "-")
    taught = folder / "teachers"
    run(1, "teach", recipe, "--run-folder", taught, *changes, timeout=250)
    placements: dict[str, dict] = {}  # as JSON -> what the planner says of it; the same one may be auto's and one by hand
    steps: dict[str, list[float]] = defaultdict(list)
    predicted: dict[str, list[float]] = defaultdict(list)
    chosen, hand = [], set()
    for number in range(ROUNDS):
        timed = folder / f"timed-{number}"  # parts are timed in each round anew
        os.environ["XDG_CACHE_HOME"] = str(timed)
        distilled(world, recipe, folder / f"timing-{number}", taught, timed, *changes, AUTO, "--steps", 1)
        wishes = {}
        for wish in (AUTO, *by_hand):
            found = plan(load_recipe(str(recipe), [*changes, wish]), world, Console(quiet=True))
            key = who_is_where(found["placement"])
            placements[key] = found["placement"]
            predicted[key].append(found["step_ms"])
            wishes.setdefault(key, wish)
            chosen += [key] * (wish == AUTO)
            hand |= {key} if wish != AUTO else set()
        for key in list(wishes) if number % 2 == 0 else list(wishes)[::-1]:
            to = folder / f"{number}-{list(wishes).index(key)}"
            distilled(world, recipe, to, taught, timed, *changes, wishes[key])
            steps[key].append(step_of(to))
            print(name, number, wishes[key], f"{predicted[key][-1]:.0f} {steps[key][-1]:.0f}", flush=True)
    rows = []
    for key, placement in placements.items():
        hosts = ", ".join("+".join(source["teachers"]) for source in placement["sources"])
        by = " and ".join([f"auto ({chosen.count(key)} of {ROUNDS})"] * (key in chosen) + ["hand"] * (key in hand))
        guess, real = statistics.median(predicted[key]), statistics.median(steps[key])
        groups = f" in {placement['groups']} groups" if placement["groups"] > 1 else ""
        cells = (name, by, f"{placement['kind']}, {placement['student_ranks']} of {world} train{groups}; {hosts}",
                 f"{guess:.1f}", f"{real:.1f}", f"{min(steps[key]):.1f} to {max(steps[key]):.1f}",
                 f"{100 * (guess / real - 1):+.0f} %")
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    best = min(statistics.median(steps[key]) for key in hand)
    return rows, statistics.mean(statistics.median(steps[key]) for key in chosen) / best


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_file(folder)
    found = {name: case(name, recipe, folder) for name in names}
    if names != list(CASES):
        return
    (HERE / "RESULTS-placements.md").write_text("\n".join([
        "# Placements: predicted and measured", "",
        f"Written by `tests/bench/placements.py` on {os.cpu_count()} CPU cores, torch {torch.__version__}, ranks of one "
        f"thread each. {ROUNDS} rounds; in each, all parts are timed anew and every placement runs {EPOCHS} epochs of 25 "
        "steps of 64 views of 32 pixels, the first not counted; medians over rounds, of medians over epochs.", "",
        "| case | by | who is where | predicted ms | measured ms | of rounds | off by |", "|---|---|---|---|---|---|---|",
        *(row for rows, _ in found.values() for row in rows), "",
        "| case | auto / best by hand |", "|---|---|",
        *(f"| {name} | {over:.3f} |" for name, (_, over) in found.items()), "",
        "# Worlds that are not here", "", "A binary tree of teachers all asked about every sample, 80 GiB a rank, 8 ranks a "
        "node, 8 samples a student rank at least; busy by the planner's own simulation.", "", *table(), ""]))


if __name__ == "__main__":
    os.environ.update(clean_environment())
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
