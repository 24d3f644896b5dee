"""Teachers that no rank can hold: several ranks hold one together, and nothing else changes."""

import time

import pytest
from ranks import Ranks, refused, run, students, trace, wait_for_step

DEDICATED, CO_LOCATED = "placement.kind=dedicated", "placement.kind=co-located"
ONE_STUDENT = "placement.student_ranks=1"


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    return trace(folder), students(folder)


def test_losses_are_equal_bit_for_bit_whether_a_teacher_is_whole_or_in_shards(tiny, new_run):
    """Invariant 1: on ranks of its own, by itself and beside whole teachers, offloaded or not, and on all ranks."""
    whole = distilled(2, tiny, new_run("whole"), DEDICATED)
    assert distilled(3, tiny, new_run("apart"), DEDICATED, ONE_STUDENT, "placement.shards.level0=2") == whole
    assert distilled(3, tiny, new_run("all"), DEDICATED, ONE_STUDENT, "deepspeed.shards=teacher-zero3-offload",
                     "placement.shards={level0: 2, level1-0: 2, level1-1: 2, level2-0: 2, level2-1: 2, level2-2: 2}") == whole
    both = distilled(2, tiny, new_run("co-located"), CO_LOCATED)
    assert distilled(2, tiny, new_run("over all"), CO_LOCATED, "placement.shards.level0=2",
                     "deepspeed.students=zero1") == both


def test_a_killed_rank_of_a_shard_group_ends_the_job_and_it_comes_to_the_same_students(tiny, new_run):
    """Invariant 5 and 6: kill -9 of the rank that does not send, which only its own group talks to."""
    place = (DEDICATED, ONE_STUDENT, "placement.shards.level0=2")
    expected = distilled(3, tiny, new_run("undisturbed"), *place)
    folder, teachers_from = new_run("disturbed")
    ranks = Ranks(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    wait_for_step(folder, 3)
    ranks.processes[2].kill()
    began = time.monotonic()
    ended = ranks.wait()
    assert time.monotonic() - began < 20, "a dead rank ends the job within seconds"
    assert all(one.code != 0 for one in ended)
    run(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    assert (trace(folder), students(folder)) == expected


@pytest.mark.parametrize(("world", "overrides", "words"), [
    (3, (CO_LOCATED, "placement.shards.level0=2"), ["placement.shards.level0 is 2", "3 co-located ranks"]),
    (2, (DEDICATED, "placement.shards.level0=2", "deepspeed.shards=zero1"), ["deepspeed.shards is zero1", "teacher-zero3"]),
])
def test_what_cannot_be_sharded_is_refused(tiny, new_run, world, overrides, words):
    folder, teachers_from = new_run("run")
    sentence = refused(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    assert all(word in sentence for word in words), sentence
