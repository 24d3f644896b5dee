"""What ranks tell each other about themselves, and what the planner makes of it; pure."""

import pytest
import torch

from pkd.errors import UserError
from pkd.hardware import (
    Hardware,
    _allowance,
    cores_per_node,
    devices,
    hardware,
    known_ranks,
    memory_per_rank,
    nodes,
    to_json,
)
from pkd.pyramid import Teacher
from pkd.recipe import Model
from pkd.teach import assign
from pkd.world import refuse_shared

GIB = 2**30


def rank(host: str, device: str = "cpu", memory: int = 64 * GIB, cores: str = "f", unit: str = "cpu") -> Hardware:
    return Hardware(host, 1, 0.0, device, memory, cores, unit)


def test_nodes_are_numbered_as_ranks_first_name_them():
    assert nodes([rank("b"), rank("b"), rank("a"), rank("b"), rank("c")]) == (0, 0, 1, 0, 2)


def test_ranks_on_one_device_share_its_memory():
    """A host's CPU is one device; of its GPUs each is."""
    first, second = (dict(device="H100", memory=80 * GIB, unit=unit) for unit in ("GPU-1", "GPU-2"))
    mixed = [rank("a"), rank("a"), rank("b", **first), rank("b", **second), rank("c"), rank("c", **first),
             rank("d", **second), rank("d", **second)]
    assert memory_per_rank(mixed) == tuple(GIB * n for n in (32, 32, 80, 80, 64, 80, 40, 40))
    assert memory_per_rank(mixed, 36.5) == tuple(int(GIB * n) for n in (32, 32, *[36.5] * 6)), "no more than is asked for"


def test_a_nodes_cores_are_those_that_any_of_its_ranks_may_use():
    assert cores_per_node([rank("a", cores="3"), rank("a", cores="c"), rank("b", "H100"), rank("c", cores="1")]) == \
        (4.0, float("inf"), 1.0)


def test_this_process_describes_itself():
    found = hardware(torch.device("cpu"))
    assert found.device == "cpu" and found.memory > 0 and int(found.cores, 16) > 0
    assert Hardware(**{key: value for key, value in to_json([found])[0].items() if key != "rank"}) == found
    assert known_ranks([found, found], 2).memory == (found.memory // 2,) * 2


ON_TWO_GPUS = [rank("a", "H100", unit="GPU-1"), rank("a", "H100", unit="GPU-1"), rank("a", "H100", unit="GPU-2"),
               rank("b", "H100", unit="GPU-1")]


def test_a_control_group_may_allow_less_memory_than_there_is(tmp_path):
    """The least of this process's group and those above it counts; "max" is no limit, nor is a system without any."""
    (tmp_path / "mine").write_text("1:name=systemd:/old\n0::/job_7/step_0\n")
    (tmp_path / "job_7" / "step_0").mkdir(parents=True)
    assert _allowance(tmp_path / "mine", tmp_path) > 2**60
    (tmp_path / "job_7" / "step_0" / "memory.max").write_text("max\n")
    (tmp_path / "job_7" / "memory.max").write_text("4000\n")
    assert _allowance(tmp_path / "mine", tmp_path) == 4000
    assert _allowance(tmp_path / "absent", tmp_path) > 2**60


def test_ranks_share_a_gpu_of_their_host_and_never_a_cpu():
    assert devices(ON_TWO_GPUS) == (0, 0, 1, 2)
    assert devices([rank("a"), rank("a"), rank("b")]) == (0, 1, 2)


def test_ranks_of_one_gpu_are_not_put_into_one_island():
    numbers = list(devices(ON_TWO_GPUS))
    refuse_shared(numbers, [0, 2, 3], "students 0")
    with pytest.raises(UserError, match=r"ranks 0 and 1 would train together \(island students 0\).*at most one rank a GPU"):
        refuse_shared(numbers, [0, 1], "students 0")
    top, *rest = [Teacher(f"t{n}", level, (0, 1), Model(name="x")) for n, level in enumerate((0, 1, 1, 1, 1))]
    costs = {"t0": 4.0, **{teacher.name: 1.0 for teacher in rest}}
    plan = assign([top, *rest], costs, numbers, 64)
    assert plan[0] == (top, [0, 2, 3])
    assert all(len(ranks) == 1 for _, ranks in plan[1:])
    assert assign([top], costs, [0, 1, 2, 3], 64) == [(top, [0, 1, 2, 3])], "each on a device of its own"


def test_a_teacher_gets_as_many_ranks_whichever_others_are_left_to_train():
    """What its batch statistics are made of; only who asks for one teacher by its name gives it all ranks."""
    every = [Teacher(f"t{n}", min(n, 1), (0, 1), Model(name="x")) for n in range(4)]
    costs = {teacher.name: 1.0 for teacher in every}
    width = {teacher.name: len(ranks) for teacher, ranks in assign(every, costs, [0, 1, 2, 3], 64)}
    assert width == {"t0": 4, "t1": 1, "t2": 1, "t3": 1}
    for left in ([every[3]], every[2:], [every[0]], [every[0], every[3]]):
        assert all(len(ranks) == width[teacher.name] for teacher, ranks in assign(left, costs, [0, 1, 2, 3], 64))
    assert assign([every[3]], costs, [0, 1, 2, 3], 64, named=True) == [(every[3], [0, 1, 2, 3])]
