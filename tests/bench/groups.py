"""Students in groups of their own (placement.student_groups) against one data-parallel engine: real runs of two ranks.

python tests/bench/groups.py [--rounds 5] [--steps 24]     a few minutes; writes RESULTS-groups.md beside itself
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import torch
import yaml
from commit import commit

from pkd.bench import FEW, Program, Trial, ratio, spread, take_turns

NETS = {"alike": ("mobilenet_v2", "mobilenet_v2"), "unlike": ("mobilenet_v2", "shufflenet_v2_x1_0")}
CASES = {  # students, changes
    "alike, labels only": ("alike", ("objective.kind=alone",)),
    "unlike, labels only": ("unlike", ("objective.kind=alone",)),
    "unlike, paper's objective with its ensemble term, from the archive": ("unlike", ("soft_targets=archive",)),
}
KINDS = {"together": (), "split": ("placement.student_groups=2",)}


def recipe_file(folder: Path, name: str) -> Path:
    """Noise serves as images: nobody's speed depends on them."""
    chance = np.random.default_rng(0)
    np.savez(folder / "noise.npz", x=chance.integers(0, 256, (3200, 3, 32, 32), dtype=np.uint8), y=np.arange(3200) % 100)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "name": name, "data": {"name": "npz", "path": str(folder / "noise.npz")}, "views": {},
        "pyramid": [{"teachers": 1, "model": "pkd_resnet_s"}], "objective": {"kind": "paper"},
        "students": [{"name": f"{net[:6]}{index}", "model": net} for index, net in enumerate(NETS[name])],
        "distill": {"epochs": 1, "batch": 64}, "placement": {"kind": "co-located"}}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    ask = parser.parse_args()
    measured = commit()
    with tempfile.TemporaryDirectory(prefix="pkd-groups-") as temporary:
        folder, programs = Path(temporary), []
        for name in NETS:
            words, taught = [str(recipe_file(folder, name)), *FEW], folder / f"taught-{name}"
            Trial(folder, words, 2).phase("teach", run=taught)
            Trial(folder, words, 2).phase("archive", run=taught)
            for case, (nets, changes) in CASES.items():
                for kind, split in KINDS.items() if nets == name else ():
                    trial = Trial(folder, [*words, f"teachers_from={taught}", *changes, *split], 2)
                    programs.append(Program(f"{case}: {kind}", lambda trial=trial: trial.rate(ask.steps)[0]))
        rates = take_turns(programs, ask.rounds, lambda text: print(text, flush=True))
    lines = ["# Students in groups", "",
             f"Written by `tests/bench/groups.py` at commit {measured} on {os.cpu_count()} CPU cores, torch "
             f"{torch.__version__}: two ranks of "
             f"one thread, batch 64 of 32 pixels, two students; `together`: one engine, {64 // 2} samples a rank, gradients "
             "all-reduced; `split`: a student a rank, 64 samples. "
             f"{ask.rounds} rounds of {ask.steps} steps in which every program takes its turn; a ratio is of one round.", "",
             "| students, objective | images/s together: min | median | max | split: min | median | max | split / together: "
             "min | median | max |", "|---|---|---|---|---|---|---|---|---|---|"]
    for case in CASES:
        kinds = [f"{case}: {kind}" for kind in KINDS]
        cells = [f"{value:.1f}" for kind in kinds for value in spread(rates[kind])]
        lines.append(f"| {case} | " + " | ".join([*cells, *(f"{r:.2f}" for r in ratio(rates, kinds[1], kinds[0]))]) + " |")
    (HERE / "RESULTS-groups.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
