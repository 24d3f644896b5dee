#!/usr/bin/env bash
# The table of speeds, against a published loop, naive data parallelism and torchdistill; writes tests/bench/RESULTS.md.
# An hour and a half on two quiet cores; options go to tests/bench/speed.py (--rounds 9, --steps 16, --only WORD).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh bench
exec .venv/bin/python tests/bench/speed.py "$@"
