"""Every fault of the table, one run each, with the time to recovery; started by full.sh."""

import os
import re
import shutil
import signal
import time

import pytest


def row(record, name: str, recovery, mine, expected) -> None:
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == expected
    record(name, **{"noticed after s": f"{recovery.noticed:.1f}", "training goes on after s": f"{recovery.going_on:.1f}",
                    "steps taken again": recovery.steps_lost, "students identical": "yes" if same else "NO"})
    assert same


@pytest.mark.parametrize(("name", "rank", "number"), [
    ("kill -9 of student rank 0, which serves the store", 0, signal.SIGKILL),
    ("kill -9 of student rank 1", 1, signal.SIGKILL),
    ("kill -9 of a teacher rank", 2, signal.SIGKILL),
    ("SIGSTOP of student rank 0 (limit 10 s)", 0, signal.SIGSTOP),
    ("SIGSTOP of student rank 1 (limit 10 s)", 1, signal.SIGSTOP),
    ("SIGSTOP of a teacher rank (limit 10 s)", 3, signal.SIGSTOP),
])
def test_a_rank(disturbed, undisturbed, record, name, rank, number):
    mine = disturbed()
    os.kill(mine.pid(rank), number)
    recovery = mine.recovery()
    if number == signal.SIGSTOP:
        role = "teacher" if rank > 1 else "student"
        assert f"the stalest is rank {rank} ({role})" in mine.log or "the store does not answer" in mine.log, mine.log
    row(record, name, recovery, mine, undisturbed)


def test_a_rank_of_a_shard_group(disturbed, undisturbed, record):
    """Of the two teacher ranks that hold the top teacher together, the one that sends nothing."""
    mine = disturbed(words=("placement.shards={level0: 2}",))
    os.kill(mine.pid(3), signal.SIGKILL)
    row(record, "kill -9 of a rank that holds a part of a teacher", mine.recovery(), mine, undisturbed)


@pytest.mark.parametrize(("name", "fault", "node"), [
    ("a node killed (connections reset)", "kill_node", 1),
    ("a node's power cut (peers hear nothing)", "cut_node", 1),
    ("a node cut off the network, its processes alive", "unplug", 1),
    ("the batch host killed", "kill_node", 0),
    ("the batch host's power cut", "cut_node", 0),
    ("all processes of a node hang (limit 10 s)", "stop_node", 1),
])
def test_a_node(cluster, disturbed, undisturbed, record, name, fault, node):
    mine = disturbed()
    assert cluster.hosts(mine.job)[0] == cluster.batch_host(mine.job)
    getattr(cluster, fault)(cluster.hosts(mine.job)[node])
    recovery = mine.recovery()
    if fault == "stop_node":
        assert re.search(r"the stalest is rank [23] \(teacher\), last in epoch \d at step \d+", mine.log), mine.log
    row(record, name, recovery, mine, undisturbed)


def test_a_full_disk(cluster, disturbed, undisturbed, record):
    """The job says so and ends; with room again, the same job goes on."""
    shutil.rmtree(cluster.small / "run", ignore_errors=True)
    mine = disturbed(folder=cluster.small / "run")
    began, hit = time.monotonic(), mine.last_step()
    full = cluster.small / "full"
    try:
        with open(full, "wb") as file:
            while True:
                file.write(bytes(2**16))
    except OSError:
        pass
    assert mine.end() == "FAILED"
    noticed = time.monotonic() - began
    assert cluster.restarts(mine.job) == 0
    full.unlink()
    said = mine.log + "".join(path.read_text() for path in cluster.small.glob("run*.log"))
    assert "make room and start the same command again" in said or "no space left" in said.lower(), said
    mine.submit()
    mine._until(lambda: "resuming from" in mine.log, 60, "resuming")
    lost = max(0, hit + 1 - int(mine.log.split("step-")[1].split()[0]))
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == undisturbed
    record("file system full during a save (room is made, the job submitted again)", **{
        "noticed after s": f"{noticed:.1f}", "training goes on after s": "by hand", "steps taken again": lost,
        "students identical": "yes" if same else "NO"})
    shutil.rmtree(cluster.small / "run")
    assert same


@pytest.mark.parametrize("damage", ["a checkpoint file with a flipped byte", "the clock of two checkpoints equal"])
def test_a_checkpoint(cluster, disturbed, undisturbed, record, damage):
    mine = disturbed()
    cluster.slurm("scancel", mine.job)
    mine.end()
    assert cluster.restarts(mine.job) == 0, "a cancelled job stays cancelled"
    older, newest = sorted((mine.folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    hit = mine.last_step()
    if "byte" in damage:
        path = newest / "network-shuffle-momentum_buffer.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        for path in (older, newest):
            os.utime(path, (0, 0))
    began = time.monotonic()
    mine.submit()
    start = older if "byte" in damage else newest
    mine._until(lambda: f"{start.name} (epoch" in mine.log, 60, "resuming")
    assert ("byte" not in damage) or f"{newest} is damaged" in mine.log
    mine.wait_for_step(int(start.name[5:]))
    seconds = time.monotonic() - began
    assert mine.end() == "COMPLETED", mine.log
    same = mine.result() == undisturbed
    record(damage, **{"noticed after s": "at the start", "training goes on after s": f"{seconds:.1f}",
                      "steps taken again": hit + 1 - int(start.name[5:]), "students identical": "yes" if same else "NO"})
    assert same
