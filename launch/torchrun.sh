#!/usr/bin/env bash
# Teach, distill and evaluate on one machine under torchrun.
#
#   ./launch/torchrun.sh RANKS RECIPE [key.sub=value ...] [--run-folder DIR]
#
# RANKS: processes, one a GPU. SIGTERM or SIGUSR1 makes all of them stop at the same step and save; the same command then
# goes on there.
set -euo pipefail
ranks=${1:?usage: torchrun.sh RANKS RECIPE [key.sub=value ...]}
trap "" TERM USR1 # until pkd listens to them
if [[ ! $(command -v pkd) && -f .venv/bin/activate ]]; then . .venv/bin/activate; fi
exec pkd launch "${@:2}" --on torchrun --ranks-per-node "$ranks"
