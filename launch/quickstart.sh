#!/usr/bin/env bash
# Set everything up and run the main job on scikit-learn's digits: teach -> distill -> evaluate, on 4 ranks on the CPU.
# Arguments go to the recipe: ./launch/quickstart.sh seed=1   (another seed is another run: a folder of its own)
# On the CPU, whatever there is: ranks that share a GPU cannot train together.
# Two ranks train and two answer, whatever the planner would find faster here: accuracies repeat for as many student ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh
export CUDA_VISIBLE_DEVICES=

run=runs/digits
for argument in "$@"; do run+=-$argument; done
exec .venv/bin/pkd launch digits --on torchrun --ranks-per-node 4 --run-folder "$run" placement.student_ranks=2 "$@"
