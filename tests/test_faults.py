"""Damage: what is whole is used, and said."""

import errno
import json
import os
import shutil
import socket

import pytest
from PIL import Image
from ranks import LIGHT, Ranks, refused, run, students, trace

from pkd.errors import PassingError, UserError
from pkd.files import sha256, unwritable
from pkd.images import decode
from pkd.tensor_file import read_tensors, write_tensors


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(tiny, taught, tmp_path_factory):
    """A run cut short twice, so that it has two checkpoints."""
    folder = tmp_path_factory.mktemp("faults")
    start = ("distill", tiny, f"teachers_from={taught}", *LIGHT)
    for steps in (4, 8):
        run(1, *start, "--run-folder", folder / "cut", "--steps", steps)
    return folder, start


@pytest.fixture(scope="module")
def whole(stopped):
    """The same run, that nothing disturbed."""
    folder, start = stopped
    run(1, *start, "--run-folder", folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("name", ["network-mobile-weights.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_its_checksum_and_the_one_before_it_used(stopped, whole, tmp_path, name):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-8" / name)
    ended = run(1, *start, "--run-folder", tmp_path / "run")
    said = " ".join(ended[0].out.split())
    assert "step-8 is damaged" in said and name in said and "step-4" in said
    assert (trace(tmp_path / "run"), students(tmp_path / "run")) == (trace(whole), students(whole))


def test_without_a_whole_checkpoint_the_run_is_refused_and_nothing_lost(stopped, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/network-shuffle-momentum_buffer.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    assert "no whole checkpoint is left" in refused(1, *start, "--run-folder", tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before


def test_checkpoints_are_chosen_by_step_not_by_clock_and_two_are_kept(stopped, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        os.utime(path, (0, 0) if path.name == "step-8" else None)
    ended = run(1, *start, "--run-folder", tmp_path / "run")
    assert "step-8" in ended[0].out
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-12", "step-24"], "each epoch's end, the last two"
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_metrics_after_the_checkpoint_are_dropped_on_resume(stopped, whole, tmp_path):
    folder, start = stopped
    shutil.copytree(folder / "cut", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 7, "step": 99}) + "\n" + '{"half a li')
    run(1, *start, "--run-folder", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["train"] for line in lines] == [line["train"] for line in expected]
    assert [line["validation"] for line in lines] == [line["validation"] for line in expected]


def test_a_teacher_that_diverged_is_named_by_the_rank_that_asks_it(tiny, taught, tmp_path):
    """And not the students, whose losses would be the first to show it."""
    shutil.copytree(taught / "teachers", tmp_path / "taught" / "teachers")
    weights = tmp_path / "taught" / "teachers" / "level1-0.safetensors"
    facts = json.loads(weights.with_suffix(".json").read_text())
    tensors = {name: value * 1e9 if name.startswith("head") else value for name, value in read_tensors(weights).items()}
    write_tensors(weights, tensors)
    weights.with_suffix(".json").write_text(json.dumps({**facts, "sha256": sha256(weights)}))
    ended = Ranks(2, "distill", tiny, "--run-folder", tmp_path / "run", f"teachers_from={tmp_path / 'taught'}",
                  "placement.kind=dedicated").wait()
    assert all(one.code != 0 for one in ended)
    assert ended[1].code == 2 and "teacher level1-0 answers with logits that are not finite" in ended[1].err
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_what_may_pass_is_no_mistake_of_the_users_and_the_same_command_goes_on(tiny, new_run, tmp_path):
    """Slurm queues a job again that ends with 1, and cancels what waits for one that ends with 2."""
    folder, teachers_from = new_run("run")
    away = tmp_path / "away"
    away.touch()
    words = ("distill", tiny, "--run-folder", folder, teachers_from, "distill.epochs=4", "placement.kind=dedicated",
             "students.0={name: mobile, model: 'own_model:Stale'}")
    for _ in range(2):
        ended = Ranks(2, *words, env=lambda rank: {"PKD_TEST_STALE": str(away)}).wait()
        said = "".join(one.err for one in ended)
        assert {one.code for one in ended} == {1} and "Traceback" not in said, ended
        assert "far-away.png: the system answered 'Stale file handle', which often passes" in said
        assert json.loads((folder / "state" / "distill.json").read_text())["state"] == "running"
    away.unlink()
    assert "resuming from" in run(2, *words, env=lambda rank: {"PKD_TEST_STALE": str(away)})[0].out


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE])
def test_an_image_that_cannot_be_read_just_now_is_not_called_damaged(tmp_path, monkeypatch, number):
    def away(*_):
        raise OSError(number, os.strerror(number))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", away)
    with pytest.raises(PassingError, match="goes on from the last checkpoint"):
        decode(tmp_path / "a.png", (8, 8), True)
    with pytest.raises(PassingError):
        raise unwritable(tmp_path / "a.png", OSError(number, os.strerror(number)), 0)


def test_a_damaged_image_and_a_full_disk_are_mistakes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be decoded"):
        decode(tmp_path / "a.png", (8, 8), True)
    assert "make room" in str(unwritable(tmp_path / "a.png", OSError(errno.ENOSPC, "No space left on device"), 9))


@pytest.mark.parametrize("interface", [{}, {"GLOO_SOCKET_IFNAME": "lo"}], ids=["found", "given"])
def test_an_address_of_rank_0_that_other_nodes_cannot_reach_is_refused_at_once(interface, tiny, new_run):
    """Some systems' /etc/hosts says so of their own names. CROSS_SIZE: DeepSpeed's word for the number of nodes."""
    folder, teachers_from = new_run("run")
    ended = Ranks(2, "distill", tiny, "--run-folder", folder, teachers_from,
                  env=lambda rank: {"CROSS_SIZE": "2", **interface}).wait()
    assert [one.code for one in ended] == [2, 2] and not folder.exists()
    assert "2 nodes are to reach rank 0 at 127.0.0.1" in ended[0].err + ended[1].err


def test_an_interface_that_is_not_there_is_named(tiny, new_run):
    folder, teachers_from = new_run("run")
    ended = Ranks(2, "distill", tiny, "--run-folder", folder, teachers_from,
                  env=lambda rank: {"GLOO_SOCKET_IFNAME": "ib7"}).wait()
    assert [one.code for one in ended] == [2, 2]
    assert "GLOO_SOCKET_IFNAME is ib7, but the network interfaces of " + socket.gethostname() in ended[0].err + ended[1].err
    assert not folder.exists()
