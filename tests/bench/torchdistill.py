"""One teacher and one student: pkd against torchdistill, in turn; writes RESULTS-torchdistill.md. See launch/bench.sh.

python tests/bench/torchdistill.py [--rounds 9] [--steps 16]
"""

import argparse
import tempfile
from pathlib import Path

from speed import ANSWERS, HERE, PACKAGES, Bench
from tables import machine, ratios, speeds

from pkd.bench import Program, take_turns

PAGE = """\
# One teacher, one student: pkd and torchdistill

Written by `launch/bench.sh torchdistill` at commit {commit}: {machine}.
{rounds} rounds; in each, every program runs once: torchdistill {steps} steps of 64 images, the first quarter of which warms
up; pkd {ours}, of which {timed} count that neither warm up nor have a teacher that is done already, and for which it answers
as many. A ratio compares two runs of one round. A ResNet-50 teaches a MobileNetV2, 32 pixels, 100 classes, labels and the
soft targets of the top teacher, no augmentation; one process, two threads. Eager: the same arithmetic, layout and fused SGD
in both, but torchdistill asks its teacher about each batch by itself, as its loop does, and pkd's answers {answer_steps}
steps at once in blocks of {rows} rows. Our kernels: the student fp32, channels last, with pkd.depthwise; the teacher
{kernels}.

{ratios}

{speeds}
"""
THEIRS, EAGER, OURS = "torchdistill, eager", "pkd, eager", "pkd, our kernels"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pkd-torchdistill-") as folder:
        bench = Bench(Path(folder), arguments.steps)
        chosen = [Program(THEIRS, lambda: bench.baseline("torchdistill_kd", "pair-eager", "eager", 1, 2, name=THEIRS)),
                  Program(EAGER, lambda: bench.pkd("pair-eager", 1, name=EAGER)),
                  Program(OURS, lambda: bench.pkd("pair", 1, name=OURS))]
        rates: dict[str, list[float]] = {program.name: [] for program in chosen}
        for number in range(arguments.rounds):
            for name, own in take_turns(chosen[::-1 if number % 2 else 1], 1, lambda text: print(text, flush=True)).items():
                rates[name] += own

        def over(one: str) -> list[float]:
            return [a / b for a, b in zip(rates[one], rates[THEIRS])]
        (HERE / "RESULTS-torchdistill.md").write_text(PAGE.format(
            commit=bench.commit, machine=machine(*PACKAGES, "torchdistill"), rounds=arguments.rounds, steps=bench.steps,
            ours=bench.ours, timed=len(bench.timed), kernels=bench.kernels, rows=bench.rows, **ANSWERS,
            ratios="\n".join(ratios([("pkd against torchdistill, eager both", "1.0", over(EAGER)),
                                     ("the same with our kernels", "", over(OURS))])),
            speeds="\n".join(speeds(rates, bench.memory))))


if __name__ == "__main__":
    main()
