"""slurm.conf and its companions for a cluster of virtual nodes that is to react within seconds."""

from pathlib import Path

SLURMD_PORT = 17001

# slurmd loads a cgroup plugin even if nothing uses it, and its autodetection fails on the empty /sys/fs/cgroup of a node.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"

SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost=control({control})
SlurmUser=root
SlurmctldPort=17000
SlurmdPort={port}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired: 120 s by default
AuthInfo=socket={scratch}/munge/socket,cred_expire=5
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool/%n
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose

# no systemd, no cgroups, no data base
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE

# believe the hardware below, not the machine's
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
{gres_types}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillOnBadExit=1
ReturnToService=2

SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=1
InactiveLimit=0
KillWait=2
CompleteWait=0
UnkillableStepTimeout=20
BatchStartTimeout=10
EpilogMsgTime=0
MinJobAge=3600

{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=30 OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=5 PreemptMode=REQUEUE GraceTime=0
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def slurm_conf(folder: Path, scratch: Path, addresses: dict[str, str], cpus: int, gpus: int) -> tuple[str, str]:
    """The texts of slurm.conf and gres.conf: the first half of the nodes has a100, the second h100, so that the first
    component of slurm-het.sbatch is not on the nodes whose names come first.
    """
    control, *nodes = addresses.values()
    lines, gres = [], []
    for number, name in enumerate(list(addresses)[1:]):
        kind = "a100" if number < (len(nodes) + 1) // 2 else "h100"
        lines.append(f"NodeName={name} NodeAddr={nodes[number]} CPUs={cpus} Sockets=1 CoresPerSocket={cpus} "
                     f"ThreadsPerCore=1 RealMemory=64000 Feature={kind} State=UNKNOWN"
                     + (f" Gres=gpu:{kind}:{gpus}" if gpus else ""))
        if gpus:
            gres.append(f"NodeName={name} Name=gpu Type={kind} File={scratch}/gpu[0-{gpus - 1}]\n")
    conf = SLURM_CONF.format(folder=folder, scratch=scratch, port=SLURMD_PORT, control=control,
                             nodes="\n".join(lines), gres_types="GresTypes=gpu" if gpus else "")
    return conf, "".join(gres)
