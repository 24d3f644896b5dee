"""What a stranger's file may not do, and what pkd does not do to its surroundings."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from ranks import LIGHT, Ranks, refused, run, wait_for_step

from pkd.errors import UserError
from pkd.files import sha256, write_json
from pkd.models import read_weights
from pkd.recipe import Model
from pkd.vision import torchvision


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def change(path: Path, **keys) -> None:
    write_json(path, {**json.loads(path.read_text()), **keys})


def test_weights_in_torchs_cache_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "checkpoints" / url.rsplit("/", 1)[-1])
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        read_weights(Model(name="resnet18", weights="IMAGENET1K_V1"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "record", "key"), [
    ("teachers/level0.safetensors", "teachers/level0.json", "sha256"),
    ("students/mobile.safetensors", "students/mobile.json", "sha256"),
    ("checkpoints/step-24/network-shuffle-weights.safetensors", "checkpoints/step-24/sha256.json",
     "network-shuffle-weights.safetensors"),
    ("checkpoints/step-24/best-mobile.safetensors", "checkpoints/step-24/sha256.json", "best-mobile.safetensors"),
])
def test_a_teacher_a_student_or_a_checkpoint_that_is_a_pickle_is_refused_unread(tiny, taught, finished, tmp_path, name,
                                                                                record, key):
    """Whose record has the right hash."""
    run_folder, teachers_from = tmp_path / "run", tmp_path / "taught"
    shutil.copytree(finished, run_folder)
    shutil.copytree(taught, teachers_from)
    folder = teachers_from if name.startswith("teachers") else run_folder
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    change(folder / record, **{key: sha256(folder / name)})
    if name.startswith("students"):
        sentence = refused(1, "export", run_folder, "--to", tmp_path / "out")
    else:
        change(run_folder / "state" / "distill.json", state="running")
        sentence = refused(1, "distill", tiny, "--run-folder", run_folder, f"teachers_from={teachers_from}")
    assert Path(name).name in sentence and "cannot be read as safetensors" in sentence, sentence
    assert not (tmp_path / "executed").exists()


def test_a_recipe_that_asks_for_a_python_object_is_refused(tiny, tmp_path):
    recipe, path = tmp_path / "recipe.yaml", tmp_path / "executed"
    recipe.write_text(tiny.read_text() + f"seed: !!python/object/apply:os.mkdir [{path}]\n")
    assert "python/object" in refused(1, "plan", recipe)
    assert "python/object" in refused(1, "plan", tiny, f"seed=!!python/object/apply:os.mkdir [{path}]")
    assert not path.exists()


def test_what_a_network_s_record_calls_it_leads_nowhere_else(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    for suffix in (".json", ".safetensors"):
        shutil.copy(run_folder / "students" / f"mobile{suffix}", tmp_path / f"evil{suffix}")
    change(run_folder / "students" / "mobile.json", name="../../evil")
    assert "another name" in refused(1, "export", run_folder, "--to", tmp_path / "a" / "b")
    change(run_folder / "students" / "students.json", students=["../../evil"])
    assert "another name" in refused(1, "export", run_folder, "--to", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_only_a_class_of_networks_is_ever_called_whatever_a_file_names(tiny, taught, tmp_path):
    mine = tmp_path / "taught"
    shutil.copytree(taught, mine)
    change(mine / "teachers" / "level0.json", architecture="os:mkdir", width=1.0)
    sentence = refused(1, "distill", tiny, "--run-folder", tmp_path / "run", f"teachers_from={mine}")
    assert "'os:mkdir' is no torch.nn.Module class" in sentence


def test_code_that_a_recipe_names_is_said_at_the_start(tiny, new_run):
    folder, teachers_from = new_run("run")
    said = run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 1,
               "students.0.model=own_model:Smooth")[0].out
    assert "code of its own, which is run: own_model:Smooth (" in said and "own_model.py)" in said.replace("\n", "")


def test_only_timings_are_written_outside_the_run_folder_and_ports_open_on_the_jobs_interface(tiny, new_run, tmp_path):
    folder, teachers_from = new_run("run")
    places = [tmp_path / name for name in ("home", "tmp", "here")]
    for place in places:
        place.mkdir()
    there = {"cwds": [places[2]] * 2, "env": lambda rank: {"HOME": str(places[0]), "TMPDIR": str(places[1]),
                                                           "XDG_CACHE_HOME": ""}}
    run(2, "teach", tiny, "--run-folder", tmp_path / "taught", "--steps", 1, "--teacher", "level1-0", **there)
    ranks = Ranks(2, "distill", tiny, "--run-folder", folder, teachers_from, "distill.epochs=500", *LIGHT, **there)
    wait_for_step(folder, 12)
    listening = [c.laddr.ip for process in ranks.processes for c in psutil.Process(process.pid).net_connections("inet")
                 if c.status == psutil.CONN_LISTEN]
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert [one.code for one in ranks.wait()] == [0, 0]
    assert listening and set(listening) == {"127.0.0.1"}, listening
    left = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert left and {path.parent for path in left} == {places[0] / ".cache" / "pkd" / "calibration"}, left
