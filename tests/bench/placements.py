"""Predicted against measured step time, and `auto` against placements made by hand, by real runs on this machine's cores.

PYTHONPATH=tests python tests/bench/placements.py FOLDER     two minutes a case on two quiet cores; writes
RESULTS-placements.md beside itself, with the planner's own figures on worlds that are not here
"""

import json
import os
import statistics
import sys
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
EPOCHS = 4  # of 25 steps; the first is not counted
TWO = ("placement.kind=dedicated", "placement.kind=co-located")
THREE, FOUR = (("placement.kind=co-located",
                *(f"placement={{kind: dedicated, student_ranks: {n}}}" for n in range(1, world))) for world in (3, 4))
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


def measured(world: int, recipe: Path, folder: Path, taught: Path, *words: str) -> float:
    """Median milliseconds of a step, over the epochs after the first."""
    run(world, "distill", recipe, "--run-folder", folder, f"teachers_from={taught}", *words, timeout=250)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(1000 * 64 / line["images_per_second"] for line in lines[1:])


def case(name: str, recipe: Path, folder: Path) -> tuple[list[str], float]:
    """Rows of the table, and auto's step over the best by hand."""
    world, changes, placements = CASES[name]
    taught = folder / f"{name} teachers".replace(" ", "-")
    run(1, "teach", recipe, "--run-folder", taught, *changes, timeout=250)
    steps, rows = {}, []
    for index, wish in enumerate(("placement.kind=auto", *placements)):
        steps[wish] = measured(world, recipe, folder / f"{name}-{index}".replace(" ", "-"), taught, *changes, wish)
        found = plan(load_recipe(str(recipe), [*changes, wish]), world, Console(quiet=True))
        placement = found["placement"]
        hosts = ", ".join("+".join(source["teachers"]) for source in placement["sources"])
        rows.append(f"| {name} | `{wish.removeprefix('placement.').removeprefix('placement=')}` | {placement['kind']}, "
                    f"{placement['student_ranks']} of {world} train; {hosts} | {found['step_ms']:.1f} | {steps[wish]:.1f} | "
                    f"{100 * (found['step_ms'] / steps[wish] - 1):+.0f} % |")
        print(rows[-1], flush=True)
    return rows, steps["placement.kind=auto"] / min(steps[wish] for wish in placements)


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_file(folder)
    found = {name: case(name, recipe, folder) for name in names}
    if names != list(CASES):
        return
    (HERE / "RESULTS-placements.md").write_text("\n".join([
        "# Placements: predicted and measured", "",
        f"Written by `tests/bench/placements.py` on {os.cpu_count()} CPU cores, torch {torch.__version__}, ranks of one "
        f"thread each: {EPOCHS} epochs of 25 steps of 64 views of 32 pixels, the first not counted, medians of the others. "
        "Parts are timed once, by the first run of a case.", "",
        "| case | placement | who is where | predicted ms | measured ms | off by |", "|---|---|---|---|---|---|",
        *(row for rows, _ in found.values() for row in rows), "",
        "| case | auto / best by hand |", "|---|---|",
        *(f"| {name} | {over:.3f} |" for name, (_, over) in found.items()), "",
        "# Worlds that are not here", "", "A binary tree of teachers all asked about every sample, 80 GiB a rank, 8 ranks a "
        "node, 8 samples a student rank at least; busy by the planner's own simulation.", "", *table(), ""]))


if __name__ == "__main__":
    os.environ.update(clean_environment())
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
