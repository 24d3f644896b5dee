"""The virtual cluster itself: Slurm runs, restarts and forgets jobs on it as on a real one, and it leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from ranks import REPOSITORY
from virtual_hosts import until


def traces(folder: Path) -> list[str]:
    """What of a cluster in this folder is on the machine: its processes, namespaces and mounts."""
    marks = (str(folder), Cluster(folder)._hosts.key)

    def marked(text: str) -> bool:
        return any(mark in text for mark in marks)

    places = (Path("/run"), Path("/run/netns"), Path("/etc/netns"))
    found = [str(path) for place in places for path in place.glob("*") if marked(path.name)]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if marked(line)]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marked(words) and int(entry.name) != os.getpid():
            found.append(f"{entry.name}: {words}")
    return found


def test_a_job_sees_its_nodes_and_gpus(cluster, tmp_path):
    say = 'echo "$(hostname) $CUDA_VISIBLE_DEVICES $(command -v python) $MARK"; df --output=target "$SMALL" | tail -1'
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={tmp_path}/out",
                         "--wrap", 'srun --label sh -c "$SAY"',
                         env={"MARK": "one two", "SAY": say, "SMALL": str(cluster.small)})
    assert cluster.wait(job, 30) == "COMPLETED"
    first, second = cluster.hosts(job)
    python = os.path.join(os.path.dirname(sys.executable), "python")
    assert sorted((tmp_path / "out").read_text().splitlines()) == [
        f"0: {cluster.small}", f"0: {first} 0,1 {python} one two",
        f"1: {cluster.small}", f"1: {second} 0,1 {python} one two"]
    assert first == cluster.batch_host(job) and cluster.restarts(job) == 0


def test_elements_of_an_array_have_states_of_their_own(cluster, tmp_path):
    job = cluster.sbatch("--array=0-2", f"--output={tmp_path}/%a", "--wrap", "exit $((SLURM_ARRAY_TASK_ID == 1))")
    assert cluster.wait(job, 30) == "COMPLETED,FAILED"


def test_a_job_goes_on_elsewhere_when_its_node_dies(cluster, tmp_path):
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--requeue", f"--output={tmp_path}/out",
                         "--wrap", '[ -n "$SLURM_RESTART_COUNT" ] || srun --wait=5 sleep 1234')
    assert cluster.wait(job, 20, until={"RUNNING"}) == "RUNNING"
    before, started = cluster.hosts(job), cluster.start_time(job)
    assert until(lambda: all(cluster.pids(name, "sleep 1234") for name in before), 10)
    cluster.stop_node(before[1])
    sleeper = Path(f"/proc/{cluster.pids(before[1], 'sleep 1234')[0]}/status")
    assert until(lambda: "T (stopped)" in sleeper.read_text(), 5)
    cluster.cont_node(before[1])
    cluster.kill_node(before[1])
    assert cluster.pids(before[1]) == []
    assert cluster.wait(job, 60) == "COMPLETED"
    assert cluster.restarts(job) == 1 and cluster.start_time(job) > started
    assert before[1] not in cluster.hosts(job)
    cluster.heal()


def test_nothing_is_left_of_a_cluster_killed_or_downed(cluster, tmp_path):
    """A second cluster beside the first; its owner is killed while a job runs, and a new one takes its folder over."""
    folder = tmp_path / "second"
    program = ("import sys, time; from pathlib import Path; from cluster import Cluster\n"
               "c = Cluster(Path(sys.argv[1]), nodes=1, cpus=2); c.up()\n"
               "c.wait(c.sbatch('--output=/dev/null', '--wrap', 'srun sleep 2345'), 20, 'RUNNING')\n"
               "print('up', flush=True); time.sleep(100)")
    owner = subprocess.Popen([sys.executable, "-c", program, folder], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)})
    assert owner.stdout.readline() == "up\n" and traces(folder)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert until(lambda: not any("slurmd" in one for one in traces(folder)), 10), traces(folder)

    second = Cluster(folder, nodes=2, cpus=2, gpus=0)
    with second:
        second.sbatch("--output=/dev/null", "--wrap", "srun sleep 2345")
        assert second.slurm("srun", "hostname") == "node1\n"
        assert len([one for one in traces(folder) if "slurmd" in one]) >= 2
    assert traces(folder) == []
    second.down()  # again does nothing
    cluster.ready()


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("needs root")
    monkeypatch.setattr("cluster.CGROUP_CONF", "CgroupPlugin=none/such\n")
    monkeypatch.setattr(Cluster, "ready", lambda self, timeout=60.0, ready=Cluster.ready: ready(self, 3))
    with pytest.raises(RuntimeError, match=r"(?s)not all nodes idle after 3 s.*slurmd-node1\.log.*cgroup"):
        Cluster(tmp_path / "none", nodes=1).up()
    assert traces(tmp_path / "none") == []
    with pytest.raises(ValueError, match="with spaces"):
        Cluster(tmp_path / "a b")


def test_only_the_stopped_element_of_an_array_is_queued_again(cluster, tmp_path):
    """The element whose own id is the array's, by which Slurm would queue all elements again."""
    (tmp_path / "state").mkdir()
    again = ("from pathlib import Path; from pkd.console import Console; from pkd import slurm_job; "
             f"assert slurm_job.may_try_again(Path('{tmp_path}'), 'teach-x', 'stopped', Console()); "
             "assert slurm_job.requeue(Console())")
    job = cluster.sbatch("--array=0-2", "--requeue", f"--output={tmp_path}/%a", "--wrap",
                         'if [ -n "$SLURM_RESTART_COUNT" ]; then exit 0; fi; '
                         f'if [ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ]; then exec python -c "{again}"; fi; sleep 3',
                         env={"PYTHONPATH": str(REPOSITORY)})
    assert cluster.wait(job, 60) == "COMPLETED", [path.read_text() for path in sorted(tmp_path.glob("?"))]
    assert sorted(int(one["Restarts"]) for one in cluster.show(job)) == [0, 0, 1]
