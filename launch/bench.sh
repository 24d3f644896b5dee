#!/usr/bin/env bash
# The pages of results in tests/bench that are of machines like this one, on quiet cores; or those that are named:
#   ./launch/bench.sh [speed] [placements] [groups] [exchange] [memory] [big-teacher] [kernels]
# speed: RESULTS.md, pkd against a published loop, naive data parallelism and torchdistill, nine rounds (ROUNDS=1: one). Two
# cores take an hour and a half for that, an hour for placements, and half an hour for all others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh bench
(($#)) || set -- speed placements groups exchange memory big-teacher kernels
for page in "$@"; do
    [[ " speed placements groups exchange memory big-teacher kernels " == *" $page "* ]] ||
        { echo "bench: no page is called $page: see the head of launch/bench.sh" >&2; exit 2; }
done
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
for page in "$@"; do
    case $page in
        speed) .venv/bin/python tests/bench/speed.py --rounds "${ROUNDS:-9}" ${FOLDER:+--folder "$FOLDER"} ;;
        placements) PYTHONPATH=tests .venv/bin/python tests/bench/placements.py "$temporary/placements" ;;
        groups | memory | kernels) .venv/bin/python "tests/bench/$page.py" ;;
        exchange) .venv/bin/python tests/bench/exchange.py --page ;;
        big-teacher) .venv/bin/python tests/bench/big_teacher.py ;;
    esac
done
