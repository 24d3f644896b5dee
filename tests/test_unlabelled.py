"""Images without a label: teachers never see them, students learn what teachers say of them, wherever those sit."""

import json

import numpy as np
import pytest
import torch
from ranks import LIGHT, REPOSITORY, run, students, teachers, trace

from pkd.data import load_data
from pkd.recipe import Data
from pkd.recipe_file import load_recipe


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A recipe of 480 digits and 160 without a label, as overrides, whose teachers are trained."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("partly")
    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)
    np.savez(folder / "digits.npz", x=images[:480], y=digits.target[:480].astype(np.int64), x_unlabelled=images[480:640])
    return f"data={{name: npz, path: {folder / 'digits.npz'}, unlabelled: true}}", *LIGHT


@pytest.fixture(scope="module")
def own_teachers(tiny, partly, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    run(2, "teach", tiny, "--run-folder", folder, *partly)
    return folder


def test_teachers_are_those_of_the_labelled_images(own_teachers, taught):
    assert teachers(own_teachers) == teachers(taught)


@pytest.mark.parametrize("objective", ["composed", "paper"])
def test_losses_are_equal_bit_for_bit_wherever_the_teachers_sit(tiny, partly, own_teachers, tmp_path, objective):
    """Invariant 1, from the archive as well; the paper's specialists are not asked about samples without a label."""
    words = (*partly, f"objective.kind={objective}", f"teachers_from={own_teachers}")
    finite = "views={crop: 1, finite: 2}"

    def distilled(world, name, *more):
        run(world, "distill", tiny, "--run-folder", tmp_path / name, *words, *more)
        return trace(tmp_path / name), students(tmp_path / name)
    alone = distilled(1, "alone")
    data = load_data(load_recipe(str(tiny), words).data)
    samples = len(data.splits["train"]) + 160
    assert len(alone[0]) == 2 * (samples // 32), "an epoch has them all"
    assert distilled(2, "apart", "placement.kind=dedicated") == alone
    run(2, "archive", tiny, "--run-folder", tmp_path / "archive", *words, finite)
    assert distilled(1, "archive", finite, "soft_targets=archive") == distilled(1, "online", finite)
    made = json.loads((tmp_path / "archive" / "soft-targets" / "archive.json").read_text())
    labels = data.labels[data.splits["train"]].numpy()
    specialists = [range(5), range(5, 10), [0, 1, 2], [3, 4], range(5, 10)]
    asked = [samples if objective == "composed" else np.isin(labels, group).sum() for group in specialists]
    logits = 10 * samples + sum(len(group) * rows for group, rows in zip(specialists, asked))
    assert made["samples"] == samples and made["bytes"] == 2 * 2 * logits, "two views, two bytes a logit"


@pytest.mark.parametrize("world", [1, 2])
def test_from_labels_alone_the_loss_is_a_mean_over_images_with_a_label(tiny, partly, tmp_path, world):
    """Others say nothing, and would only make the steps of this control shorter than those of its rivals."""
    run(world, "distill", tiny, "--run-folder", tmp_path / "run", "--steps", "3", *partly, "objective.kind=alone",
        *["placement.kind=co-located"] * (world - 1))
    first = list(trace(tmp_path / "run")[0]["loss"].values())
    assert first == pytest.approx([np.log(10)] * len(first), abs=0.25), "of networks that know nothing yet"


def test_the_digits_of_few_labels_keep_all_images_and_the_same_test_split(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch"))
    from hide_labels import main

    assert main(["--labels", "305", "--to", str(tmp_path / "few.npz")]) == 0
    whole_file = (tmp_path / "few.npz").read_bytes()
    assert main(["--labels", "400", "--to", str(tmp_path / "few.npz")]) == 2 == main(["--labels", "9"])
    assert (tmp_path / "few.npz").read_bytes() == whole_file and sorted(tmp_path.iterdir()) == [tmp_path / "few.npz"]
    data, whole = (load_data(Data(name=name, path=path, unlabelled=path is not None))
                   for name, path in (("npz", str(tmp_path / "few.npz")), ("digits", None)))
    assert len(data.splits["train"]) == 300 and data.labels[data.splits["train"]].bincount().tolist() == [30] * 10
    assert len(data.students_see) == len(whole.splits["train"]) and data.classes == whole.classes
    for split in ("validation", "test"):
        assert torch.equal(data.images[data.splits[split]], whole.images[whole.splits[split]])
        assert torch.equal(data.labels[data.splits[split]], whole.labels[whole.splits[split]])
