"""Every way of starting, on real Slurm daemons: the same students and losses as four ranks on this machine."""

import json

import pytest
import yaml
from ranks import refused, run, students, teachers, trace
from slurm_run import SlurmRun


@pytest.fixture(scope="module")
def expected(tiny, taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "run"
    run(4, "distill", tiny, "--run-folder", folder, f"teachers_from={taught}", "placement.student_ranks=2")
    return trace(folder), students(folder)


@pytest.mark.parametrize("script", ["slurm-deepspeed.sbatch", "slurm-het.sbatch"])
def test_each_script_gives_the_same_students(cluster, tiny, new_run, expected, script):
    """slurm.sbatch: test_slurm_faults.py."""
    folder, teachers_from = new_run("run")
    mine = SlurmRun(cluster, folder, script, tiny, teachers_from, "--phases", "distill",
                    "placement.student_ranks=2").submit()
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == expected
    ranks = mine.two_nodes()
    if script == "slurm-het.sbatch":  # the first component's nodes hold the students
        kinds = [cluster.slurm("scontrol", "show", "node", rank["host"]) for rank in ranks]
        assert ["h100" in kind for kind in kinds] == [True, True, False, False]


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_each_script_for_one_machine_gives_the_same_students_in_an_allocation_of_one_node(cluster, tiny, new_run, finished,
                                                                                         script):
    folder, teachers_from = new_run("run")
    mine = SlurmRun(cluster, folder, script, 2, tiny, teachers_from, "--phases", "distill", "placement.kind=dedicated")
    mine.submit("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=4")
    assert mine.end() == "COMPLETED", mine.log
    assert mine.result() == (trace(finished), students(finished))


def test_launch_submits_a_chain_and_a_failed_teacher_cancels_what_waits_for_it(cluster, tiny, taught, tmp_path):
    """Also: the same command afterwards submits only what is left."""
    folder, recipe = tmp_path / "run", yaml.safe_load(tiny.read_text())
    recipe["placement"] = {"kind": "dedicated"}
    recipe["pyramid"].pop()  # each of the lowest level's teachers would be a task more, of a kind that level 1 has
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(recipe, sort_keys=False))
    launch = ("python", "-m", "pkd", "launch", small, "--run-folder", folder, "--on", "slurm", "--ranks-per-node", 2,
              f"--sbatch=--output={tmp_path}/%x-%a.log")
    wrong = folder / "teachers" / "level1-1.json"
    wrong.parent.mkdir(parents=True)
    wrong.write_text('{"identity": "another"}')
    cluster.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")  # jobs wait, or all might end before it is asked
    try:
        cluster.slurm(*launch, cwd=tmp_path)
        jobs = json.loads((folder / "jobs.json").read_text())
        with pytest.raises(RuntimeError, match="still queued or running"):
            cluster.slurm(*launch, cwd=tmp_path)
    finally:
        cluster.slurm("scontrol", "update", "PartitionName=main", "State=UP")
    assert cluster.wait(int(jobs["teach-specialists"]), 120) == "COMPLETED,FAILED"
    assert cluster.wait(int(jobs["distill"]), 60) == "CANCELLED"
    assert cluster.wait(int(jobs["evaluate"]), 60) == "CANCELLED"
    said = "".join(path.read_text() for path in tmp_path.glob("pkd-teach-specialists-*.log"))
    assert "level1-1 in" in said and f"Slurm cancels what waits for it: {jobs['distill']} (distill)" in said, said
    status = cluster.slurm("python", "-m", "pkd", "status", folder)
    assert "teacher level1-1: " in status and f"{jobs['distill']} (distill): CANCELLED" in status, status
    assert cluster.wait(int(jobs["teach-top"]), 120) == "COMPLETED"
    wrong.unlink()
    cluster.slurm(*launch, cwd=tmp_path)
    jobs = json.loads((folder / "jobs.json").read_text())
    assert set(jobs) == {"teach-specialists", "distill", "evaluate"}
    assert cluster.wait(int(jobs["evaluate"]), 180) == "COMPLETED"
    assert len(teachers(folder)) == 3 and teachers(folder).items() <= teachers(taught).items()
    assert json.loads((folder / "summary.json").read_text())["complete"]
    assert "belongs to another recipe" in refused(1, *launch[3:], "seed=1", cwds=[tmp_path])


def test_a_study_is_an_array_over_seeds_and_ends_with_its_table(cluster, tiny, tmp_path):
    folder = tmp_path / "study"
    study = ("python", "-m", "pkd", "study", tiny, "--arms", "alone", "--seeds", "3,5", "--study-folder", folder, "--on",
             "slurm", "--ranks-per-node", 2, f"--sbatch=--output={tmp_path}/%x-%a.log")
    cluster.slurm(*study, cwd=tmp_path)
    jobs = json.loads((folder / "jobs.json").read_text())
    assert set(jobs) == {"study", "table"}
    assert cluster.wait(int(jobs["table"]), 240) == "COMPLETED", [path.read_text() for path in tmp_path.glob("*.log")]
    found = json.loads((folder / "study.json").read_text())
    assert found["complete"] and found["seeds"] == [3, 5] and found["world_sizes"] == [2] and found["test_readings"] == 2
    said = next(path.read_text() for path in tmp_path.glob("pkd-table-*.log"))
    assert "± " in said and "read 2 times in all" in said
    assert "accuracy in %" in run(1, *study[3:], cwds=[tmp_path])[0].out, "a finished study submits nothing"
    assert json.loads((folder / "jobs.json").read_text()) == jobs
