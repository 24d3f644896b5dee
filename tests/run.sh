#!/usr/bin/env bash
# Set everything up and run the tests; arguments go to pytest: ./tests/run.sh tests/test_loss.py -k composed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh tests
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes would each compile what they import
exec .venv/bin/python -m pytest "$@"
