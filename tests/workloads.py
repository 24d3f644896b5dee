"""Made-up workloads for the tests of the planner."""

import numpy as np

from pkd.recipe import Recipe
from pkd.schedule import BLOCK
from pkd.workload import Links, StudentWork, TeacherWork, Workload

NO_NETWORK = Links(float("inf"), 0.0, float("inf"))


def work_of(recipe: Recipe, costs: dict[str, float], sizes: dict[str, int] | None = None, micro: float = 0.1,
            row: float = 0.01, links: Links = NO_NETWORK, activations: float = 1000.0, **more) -> Workload:
    """costs: teacher -> seconds of its forwards in a step; every teacher is asked about every sample. sizes: bytes.
    micro, row, activations: of all students, which are alike and have 1,000 weights together.
    """
    batch = recipe.distill.batch
    blocks = -(-batch // BLOCK)
    teachers = {name: TeacherWork(cost / blocks, batch, blocks, (sizes or {}).get(name, 0), 10)
                for name, cost in costs.items()}
    count = len(recipe.students)
    each = StudentWork(micro / count, row / count, 1000 // count, 1, activations / count)
    return Workload(teachers, (each,) * count, batch, links=links, **more)


def large_workload(levels: int, batch: int, seed: int = 0) -> Workload:
    """For a large cluster: a binary tree of teachers, all asked about every sample.

    A block takes 60 ms at the top and down to 4 ms below, each teacher a little more or less.
    """
    chance = np.random.default_rng(seed)
    teachers = {}
    for level in range(levels):
        block, size = max(0.004, 0.06 / 1.6**level), int(4 * 60e6 / 2**level)
        for index in range(2**level):
            name = f"level{level}-{index}"
            teachers[name] = TeacherWork(block * chance.uniform(0.9, 1.1), batch, -(-batch // BLOCK), size, 2048 >> level)
    students = (StudentWork(0.005, 0.0005, 5_000_000, 1, 37.5e6),) * 4
    return Workload(teachers, students, batch, view=2e-5, step=0.001, stage=2, element=2, teacher_memory=2e9,
                    image=3 * 224 * 224, links=Links(2e10, 2e-5, 2e10), runtime=2e9)
