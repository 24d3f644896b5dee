"""Slurm from within a job: how large it is, whether and how it is queued again; and the chain of jobs of a run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import read_json, write_bytes, write_json
from pkd.launcher import first_host
from pkd.standing import progress

TRIES = 4  # starts in a row that fail without a new checkpoint


@dataclass(frozen=True)
class Submission:
    """One sbatch call; after: names of the submissions that must end well before it starts."""

    name: str
    options: tuple[str, ...]
    words: tuple[str, ...]  # for the script
    after: tuple[str, ...] = ()


def chain(words: list[str], run: Path, top: str | None, specialists: list[str], distill: bool, evaluate: bool, nodes: int,
          per_node: int, top_ranks: int) -> list[Submission]:
    """The jobs of what is left of a run; pure.

    The top teacher trains on as many ranks as it can use, the specialists one rank each as one array, both at the same
    time; then the students on all ranks; then the evaluation on one.
    """
    base, out = (*words, "--run-folder", str(run), "--phases"), []
    if top:
        wide = (1, top_ranks) if top_ranks <= per_node else (top_ranks // per_node, per_node)
        out.append(Submission("teach-top", _size(*wide), (*base, "teach", "--teacher", top)))
    if specialists:
        named = tuple(word for name in specialists for word in ("--teacher", name))
        out.append(Submission("teach-specialists", (*_size(1, 1), f"--array=0-{len(specialists) - 1}"),
                              (*base, "teach", *named)))
    teaching = tuple(job.name for job in out)
    if distill:
        out.append(Submission("distill", _size(nodes, per_node), (*base, "distill"), teaching))
    if evaluate:
        out.append(Submission("evaluate", _size(1, 1), (*base, "evaluate"), ("distill",) if distill else teaching))
    return out


def sbatch(job: Submission, script: Path, extra: list[str], ids: Mapping[str, str]) -> list[str]:
    """argv of a submission, `ids` being the job ids of those before it; pure."""
    after = [f"--dependency=afterok:{':'.join(ids[name] for name in job.after)}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", f"--job-name=pkd-{job.name}", *job.options, *extra, *(after if job.after else []),
            str(script), *job.words]


def shown(argv: list[str]) -> str:
    """A command as one would type it; what stands in angle brackets is known only when it is run."""
    return " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in argv)


def submit(jobs: list[Submission], script: Path, extra: list[str], run: Path, console: Console) -> None:
    """Submit a chain and write jobs.json. Raises UserError; what was submitted by then is cancelled again."""
    _refuse_queued(run)
    ids: dict[str, str] = {}
    for job in jobs:
        try:
            ids[job.name] = _ask(*sbatch(job, script, extra, ids)).strip().split(";")[0]
        except UserError:
            if ids:
                _ask("scancel", *ids.values())
            raise
        console.say(f"submitted {ids[job.name]}: {job.name}"
                    + (f", after {', '.join(ids[name] for name in job.after)}" if job.after else ""))
    write_json(run / "jobs.json", ids)
    console.say(f"pkd status {run} tells where it stands; scancel {' '.join(ids.values())} ends it")


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
    hosts = _ask("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split()
    slots = world_size(env) // len(hosts)
    write_bytes(path, "".join(f"{host} slots={slots}\n" for host in hosts).encode())


def may_try_again(run: Path, name: str, outcome: str, console: Console) -> bool:
    """Whether this job is to be queued again: not if it was cancelled, nor if it fails over and over at one place."""
    if _job_state() not in ("RUNNING", "UNKNOWN"):  # it was cancelled, or Slurm itself is at it
        return False
    if outcome == "stopped":
        return True
    path, now = run / "state" / f"{name}.failures.json", progress(run)
    before = read_json(path) if path.exists() else {}
    count = before["count"] + 1 if before.get("progress") == now else 1
    write_json(path, {"progress": now, "count": count})
    if count < TRIES:
        return True
    console.error(f"pkd: {name} failed {count} times in a row without getting on, so it is not queued again: mend what the "
                  f"logs in {run / 'logs'} name, then submit the same job")
    return False


def requeue(console: Console) -> None:
    """Queue this job again; Slurm then ends this process. Returns where it does not."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    console.say(f"Slurm job {os.environ['SLURM_JOB_ID']} is queued again and goes on from the last checkpoint")
    sys.stdout.flush()
    asked = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if asked.returncode:
        console.error(f"pkd: Slurm did not queue the job again ({asked.stderr.strip()}): submit the same job, it goes on")
        return
    time.sleep(120)


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


def _size(nodes: int, per_node: int) -> tuple[str, ...]:
    return (f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}")


def _refuse_queued(run: Path) -> None:
    jobs = read_json(run / "jobs.json") if (run / "jobs.json").exists() else {}
    if jobs:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", ",".join(jobs.values()), "--format", "%A"],
                               capture_output=True, text=True)
        alive = sorted(set(asked.stdout.split()))
        if asked.returncode == 0 and alive:
            raise UserError(f"jobs {', '.join(alive)} of run folder {run} are still queued or running: wait for them, or "
                            "scancel them first")


def _job_state() -> str:
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]], capture_output=True,
                           text=True)
    return next((word[9:] for word in asked.stdout.split() if word.startswith("JobState=")), "UNKNOWN")


def _ask(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{argv[0]} could not be run ({error.strerror}): run this where Slurm is installed") from None
    if done.returncode:
        raise UserError(f"{argv[0]} refused: {done.stderr.strip() or done.stdout.strip()}: change what it names, for "
                        "instance by --sbatch=--partition=NAME")
    return done.stdout
