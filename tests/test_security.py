"""What a stranger's file may not do, and what pkd does not do to its surroundings."""

import json
import os
import pickle
import shutil
import signal

import psutil
import pytest
import torch
from ranks import Ranks, refused, run, wait_for_step

from pkd.errors import UserError
from pkd.models import read_weights
from pkd.recipe import Model
from pkd.vision import torchvision


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_in_torchs_cache_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "checkpoints" / url.rsplit("/", 1)[-1])
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        read_weights(Model(name="resnet18", weights="IMAGENET1K_V1"))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_a_teacher_or_a_student_that_is_a_pickle_is_refused_unread(tiny, taught, new_run, tmp_path):
    mine = tmp_path / "taught"
    shutil.copytree(taught, mine)
    (mine / "teachers" / "level0.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    assert "level0.safetensors" in refused(1, "distill", tiny, "--run-folder", tmp_path / "run", f"teachers_from={mine}")
    assert not (tmp_path / "executed").exists()


def test_only_a_class_of_networks_is_ever_called_whatever_a_file_names(tiny, taught, tmp_path):
    mine = tmp_path / "taught"
    shutil.copytree(taught, mine)
    facts = json.loads((mine / "teachers" / "level0.json").read_text())
    (mine / "teachers" / "level0.json").write_text(json.dumps({**facts, "architecture": "os:mkdir", "width": 1.0}))
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
    ranks = Ranks(2, "distill", tiny, "--run-folder", folder, teachers_from, "distill.epochs=500", cwds=[places[2]] * 2,
                  env=lambda rank: {"HOME": str(places[0]), "TMPDIR": str(places[1]), "XDG_CACHE_HOME": ""})
    wait_for_step(folder, 12)
    listening = [c.laddr.ip for process in ranks.processes for c in psutil.Process(process.pid).net_connections("inet")
                 if c.status == psutil.CONN_LISTEN]
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert [one.code for one in ranks.wait()] == [0, 0]
    assert listening and set(listening) == {"127.0.0.1"}, listening
    left = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert left and {path.parent for path in left} == {places[0] / ".cache" / "pkd" / "calibration"}, left
