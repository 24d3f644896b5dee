"""Slurm from within a job: how large it is, whether and how it is queued again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import read_json, write_bytes, write_json
from pkd.launcher import first_host
from pkd.standing import progress
from pkd.stop import signalled

TRIES = {"failed": 4, "stopped": 20}  # starts in a row that end so without a new checkpoint


def world_size(env: Mapping[str, str]) -> int:
    """Tasks of this allocation, over all components of a heterogeneous job. Raises UserError outside one."""
    if "SLURM_JOB_ID" not in env:
        raise UserError("--on srun starts tasks inside a Slurm allocation, but SLURM_JOB_ID is not set: use --on slurm to "
                        "submit jobs, or call it from an sbatch script")
    groups = int(env.get("SLURM_HET_SIZE", "0"))
    if groups:
        return sum(int(env[f"SLURM_NTASKS_HET_GROUP_{group}"]) for group in range(groups))
    return int(env.get("SLURM_NTASKS", "1"))


def with_first_host(env: Mapping[str, str]) -> dict[str, str]:
    nodes = env.get("SLURM_JOB_NODELIST_HET_GROUP_0", env.get("SLURM_JOB_NODELIST"))
    return {**env, "PKD_FIRST_HOST": first_host(nodes)} if nodes else dict(env)


def write_hostfile(path: Path, env: Mapping[str, str]) -> None:
    """DeepSpeed's list of hosts and their slots, from the allocation."""
    hosts = ask("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split()
    slots = world_size(env) // len(hosts)
    write_bytes(path, "".join(f"{host} slots={slots}\n" for host in hosts).encode())


def job_id() -> str:
    """Of this job, or of this element of an array: one element's SLURM_JOB_ID is also the name of the whole array."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def may_try_again(run: Path, name: str, outcome: str, console: Console) -> bool:
    """Whether this job is to be queued again: not if it was cancelled, nor if it ends over and over at one place."""
    if _job_state() not in ("RUNNING", "UNKNOWN"):  # it was cancelled, or Slurm itself is at it
        return False
    path, now = run / "state" / f"{name}.tries.json", progress(run, name)
    before = read_json(path) if path.exists() else {}
    counts = before["counts"] if before.get("progress") == now else {}
    count = counts.get(outcome, 0) + 1
    if count < TRIES[outcome]:
        write_json(path, {"progress": now, "counts": {**counts, outcome: count}})
        return True
    path.unlink(missing_ok=True)  # who mends it and submits it again has all tries again
    what = "was stopped" if outcome == "stopped" else "failed"
    console.error(f"pkd: {name} {what} {count} times in a row without getting on, so it is not queued again: mend what the "
                  f"logs in {run / 'logs'} name, or give it a longer --time, then submit the same job")
    return False


def goes_on() -> bool:
    """Whether this job runs and nobody asked it to stop: what failed in it for good need not keep the rest waiting."""
    return not signalled.yes and _job_state() in ("RUNNING", "UNKNOWN")


def requeue(console: Console) -> bool:
    """Queue this job again; Slurm then ends this process. False where it refuses."""
    console.say(f"Slurm job {job_id()} is queued again and goes on from the last checkpoint")
    sys.stdout.flush()
    before, signalled.yes = signalled.yes, False
    asked = subprocess.run(["scontrol", "requeue", job_id()], capture_output=True, text=True)
    if asked.returncode:
        signalled.yes |= before  # the time is as nearly up as it was: nothing more is to be begun
        console.error(f"pkd: Slurm did not queue the job again ({asked.stderr.strip()}): submit the same job, it goes on")
        return False
    for number in (signal.SIGTERM, signal.SIGUSR1):  # not before Slurm has heard: it may be slow, and the time nearly up
        signal.signal(number, signal.SIG_DFL)
    if not signalled.yes:  # else Slurm has ended this process already, as far as it is concerned
        time.sleep(120)
    return True


def tell_who_waited(run: Path, name: str, console: Console) -> None:
    """Say which jobs of the chain Slurm now cancels, because they wait for this one's success."""
    jobs = read_json(run / "jobs.json") if (run / "jobs.json").exists() else {}
    mine = {os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")}
    names = list(jobs)
    first = next((index for index, job in enumerate(names) if jobs[job] in mine), None)
    later = [f"{jobs[job]} ({job})" for job in names[first + 1:] if not job.startswith("teach")] if first is not None else []
    if later:
        console.error(f"pkd: {name} did not end well, so Slurm cancels what waits for it: {', '.join(later)}; when it is "
                      "mended, the same pkd launch submits what is left")


def _job_state() -> str:
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", job_id()], capture_output=True, text=True)
    return next((word[9:] for word in asked.stdout.split() if word.startswith("JobState=")), "UNKNOWN")


def ask(*argv: str, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
    except OSError as error:
        raise UserError(f"{argv[0]} could not be run ({error.strerror}): run this where Slurm is installed") from None
    if done.returncode:
        raise UserError(f"{argv[0]} refused: {done.stderr.strip() or done.stdout.strip()}: change what it names, for "
                        "instance by --sbatch=--partition=NAME")
    return done.stdout
