#!/usr/bin/env bash
# Set everything up and run the main job on scikit-learn's digits: teach -> distill -> evaluate, on 4 ranks on the CPU.
# Arguments go to the recipe: ./launch/quickstart.sh seed=1   (another seed is another run: a folder of its own)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh

run=runs/digits
for argument in "$@"; do run+=-$argument; done
ranks=(.venv/bin/torchrun --standalone --nproc_per_node 4 -m pkd)
export OMP_NUM_THREADS=1 # torchrun would set it, and say so

.venv/bin/pkd plan digits --world 4 "$@"
"${ranks[@]}" teach digits --run-folder "$run" "$@"
"${ranks[@]}" distill digits --run-folder "$run" "$@"
.venv/bin/pkd evaluate "$run"
