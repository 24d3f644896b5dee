"""How long `auto` takes on large worlds, and how busy it keeps the ranks, by its own prediction."""

import time

import numpy as np
from workloads import large_workload

from pkd.planner import Planner
from pkd.rank_map import Ranks
from pkd.simulator import simulate


def table() -> list[str]:
    lines = ["| ranks | teachers | batch | planned in s | one simulation s | student ranks | groups | mean / max busy |",
             "|---|---|---|---|---|---|---|---|"]
    for levels, ranks, batch in ((4, 64, 512), (8, 256, 2048), (8, 1024, 4096), (9, 4096, 8192)):
        work = large_workload(levels, batch)
        known = Ranks((80 * 2**30,) * ranks, tuple(np.arange(ranks) // 8))
        began = time.perf_counter()
        choice = Planner(work, ranks, 1, {}, known).choose([1, 2, 3, 4])
        planned = time.perf_counter() - began
        began = time.perf_counter()
        simulate(choice.system)
        simulated = time.perf_counter() - began
        busy = choice.predicted.busy
        lines.append(f"| {ranks} | {len(work.teachers)} | {batch} | {planned:.2f} | {simulated:.2f} | "
                     f"{choice.map.students} | {choice.groups} | {busy.mean() / busy.max():.3f} |")
    return lines
