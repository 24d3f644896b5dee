#!/usr/bin/env bash
# The whole table of faults, every signal, what befalls jobs as a whole, and the soak, on virtual nodes with real Slurm daemons
# (root; 14, 27, 7 and 18 minutes on two cores). Each part writes its page, tests/slurm/RESULTS-<part>.md.
#
#   ./tests/slurm/full.sh [faults] [signals] [jobs] [soak]     all four without arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
./launch/setup.sh tests
python=.venv/bin/python
(($#)) || set -- faults signals jobs soak
$python -m pytest tests/slurm/full_cluster.py  # whether the nodes themselves behave as real ones; a minute
for part in "$@"; do
    page=tests/slurm/RESULTS-$part.md
    cat > "$page" << END
# ${part^} on a virtual Slurm cluster

Written by \`tests/slurm/full.sh $part\` on $(date -u +%F): $(nproc) cores, $(slurmctld -V), torch $($python -c 'import torch; print(torch.__version__)'),
commit $(git rev-parse --short HEAD). Four virtual nodes; the job has two of them, two student ranks on the first, two teacher ranks
on the second; a checkpoint about every second; \`timeouts.step\` 10 s. Slurm's own timers are short here (a silent node is given
up after 6 s, a requeued job may start after 5 s). Seconds count from the fault.

END
    PKD_RESULTS=$page $python -m pytest "tests/slurm/full_$part.py" --timeout 1500
done
