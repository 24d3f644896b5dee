#!/usr/bin/env bash
# Make .venv beside the sources and install pkd with what it runs on; `setup.sh tests` adds what the tests need.
# A second call finds the same requirements installed and does nothing. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "setup: Python 3.10 or newer is needed, found $("$python" --version 2>&1 || true): set PYTHON to one" >&2
    exit 2
fi
extra=${1:+[$1]}
stamp=.venv/installed-${1:-base}
wanted=$(cat requirements.txt pyproject.toml | cksum)
if [[ -x .venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi
# Its Python is there before its pip, which a system without ensurepip, or an interruption, may leave it without.
.venv/bin/python -m pip --version &> /dev/null || "$python" -m venv .venv
echo "setup: installing pkd$extra into .venv (a minute or more)"
# Of the thousands of files that pip would compile a run imports a fifth: those are compiled here, once, rather than by all of
# its ranks at the same time, and in each of them again where Python is told to write none.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".$extra"
imports='import pkd.archive, pkd.cli, pkd.distill_setup, pkd.evaluate, pkd.teach; pkd.ds_config.import_deepspeed()'
said=$(env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c "$imports" 2>&1) || { echo "$said" >&2; exit 1; }
echo "$wanted" > "$stamp"
