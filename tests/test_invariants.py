"""The invariants, each with real processes: several ranks, gloo, DeepSpeed's own engine."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import LIGHT, Ranks, listens, run, students, teachers, trace, wait_for_step

from pkd.files import sha256, write_json
from pkd.tensor_file import read_tensors

# Batch statistics over all ranks, no dropout, no corners (own_model.py): what may differ is rounding alone.
COMPARABLE = ("distill.sync_batch_norm=true", *LIGHT)
DEDICATED, CO_LOCATED = "placement.kind=dedicated", "placement.kind=co-located"
TWO = (DEDICATED, "placement.student_ranks=2")
ONE_EPOCH = ("distill.epochs=1",)  # of 12 steps, for students of many layers; those of two epochs are LIGHT


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    return trace(folder), students(folder)


@pytest.fixture(scope="module")
def two_students(tiny, taught, tmp_path_factory):
    """What a run on two student ranks beside one of teachers becomes."""
    return distilled(3, tiny, (tmp_path_factory.mktemp("two") / "run", f"teachers_from={taught}"), "answer_rows=16",
                     *ONE_EPOCH, *TWO)


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_losses_are_equal_bit_for_bit_wherever_the_teachers_sit(tiny, new_run, two_students, objective):
    """Invariant 1, with one and with two student ranks."""
    kind = f"objective.kind={objective}", "answer_rows=16", *(LIGHT if objective == "paper" else ONE_EPOCH)
    alone = distilled(1, tiny, new_run("alone"), *kind)
    assert distilled(2, tiny, new_run("one-teacher-rank"), *kind, DEDICATED) == alone
    assert distilled(3, tiny, new_run("two-teacher-ranks"), *kind, DEDICATED, "placement.student_ranks=1",
                     "window=4", "ballot_every=3") == alone
    two = two_students if objective == "composed" else distilled(3, tiny, new_run("two-students"), *kind, *TWO)
    assert distilled(2, tiny, new_run("co-located"), *kind, CO_LOCATED) == two
    replicated = new_run("replicated")
    assert distilled(4, tiny, replicated, *kind, DEDICATED, "exchange=direct", "placement.replicas={level0: 2}") == two
    sources = json.loads((replicated[0] / "placement.json").read_text())["placement"]["sources"]
    assert [source["rank"] for source in sources if "level0" in source["teachers"]] == [2, 3]
    if objective == "paper":  # whose specialists are asked about some of the rows only
        assert distilled(2, tiny, new_run("co-located-direct"), *kind, CO_LOCATED, "exchange=direct") == two
    assert two[0] != alone[0]  # other batch statistics: the comparison can tell runs apart


def test_losses_do_not_depend_on_the_number_of_student_ranks(tiny, new_run):
    """Invariant 1, second half: 1e-6 relative over the first 20 steps, with synchronised batch statistics."""
    alone, _ = distilled(1, tiny, new_run("1"), *COMPARABLE, "distill.batch=25")
    for ranks in (2, 3):
        several, _ = distilled(ranks, tiny, new_run(f"{ranks}"), *COMPARABLE, "distill.batch=25", CO_LOCATED)
        for one, other in zip(alone[:20], several[:20], strict=True):
            for name, loss in one["loss"].items():
                assert other["loss"][name] == pytest.approx(loss, rel=1e-6), (ranks, one["step"])


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_denominators_are_those_of_the_whole_step(tiny, new_run, objective):
    """Invariant 3: uneven ranks and micro batches (35 over 2 ranks by 2 micro batches: 9, 9, 9, 8) change only rounding."""
    # T 4: at the paper's 20, rounding of log-probabilities times T^2 = 400 is up to 1.1e-6 of the loss on its own.
    plain = ("students.0.model=own_model:Plain", "students.1.model=own_model:Plain", "distill.batch=35",
             "objective.temperature=4", f"objective.kind={objective}")
    whole, _ = distilled(1, tiny, new_run("whole"), *plain)
    parts, _ = distilled(2, tiny, new_run("parts"), *plain, CO_LOCATED, "placement.accumulation=2",
                         "deepspeed.students=zero2")
    for one, other in zip(whole[:20], parts[:20], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), one["step"]


def test_the_zero_stage_changes_nothing_but_the_last_bits(tiny, new_run):
    """In ZeRO 0 the weights lie channels last as well, which takes other kernels."""
    smooth = (*LIGHT, CO_LOCATED)
    whole, _ = distilled(2, tiny, new_run("0"), *smooth, "deepspeed.students=zero0")
    for stage in (1, 2, 3):
        split, _ = distilled(2, tiny, new_run(f"{stage}"), *smooth, f"deepspeed.students=zero{stage}")
        for one, other in zip(whole, split, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), (stage, one["step"])


def test_a_run_killed_before_its_first_checkpoint_comes_to_the_same_students(tiny, new_run, two_students):
    """Invariant 6: kill -9 of a teacher rank, then the same command again. After a checkpoint: tests/slurm."""
    place = (*TWO, "answer_rows=16", *ONE_EPOCH)
    folder, teachers_from = new_run("disturbed")
    ranks = Ranks(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    wait_for_step(folder, 3)
    ranks.processes[2].kill()
    began = time.monotonic()
    ended = ranks.wait()
    assert time.monotonic() - began < 20, "a dead rank ends the job within seconds"
    assert all(one.code != 0 for one in ended) and not list(folder.glob("checkpoints/step-*"))
    run(3, "distill", tiny, "--run-folder", folder, teachers_from, *place)
    assert (trace(folder), students(folder)) == two_students


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_or_stopped_teaching_goes_on_to_the_same_teachers(tiny, taught, tmp_path, number):
    """Invariant 6, for teach: the specialists are trained from their last checkpoint on, bit for bit."""
    folder = tmp_path / "run"
    # Teachers of different ranks have nothing to do with each other: without a launcher the watchdog tells of a death.
    ranks = Ranks(2, "teach", tiny, "--run-folder", folder, "timeouts={start: 60, step: 8}")
    deadline = time.monotonic() + 60
    while not list(folder.glob("teachers/level1-*.training/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks.processes[1].send_signal(number)
    codes = [one.code for one in ranks.wait()]
    if number == signal.SIGTERM:
        assert codes == [0, 0] and json.loads((folder / "state" / "teach.json").read_text())["state"] == "stopped"
    else:
        assert 0 not in codes
    assert (folder / "teachers" / "level0.json").exists() and len(list(folder.glob("teachers/level*.json"))) < 6
    run(2, "teach", tiny, "--run-folder", folder)
    assert teachers(folder) == teachers(taught)
    assert not list(folder.glob("teachers/*.training"))


def test_a_teaching_stopped_where_it_would_have_ended_ends_at_its_next_start(tiny, tmp_path):
    """Its only validation comes with the stop; also with fewer --steps than were taken."""
    for more, steps in ((("teachers.steps=2",), ()), ((), ("--steps", 1))):
        start = ("teach", tiny, "--run-folder", tmp_path / f"{len(steps)}", "--teacher", "level0", *more)
        ranks = Ranks(1, *start)
        while not listens(ranks.processes[0].pid):
            time.sleep(0.001)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.wait()[0].code == 0 and not list(tmp_path.glob(f"{len(steps)}/teachers/level0.json"))
        run(1, *start, *steps)
        facts = json.loads((tmp_path / f"{len(steps)}" / "teachers" / "level0.json").read_text())
        assert 1 < facts["steps"] == facts["validation"]["step"] < 30


@pytest.fixture(scope="module")
def one_process(tiny, taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-process") / "run"
    run(1, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", *COMPARABLE, *SCHEDULED)
    return folder


# Everything that has a state: momentum, averaged weights, two moments, a schedule that looks at validation.
SCHEDULED = ("students.0.schedule=plateau", "students.0.patience=0", "students.0.ema=0.8", "students.1.optimizer=adamw",
             "students.1.lr=0.01")


def unbeatable(checkpoint: Path, student: str) -> dict[str, torch.Tensor]:
    """Lift a student's best accuracy so far above all others; returns its best weights."""
    state, sums = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "sha256.json"))
    state["progress"]["best"][student]["accuracy"] = 2.0
    write_json(checkpoint / "state.json", state)
    write_json(checkpoint / "sha256.json", {**sums, "state.json": sha256(checkpoint / "state.json")})
    return read_tensors(checkpoint / f"best-{student}.safetensors")


@pytest.fixture(scope="module")
def stopped(tiny, taught, tmp_path_factory):
    """A run folder of two student ranks, stopped in its second epoch, so that there are best weights to keep, of which
    shuffle's are made the best that there will ever be; these. To be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(2, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", *COMPARABLE, *SCHEDULED, CO_LOCATED,
        "deepspeed.students=zero1", "--steps", 14)
    return folder, unbeatable(folder / "checkpoints" / "step-14", "shuffle")


@pytest.mark.parametrize(("ranks", "after"), [
    (1, ("deepspeed.students=zero0", "placement.kind=single")),
    (3, ("deepspeed.students=zero3", CO_LOCATED)),
    (4, ("deepspeed.students=zero2", CO_LOCATED)),
    (4, ("deepspeed.students=zero1", DEDICATED, "placement.student_ranks=3")),
])
def test_a_run_of_two_student_ranks_goes_on_with_others_placement_and_stage(tiny, new_run, one_process, stopped, ranks,
                                                                            after):
    """Invariant 6: to invariant 1's tolerance."""
    (folder, teachers_from), best = new_run("moved"), stopped[1]
    shutil.copytree(stopped[0], folder)
    run(ranks, "distill", tiny, "--run-folder", folder, teachers_from, *COMPARABLE, *SCHEDULED, *after)
    for one, other in zip(trace(one_process)[:20], trace(folder)[:20], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), one["step"]
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
             for path in (one_process, folder)]
    assert [line["learning_rate"] for line in lines[0]] == [line["learning_rate"] for line in lines[1]]
    kept = [json.loads((path / "students" / "mobile.json").read_text()) for path in (one_process, folder)]
    assert kept[0]["validation"]["epoch"] == kept[1]["validation"]["epoch"]
    weights = [read_tensors(path / "students" / "mobile.safetensors") for path in (one_process, folder)]
    for key, value in weights[0].items():
        assert torch.allclose(weights[1][key].float(), value.float(), rtol=1e-4, atol=1e-5), key
    assert json.loads((folder / "students" / "shuffle.json").read_text())["validation"]["epoch"] == 0
    for key, value in read_tensors(folder / "students" / "shuffle.safetensors").items():
        assert torch.equal(value, best[f"backbone.{key}"]), key
