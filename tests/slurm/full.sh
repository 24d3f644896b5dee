#!/usr/bin/env bash
# The whole table of faults, every signal and the soak, on virtual nodes with real Slurm daemons (root, about 40 minutes);
# writes tests/slurm/RESULTS.md. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
./launch/setup.sh tests
page=tests/slurm/RESULTS.md
python=.venv/bin/python
cat > $page << END
# Faults on a virtual Slurm cluster

Written by \`tests/slurm/full.sh\` on $(date -u +%F): $(nproc) cores, $(slurmctld -V), torch $($python -c 'import torch; print(torch.__version__)'), commit
$(git rev-parse --short HEAD). Four virtual nodes; the job has two of them, two student ranks on the first and two teacher ranks
on the second; a checkpoint about every second; \`timeouts.step\` 10 s. Slurm's own timers are short (a silent node is given up
after 6 s, a requeued job may start after 5 s). Seconds count from the fault.

END
for part in faults signals soak; do
    echo "## ${part^}" >> $page
    echo >> $page
    PKD_RESULTS=$page $python -m pytest tests/slurm/full_$part.py --timeout 600 "$@"
done
