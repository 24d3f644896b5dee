"""launch/weigh_targets.py: what it says of soft targets is what pkd's loss makes of the same teachers."""

import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from made_up import in_several_files
from ranks import REPOSITORY

from pkd.data import load_data
from pkd.files import read_json, write_json
from pkd.network_file import read_network
from pkd.recipe_file import load_recipe

sys.path.insert(0, str(REPOSITORY / "launch"))
from weigh_targets import Answers, composed, fit, learned, main, weighted


def test_the_composed_target_of_three_levels_is_the_mean_of_their_chain_rules():
    torch.manual_seed(0)
    top = torch.randn(7, 5)
    groups = {1: [[0, 3], [1, 2, 4]], 2: [[4], [0, 1], [2, 3]]}
    specialists = [Answers(f"{level}-{index}", level, torch.tensor(own), torch.randn(7, len(own)))
                   for level, parts in groups.items() for index, own in enumerate(parts)]
    probability, chains = top.softmax(1), {}
    for level in groups:
        chains[level] = torch.empty(7, 5)
        for own in (one for one in specialists if one.level == level):
            mass = probability[:, own.classes].sum(1, keepdim=True)
            chains[level][:, own.classes] = (mass * (own.logits / 2).softmax(1)).log()
    for weight in (0.0, 0.3, 1.0):
        wanted = (1 - weight) * probability.log() + weight * (chains[1] + chains[2]) / 2
        torch.testing.assert_close(composed(top, specialists, weight, 2.0), wanted, rtol=0, atol=1e-5)


def test_weights_that_are_learned_start_from_pkds_and_find_who_is_to_be_believed():
    torch.manual_seed(0)
    labels = torch.arange(6).repeat(100)
    groups = [[0, 1, 2], [3, 4, 5]]
    top = torch.randn(600, 6) + 2 * F.one_hot(labels, 6)
    knows = [3.0, 0.0]  # the second specialist guesses
    specialists = [Answers(f"level1-{index}", 1, torch.tensor(own),
                           torch.randn(600, 3) + knows[index] * F.one_hot(labels, 6)[:, own])
                   for index, own in enumerate(groups)]
    plain = weighted(top, specialists, torch.tensor([0.0, 0.5, 0.0]), [0, 0]).log_softmax(1)
    torch.testing.assert_close(plain, composed(top, specialists, 0.5, 1.0).log_softmax(1), rtol=0, atol=1e-5)
    numbers = fit(top, specialists, labels, [0, 1])
    assert numbers[1] > 0.3 and abs(numbers[2]) < 0.1, "weights of the one that knows and of the one that guesses"
    each, together = (F.cross_entropy(learned(top, specialists, labels, parts), labels) for parts in ([0, 1], [0, 0]))
    assert each < together < F.cross_entropy(plain, labels), "on images that the numbers were not learned from"


def test_it_tells_accuracies_on_validation_images_and_which_target_is_pkds(tiny, taught, tmp_path, capsys):
    shutil.copytree(taught, tmp_path / "again")
    in_several_files(taught / "teachers" / "level0", tmp_path / "again" / "teachers" / "level0")
    assert main([str(tiny), str(taught), str(tmp_path / "again"), "--json", str(tmp_path / "said.json")]) == 0
    said = capsys.readouterr().out
    data = load_data(load_recipe(str(tiny)).data)
    network, _ = read_network(taught / "teachers" / "level0")
    ids = data.splits["validation"]
    with torch.inference_mode():
        logits = network.eval()(data.images[ids]).float()
    top = f"{F.cross_entropy(logits, data.labels[ids]).item():7.4f}"
    assert f"%  {top}  run level0\n" in said and f"%  {top}  again level0\n" in said
    assert f"%  {top}  mean of run and again\n" in said, "of one and the same"
    assert said.count(" <- pkd's") == 2 and "specialists' weight 0.667, temperature 1 <- pkd's" in said
    assert "level2-2, 5 classes:" in said and said.count("learned for each level\n") == 2
    written = read_json(tmp_path / "said.json")
    assert written["validation_images"] == len(ids) and len(written["rows"]) == said.count(" %  ")
    assert written["rows"][0]["name"] == "run level0" and f"{written['rows'][0]['cross_entropy']:7.4f}" == top


@pytest.mark.parametrize("name", ["level0", "level1-1"])
def test_a_pyramid_that_lacks_a_teacher_is_no_figure(tiny, taught, tmp_path, name, capsys):
    shutil.copytree(taught, tmp_path / "run")
    (tmp_path / "run" / "teachers" / f"{name}.json").unlink()
    assert main([str(tiny), str(tmp_path / "run")]) == 2
    assert "lacks its top or a specialist of level 1" in capsys.readouterr().err
    assert main(["glyphs" if name == "level0" else "digits", str(tmp_path / "run")]) == 2


def test_nothing_is_overwritten_and_folders_that_cannot_be_told_apart_or_know_the_images_are_refused(
        tiny, taught, tmp_path, capsys):
    (tmp_path / "mine.json").write_text("mine")
    assert main([str(tiny), str(taught), "--json", str(tmp_path / "mine.json")]) == 2
    assert "already exists" in capsys.readouterr().err and (tmp_path / "mine.json").read_text() == "mine"
    shutil.copytree(taught, tmp_path / taught.name)
    assert main([str(tiny), str(taught), str(tmp_path / taught.name)]) == 2
    assert f"two folders are called {taught.name}" in capsys.readouterr().err
    record = read_json(taught / "run.json")
    record["recipe"]["data"]["seed"] += 1
    write_json(tmp_path / taught.name / "run.json", record)
    assert main([str(tiny), str(tmp_path / taught.name)]) == 2
    assert "were trained with data.seed = " in capsys.readouterr().err


@pytest.mark.parametrize("words", [("{tiny}", "{tmp}"), ("nothing.yaml", "{tmp}")])
def test_what_is_not_there_is_named(tiny, tmp_path, words, capsys):
    assert main([word.format(tiny=tiny, tmp=tmp_path) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
