"""What the launcher's environment says: torchrun, deepspeed, srun or a plain start; pure.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from torchrun and deepspeed; under srun they are derived
from the *step's* variables, because a job may run many steps of different sizes.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from pkd.errors import UserError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, PORTS = 20000, 12000  # below the ephemeral range, which starts at 32768 on Linux


@dataclass(frozen=True)
class Launch:
    by: str  # "torchrun", "deepspeed", "srun" or "plain"
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int  # 0: none needed
    attempt: str  # differs between a job's restarts by its launcher
    serves_store: bool  # whether this process serves the rendezvous store
    nodes: int = 1  # as far as the launcher tells


def read_launch(env: Mapping[str, str]) -> Launch:
    """Raises UserError where the variables are incomplete or contradict each other."""
    srun = "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env
    # Many batch scripts export MASTER_ADDR and MASTER_PORT, also where srun starts the ranks.
    present = [key for key in TORCH if key in env and not (srun and key.startswith("MASTER_"))]
    if present:
        missing = [key for key in TORCH if key not in env]
        if missing:
            raise UserError(f"the environment sets {', '.join(present)} but not {', '.join(missing)}: start with "
                            "torchrun, deepspeed or srun, or unset them for a single process")
        rank, world, local, port = (_number(env, key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        _check(rank, world, "RANK", "WORLD_SIZE")
        by = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
        agent_serves = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        nodes = env.get("GROUP_WORLD_SIZE") or env.get("CROSS_SIZE") or "1"  # torchrun's, deepspeed's
        return Launch(by, rank, world, local, env["MASTER_ADDR"], port,
                      env.get("TORCHELASTIC_RESTART_COUNT", "0"), rank == 0 and not agent_serves,
                      int(nodes) if nodes.isdigit() else 1)
    if srun:
        rank, world = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
        _check(rank, world, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
        # A restart may come while the start before still holds its port.
        step = ".".join(env.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        # A single rank has nobody to meet: an array of such jobs may fill a node, and two of them would meet on one port.
        port = FIRST_PORT + zlib.crc32(step.encode()) % PORTS if world > 1 else 0
        return Launch("srun", rank, world, _number(env, "SLURM_LOCALID"), env.get("MASTER_ADDR") or first_host(nodes), port,
                      env.get("SLURM_RESTART_COUNT", "0"), rank == 0, int(env.get("SLURM_STEP_NUM_NODES", "1")))
    return Launch("plain", 0, 1, 0, "127.0.0.1", 0, "0", True)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: 'gpu[07-09,12],big1' -> 'gpu07'."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        raise UserError(f"srun's node list {nodes!r} names no host: start with srun inside an allocation")
    return match[1] + (match[2] or "") + match[3]


def _number(env: Mapping[str, str], key: str) -> int:
    value = env.get(key, "")
    if not value.isdigit():
        raise UserError(f"the environment's {key} must be a whole number, found {value!r}")
    return int(value)


def _check(rank: int, world: int, rank_key: str, world_key: str) -> None:
    if rank >= world:
        raise UserError(f"the environment's {rank_key} is {rank}, but {world_key} is {world}, so ranks end at "
                        f"{world - 1}")
