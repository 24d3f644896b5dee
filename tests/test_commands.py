"""The commands, from teaching to prediction, and every way of starting them."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from ranks import REPOSITORY, free_port, refused, run, students, teachers, trace

from pkd.predictions import Predictions

LINE = {"epoch", "step", "train", "validation", "ensemble", "learning_rate", "images_per_second", "seconds",
        "steady_images_per_second", "wait_seconds", "peak_memory_bytes", "busy"}
SUMMARY = {"recipe", "identity", "seed", "fingerprint", "world_size", "placement", "made_by", "complete", "evaluated",
           "teachers", "students", "ensemble", "images", "test_images", "test_readings", "images_per_second", "wall_seconds"}
NETWORK = {"architecture", "library", "arguments", "width", "classes", "channels", "view_size", "input_channels",
           "input_size", "mean", "std", "parameters", "sha256", "name", "validation"}


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished, folder)
    run(1, "evaluate", folder)
    return folder


def test_evaluate_shows_every_model_and_counts_its_readings_of_the_test_split(evaluated):
    said = run(1, "evaluate", evaluated)[0].out
    for name in ("level0", "level1-0", "level2-2", "mobile", "shuffle", "ensemble", str(evaluated)):
        assert name in said.replace("\n", ""), name
    assert json.loads((evaluated / "summary.json").read_text())["test_readings"] == 2


def test_a_mistake_is_found_before_the_test_split_is_read(evaluated, taught, tmp_path):
    before = json.loads((evaluated / "test-readings.json").read_text())
    assert "level0" in refused(1, "evaluate", evaluated, f"teachers_from={tmp_path}")
    assert json.loads((evaluated / "test-readings.json").read_text()) == before
    (evaluated / "test-readings.json").unlink()  # a run of before there was such a file
    run(1, "evaluate", evaluated, f"teachers_from={taught}")
    assert json.loads((evaluated / "summary.json").read_text())["test_readings"] == before["test_readings"] + 1


def test_a_finished_run_keeps_its_figures_from_smoke_runs_and_from_other_data(evaluated, tmp_path):
    def kept():
        return [(evaluated / name).read_bytes() for name in ("summary.json", "test-readings.json", "run.json")]
    before = kept()
    assert "summary.json is of all of them" in refused(1, "evaluate", evaluated, "--steps", 5)
    record = json.loads((evaluated / "run.json").read_text())
    with np.load(record["free"]["data"]["path"]) as digits:
        np.savez(tmp_path / "fewer.npz", x=digits["x"][:-1], y=digits["y"][:-1])
    assert "trained on other images" in refused(1, "evaluate", evaluated, f"data.path={tmp_path / 'fewer.npz'}")
    assert before == kept()


def test_the_predictions_that_are_kept_make_the_figures_of_the_summary(evaluated):
    summary = json.loads((evaluated / "summary.json").read_text())
    kept = Predictions.read(evaluated / "predictions")
    assert kept.names == ("mobile", "shuffle", "ensemble") and len(kept.labels) == summary["test_images"]
    figures = [summary["students"]["mobile"], summary["students"]["shuffle"], summary["ensemble"]]
    for index, own in enumerate(figures):
        assert own["accuracy"] == kept.correct[index].double().mean().item()
        assert own["loss"] == pytest.approx(kept.loss[index].double().mean().item(), rel=1e-5)
    assert [own["calibration_error"] for own in figures] == kept.calibration_errors()


def test_evaluate_finds_what_training_found_on_the_validation_split(evaluated):
    """The same weights on the same images, by other code: in eval mode, with the running statistics."""
    summary = json.loads((evaluated / "summary.json").read_text())
    for name, own in summary["students"].items():
        kept = json.loads((evaluated / "students" / f"{name}.json").read_text())
        assert own["validation_accuracy"] == kept["validation"]["accuracy"], name


def test_the_files_of_a_run_hold_the_keys_that_the_readme_names(evaluated, taught):
    summary = json.loads((evaluated / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert set(summary["teachers"]["level1-0"]) == {"level", "classes", "accuracy", "test_images", "parameters"}
    assert set(summary["students"]["mobile"]) == {
        "accuracy", "loss", "calibration_error", "parameters", "validation_accuracy", "validation_loss"}
    assert set(summary["ensemble"]) == set(summary["students"]["mobile"])
    lines = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and all(set(line) == LINE for line in lines)
    assert set(lines[0]["train"]["mobile"]) == {"ce", "kl", "loss"}
    assert set(lines[0]["peak_memory_bytes"]) == {"student", "teacher"}
    assert len(lines[0]["busy"]) == 2 and all(0 < share <= 1 for share in lines[0]["busy"])
    network = json.loads((evaluated / "students" / "mobile.json").read_text())
    assert set(network) == NETWORK | {"recipe"}
    teacher = json.loads((taught / "teachers" / "level0.json").read_text())
    assert set(teacher) == NETWORK | {"level", "class_ids", "steps", "identity"}
    assert set(json.loads((evaluated / "run.json").read_text())) == {"identity", "recipe", "free"}
    assert set(json.loads((evaluated / "placement.json").read_text())) == {"wish", "placement", "since_epoch"}
    assert set(json.loads((taught / "pyramid.json").read_text())) == {"classes", "teachers"}
    assert set(json.loads((evaluated / "students" / "students.json").read_text())) == {
        "students", "complete", "epochs", "teachers", "fingerprint", "soft_targets", "world_size", "placement", "made_by"}
    state = json.loads((evaluated / "state" / "distill.json").read_text())
    assert set(state) == {"state", "time", "complete"} and state["state"] == "finished" and state["complete"]
    readme = (REPOSITORY / "README.md").read_text()
    for key in LINE | SUMMARY | NETWORK:
        assert f"`{key}`" in readme, f"the README does not explain {key}"


def test_the_reported_loss_is_the_mean_of_the_steps_and_the_sum_of_its_terms(finished):
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    steps = [line["loss"] for line in trace(finished)[:first["step"]]]
    for name, terms in first["train"].items():
        assert terms["loss"] == pytest.approx(np.mean([step[name] for step in steps]), rel=1e-6)
        assert terms["ce"] + terms["kl"] == pytest.approx(terms["loss"], rel=1e-6)


def test_export_and_predict_agree_with_the_run(evaluated, tiny, tmp_path):
    from pkd.network_file import read_network

    images = np.load(Path(tiny).parent / "digits.npz")["x"][:3]
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, image in zip(files, images):
        Image.fromarray(image).save(file)
    run(1, "export", evaluated, "--to", tmp_path / "ensemble")
    run(1, "export", evaluated, "--to", tmp_path / "one", "--student", "shuffle")
    assert "not empty" in refused(1, "export", evaluated, "--to", tmp_path / "one")
    ensemble = run(1, "predict", evaluated, *files)[0].out
    assert run(1, "predict", tmp_path / "ensemble", *files)[0].out == ensemble
    alone = run(1, "predict", evaluated, *files, "--student", "shuffle")[0].out
    assert run(1, "predict", tmp_path / "one", *files)[0].out == alone
    network, facts = read_network(tmp_path / "one" / "shuffle")
    with torch.inference_mode():
        probabilities = network.eval()(torch.from_numpy(images)[:, None]).softmax(1)
    for row in probabilities:
        assert f"{row.max():.4f}" in alone and facts["classes"][row.argmax()] in alone
    (tmp_path / "no.png").write_bytes(b"no image")
    assert "no.png" in refused(1, "predict", evaluated, tmp_path / "no.png")
    assert "mobile, shuffle" in refused(1, "predict", evaluated, files[0], "--student", "shuffel")


def test_an_unfinished_run_is_not_evaluated(tiny, new_run, taught):
    folder, teachers_from = new_run("run")
    assert "does not exist" in refused(1, "evaluate", folder)
    assert "not finished" in refused(1, "evaluate", taught)
    run(1, "distill", tiny, "--run-folder", folder, teachers_from, "--steps", 2)
    assert "cut short by --steps" in refused(1, "evaluate", folder)
    run(1, "evaluate", folder, "--steps", 10)
    assert not json.loads((folder / "summary.json").read_text())["complete"]
    assert not json.loads(run(1, "status", folder, "--json")[0].out)["evaluated"], "a smoke run evaluates nothing"
    assert json.loads((folder / "summary.json").read_text())["test_images"] == 10


def test_a_smoke_run_goes_through_all_phases_and_can_be_gone_on_from(tiny, taught, tmp_path):
    """To the same teachers, although it validated where nobody does that goes all the way."""
    folder = tmp_path / "run"
    run(2, "teach", tiny, "--run-folder", folder, "--steps", 25)
    assert json.loads((folder / "teachers" / "level0.json").read_text())["steps"] == 25
    assert "25 of 30 steps" in refused(1, "distill", tiny, "--run-folder", folder)
    run(1, "distill", tiny, "--run-folder", folder, "--steps", 3)
    run(1, "evaluate", folder, "--steps", 5)
    run(2, "teach", tiny, "--run-folder", folder)
    assert teachers(folder) == teachers(taught)
    assert "other teachers" in refused(1, "distill", tiny, "--run-folder", folder)


def test_a_teacher_that_is_lost_or_damaged_is_trained_again_to_the_same(tiny, taught, new_run, tmp_path):
    folder, _ = new_run("run")
    shutil.copytree(taught, folder)
    whole = (folder / "teachers" / "level1-1.safetensors").read_bytes()
    (folder / "teachers" / "level1-1.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "delete level1-1.json and train it again" in refused(2, "distill", tiny, "--run-folder", folder)
    (folder / "teachers" / "level1-1.json").unlink()
    run(2, "teach", tiny, "--run-folder", folder)
    assert teachers(folder) == teachers(taught)


def test_a_level_may_train_its_teachers_for_steps_of_its_own(tiny, taught, tmp_path):
    words = ("teach", tiny, "--run-folder", tmp_path / "run", "pyramid.1.steps=12")
    assert run(2, *words)[0].out.count(" 12 steps") == 2 and "steps, validation" not in run(2, *words)[0].out
    assert json.loads(run(1, "status", tmp_path / "run", "--json")[0].out)["phase"] == "distill", "all teachers are done"
    facts = [json.loads(path.read_text()) for path in (tmp_path / "run" / "teachers").glob("level*.json")]
    steps = {own["name"]: own["steps"] for own in facts if "steps" in own}
    assert steps == {"level0": 30, "level1-0": 12, "level1-1": 12, "level2-0": 30, "level2-1": 30, "level2-2": 30}
    found, whole = teachers(tmp_path / "run"), teachers(taught)
    assert {name for name in whole if found[name] != whole[name]} == {"level1-0.safetensors", "level1-1.safetensors"}
    assert "belongs to another recipe" in refused(2, *words[:-1], "pyramid.1.steps=13")
    assert "by other settings" in refused(1, "distill", tiny, "--run-folder", tmp_path / "other",
                                          f"teachers_from={tmp_path / 'run'}")


def test_a_finished_run_stays_finished_whatever_becomes_of_another_start(tiny, finished, new_run, tmp_path):
    folder, teachers_from = new_run("run")
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    kept = {path: path.read_bytes() for path in (folder / "state" / "distill.json", folder / "metrics.jsonl")}
    words = ("distill", tiny, "--run-folder", folder, teachers_from, "placement.kind=dedicated")
    assert "cannot be read" in refused(2, *words, f"data.path={tmp_path / 'unmounted.npz'}")
    assert "finished already" in run(2, *words)[0].out
    assert all(path.read_bytes() == content for path, content in kept.items()) and students(folder) == students(finished)


def test_a_checkpoint_of_another_recipe_is_not_gone_on_with(tiny, new_run):
    """Though the run folder has forgotten whose it is."""
    folder, teachers_from = new_run("run")
    words = ("distill", tiny, "--run-folder", folder, teachers_from)
    run(1, *words, "--steps", 3)
    (folder / "run.json").unlink()
    assert "other settings than the recipe has now" in refused(1, *words, "students.0.lr=0.01")


def test_a_key_that_deepspeed_does_not_know_is_named(tiny, new_run, tmp_path):
    folder, teachers_from = new_run("run")
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1, "reduce_scater": true}}')
    said = refused(1, "distill", tiny, "--run-folder", folder, teachers_from, f"deepspeed.students={tmp_path / 'own.json'}")
    assert "DeepSpeed refuses reduce_scater" in said and "mend that key" in said


def test_only_ranks_ask_a_launchers_variables(tiny):
    """Batch scripts export some of them, for srun."""
    exported = {"MASTER_ADDR": "gpu08-ib", "MASTER_PORT": "29500"}
    assert "level2-2" in run(1, "plan", tiny, "--world", 2, env=lambda rank: exported)[0].out
    assert "but not RANK" in refused(1, "teach", tiny, env=lambda rank: exported)


def test_one_teacher_can_be_trained_alone_and_is_the_same(tiny, taught, tmp_path):
    folder = tmp_path / "run"
    run(1, "teach", tiny, "--run-folder", folder, "--teacher", "level2-1")
    assert (folder / "teachers" / "level2-1.safetensors").read_bytes() == \
        (taught / "teachers" / "level2-1.safetensors").read_bytes()
    assert not (folder / "teachers" / "level0.json").exists()
    assert "did you mean 'level2-1'" in refused(1, "teach", tiny, "--run-folder", folder, "--teacher", "leve2-1")


def test_plan_prints_what_would_run_and_starts_nothing(tiny, tmp_path):
    said = run(1, "plan", tiny, "--world", 4, "--json", "placement.student_ranks=2")[0].out
    ranks = json.loads(said)["ranks"]
    assert [rank["role"] for rank in ranks] == ["student", "student", "teacher", "teacher"]
    assert "level2-2" in run(1, "plan", tiny, "--world", 2)[0].out
    assert "you asked for 9" in refused(1, "plan", tiny, "--world", 9, "placement.kind=co-located")
    assert "at least 2 ranks" in refused(1, "plan", tiny, "placement.kind=dedicated")
    said = refused(1, "plan", tiny, "--device", "h200", "--ranks-per-node", 2)
    assert "--ranks-per-node is 2, but of --device h200" in said
    assert "teachers.forward asks for bf16, in which a v100" in refused(1, "plan", tiny, "--device", "v100",
                                                                       "teachers.forward=bf16")


def test_plan_counts_this_machines_memory_and_builds_no_teacher_to_do_so(tiny):
    """Which would end the process. A teacher of more than all of the memory: in two halves it does not fit either."""
    needed = 1.05 * psutil.virtual_memory().total
    huge = f"pyramid.0.model={{name: pkd_resnet_l, width: {round((needed / 2.77e6) ** 0.5)}}}"  # 2.77 MB at width 1
    assert "have room for" in refused(1, "plan", tiny, "--world", 2, huge)
    said = " ".join(run(1, "plan", tiny, "--world", 2, "--ranks-per-node", 1, "placement={kind: co-located}",
                        huge.replace("pyramid.0", "students.0"))[0].out.split())
    assert "rank 0 would need" in said and "GB are to be counted on: raise placement.accumulation" in said
    four = ("--world", 4, "placement.student_ranks=1", "--json", huge)
    for more in (("--device", "h200"), ("--ranks-per-node", 1)):
        found = json.loads(run(1, "plan", tiny, *four, *more)[0].out)
        assert sum(rank["bytes"] for rank in found["ranks"]) > needed


def test_the_environment_of_srun_is_enough_to_start(tiny, new_run, finished):
    """tests/slurm has the real daemons, test_launch.py the other launchers."""
    folder, teachers_from = new_run("run")
    job = str(free_port())  # another job, another port
    words = ("distill", tiny, "--run-folder", folder, teachers_from, "placement.kind=dedicated")
    run(2, *words, launcher=False, env=lambda rank: {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"})
    assert students(folder) == students(finished) and trace(folder) == trace(finished)


def test_bf16_and_accumulation_run_the_whole_way(tiny, new_run):
    folder, teachers_from = new_run("run")
    run(2, "distill", tiny, "--run-folder", folder, teachers_from, "deepspeed.students=zero2-bf16",
        "placement.kind=dedicated", "placement.accumulation=2", "deterministic=true",
        "students.1.optimizer=adamw", "students.1.lr=0.01", "students.0.ema=0.9",
        "students.0.schedule=plateau", "students.1.clip=1.0", "objective.kind=paper")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train"]["shuffle"]["loss"] < lines[0]["train"]["shuffle"]["loss"]
    assert set(lines[0]["train"]["mobile"]) == {"ce", "kl_level0", "kl_level1", "kl_level2", "ensemble", "loss"}


def test_terminal_output_is_one_plain_line_an_epoch_and_chatter_goes_to_a_log(tiny, new_run):
    folder, teachers_from = new_run("run")
    ended = run(2, "distill", tiny, "--run-folder", folder, teachers_from, "placement.kind=dedicated",
                "deepspeed.students=zero1")
    lines = ended[0].out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert all(line.startswith(("epoch ", "dedicated: ", "  rank ")) for line in lines), lines
    assert ended[1].out == "" and all(one.err == "" for one in ended)
    assert "ZeRO" in (folder / "logs" / "distill-rank0.log").read_text()
