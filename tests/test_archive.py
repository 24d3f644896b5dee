"""The archive: students cannot tell it from their teachers, and nothing stale or damaged is ever read from it."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from ranks import LIGHT, Ranks, refused, run, students, trace, wait_for_step

from pkd.data import load_data
from pkd.recipe import Views as Policy
from pkd.recipe_file import load_recipe

FINITE = ("views.finite=2", "distill.epochs=3", *LIGHT)
ARCHIVE, AUTO, ONE_GROUP = "soft_targets=archive", "soft_targets=auto", "placement.student_groups=1"
CO_LOCATED = "placement.kind=co-located"


def fill(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "archive", tiny, "--run-folder", folder, teachers_from, *overrides)
    return new


def distilled(world, tiny, new, *overrides):
    folder, teachers_from = new
    run(world, "distill", tiny, "--run-folder", folder, teachers_from, *overrides)
    return trace(folder), students(folder)


def shards(folder):
    return sorted((folder / "soft-targets").glob("*.safetensors"))


def record(folder):
    return json.loads((folder / "soft-targets" / "archive.json").read_text())


@pytest.fixture(scope="module")
def archived(tiny, taught, tmp_path_factory):
    """A run folder with two views of each sample, filled by two ranks; to be copied."""
    return fill(2, tiny, (tmp_path_factory.mktemp("archived") / "run", f"teachers_from={taught}"), *FINITE)


@pytest.fixture
def copied(archived, tmp_path):
    """copied(name) -> a run folder of that name with its own copy of the archive, and the override for its teachers."""
    def make(name):
        shutil.copytree(archived[0], tmp_path / name)
        return tmp_path / name, archived[1]
    return make


@pytest.fixture(scope="module")
def online(tiny, taught, tmp_path_factory):
    """What a run of two views becomes with its teachers: by number of student ranks."""
    folder = tmp_path_factory.mktemp("online")
    return {ranks: distilled(ranks, tiny, (folder / f"{ranks}", f"teachers_from={taught}"), *FINITE,
                             *[CO_LOCATED] * (ranks > 1)) for ranks in (1, 2)}


# ---- the same losses


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_losses_and_students_are_those_of_the_run_with_teachers_bit_for_bit(tiny, new_run, online, objective):
    """Invariant 1, with one and two student ranks; whoever filled the archive, and where placement asks for teachers. A
    student on a rank of its own is that of a single process, whether the recipe deals students to groups or auto does."""
    words = (f"objective.kind={objective}", *FINITE)
    if objective == "composed":  # the recipe's own
        before = online[1], online[2]
    else:
        before = distilled(1, tiny, new_run("online-1"), *words), distilled(2, tiny, new_run("online-2"), *words, CO_LOCATED)
    own = fill(1, tiny, new_run("archive"), *words)
    groups = () if objective == "composed" else ("placement.student_groups=2",)
    found = distilled(2, tiny, own, *words, ARCHIVE, *groups)
    placement = json.loads((own[0] / "placement.json").read_text())["placement"]
    assert found == before[0 if placement["groups"] == 2 else 1] and (placement["why"] or groups)
    assert distilled(2, tiny, fill(3, tiny, new_run("archive-2"), *words), *words, ARCHIVE,
                     "placement.kind=dedicated") == before[1]
    assert before[0] != before[1]
    placement = json.loads((own[0] / "students" / "students.json").read_text())
    assert placement["soft_targets"]["from"] == "archive" and placement["placement"]["sources"] == []


@pytest.mark.parametrize("words", [("archive.dtype=int8", "archive.top_k=5"), ("views={}", "archive.top_k=3"),
                                   ("teachers.forward=bf16", "distill.batch=35")])
def test_whatever_decides_the_soft_targets_decides_them_online_as_well(tiny, taught, tmp_path, words):
    """Coarser rows are part of the identity; so teachers that answer online round as the archive does."""
    words = (*FINITE, "distill.epochs=1", *words)
    if words[len(FINITE) + 1].startswith(("views", "teachers")):  # other teachers' settings
        words = (*words, "teachers.steps=4", "teachers.evaluate_every=4")
        run(2, "teach", tiny, "--run-folder", tmp_path / "taught", *words)
        taught = tmp_path / "taught"
    own = fill(2, tiny, (tmp_path / "archive", f"teachers_from={taught}"), *words)
    assert distilled(1, tiny, own, *words, ARCHIVE) == \
        distilled(1, tiny, (tmp_path / "online", f"teachers_from={taught}"), *words)


def test_a_run_may_change_between_teachers_and_archive_at_every_start(tiny, copied, online):
    """Invariant 6: teachers, then a kill, then the archive, then teachers again: the same bytes."""
    folder, teachers_from = copied("run")
    words = ("distill", tiny, "--run-folder", folder, teachers_from, *FINITE, "checkpoint_minutes=0.005")
    fill(2, tiny, (folder, teachers_from), *FINITE)
    run(2, *words, CO_LOCATED, "--steps", 7)
    ranks = Ranks(2, *words, ARCHIVE, ONE_GROUP)
    wait_for_step(folder, 13)  # after the checkpoint at the end of its first epoch
    ranks.processes[1].kill()
    assert all(one.code != 0 for one in ranks.wait())
    run(2, *words, ARCHIVE, ONE_GROUP, "--steps", 25)
    run(2, *words, CO_LOCATED)
    assert (trace(folder), students(folder)) == online[2]


# ---- what there is


def test_specialists_are_stored_for_the_samples_that_they_are_asked_about(tiny, new_run):
    words = ("objective.kind=paper", *FINITE)
    folder, _ = fill(1, tiny, new_run("own"), *words)
    everything, _ = fill(1, tiny, new_run("all"), *words, "objective.routes=all")
    said = record(folder)
    assert said["complete"] and said["views"] == 2 and said["made_of"]["routes"] == "own"
    assert set(said["shards"]) == {path.name for path in shards(folder)}
    views, logits = 2, said["bytes"] // 2
    assert record(everything)["bytes"] // 2 == views * said["samples"] * (10 + 10 + 10)
    labels = load_data(load_recipe(str(tiny)).data)
    known = np.bincount(labels.labels[labels.splits["train"]], minlength=10)
    ten, halves, bottom = 10 * known.sum(), 5 * known.sum(), 3 * known[:3].sum() + 2 * known[3:5].sum() + 5 * known[5:].sum()
    assert logits == views * (ten + halves + bottom), "a teacher's classes for each sample of one of them"
    stored = sum(path.stat().st_size for path in shards(folder))
    assert said["bytes"] <= stored <= said["bytes"] + 2000 * len(shards(folder))


def test_without_augmentation_one_view_serves_all_epochs_and_no_more_views_are_made_than_epochs():
    assert Policy().different == Policy(finite=7).different == 1
    assert Policy(flip=True, finite=7).different == 7 and Policy(flip=True).different is None


def test_an_archive_serves_other_runs_that_use_its_teachers(tiny, archived, tmp_path):
    """Only students differ: the second run needs no archive of its own."""
    words = (tiny, "--run-folder", tmp_path / "run", f"teachers_from={archived[0]}", *FINITE, "students.0.lr=0.02")
    shutil.copytree(archived[1].partition("=")[2] + "/teachers", archived[0] / "teachers", dirs_exist_ok=True)
    assert "fits and is used" in run(1, "archive", *words)[0].out
    assert "soft targets are read from" in run(1, "distill", *words, ARCHIVE)[0].out
    assert not (tmp_path / "run" / "soft-targets").exists()
    damaged = shards(archived[0])[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    said = run(1, "archive", *words)[0].out
    assert f"is damaged ({damaged.name})" in said and record(tmp_path / "run")["complete"]
    damaged.write_bytes(content)


# ---- invariant 7: whole or absent, going on where it was


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_archive_goes_on_with_the_shards_that_are_whole(tiny, archived, new_run, victim):
    folder, teachers_from = new_run("run")
    words = ("archive", tiny, "--run-folder", folder, teachers_from, *FINITE)
    ranks = Ranks(2, *words)
    deadline = time.monotonic() + 60
    while len(shards(folder)) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks.processes[victim].kill()
    began = time.monotonic()
    assert all(one.code != 0 for one in ranks.wait())
    assert time.monotonic() - began < 20, "a dead rank ends the job within seconds"
    there = {path.name: path.stat().st_mtime_ns for path in shards(folder)}
    assert not record(folder)["complete"] and 4 <= len(there) < record(folder)["files"]
    assert "is not finished" in refused(1, "distill", tiny, "--run-folder", folder, teachers_from, *FINITE, ARCHIVE)
    assert f"{len(there)} of {record(folder)['files']} shards" in run(1, "status", folder)[0].out
    damaged = shards(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    said = run(1, *words)[0].out
    assert f"{len(there) - 1} shards were there" in said
    kept = {path.name: path.stat().st_mtime_ns for path in shards(folder)}
    assert all(kept[name] == written for name, written in there.items() if name != damaged.name)
    assert record(folder)["complete"] and not list(folder.rglob("*.partial"))
    assert_same(folder, archived[0])


def test_a_signal_stops_all_ranks_and_keeps_what_is_done(tiny, archived, new_run):
    folder, teachers_from = new_run("run")
    words = ("archive", tiny, "--run-folder", folder, teachers_from, *FINITE)
    ranks = Ranks(2, *words)
    deadline = time.monotonic() + 60
    while not shards(folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert [one.code for one in ranks.wait()] == [0, 0]
    assert json.loads((folder / "state" / "archive.json").read_text())["state"] == "stopped"
    run(2, *words)
    assert json.loads((folder / "state" / "archive.json").read_text())["state"] == "finished"
    assert_same(folder, archived[0])


def assert_same(folder, other):
    """Shards of the same tensors; their files may hold the label's words in another order."""
    from safetensors.torch import load_file

    assert [path.name for path in shards(folder)] == [path.name for path in shards(other)]
    for one, two in zip(shards(folder), shards(other)):
        a, b = load_file(one), load_file(two)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), one.name


# ---- invariant 8: a stale soft target is impossible


def test_a_damaged_or_missing_shard_is_refused_and_filled_again(tiny, copied, online):
    folder, teachers_from = copied("run")
    words = (tiny, "--run-folder", folder, teachers_from, *FINITE)
    first, second = shards(folder)[0], shards(folder)[-1]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    sentence = refused(2, "distill", *words, ARCHIVE)
    assert first.name in sentence and "sha256" in sentence and "run pkd archive again" in sentence
    second.unlink()
    first.write_bytes(content[:50])
    assert first.name in refused(1, "distill", *words, ARCHIVE)
    said = run(2, "distill", *words, AUTO, CO_LOCATED, "--steps", 3)[0].out
    assert "teachers are asked online" in said and first.name in said
    assert trace(folder) == online[2][0][:3]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-3"]
    run(1, "archive", *words)
    first.unlink()
    assert "is missing" in refused(1, "distill", *words, ARCHIVE)
    run(1, "archive", *words)
    assert "soft targets are read from" in run(2, "distill", *words, AUTO, ONE_GROUP)[0].out
    assert (trace(folder), students(folder)) == online[2]


def test_a_shard_that_is_a_pickle_is_refused_unread(tiny, copied, tmp_path):
    """Whose record has the right hash."""
    from pkd.files import sha256

    folder, teachers_from = copied("run")
    shard = shards(folder)[0]
    shard.write_bytes(f"cos\nmkdir\n(V{tmp_path / 'executed'}\ntR.".encode())
    change(folder, shards=lambda old: {**old, shard.name: sha256(shard)})
    assert shard.name in refused(1, "distill", tiny, "--run-folder", folder, teachers_from, *FINITE, ARCHIVE)
    assert not (tmp_path / "executed").exists()


def test_an_archive_of_other_teachers_data_or_views_is_refused_and_made_anew(tiny, copied, taught, tmp_path):
    folder, _ = copied("run")
    other = tmp_path / "others"
    shutil.copytree(taught, other)
    shutil.copy(other / "teachers" / "level1-0.safetensors", other / "level1-0.before")
    facts = json.loads((other / "teachers" / "level1-0.json").read_text())
    from pkd.files import sha256
    from pkd.tensor_file import read_tensors, write_tensors

    weights = other / "teachers" / "level1-0.safetensors"
    write_tensors(weights, {key: value * 1.5 if value.is_floating_point() else value
                            for key, value in read_tensors(weights).items()})
    assert "another sha256" in refused(1, "archive", tiny, "--run-folder", folder, f"teachers_from={other}", *FINITE)
    (other / "teachers" / "level1-0.json").write_text(json.dumps({**facts, "sha256": sha256(weights)}))
    words = (tiny, "--run-folder", folder, f"teachers_from={other}", *FINITE)
    sentence = refused(2, "distill", *words, ARCHIVE)
    assert "another teacher level1-0" in sentence and facts["sha256"][:12] in sentence
    assert "another teacher level1-0" in run(1, "distill", *words, AUTO, "--steps", 1)[0].out
    assert "is made anew" in run(2, "archive", *words)[0].out
    shutil.rmtree(folder / "checkpoints")
    assert "soft targets are read from" in run(1, "distill", *words, ARCHIVE, "--steps", 1)[0].out


def change(folder, **more):
    path = folder / "soft-targets" / "archive.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, **{key: value(tree[key]) for key, value in more.items()}}))


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"made_of": lambda old: {**old, "data": "0" * 64}}, "data is "),
    ({"made_of": lambda old: {**old, "views": {**old["views"], "finite": 3}}}, "views.finite is 2 in the recipe and 3"),
    ({"made_of": lambda old: {**old, "views": {**old["views"], "crop": 2}}}, "views.crop is 1 in the recipe and 2"),
    ({"made_of": lambda old: {**old, "seed": 1}}, "seed is 0 in the recipe and 1"),
    ({"made_of": lambda old: {**old, "routes": "own"}}, "routes is 'all' in the recipe and 'own'"),
    ({"made_of": lambda old: {**old, "archive": {"dtype": "int8", "top_k": None}}}, "archive.dtype is 'fp16'"),
    ({"views": lambda old: 1}, "holds 1 view(s)"),
    ({"pixels": lambda old: [0, *old[1:]]}, "other pixels"),
    ({"complete": lambda old: False}, "is not finished"),
])
def test_the_record_is_compared_with_what_is_asked(tiny, copied, changed, sentence):
    folder, teachers_from = copied("run")
    change(folder, **changed)
    said = refused(1, "distill", tiny, "--run-folder", folder, teachers_from, *FINITE, ARCHIVE)
    assert sentence in said and "pkd archive" in said and "soft_targets=online" in said
    assert not (folder / "checkpoints").exists()


def test_mistakes_are_one_sentence_before_anything_is_written(tiny, new_run):
    folder, teachers_from = new_run("run")
    words = (tiny, "--run-folder", folder, teachers_from)
    assert "set views.finite" in refused(1, "archive", *words)
    assert "set views.finite" in refused(1, "distill", *words, ARCHIVE)
    assert "asks no teacher" in refused(1, "archive", *words, "objective.kind=alone", "--run-folder", folder / "alone")
    new = (*words, "--run-folder", folder / "finite", *FINITE)
    assert "run pkd archive first" in refused(2, "distill", *new, ARCHIVE)
    assert "nobody would read the archive" in refused(1, "launch", *new, "--on", "torchrun", "--phases", "archive,distill")
    many = ("views.finite=2000000000", "distill.epochs=2000000000", "--run-folder", folder / "large")
    sentence = refused(2, "archive", *words, *many)
    assert "GiB more in" in sentence and "are free" in sentence
    assert not shards(folder / "large")


# ---- the audit


def test_an_audit_asks_again_and_finds_rows_that_were_altered_before_they_were_hashed(tiny, copied):
    """With a corrected sha256 in archive.json a distillation cannot tell, the teachers can; whatever the number of ranks."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from pkd.files import sha256
    from pkd.tensor_file import write_tensors

    folder, teachers_from = copied("run")
    words = ("archive", tiny, "--run-folder", folder, teachers_from, *FINITE, "--audit")
    everything = record(folder)["samples"] * 2 * len(record(folder)["made_of"]["teachers"])
    said = run(2, *words, 100)[0].out
    assert "100 soft targets" in said and "all equal bit for bit" in said and "largest difference 0" in said
    victim = shards(folder)[3]
    tensors = load_file(victim)
    with safe_open(victim, framework="pt") as file:
        label = file.metadata()
    tensors["level1-0"][5] += 0.125
    write_tensors(victim, tensors, label)
    change(folder, shards=lambda old: {**old, victim.name: sha256(victim)})
    assert "soft targets are read from" in run(1, "distill", *words[1:-1], ARCHIVE, "--steps", 1)[0].out
    for ranks in (1, 2):
        sentence = refused(ranks, *words, 10**6)
        assert f"1 of {everything} soft targets" in sentence and victim.name in sentence and "teacher level1-0" in sentence
        assert "largest difference 0.12" in sentence and "delete that folder and run pkd archive again" in sentence


def test_launch_archives_between_teachers_and_students_and_status_tells(tiny, new_run, online):
    folder, teachers_from = new_run("run")
    words = ("launch", tiny, teachers_from, *FINITE, ARCHIVE, "--run-folder", folder, "--on", "here")
    plan = run(1, *words, "--dry-run")[0].out.splitlines()
    assert [line.split(" -m pkd ")[1].split()[0] for line in plan[1:]] == ["archive", "distill", "evaluate"]
    run(1, *words)
    assert (trace(folder), students(folder)) == online[1]
    assert run(1, *words)[0].out.count("done already") == 4
    assert "archive of soft targets: done" in run(1, "status", folder)[0].out
    assert json.loads(run(1, "status", folder, "--json")[0].out)["archive"] == "done"
    shutil.rmtree(folder / "soft-targets")
    assert json.loads(run(1, "status", folder, "--json")[0].out)["archive"] == "none", "whatever its phase had come to"
    slurm = run(1, *words[:-2], "--run-folder", folder.parent / "new", "--on", "slurm", "--dry-run")[0].out
    assert "afterok:<id of archive>" in next(line for line in slurm.splitlines() if "job-name=pkd-distill" in line)


# ---- the parts
