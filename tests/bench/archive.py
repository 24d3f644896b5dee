"""An epoch from the archive and one without teachers, in turn and for longer than in speed.py; writes RESULTS-archive.md.

python tests/bench/archive.py [--rounds 9] [--steps 48]
"""

import argparse
import tempfile
from pathlib import Path

from speed import HERE, PACKAGES, Bench
from tables import machine, ratios, speeds

from pkd.bench import Program, take_turns

PAGE = """\
# From the archive and without teachers

Written by `launch/bench.sh archive` at commit {commit}: {machine}.
{rounds} rounds; in each, both programs run once: {steps} steps of 64 images, the first quarter of which warms up; a ratio
compares two runs of one round. The paper's pyramid and objective (ResNet-101 / 2 x ResNet-50 / 4 x ResNet-18 teachers, 2 x
MobileNetV2 and 2 x ShuffleNetV2 students), 32 pixels, 100 classes, no augmentation; two ranks of one thread, placed by auto:
{kind}.

{ratios}

{speeds}
"""
ALONE, ARCHIVE = "students alone", "pkd archive"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pkd-archive-") as folder:
        bench = Bench(Path(folder), arguments.steps)
        bench.fill()
        chosen = [Program(ALONE, lambda: bench.pkd("paper", 2, "objective.kind=alone", name=ALONE)),
                  Program(ARCHIVE, lambda: bench.pkd("paper", 2, "soft_targets=archive", name=ARCHIVE))]
        rates: dict[str, list[float]] = {program.name: [] for program in chosen}
        for number in range(arguments.rounds):
            for name, own in take_turns(chosen[::-1 if number % 2 else 1], 1, lambda text: print(text, flush=True)).items():
                rates[name] += own
        (HERE / "RESULTS-archive.md").write_text(PAGE.format(
            commit=bench.commit, machine=machine(*PACKAGES), rounds=arguments.rounds, steps=bench.steps,
            kind=bench.kinds[ARCHIVE], speeds="\n".join(speeds(rates, bench.memory)),
            ratios="\n".join(ratios([("archive, 2nd epoch on, against students alone", "0.95",
                                      [a / b for a, b in zip(rates[ARCHIVE], rates[ALONE])])]))))


if __name__ == "__main__":
    main()
