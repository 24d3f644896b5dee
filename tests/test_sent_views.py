"""Views that students send to their teachers: the same losses, bit for bit, with images in files; whoever stops or dies."""

import signal
import time

import pytest
from PIL import Image
from ranks import LIGHT, Ranks, run, students, trace, wait_for_step
from sklearn.datasets import load_digits

DEDICATED, CO_LOCATED, SENT, DIRECT = ("placement.kind=dedicated", "placement.kind=co-located", "teacher_views=sent",
                                       "exchange=direct")
TWO_STUDENTS = (DEDICATED, "placement.student_ranks=2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Overrides for images that are decoded when they are asked for."""
    folder = tmp_path_factory.mktemp("files")
    digits = load_digits()
    for index in range(300):
        path = folder / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(path)
    return (f"data={{name: folder, path: {folder}, cache_gib: 0, workers: 1}}", "distill.epochs=1", "views.flip=true",
            "teachers.steps=10", *LIGHT)


@pytest.fixture(scope="module")
def start(tiny, files, tmp_path_factory):
    """start(name, *overrides) -> (run folder, the words of a distillation)."""
    folder = tmp_path_factory.mktemp("sent")
    run(2, "teach", tiny, "--run-folder", folder / "taught", *files)
    return lambda name, *more: (folder / name, ("distill", tiny, "--run-folder", folder / name, *files,
                                                f"teachers_from={folder / 'taught'}", *more))


def distilled(world, start, name, *more):
    folder, words = start(f"{name}-{world}", *more)
    run(world, *words)
    return trace(folder), students(folder)


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_losses_are_those_of_rebuilt_views_wherever_the_teachers_sit(start, objective):
    """Invariant 1; the paper's specialists are sent the views of their own classes only."""
    kind = (f"objective.kind={objective}",)
    rebuilt = distilled(3, start, f"rebuilt-{objective}", *kind, *TWO_STUDENTS)
    sent = (SENT, *kind)
    assert distilled(4, start, f"teachers-apart-{objective}", *sent, *TWO_STUDENTS, "window=3", "ballot_every=2") == rebuilt
    assert distilled(2, start, f"co-located-{objective}", *sent, CO_LOCATED, DIRECT) == rebuilt
    if objective == "paper":
        assert distilled(1, start, "alone", *sent) == distilled(2, start, "one-student", *sent, "placement.student_ranks=1")


def test_nothing_is_pending_when_a_run_stops_and_it_goes_on_to_the_same_students(start):
    words = (*TWO_STUDENTS, SENT, DIRECT, "distill.epochs=3")
    expected = distilled(3, start, "undisturbed", *words)
    folder, command = start("stopped", *words)
    ranks = Ranks(3, *command)
    wait_for_step(folder, 3)
    ranks.processes[2].send_signal(signal.SIGTERM)
    assert [one.code for one in ranks.wait()] == [0, 0, 0]
    assert len(trace(folder)) < len(expected[0])
    run(3, *command)
    assert (trace(folder), students(folder)) == expected


def test_a_dead_teacher_rank_ends_the_job_within_seconds(start):
    """It is connected with those that it has rows for, and with nobody else."""
    folder, command = start("dead", *TWO_STUDENTS, SENT, DIRECT, "distill.epochs=100")
    ranks = Ranks(4, *command)
    wait_for_step(folder, 3)
    ranks.processes[2].kill()
    began = time.monotonic()
    assert all(one.code != 0 for one in ranks.wait())
    assert time.monotonic() - began < 20

