#!/usr/bin/env bash
# Teach, distill and evaluate on one machine under DeepSpeed's launcher.
#
#   ./launch/deepspeed.sh RANKS RECIPE [key.sub=value ...] [--run-folder DIR]
#
# Signals as under torchrun.sh; DeepSpeed's launcher passes none on, pkd sends them to the ranks. For several machines
# DeepSpeed wants a hostfile and ssh or pdsh between them (deepspeed --hostfile FILE --module pkd distill RECIPE), which this
# project has not run; on a Slurm cluster slurm-deepspeed.sbatch needs neither.
set -euo pipefail
ranks=${1:?usage: deepspeed.sh RANKS RECIPE [key.sub=value ...]}
trap "" TERM USR1 # until pkd listens to them
if [[ ! $(command -v pkd) && -f .venv/bin/activate ]]; then . .venv/bin/activate; fi
exec pkd launch "${@:2}" --on deepspeed --ranks-per-node "$ranks"
