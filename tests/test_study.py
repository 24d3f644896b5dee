"""`pkd study`: arms by seeds, each once, going on where the study stands; what its results say together."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import LIGHT, Ranks, refused, run, teachers, wait_for_step

from pkd import slurm_job
from pkd.cli import parse
from pkd.console import Console
from pkd.errors import UserError
from pkd.files import write_json
from pkd.lock import Lock
from pkd.study import command
from pkd.study.command import Study, seeds
from pkd.study.results import all_readings, go_on_counting, keep_readings, packed, readings, right


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_what_was_right_survives_as_text(bits):
    result = {"test_images": len(bits), "correct": {"ensemble": packed(np.array(bits))}}
    assert right(result, "ensemble").tolist() == bits


def test_seeds_are_so_many_or_these():
    assert seeds("3", 5) == [5, 6, 7] and seeds("0,1,5", 9) == [0, 1, 5] and seeds("4,", 0) == [4]
    for text in ("", "x", "0,0", "0", "-1", ",", "1,,2", "20240101"):
        with pytest.raises(UserError, match="--seeds is"):
            seeds(text, 0)


pytestmark = pytest.mark.timeout(900)  # the first test waits for two starts of a whole study


def words(tiny: Path, folder: Path) -> tuple:
    """The level that the recipe's word is about does not exist in these arms."""
    return ("study", tiny, "views.finite=2", "distill.epochs=4", "pyramid.1.partition=contiguous", "--arms", "alone,top",
            "--seeds", "0,1", "--study-folder", folder)


def refusal(*arguments) -> str:
    """The sentence with which `pkd study` refuses; without the seconds of a process of its own."""
    with pytest.raises(UserError) as error:
        Study(parse(list(map(str, arguments))), Console(quiet=True))
    return str(error.value)


@pytest.fixture(scope="module")
def studied(tiny, taught, tmp_path_factory) -> tuple[Path, str, str]:
    """A study that a signal stopped and a second start finished, its folder already having the teachers of one seed; what
    the two starts said.
    """
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(taught, folder / "teachers" / "given-seed-0")
    process = Ranks(1, *words(tiny, folder))
    wait_for_step(folder / "runs" / "alone-seed-0", 3)
    process.processes[0].send_signal(signal.SIGTERM)
    stopped = process.wait()[0]
    assert stopped.code == 0 and not list(folder.glob("results/*")), stopped
    begun = json.loads((folder / "study.json").read_text())
    assert begun["arms"] == {} and len(begun["missing"]) == 4, "a report has something to say from the beginning"
    return folder, stopped.out, run(1, *words(tiny, folder), timeout=500)[0].out


def test_a_signal_stops_a_study_and_a_second_start_finishes_it(studied):
    folder, first, second = studied
    assert "the same command goes on" in first and "resuming from" in second
    found = json.loads((folder / "study.json").read_text())
    assert found["complete"] and found["test_readings"] == 4 and found["best_control"] in ("alone", "top")
    assert {path.name for path in folder.glob("results/*")} == {
        f"{arm}-seed-{seed}.json" for arm in ("alone", "top") for seed in (0, 1)}
    assert set(found["arms"]["top"]["networks"]) == {"mobile", "shuffle", "ensemble"}
    assert found["arms"]["alone"]["teacher_flops"] == 0 < found["arms"]["top"]["teacher_flops"] < found["pyramid_flops"]
    assert f"best control by validation on seeds 0, 1: {found['best_control']}" in second and "read 4 times" in second


def test_results_are_those_of_the_runs(studied):
    folder = studied[0]
    result = json.loads((folder / "results" / "top-seed-1.json").read_text())
    summary = json.loads((folder / "runs" / "top-seed-1" / "summary.json").read_text())
    for name, own in {**summary["students"], "ensemble": summary["ensemble"]}.items():
        assert result["networks"][name] == own and right(result, name).mean() == own["accuracy"]
    assert result["test_images"] == summary["test_images"] and list(result["teachers"]) == ["level0"]
    assert result["recipe"]["seed"] == 1 and len(json.dumps(result)) < 10_000


def test_teachers_and_archives_are_shared_and_copied_rather_than_made_again(studied, taught):
    folder, _, second = studied
    assert "teachers of another folder of the study are used: level0" in second
    own = {path.name.rpartition("-seed-")[2]: path for path in folder.glob("teachers/*") if "given" not in path.name}
    assert set(own) == {"0", "1"}, "a pyramid for each seed"
    assert teachers(own["0"])["level0.safetensors"] == teachers(taught)["level0.safetensors"]
    assert teachers(own["1"])["level0.safetensors"] != teachers(taught)["level0.safetensors"]
    for seed, path in own.items():
        students = json.loads((folder / "runs" / f"top-seed-{seed}" / "students" / "students.json").read_text())
        assert students["soft_targets"]["folder"] == str(path / "soft-targets")
        assert not (folder / "runs" / f"top-seed-{seed}" / "teachers").exists()


def test_on_several_ranks_arms_share_their_specialists_and_one_archive(tiny, taught, tmp_path):
    shutil.copytree(taught, tmp_path / "teachers" / "given-seed-0")
    said = run(1, "study", tiny, "views.finite=2", *LIGHT, "distill.epochs=1", "--arms", "composed,soft",
               "--arm", "soft=objective.temperature=2", "--seeds", "0,", "--study-folder", tmp_path,
               "--on", "torchrun", "--ranks-per-node", 2, timeout=400)[0].out
    assert "level0, level1-0, level1-1, level2-0, level2-1, level2-2" in said, "all teachers are taken over"
    starts = [line.partition(":")[0] for line in said.splitlines() if "-m pkd " in line]
    assert starts == ["archive", "distill", "evaluate", "distill", "evaluate"]
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["complete"] and found["world_sizes"] == [2] and found["micro_batches"] == [16]
    one, other = (json.loads((tmp_path / "results" / f"{arm}-seed-0.json").read_text()) for arm in ("composed", "soft"))
    assert len(one["teachers"]) == 6 and one["teachers"] == other["teachers"] and one["networks"] != other["networks"]
    assert one["teacher_flops"] == pytest.approx(found["pyramid_flops"], rel=0.2), "even shares stand for its own groups"


def test_a_finished_run_of_other_settings_is_not_taken_for_what_is_asked_now(studied, tiny, tmp_path):
    shutil.copytree(studied[0] / "runs", tmp_path / "runs")
    other = ["distill.epochs=3" if str(word) == "distill.epochs=4" else word for word in words(tiny, tmp_path)]
    ended = Ranks(1, *other, "--arms", "alone").wait()[0]
    assert ended.code == 2 and "distill.epochs is 3 in the recipe and 4 there" in ended.err, ended
    assert not list(tmp_path.glob("results/*"))


def test_what_has_its_result_is_not_run_again_though_its_runs_are_gone(studied, tiny, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    ended = run(1, *words(tiny, tmp_path), "--json")[0]
    found = json.loads(ended.out)
    assert found == json.loads((tmp_path / "study.json").read_text()) and found["complete"]
    assert found["arms"] == json.loads((studied[0] / "study.json").read_text())["arms"]
    assert {path.name for path in tmp_path.iterdir()} == {"results", "study.json"}, "nothing was started"


def test_results_outlive_keys_that_recipes_get_later(studied, tiny, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    for path in tmp_path.glob("results/*"):
        result = json.loads(path.read_text())
        assert result["recipe"].pop("channels_last") == result["study"].pop("channels_last")  # the default
        path.write_text(json.dumps(result))
    found = json.loads(run(1, *words(tiny, tmp_path), "--table", "--json")[0].out)
    assert found["complete"] and len(found["arms"]) == 2
    assert "no result yet" in refused(1, *words(tiny, tmp_path / "other"), "--table")


@pytest.mark.parametrize(("state", "stopping", "tried"), [
    ("RUNNING", False, ["alone", "top"]), ("COMPLETING", False, ["alone"]), ("RUNNING", True, ["alone"])])
def test_in_a_slurm_job_an_arm_that_fails_for_good_does_not_keep_the_others_waiting(tiny, tmp_path, monkeypatch, state,
                                                                                   stopping, tried):
    """Unless the job is cancelled, queued again or about to be stopped."""
    seen = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr(slurm_job, "_job_state", lambda: state)
    monkeypatch.setattr(slurm_job.signalled, "yes", stopping)
    monkeypatch.setattr(command, "run_phases", lambda order, console, dry: seen.append(order.run.name) or 1)
    study = Study(parse(["study", str(tiny), "--study-folder", str(tmp_path), "--seeds", "0,", "--arms", "alone,top",
                         "--on", "srun"]), Console(quiet=True))
    assert study.run() == 1
    assert ["alone" if "alone" in name else "top" for name in seen] == tried, "of top its teachers"


def test_readings_of_the_test_split_are_counted_over_runs_that_were_deleted(tmp_path):
    for seed, (kept, now) in enumerate([(None, None), (None, 2), (3, None), (3, 1), (3, 4)]):
        for path, count in ((f"readings/top-seed-{seed}.json", kept), (f"runs/top-seed-{seed}/test-readings.json", now)):
            if count:
                write_json(tmp_path / path, {"test_readings": count})
        most = max(kept or 0, now or 0)
        assert readings(tmp_path, "top", seed) == most
        go_on_counting(tmp_path, "top", seed)
        keep_readings(tmp_path, "top", seed)
        if most:
            assert json.loads((tmp_path / "readings" / f"top-seed-{seed}.json").read_text())["test_readings"] == most
            assert json.loads((tmp_path / "runs" / f"top-seed-{seed}" / "test-readings.json").read_text()) == {
                "test_readings": now or kept}, "a run that is there counts for itself"
        else:
            assert not list(tmp_path.iterdir())
    gone = {"arm": "alone", "seed": 0, "test_readings": 2}
    assert all_readings(tmp_path, [gone, {**gone, "arm": "top", "seed": 4}]) == 2 + 3 + 3 + 4 + 2
    before = all_readings(tmp_path, [])
    write_json(tmp_path / "runs" / "top-seed-7" / "test-readings.json", {"test_readings": 2})
    assert all_readings(tmp_path, []) == before + 2, "by one that was killed before it was written down"


def test_an_arm_of_ones_own_without_specialists_is_a_control(tiny, tmp_path):
    own = {"soft": "objective.temperature=2", "two": "pyramid=[{teachers: 1, model: pkd_resnet_s}, {teachers: 1, model: "
           "pkd_resnet_s}] objective={kind: composed}", "half": "pyramid.2.classes=[[0, 1]] objective={kind: paper}",
           "only": "objective={kind: top, temperature: 2}", "unheard": "objective={kind: paper, weights: [0.6, 0, 0]}"}
    given = [word for name, changes in own.items() for word in ("--arm", f"{name}={changes}")]
    study = Study(parse(["study", str(tiny), "objective.kind=composed", "--study-folder", str(tmp_path), "--seeds", "0,",
                         *given]), Console(quiet=True))
    controls = {trial.arm.name for trial in study.trials if trial.arm.control}
    assert controls == {"alone", "top", "top-t20", "top-ensemble", "peers", "peers-ensemble", "top-long", "long-ensemble",
                        "peers-long", "two", "only", "unheard"}


def test_results_of_other_settings_are_refused(studied, tiny, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert "study of another recipe" in refusal(*words(tiny, tmp_path), "distill.epochs=9")
    softer = ("--arm", "soft=objective={kind: alone, ensemble: [0.5, 0.5]}", "--arms", "soft")
    shutil.copy(tmp_path / "results" / "alone-seed-0.json", tmp_path / "kept.json")
    text = (tmp_path / "kept.json").read_text().replace('"arm": "alone"', '"arm": "soft"')
    (tmp_path / "results" / "soft-seed-0.json").write_text(text)
    later = [word if str(word) != "0,1" else "2,3" for word in words(tiny, tmp_path)]
    assert "soft-seed-0.json is of other settings" in refusal(*later, *softer), "an arm is one thing, whatever its seeds"
    (tmp_path / "results" / "soft-seed-0.json").unlink()
    (tmp_path / "results" / "alone-seed-0.json").rename(tmp_path / "results" / "mine-seed-0.json")
    assert "give it that name again" in refusal(*words(tiny, tmp_path))
    path = tmp_path / "results" / "mine-seed-0.json"
    path.write_text(path.read_text().replace('"arm": "alone"', '"arm": "mine"'))
    said = refusal(*words(tiny, tmp_path), "--arm", "mine=objective={kind: alone, ensemble: [0.5, 0.5]}")
    assert "mine-seed-0.json is of other settings" in said and "in the recipe and" in said
    whole = json.loads(path.read_text())
    for content in ({}, {**whole, "networks": {"ensemble": {}}}, {key: whole[key] for key in whole if key != "teachers"}):
        path.write_text(json.dumps(content))
        assert "no result of a study" in refusal(*words(tiny, tmp_path))
    path.unlink()
    moved = tmp_path / "results" / "alone-seed-0.json"  # by this test
    assert all(path.read_bytes() == content for path, content in before.items() if path != moved)


def test_mistakes_end_a_study_before_anything_is_started(tiny, taught, tmp_path):
    folder = tmp_path / "study"
    mine = ("study", tiny, "--study-folder", folder)
    assert "pyramid of its own" in refused(1, *mine, f"teachers_from={taught}")
    assert "did you mean 'paper'" in refusal(*mine, "--arms", "papr")
    assert "arm mine changes distill" in refusal(*mine, "--arm", "mine=distill.epochs=1")
    assert "arm mine sets teachers_from" in refusal(*mine, "--arm", f"mine=teachers_from={tmp_path}")
    assert "--on here runs one process" in refusal(*mine, "--ranks-per-node", 2)
    assert "you asked for 9" in refusal(*mine, "--on", "torchrun", "--ranks-per-node", 9)
    assert "names a seed twice" in refusal(*mine, "--seeds", "1,1")
    assert "--only-seed is 3, but --seeds asks for 0, 1" in refusal(*mine, "--seeds", "2", "--only-seed", 3)
    assert not folder.exists()
    for content, said in (({"mine": 1}, "not of a study of pkd"), ({"arms": {"top": {}}}, "tells of results that are gone")):
        write_json(folder / "study.json", content)
        assert said in refusal(*mine) and json.loads((folder / "study.json").read_text()) == content
    (folder / "study.json").unlink()
    write_json(folder / "readings" / "top-seed-0.json", {})
    assert "does not say how often the test split was read" in refused(1, *mine, "--arms", "top", "--only-seed", 0)
    shutil.rmtree(folder)
    lock = Lock(folder / "locks" / "seed-0", "study")
    assert "seed 0 of study" in refused(1, *mine, "--arms", "alone")
    lock.release()
    assert not (folder / "runs").exists()


def test_an_arm_that_is_refused_does_not_keep_the_others_waiting(tiny, tmp_path):
    ended = Ranks(1, "study", tiny, "distill.epochs=1", "--arms", "bad,fine", "--seeds", "7,8", "--only-seed", 7,
                  "--study-folder", tmp_path, "--arm", "bad=objective={kind: alone, ensemble: [1.0e+30, 1.0e+30]}",
                  "--arm", "fine=objective={kind: alone, ensemble: [0.1, 0.1]}").wait()[0]
    assert ended.code == 2 and "bad-seed-7 ended as said above" in ended.err and "was not finite" in ended.err, ended
    assert [path.name for path in tmp_path.glob("results/*")] == ["fine-seed-7.json"]
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["missing"] == ["bad-seed-7", "bad-seed-8", "fine-seed-8"] and found["asked"] == [7, 8]


def test_a_damaged_file_of_one_arm_does_not_keep_the_others_waiting(studied, tiny, tmp_path):
    """And a dry run shows what the next seed lacks."""
    shutil.copytree(studied[0], tmp_path, dirs_exist_ok=True)
    for name in ("alone-seed-1", "top-seed-1"):
        (tmp_path / "results" / f"{name}.json").unlink()
    shown = run(1, *words(tiny, tmp_path), "--dry-run")[0].out
    assert "arm alone, seed 1" in shown and "arm top, seed 1" in shown and "seed 0" not in shown
    (tmp_path / "runs" / "alone-seed-1" / "predictions.safetensors").write_bytes(b"damaged")
    ended = Ranks(1, *words(tiny, tmp_path)).wait()[0]
    assert ended.code == 2 and "alone-seed-1 ended as said above" in ended.err and "predictions" in ended.err, ended
    assert {path.name for path in tmp_path.glob("results/*-seed-1.json")} == {"top-seed-1.json"}


def test_a_study_on_slurm_is_an_array_over_seeds_and_a_table(tiny, tmp_path):
    said = run(1, "study", tiny, "distill.epochs=1", "--arm", "soft=objective.temperature=2", "--arms", "top,soft",
               "--seeds", "2", "--study-folder", tmp_path, "--on", "slurm", "--nodes", 2, "--ranks-per-node", 2,
               "--sbatch=--partition=gpu", "--dry-run")[0].out
    seeds, table = said.splitlines()
    assert "--array=0-1" in seeds and "--nodes=2 --ntasks-per-node=2" in seeds and "--seeds 0,1," in seeds
    assert " study " in seeds and "--arms top,soft" in seeds and "--arm soft=objective.temperature=2" in seeds
    assert "afterany:<id of study>" in table and "--nodes=1" in table and "--partition=gpu" in table
    assert table.endswith(" --table") and "--table" not in seeds
    said = run(1, "study", tiny, "--arms", "alone", "--seeds", "4,6", "--study-folder", tmp_path, "--on", "srun",
               "--dry-run", env=lambda rank: {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_NTASKS": "2"})[0].out
    assert "seed=6" in said and "seed=4" not in said and "srun" in said and "placement.kind=co-located" in said
