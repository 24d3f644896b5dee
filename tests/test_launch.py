"""`pkd launch`: the phases in order, each once, going on where the run stands; signals reach every rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fork_server import Forked, folder_of_forks
from ranks import LIGHT, REPOSITORY, clean_environment, listens, refused, run, students, trace, wait_for_step

from pkd.order import Order, is_done
from pkd.recipe_file import load_recipe

BIN = Path(sys.executable).parent
SCRIPTS = {"torchrun": REPOSITORY / "launch" / "torchrun.sh", "deepspeed": REPOSITORY / "launch" / "deepspeed.sh"}
END = 60  # seconds


def start(way: str, *words, forked: bool = False) -> subprocess.Popen:
    """launch/<way>.sh on two ranks, in a session of its own; forked: what it starts is."""
    places = [*[str(folder_of_forks())] * forked, str(BIN), os.environ["PATH"]]
    environment = {**clean_environment(), "PATH": os.pathsep.join(places)}
    words = [*map(str, words), "placement.kind=dedicated"]
    return subprocess.Popen([SCRIPTS[way], "2", *words], env=environment, cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            # As in a terminal; what a shell runs in the background, these tests maybe, ignores Ctrl-C.
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def launched(*words) -> Forked:
    """`pkd launch` with torchrun on two ranks, all of it forked; how the scripts come to it: start(), and tests/slurm."""
    return Forked(["launch", *map(str, words), "placement.kind=dedicated", "--on", "torchrun", "--ranks-per-node", "2"],
                  clean_environment(), REPOSITORY)


def ended(process: subprocess.Popen, timeout: float = 120.0) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:  # what it started lies in sessions of its own
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
    return process.returncode, out


def state(folder: Path) -> str:
    return json.loads((folder / "state" / "distill.json").read_text())["state"]


def test_all_phases_run_once_and_a_second_call_finds_nothing_to_do(tiny, taught, finished, tmp_path):
    folder = tmp_path / "run"
    process = launched(tiny, "--run-folder", folder)
    out, said = process.communicate(120)
    assert process.returncode == 0, said
    assert "ensemble of students" in out and json.loads((folder / "summary.json").read_text())["complete"]
    assert students(folder) == students(finished) and trace(folder) == trace(finished)
    assert (folder / "teachers" / "level1-0.safetensors").read_bytes() == \
        (taught / "teachers" / "level1-0.safetensors").read_bytes()
    process = launched(tiny, "--run-folder", folder)
    again, said = process.communicate(60)
    assert process.returncode == 0, said
    assert again.count("done already") == 3 and "ensemble of students" in again
    said = json.loads(run(1, "status", folder, "--json")[0].out)
    assert said["phase"] == "done" and said["holder"] is None and set(said["teachers"].values()) == {"done"}
    assert said["checkpoint"] == "step-24" and said["checkpoint_age"] < 300 and said["epoch"] == 2


@pytest.mark.parametrize(("way", "target", "number"), [
    ("torchrun", "terminal", signal.SIGINT), ("torchrun", "launcher", signal.SIGUSR1),
    ("torchrun", "rank", signal.SIGUSR1), ("deepspeed", "script", signal.SIGUSR1),
    ("deepspeed", "launcher", signal.SIGTERM), ("deepspeed", "rank", signal.SIGTERM)])
def test_ctrl_c_or_a_signal_to_script_launcher_or_rank_stops_all_ranks_together_and_saved(tiny, new_run, finished, way,
                                                                                          target, number):
    folder, teachers_from = new_run("run")
    words = (tiny, teachers_from, "--run-folder", folder, "--phases", "distill")
    # Signals to the terminal or the launcher meet what is really there; a rank is real in any case.
    forked = target in ("rank", "script")
    process = start(way, *words, forked=forked)
    wait_for_step(folder, 3)
    victim = process.pid
    if target == "terminal":
        victim = -process.pid  # all that it holds
    elif target == "launcher":  # the first child of `pkd launch`, which took the script's place
        victim = int(subprocess.run(["pgrep", "-o", "-P", str(victim)], capture_output=True, text=True).stdout)
    elif target == "rank":
        victim = json.loads((folder / "ranks" / "distill.json").read_text())["ranks"][1]["pid"]
    os.kill(victim, number)
    code, out = ended(process, END)
    assert code == 0 and state(folder) == "stopped", out
    assert len(trace(folder)) < len(trace(finished)) and not (folder / "students").exists()
    assert "next is distill" in run(1, "status", folder)[0].out
    assert "not finished (distill: stopped)" in refused(1, "evaluate", folder)
    if target == "rank":  # what a resumed run becomes
        if way == "torchrun":
            code, out = ended(start(way, *words, forked=True))
            assert code == 0, out
        else:
            run(2, "distill", tiny, teachers_from, "--run-folder", folder, "placement.kind=dedicated")
        assert students(folder) == students(finished) and trace(folder) == trace(finished)


@pytest.mark.parametrize(("way", "delay"), [("torchrun", 0.0), ("deepspeed", 1.5), ("torchrun", 3.0)])
def test_a_signal_in_the_first_seconds_stops_as_well(tiny, new_run, way, delay):
    folder, teachers_from = new_run("run")
    process = start(way, tiny, teachers_from, "--run-folder", folder, "--phases", "distill", "distill.epochs=500")
    while not listens(process.pid):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGTERM)
    code, out = ended(process, END)
    assert code == 0 and "the same command goes on" in out, out
    assert not (folder / "checkpoints").exists() or state(folder) == "stopped"


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch", "slurm-deepspeed.sbatch",
                                    "slurm-het.sbatch"])
def test_a_signal_before_pkd_listens_does_not_end_a_script(tmp_path, script):
    """Python may take seconds to find pkd where many nodes read one file system."""
    slow = tmp_path / "bin" / "pkd"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\necho begun\nsleep 0.3\necho $*\n")
    slow.chmod(0o755)
    process = subprocess.Popen(
        ["bash", REPOSITORY / "launch" / script, *(["2"] if script.endswith(".sh") else []), "recipe.yaml"], cwd=tmp_path,
        env={**clean_environment(), "PATH": f"{slow.parent}:{os.environ['PATH']}"}, text=True,
        stdout=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and out.startswith("launch recipe.yaml --on "), out


def test_mistakes_end_a_launch_with_code_2_before_any_rank_starts(tiny, new_run, finished):
    folder, teachers_from = new_run("run")
    words = ("launch", tiny, teachers_from, "--run-folder", folder, "--on", "torchrun")
    assert "you asked for 9" in refused(1, *words, "--ranks-per-node", 9, "placement.kind=co-located")
    assert "did you mean 'epochs'" in refused(1, *words, "distill.epoch=3")
    assert "--phases is tech" in refused(1, *words, "--phases", "tech")
    assert "--nodes is 2" in refused(1, *words, "--nodes", 2)
    assert "--sbatch is for jobs to submit, but --on is torchrun" in refused(1, *words, "--sbatch=--partition=gpu")
    assert "add --phases teach" in refused(1, *words, "--teacher", "level0")
    assert "job array" in refused(1, *words, "--phases", "teach", "--teacher", "level0", "--teacher", "level1-0")
    assert "SLURM_JOB_ID" in refused(1, *words[:-1], "srun")
    assert "allocation" in refused(1, *words[:-1], "srun", "--nodes", 2)
    assert "did you mean 'level0'" in refused(1, *words[:-1], "slurm", "--teacher", "levle0", "--phases", "teach")
    assert "add --phases teach" in refused(1, *words[:-1], "slurm", "--teacher", "level0")
    assert not folder.exists()
    words = ("launch", tiny, teachers_from, "--run-folder", finished, "--on", "torchrun", "students.0.lr=1")
    assert "belongs to another recipe" in refused(1, *words)


def test_a_dry_run_prints_the_commands_and_starts_nothing(tiny, tmp_path):
    words = ("launch", tiny, "--run-folder", tmp_path / "run", "--dry-run", "--on")
    lines = run(1, *words, "deepspeed", "--ranks-per-node", 3)[0].out.splitlines()
    assert len(lines) == 3 and "--num_gpus 3" in lines[0] and "evaluate" in lines[2]
    out = run(1, *words, "slurm", "--nodes", 2, "--ranks-per-node", 2, "--sbatch=--partition=gpu")[0].out
    top, specialists, distill, evaluate = [line for line in out.splitlines() if line.startswith("sbatch ")]
    assert "--nodes=2 --ntasks-per-node=2" in top and "--teacher level0" in top and "--dependency" not in top
    assert "--array=0-4" in specialists and "--ntasks-per-node=1" in specialists and "--dependency" not in specialists
    assert "afterok:<id of teach-top>:<id of teach-specialists> --kill-on-invalid-dep=yes" in distill
    assert "afterok:<id of distill>" in evaluate and all("--partition=gpu" in line for line in (top, evaluate))
    assert "#SBATCH --requeue" in out and 'exec pkd launch "$@" --on srun' in out
    out = run(1, *words, "slurm", "--nodes", 8, "--ranks-per-node", 8, "--phases", "teach")[0].out
    assert "teach-specialists" in out and "pkd-distill" not in out, "too many ranks for the students are enough for teachers"
    out = run(1, *words, "torchrun", "--phases", "teach", "--teacher", "level0", env=lambda rank: {
        "SLURM_ARRAY_TASK_ID": "3"})[0].out
    assert "--teacher level0" in out, "in an array of somebody's own"
    assert not (tmp_path / "run").exists()


def test_only_teachers_that_the_objective_asks_are_trained(tiny, tmp_path):
    """A specialist may be named all the same."""
    words, top = ("launch", tiny, "--run-folder", tmp_path / "new", "--dry-run", "--on"), "objective.kind=top"
    plan = run(1, *words, "here", "objective.kind=alone")[0].out.splitlines()
    assert [line.split(" -m pkd ")[1].split()[0] for line in plan if " -m pkd " in line] == ["distill", "evaluate"]
    out = run(1, *words, "slurm", top)[0].out
    assert "teach-top" in out and "teach-specialists" not in out and "afterok:<id of teach-top> --kill" in out
    folder, recipe = tmp_path / "run", load_recipe(str(tiny), [top, "teachers.steps=4", "teachers.evaluate_every=2"])
    teach = ("teach", tiny, top, "teachers.steps=4", "teachers.evaluate_every=2", "--run-folder", folder)
    said = run(1, *teach)[0].out
    assert "teacher level0: step 2 of 4, validation" in said
    assert [path.name for path in (folder / "teachers").glob("*.json")] == ["level0.json"]
    done = {name: is_done(Order(recipe, [str(tiny)], folder, "here", 1, ("teach",), name), "teach")
            for name in (None, "level0", "level1-0")}
    assert done == {None: True, "level0": True, "level1-0": False}
    assert "next is distill, 1 of 1 teachers done" in run(1, "status", folder)[0].out
    run(1, *teach, "--teacher", "level1-0")
    assert is_done(Order(recipe, [str(tiny)], folder, "here", 1, ("teach",), "level1-0"), "teach")


def test_status_tells_where_a_run_stands_while_it_runs(tiny, new_run):
    folder, teachers_from = new_run("run")
    assert "holds no run" in refused(1, "status", folder)
    folder.mkdir()
    (folder / "jobs.json").write_text('{"teach-top": "7"}')
    assert "submitted, nothing has begun yet" in run(1, "status", folder)[0].out
    assert json.loads(run(1, "status", folder, "--json")[0].out)["phase"] == "submitted"
    words = (tiny, teachers_from, "--run-folder", folder, "--phases", "distill", "distill.epochs=500", *LIGHT)
    process = launched(*words)
    wait_for_step(folder, 14)
    said = run(1, "status", folder)[0].out
    run(1, "report", folder)
    assert psutil.pid_exists(process.pid), "status and report are of a run that goes on"
    process.send_signal(signal.SIGTERM)
    assert process.wait(END) == 0
    page = (folder / "report.html").read_text()
    assert "Distillation is not finished (running)" in page and "of 500 epochs" in page and ">Training</h2>" in page
    assert "is writing, 6 of 6 teachers done" in said and "distill: running, epoch" in said
    assert "last checkpoint: step-" in said and "s ago" in said
    process = launched(*words)
    wait_for_step(folder, len(trace(folder)) + 2)
    for rank in json.loads((folder / "ranks" / "distill.json").read_text())["ranks"]:
        os.kill(rank["pid"], signal.SIGKILL)
    out = "".join(process.communicate(END))
    assert process.returncode == 1 and "goes on from the last checkpoint" in out
    assert "distill: ended without a word" in run(1, "status", folder)[0].out


def test_fetch_reads_what_a_recipe_names_and_says_where_it_is(tiny, taught, tmp_path):
    said = run(1, "fetch", tiny)[0].out
    assert "480 images of 10 classes" in said
    weights = ("students.0.model={name: resnet18, input_size: 32, weights: IMAGENET1K_V1}",)
    environment = {"TORCH_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    sentence = refused(1, "fetch", tiny, *weights, env=lambda rank: environment)
    assert "IMAGENET1K_V1" in sentence and "where there is a network" in sentence
    wrong = "students.0.model={name: mobilenet_v2, input_size: 32, weights: IMAGENET1K_V9}"
    for command in (("fetch", tiny), ("teach", tiny, "--run-folder", tmp_path / "run"),
                    ("launch", tiny, "--run-folder", tmp_path / "run", "--on", "here", "--dry-run")):
        sentence = refused(1, *command, wrong)
        assert "IMAGENET1K_V9" in sentence and "did you mean 'IMAGENET1K_V2'" in sentence, sentence
    said = run(1, "fetch", tiny, f"students.0.model.weights={taught / 'teachers' / 'level0.safetensors'}",
               "students.0.model.name=pkd_resnet_s")[0].out
    assert "numbers, in" in said
