"""Trackers: a run's figures once each, at their step, in one run of the user's tracker, and nowhere but in its folder."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import LIGHT, refused, run, students

from pkd.errors import UserError
from pkd.tracker import PACKAGES, check_tracker, figures, settings

KEYS = st.sampled_from("abc")
NUMBERS = st.integers(0, 9) | st.just(0.5)
LEAVES = NUMBERS | st.none() | st.booleans() | st.just("text") | st.lists(NUMBERS, max_size=2)


@given(st.recursive(NUMBERS | st.lists(NUMBERS, min_size=1, max_size=3),
                    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3)).filter(
    lambda tree: isinstance(tree, dict)))
def test_every_figure_of_a_line_has_a_name_that_leads_to_it(line):
    def count(tree):
        inner = tree.values() if isinstance(tree, dict) else tree
        return sum(map(count, inner)) if isinstance(tree, (dict, list)) else 1
    flat = figures(line)
    assert len(flat) == count(line)
    for name, value in flat.items():
        node = line
        for key in name.split("/"):
            node = node[int(key)] if isinstance(node, list) else node[key]
        assert node == value


@given(st.dictionaries(KEYS, LEAVES | st.dictionaries(KEYS, LEAVES, min_size=1) | st.lists(
    st.dictionaries(KEYS, LEAVES, min_size=1), min_size=1, max_size=2)))
def test_every_setting_of_a_recipe_has_the_name_that_an_override_gives_it(tree):
    for name, value in settings(tree).items():
        node = tree
        for key in name.split("."):
            node = node[int(key)] if isinstance(node, list) else node[key]
        assert value == (json.dumps(node) if isinstance(node, list) else node)


def tensorboard_run(folder: Path) -> tuple[dict[int, dict], dict]:
    """Figures by step and name, and settings, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(root))
    events.Reload()
    found: dict[int, dict] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {}), f"{name} twice at step {event.step}"
            found[event.step][name] = event.value
    configuration, = root.glob("*/hparams.yml")
    import yaml

    return found, yaml.safe_load(configuration.read_text())


def wandb_run(folder: Path) -> tuple[dict[int, dict], dict]:
    """The same of the offline records of Weights & Biases: every start's file is of the one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, dict] = {}
    configuration: dict = {}
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1 < len(files)
    for file in files:
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if row:
                assert row["_step"] not in found
                found[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
            for item in [*record.run.config.update, *record.config.update]:
                configuration[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found, configuration


def records(content: bytes, block: int = 2**15) -> Iterator[bytes]:
    """Of a log in LevelDB's format (blocks of chunks: checksum, length, and whether whole, first, middle or last)."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # too little for a chunk's head
            at += block - at % block
            continue
        length, part = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            yield whole
            whole = b""


def mlflow_run(folder: Path) -> tuple[dict[int, dict], dict]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    one, = client.search_runs([experiment])
    found: dict[int, dict] = {}
    for name in one.data.metrics:
        for metric in client.get_metric_history(one.info.run_id, name):
            assert name not in found.setdefault(metric.step, {}), f"{name} twice at step {metric.step}"
            found[metric.step][name] = metric.value
    return found, one.data.params


READERS = {"tensorboard": tensorboard_run, "wandb": wandb_run, "mlflow": mlflow_run}


@pytest.mark.parametrize("kind", READERS)
def test_a_tracker_has_each_epochs_figures_once_whatever_interrupts_the_run(kind, tiny, new_run, finished):
    if not importlib.util.find_spec(kind):
        pytest.skip(f"{kind} is not installed here: pip install {PACKAGES[kind]}")
    folder, teachers_from = new_run("run")
    home = folder.parent / "home"
    home.mkdir()
    words = ("distill", tiny, "--run-folder", folder, teachers_from, "placement.kind=dedicated", f"tracker={kind}")
    environment = {"HOME": str(home), "WANDB_MODE": "online", "MLFLOW_RUN_ID": "another", "MLFLOW_TRACKING_URI": "http://x"}
    run(2, *words, "--steps", 12, env=lambda rank: environment)
    shutil.rmtree(folder / "checkpoints")  # as if it had died between the tracker's line and the checkpoint
    run(2, *words, env=lambda rank: environment)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found, configuration = READERS[kind](folder / "trackers")
    assert list(found) == [line["step"] for line in lines] == [12, 24]
    for line in lines:
        wanted = figures(line)
        assert set(found[line["step"]]) == set(wanted)
        for name in wanted:
            if name.startswith(("train", "validation", "ensemble", "learning_rate", "epoch")):
                assert found[line["step"]][name] == pytest.approx(wanted[name], rel=1e-6)
    assert str(configuration["students.1.lr"]) == "0.1" and str(configuration["distill.epochs"]) == "2"
    assert not list(home.iterdir()) and students(folder) == students(finished)


def test_a_tracker_asked_for_later_gets_the_epochs_before(tiny, new_run):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed here")
    folder, teachers_from = new_run("run")
    words = ("distill", tiny, "--run-folder", folder, teachers_from, *LIGHT)
    run(1, *words, "--steps", 12)
    run(1, *words, "tracker=tensorboard")
    assert list(tensorboard_run(folder / "trackers")[0]) == [12, 24]


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=f"pip install {PACKAGES[kind]}"):
        check_tracker(kind)
    check_tracker(None)


def test_a_tracker_that_cannot_be_started_is_refused_before_training(tiny, new_run):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed here")
    folder, teachers_from = new_run("run")
    (folder / "trackers").mkdir(parents=True)
    (folder / "trackers" / "tensorboard").write_text("no folder")
    said = refused(2, "distill", tiny, "--run-folder", folder, teachers_from, "tracker=tensorboard",
                   "placement.kind=dedicated")
    assert "tracker tensorboard could not be started" in said and not (folder / "checkpoints").exists()
