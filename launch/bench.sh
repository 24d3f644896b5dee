#!/usr/bin/env bash
# The pages of results in tests/bench that are of machines like this one, on quiet cores; or those that are named:
#   ./launch/bench.sh [speed] [archive] [torchdistill] [placements] [groups] [exchange] [memory] [big-teacher] [kernels]
# speed: RESULTS.md, pkd against a published loop and naive data parallelism; archive: an epoch from it against one without
# teachers; torchdistill: against that; nine rounds each (ROUNDS=1: one). Two cores take an hour and a half for speed, an hour
# for placements, and an hour and a half for all others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh bench
(($#)) || set -- speed archive torchdistill placements groups exchange memory big-teacher kernels
for page in "$@"; do
    [[ " speed archive torchdistill placements groups exchange memory big-teacher kernels " == *" $page "* ]] ||
        { echo "bench: no page is called $page: see the head of launch/bench.sh" >&2; exit 2; }
done
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
for page in "$@"; do
    case $page in
        speed) .venv/bin/python tests/bench/speed.py --rounds "${ROUNDS:-9}" ${FOLDER:+--folder "$FOLDER"} ;;
        archive | torchdistill) .venv/bin/python "tests/bench/$page.py" --rounds "${ROUNDS:-9}" ;;
        placements) PYTHONPATH=tests .venv/bin/python tests/bench/placements.py "$temporary/placements" ;;
        groups | memory | kernels) .venv/bin/python "tests/bench/$page.py" ;;
        exchange) .venv/bin/python tests/bench/exchange.py --page ;;
        big-teacher) .venv/bin/python tests/bench/big_teacher.py ;;
    esac
done
