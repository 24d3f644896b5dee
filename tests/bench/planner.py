"""How long `auto` takes on large worlds, and how busy it keeps the ranks: PYTHONPATH=tests python tests/bench/planner.py"""

import time

import numpy as np
from workloads import large_workload

from pkd.planner import Planner
from pkd.rank_map import Ranks
from pkd.simulator import simulate


def main() -> None:
    for levels, ranks, batch in ((4, 64, 512), (8, 256, 2048), (8, 1024, 4096), (9, 4096, 8192)):
        work = large_workload(levels, batch)
        known = Ranks((80 * 2**30,) * ranks, tuple(np.arange(ranks) // 8))
        began = time.perf_counter()
        choice = Planner(work, ranks, 1, {}, known).choose()
        planned = time.perf_counter() - began
        began = time.perf_counter()
        simulate(choice.system)
        simulated = time.perf_counter() - began
        busy = choice.predicted.busy
        print(f"{ranks} ranks, {len(work.teachers)} teachers, batch {batch}: planned in {planned:.2f} s (one simulation "
              f"{simulated:.2f} s), {choice.map.students} student ranks, mean/max busy {busy.mean() / busy.max():.3f}")


if __name__ == "__main__":
    main()
