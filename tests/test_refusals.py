"""Bad input: one sentence from one rank, exit code 2 on all, before any training, and nothing that exists is touched."""

import fcntl
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import Ranks, refused, run

from pkd.files import write_json
from pkd.tensor_file import read_tensors, write_tensors


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not {"logs", "state"} & set(p.parts) and p.suffix != ".lock" and p.name != "lock"}


@pytest.mark.parametrize(("override", "words"), [
    ("distil.epochs=3", ["distil", "distill"]),
    ("distill.epochs=many", ["distill.epochs", "many"]),
    ("students.0.model.name=pkd_mobil", ["pkd_mobil", "pkd_mobile"]),
    ("students.0.model.weights=nothing.safetensors", ["nothing.safetensors"]),
    ("students.0.model.name=resnet18", ["resnet18", "width 0.25"]),
    ("students.0.model=alexnet", ["alexnet", "8 x 8", "input_size"]),
    ("pyramid.2.classes=[[0,1],[1,2]]", ["pyramid.2", "'1'"]),
    ("pyramid.1.teachers=9", ["pyramid.1", "9", "5"]),
    ("objective.weights=[1,2]", ["objective.weights", "2"]),
    ("pyramid.2.classes=[[0,1],[2,3]]", ["composed", "pyramid.2"]),
    ("deepspeed.students=zero9", ["zero9"]),
    ("deepspeed.students=zero1-fp16", ["fp16", "GPU"]),
    ("data.path=/nowhere/at/all.npz", ["/nowhere/at/all.npz"]),
    ("distill.batch=9", ["batch 9", "1 student", "2"]),
    ("distill.batch=4000", ["4000", "training images"]),
    ("placement.kind=single", ["single", "2"]),
    ("placement={kind: dedicated, student_ranks: 2}", ["student_ranks", "2"]),
    ("placement={kind: co-located, replicas: {level0: 3}}", ["level0", "3"]),
    ("placement={kind: co-located, replicas: {boss: 1}}", ["boss"]),
])
def test_a_bad_recipe_is_refused_before_training(tiny, new_run, override, words):
    folder, teachers_from = new_run("run")
    overrides = [override] if override.startswith("placement") else ["placement.kind=co-located", override]
    sentence = refused(2, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    assert all(word in sentence for word in words), sentence
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("words", [("report", "{long}"), ("predict", "{long}", "{long}"), ("evaluate", "{long}"),
                                   ("status", "{long}"), ("export", "{long}", "--to", "{long}"), ("study", "{long}"),
                                   ("report", "/dev/null/run"), ("status", "/dev/null/run")])
def test_what_can_be_no_path_is_one_sentence(words):
    said = refused(1, *(word.format(long="x" * 300) for word in words))
    assert len(said) < 700


def test_a_refused_launch_is_told_once_by_one_rank(tiny, tmp_path):
    sentence = refused(4, "teach", tiny, "--run-folder", tmp_path / "run", "teachers.step=3")
    assert "did you mean 'steps'" in sentence
    assert not (tmp_path / "run").exists(), "a recipe that cannot be read leaves nothing behind"


@pytest.mark.parametrize("damage", ["corrupt image", "image missing", "empty class"])
def test_damaged_images_are_found_before_training(tiny, tmp_path, damage):
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "abc":
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(12):
            Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "data" / label / f"{index}.png")
    override = ["data.name=folder", f"data.path={tmp_path / 'data'}"]
    if damage == "corrupt image":
        path = tmp_path / "data" / "b" / "3.png"
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "empty class":
        path = tmp_path / "data" / "d"
        path.mkdir()
    else:
        (tmp_path / "table.csv").write_text("image,label\ndata/a/0.png,a\ndata/a/99.png,a\ndata/b/1.png,b\n")
        override, path = ["data.name=csv", f"data.path={tmp_path / 'table.csv'}"], Path("data/a/99.png")
    sentence = refused(1, "teach", tiny, "--run-folder", tmp_path / "run", *override)
    assert (str(path) if damage != "empty class" else "'d'") in sentence
    assert not (tmp_path / "run" / "teachers").exists()


def test_a_specialist_without_validation_images_is_refused(tiny, tmp_path):
    with np.load(tiny.parent / "digits.npz") as digits:
        x, y = digits["x"], digits["y"]
    chosen = np.isin(y[400:], (5, 6, 7, 8, 9))  # nobody of 0 to 4, whom level1-0 knows
    np.savez(tmp_path / "digits.npz", x_train=x[:400], y_train=y[:400], x_validation=x[400:][chosen],
             y_validation=y[400:][chosen], x_test=x[400:], y_test=y[400:])
    sentence = refused(1, "teach", tiny, "--run-folder", tmp_path / "run", f"data.path={tmp_path / 'digits.npz'}",
                       "pyramid.1.partition=contiguous")
    assert "teacher level1-0 has no validation images" in sentence
    assert not list((tmp_path / "run").glob("teachers/*"))


def test_a_run_folder_of_another_identity_is_refused_and_left_alone(tiny, new_run):
    folder, teachers_from = new_run("run")
    run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 3)
    before = snapshot(folder)
    sentence = refused(1, "distill", tiny, "--run-folder", folder, teachers_from, "students.1.lr=0.2")
    assert "students.1.lr is 0.2" in sentence and "0.1 there" in sentence
    assert snapshot(folder) == before
    run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 3, "window=5")  # a free part may change


def test_a_run_folder_that_another_job_writes_is_refused(tiny, new_run):
    folder, teachers_from = new_run("run")
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write('{"pid": 4711}')
        lock.flush()
        assert "4711" in refused(2, "distill", tiny, "--run-folder", folder, teachers_from)
    run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 1)  # a dead job's lock is no lock


def test_teachers_that_are_not_the_recipes_are_refused(tiny, taught, tmp_path):
    """Invariant 8: a missing teacher, one of other classes, other weights, other data, cut short."""
    mine = tmp_path / "teachers-of"
    shutil.copytree(taught, mine)
    folder, json_file = tmp_path / "run", mine / "teachers" / "level1-0.json"
    start = (1, "distill", tiny, "--run-folder", folder, f"teachers_from={mine}")
    facts = json.loads(json_file.read_text())
    write_json(json_file, {**facts, "class_ids": [0, 1, 2]})
    assert "knows classes [0, 1, 2], but the pyramid gives it [0, 1, 2, 3, 4]" in refused(*start)
    write_json(json_file, {**facts, "steps": 7})
    assert "7 of 30 steps" in refused(*start)
    write_json(json_file, facts)
    other = (*start[:4], tmp_path / "other", start[5])
    assert "other data or by other settings" in refused(*other, "views.crop=2")
    weights = mine / "teachers" / "level1-0.safetensors"
    tensors = read_tensors(weights)
    write_tensors(weights, {name: tensor * 1.01 if tensor.is_floating_point() else tensor
                            for name, tensor in tensors.items()})
    assert "another sha256" in refused(*start)
    json_file.unlink()
    assert "run pkd teach first" in refused(*start)


def test_ranks_that_see_other_pixels_are_refused(tiny, tmp_path):
    """Invariant 8, the views: files of the same names, sizes and labels on both nodes, but one pixel differs."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "ab":
        for index in range(40):
            pixels = random.integers(0, 200, (8, 8), dtype=np.uint8)
            for rank in range(2):
                folder = tmp_path / f"node{rank}" / "data" / label
                folder.mkdir(parents=True, exist_ok=True)
                pixels[3, 3] += np.uint8(rank)
                Image.fromarray(pixels).save(folder / f"{index}.bmp")
    start = (tiny, "--run-folder", tmp_path / "run", "data={name: folder, path: data}", "teachers.batch=16",
             "pyramid=[{teachers: 1, model: pkd_resnet_s}]", "placement.kind=dedicated")
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    run(1, "teach", *start[:-1], "teachers.steps=2", cwds=nodes)
    sentence = refused(2, "distill", *start, "teachers.steps=2", cwds=nodes)
    assert "different views of the same 8 samples" in sentence


def test_a_loss_that_is_not_finite_stops_all_ranks_and_is_named(tiny, new_run):
    """Invariant 4: by ballot, with the student and the step; nothing of it is saved."""
    folder, teachers_from = new_run("run")
    sentence = refused(2, "distill", tiny, "--run-folder", folder, teachers_from, "students.1.lr=1e30",
                       "students.1.schedule=constant", "placement.kind=dedicated")
    assert "student shuffle" in sentence and "step" in sentence
    assert not (folder / "students").exists()


def test_a_teacher_that_diverges_is_refused_and_its_last_good_checkpoint_kept(tiny, tmp_path):
    """In the last two steps, of which no vote tells any more, and long before, with a save that is due after every step."""
    words = ("teach", tiny, "objective.kind=top", "teachers.lr=1e30", "teachers.schedule=constant", "--run-folder")
    said = refused(2, *words, tmp_path / "short", "teachers.steps=2")
    assert "the loss of teacher level0 was not finite at step 1" in said
    words = ("teach", tiny, "objective.kind=top", "pyramid.0.model=own_model:Fading", "--run-folder")
    said = refused(1, *words, tmp_path / "long", "checkpoint_minutes=0.000001", "teachers.evaluate_every=30")
    saved = list((tmp_path / "long").glob("teachers/level0.training/step-*/network-*-weights.safetensors"))
    assert "not finite at step 6" in said and saved
    assert all(value.isfinite().all() for path in saved for value in read_tensors(path).values())


def test_a_device_that_is_too_small_is_a_mistake_with_a_remedy(tiny, new_run):
    folder, teachers_from = new_run("run")
    ended = Ranks(2, "distill", tiny, "--run-folder", folder, teachers_from, "students.0.model=own_model:Greedy",
                  "placement.kind=dedicated").wait()
    assert ended[0].code == 2 and ended[1].code != 0
    assert "rank 0 ran out of its device's memory" in ended[0].err and "placement.accumulation" in ended[0].err
    assert json.loads((folder / "state" / "distill.json").read_text())["state"] == "refused", "no job tries that again"


@pytest.mark.parametrize(("stage", "words"), [("zero1", "the loss of student mobile"), ("zero3", "a student's gradient")])
def test_a_gradient_that_is_not_finite_is_no_step_left_out_in_silence(tiny, new_run, stage, words):
    """Of a finite loss: DeepSpeed would leave out the step of every student, the healthy ones' too, and say nothing."""
    folder, teachers_from = new_run("run")
    sentence = refused(1, "distill", tiny, "--run-folder", folder, teachers_from, "students.0.model=own_model:Cusp",
                       f"deepspeed.students={stage}")
    assert words in sentence and "was not finite at step" in sentence


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tiny, new_run):
    """Files above a limit cannot be written (as on a full disk); the next start goes on from what was saved."""
    folder, teachers_from = new_run("run")
    start = ("distill", tiny, "--run-folder", folder, teachers_from)
    run(1, *start, "--steps", 5)
    before = snapshot(folder / "checkpoints")
    ranks = Ranks(1, *start)
    resource.prlimit(ranks.processes[0].pid, resource.RLIMIT_FSIZE, (20000, 20000))
    (ended,) = ranks.wait()
    sentence = ended.err
    assert ended.code == 2 and sentence.count("\n") == 1 and sentence.startswith("pkd: "), sentence
    assert "could not be written" in sentence and "nothing that was saved is lost" in sentence
    assert snapshot(folder / "checkpoints") == before or before.items() <= snapshot(folder / "checkpoints").items()
    run(1, *start)
