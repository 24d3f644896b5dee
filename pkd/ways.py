"""The command line that starts one phase on every rank, for each way of starting; pure."""

import shlex
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

from pkd.launcher import FIRST_PORT, PORTS, first_host

WAYS = {
    "here": "one process",
    "torchrun": "one machine, torch's launcher",
    "deepspeed": "one machine, DeepSpeed's launcher",
    "srun": "inside a Slurm allocation: one task a rank",
    "srun-deepspeed": "inside a Slurm allocation: DeepSpeed's launcher once a node, without ssh",
    "slurm": "submit the phases as chained jobs",
}

# A signal in the moment between a process's start and Python's first line would end it: until then none is listened to.
# DeepSpeed numbers the GPUs that ranks see from 0, whichever Slurm gave to the job: PKD_DEVICES holds those.
RANK = ["bash", "-c", 'trap "" TERM USR1; if [[ -v PKD_DEVICES ]]; then export CUDA_VISIBLE_DEVICES=$PKD_DEVICES; fi; '
        'exec "$@"', "rank"]


def command(way: str, arguments: list[str], ranks: int, env: Mapping[str, str], hostfile: Path) -> list[str]:
    """argv that runs `pkd <arguments>` on every rank. ranks: how many in all; env, hostfile: under Slurm."""
    rank = [*RANK, sys.executable, "-m", "pkd", *arguments]
    if way == "here":
        return rank
    if way == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
                "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--no-python", *rank]
    if way == "deepspeed":
        return [*_deepspeed("--num_gpus", str(ranks), "--master_port", str(_port(str(hostfile)))), *rank]
    groups = int(env.get("SLURM_HET_SIZE", "1"))
    ends = ["--kill-on-bad-exit=1", "--wait=60"]
    if way == "srun" and groups > 1:
        parts = [[*ends, f"--het-group={group}", *_cpus(env.get(f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}")), *rank]
                 for group in range(groups)]
        return ["srun", *parts[0], *(word for part in parts[1:] for word in (":", *part))]
    if way == "srun":
        return ["srun", *ends, *_cpus(env.get("SLURM_CPUS_PER_TASK")), *rank]
    nodes = env["SLURM_JOB_NUM_NODES"]
    node = shlex.join(_deepspeed("--no_ssh", "--hostfile", str(hostfile), "--master_addr", env["PKD_FIRST_HOST"],
                                 "--master_port", str(_port(f"{env['SLURM_JOB_ID']}.{arguments[0]}"))))
    # DeepSpeed's own processes would die of USR1; the ranks below them listen to it themselves.
    return ["srun", *ends, f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
            *_cpus(env.get("SLURM_CPUS_PER_TASK"), -(-ranks // int(nodes))), "bash", "-c",
            'trap "" TERM USR1; if [[ -v CUDA_VISIBLE_DEVICES ]]; then export PKD_DEVICES=$CUDA_VISIBLE_DEVICES; fi; '
            f'exec {node} --node_rank "$SLURM_NODEID" "$@"', "node", *rank]


def environment(way: str, env: Mapping[str, str]) -> dict[str, str]:
    """What the launcher's own environment needs beside what it has."""
    out = {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1")}  # pkd sets its threads itself, by the recipe
    if way == "deepspeed" and "CUDA_VISIBLE_DEVICES" in env:
        out["PKD_DEVICES"] = env["CUDA_VISIBLE_DEVICES"]
    if way == "srun" and "SLURM_JOB_NODELIST_HET_GROUP_0" in env and "MASTER_ADDR" not in env:
        # Slurm sorts the nodes of a step over several components by name; rank 0 is on the first component's first node.
        out["MASTER_ADDR"] = first_host(env["SLURM_JOB_NODELIST_HET_GROUP_0"])
    if way == "torchrun":
        out["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"  # after a signal torchrun kills what has not saved by then
    return out


def _cpus(given: str | None, tasks: int = 1) -> list[str]:
    """srun's option for as many CPUs as the job asked for: srun does not take that over by itself."""
    return [f"--cpus-per-task={int(given) * tasks}"] if given else []


def _deepspeed(*options: str) -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--no_python", "--no_local_rank"]


def _port(text: str) -> int:
    """Below the ephemeral range, and another one for another run on the same machine."""
    return FIRST_PORT + zlib.crc32(text.encode()) % PORTS
