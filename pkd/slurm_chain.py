"""The chain of Slurm jobs that a run is submitted as."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pkd.console import Console
from pkd.errors import UserError
from pkd.files import read_json, write_json
from pkd.slurm_job import ask


@dataclass(frozen=True)
class Submission:
    """One sbatch call; after: names of the submissions that must end before it starts, and well unless `anyhow`."""

    name: str
    options: tuple[str, ...]
    words: tuple[str, ...]  # for the script
    after: tuple[str, ...] = ()
    anyhow: bool = False


def chain(words: list[str], run: Path, top: str | None, specialists: list[str], together: list[str], evaluate: bool,
          nodes: int, per_node: int, top_ranks: int, top_first: bool) -> list[Submission]:
    """The jobs of what is left of a run; pure.

    The top teacher trains on as many ranks as it can use, the specialists one rank each as one array: both at the same
    time, unless the top decides the specialists' classes. Then the phases of `together` on all ranks, the students the
    last, then the evaluation on one.
    """
    base, out = (*words, "--run-folder", str(run), "--phases"), []
    if top:
        wide = (1, top_ranks) if top_ranks <= per_node else (top_ranks // per_node, per_node)
        out.append(Submission("teach-top", _size(*wide), (*base, "teach", "--teacher", top)))
    if specialists:
        named = tuple(word for name in specialists for word in ("--teacher", name))
        out.append(Submission("teach-specialists", (*_size(1, 1), f"--array=0-{len(specialists) - 1}"),
                              (*base, "teach", *named), ("teach-top",) if top and top_first else ()))
    before = tuple(job.name for job in out)
    for phase in together:
        out.append(Submission(phase, _size(nodes, per_node), (*base, phase), before))
        before = (phase,)
    if evaluate:
        out.append(Submission("evaluate", _size(1, 1), (*base, "evaluate"), before))
    return out


def study(words: list[str], seeds: int, nodes: int, per_node: int) -> list[Submission]:
    """The jobs of a study: an array, each element of which runs all arms of one seed, then one that prints the table of what
    came to its end; pure.

    words: of the command, with all seeds; an element takes the one of its index.
    """
    return [Submission("study", (*_size(nodes, per_node), f"--array=0-{seeds - 1}"), tuple(words)),
            Submission("table", _size(1, 1), (*words, "--table"), ("study",), anyhow=True)]


def sbatch(job: Submission, script: Path, extra: list[str], ids: Mapping[str, str]) -> list[str]:
    """argv of a submission, `ids` being the job ids of those before it; pure."""
    after = [f"--dependency={'afterany' if job.anyhow else 'afterok'}:{':'.join(ids[name] for name in job.after)}",
             "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", f"--job-name=pkd-{job.name}", *job.options, *extra, *(after if job.after else []),
            str(script), *job.words]


def shown(argv: list[str]) -> str:
    """A command as one would type it; what stands in angle brackets is known only when it is run."""
    return " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in argv)


def submit(jobs: list[Submission], script: Path, extra: list[str], run: Path, console: Console) -> dict[str, str]:
    """Submit a chain and write jobs.json: name -> job id. Raises UserError; what was submitted by then is cancelled again.
    """
    _refuse_queued(run)
    # A job gets this environment: there it finds the pkd that submits it, wherever that lies.
    own = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    ids: dict[str, str] = {}
    for job in jobs:
        try:
            ids[job.name] = ask(*sbatch(job, script, extra, ids), env=own).strip().split(";")[0]
            write_json(run / "jobs.json", ids)
        except UserError:
            if ids:
                ask("scancel", *ids.values())
            raise
        console.say(f"submitted {ids[job.name]}: {job.name}"
                    + (f", after {', '.join(ids[name] for name in job.after)}" if job.after else ""))
    return ids


def _size(nodes: int, per_node: int) -> tuple[str, ...]:
    return (f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}")


def _refuse_queued(run: Path) -> None:
    jobs = read_json(run / "jobs.json") if (run / "jobs.json").exists() else {}
    if jobs:
        try:
            asked = subprocess.run(["squeue", "--noheader", "--jobs", ",".join(jobs.values()), "--format", "%A"],
                                   capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"squeue could not be run ({error.strerror}): run this where Slurm is installed") from None
        alive = sorted(set(asked.stdout.split()))
        if asked.returncode == 0 and alive:
            raise UserError(f"jobs {', '.join(alive)} of run folder {run} are still queued or running: wait for them, or "
                            "scancel them first")
