"""What ranks tell each other about themselves, and what the planner makes of it; pure."""

import torch

from pkd.hardware import Hardware, cores_per_node, hardware, known_ranks, memory_per_rank, nodes, to_json

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


def test_a_nodes_cores_are_those_that_any_of_its_ranks_may_use():
    assert cores_per_node([rank("a", cores="3"), rank("a", cores="c"), rank("b", "H100"), rank("c", cores="1")]) == \
        (4.0, float("inf"), 1.0)


def test_this_process_describes_itself():
    found = hardware(torch.device("cpu"))
    assert found.device == "cpu" and found.memory > 0 and int(found.cores, 16) > 0
    assert Hardware(**{key: value for key, value in to_json([found])[0].items() if key != "rank"}) == found
    assert known_ranks([found, found], 2).memory == (found.memory // 2,) * 2
