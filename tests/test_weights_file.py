"""Weights in several safetensors files with an index are read as those in one."""

import json
import shutil

import pytest
import torch
from ranks import run, students, trace

from pkd.errors import UserError
from pkd.files import read_json, write_json
from pkd.models import build
from pkd.recipe import Model
from pkd.weights_file import Weights, weights_of, write_weights

SMALL = Model(name="pkd_resnet_s")


@pytest.fixture
def split(tmp_path):
    """A network, and the index of its weights in several files."""
    network = build(SMALL, 10, 1, (8, 8))
    state = network.backbone.state_dict()
    path = write_weights(tmp_path / "w", state, most=max(tensor.nbytes for tensor in state.values()))
    return state, path


def test_several_files_hold_the_same_tensors_as_one(split, tmp_path):
    state, path = split
    assert path.name == "w.safetensors.index.json" and weights_of(tmp_path / "w") == path
    weights = Weights(path)
    assert len(weights.files) > 2 and weights.names == list(state)
    for name, tensor in weights.all().items():
        assert torch.equal(tensor, state[name]) and weights.shape(name) == list(tensor.shape)
    assert max(file.stat().st_size for file in weights.files) < sum(tensor.nbytes for tensor in state.values()) / 2
    loaded = build(Model(name="pkd_resnet_s", weights=str(path)), 10, 1, (8, 8)).backbone.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_one_file_takes_the_place_of_several_and_the_hash_is_of_every_byte(split, tmp_path):
    state, path = split
    before = Weights(path).sha256()
    last = Weights(path).files[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Weights(path).sha256() != before
    assert write_weights(tmp_path / "w", state) == weights_of(tmp_path / "w") == tmp_path / "w.safetensors"


@pytest.mark.parametrize(("harm", "reason"), [
    (lambda path: write_json(path, {"weight_map": {"a": "../w.safetensors"}}), "its own folder"),
    (lambda path: write_json(path, {"weight_map": {"a": "/etc/passwd"}}), "its own folder"),
    (lambda path: write_json(path, {"metadata": {}}), "weight_map"),
    (lambda path: path.write_text("{"), "cannot be read as JSON"),
    (lambda path: Weights(path).files[1].unlink(), "is not there"),
    (lambda path: Weights(path).files[1].write_bytes(b"nothing"), "cannot be read as safetensors"),
    (lambda path: write_json(path, {"weight_map": {**read_json(path)["weight_map"], "more": Weights(path).files[0].name}}),
     "cannot be read as safetensors"),
])
def test_an_index_that_is_damaged_or_leaves_its_folder_is_refused(split, harm, reason):
    _, path = split
    harm(path)
    with pytest.raises(UserError, match=reason):
        Weights(path).all()


def test_a_teacher_in_several_files_teaches_the_same_whole_and_in_shards(tiny, taught, finished, tmp_path):
    mine = tmp_path / "taught"
    shutil.copytree(taught, mine)
    stem = mine / "teachers" / "level0"
    tensors = Weights(weights_of(stem)).all()
    index = write_weights(stem, tensors, most=max(tensor.nbytes for tensor in tensors.values()))
    facts = json.loads((mine / "teachers" / "level0.json").read_text())
    write_json(mine / "teachers" / "level0.json", {**facts, "sha256": Weights(index).sha256()})
    for world, place in ((2, ("placement.student_ranks=1",)), (3, ("placement={student_ranks: 1, shards: {level0: 2}}",))):
        folder = tmp_path / f"of-{world}"
        run(world, "distill", tiny, "--run-folder", folder, f"teachers_from={mine}", *place)
        assert trace(folder) == trace(finished) and students(folder) == students(finished)
    run(1, "evaluate", folder)
