#!/usr/bin/env bash
# Everything CI checks, on a machine without a GPU: style, types, unit and kernel tests, served tests on real servers.
#   usage: launch/test.sh [pytest arguments]      e.g. launch/test.sh tests/kernels -k union
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"

started=$SECONDS
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG" dev,test,bench
python=$LIM_ROOT/.venv/bin/python
say "set-up took $((SECONDS - started)) s"
if (($#)); then exec "$python" -m pytest "$@"; fi

say "style and types"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy

ensure_venv "$LIM_ROOT/.venv-$LIM_SGLANG_NEXT" "$LIM_SGLANG_NEXT" test
export SGL_LIM_NEXT_PYTHON=$LIM_ROOT/.venv-$LIM_SGLANG_NEXT/bin/python
say "tests"
"$python" -m pytest --durations=15 --ignore=tests/kernels
"$SGL_LIM_NEXT_PYTHON" -m pytest tests/unit
# Processes of their own: without a GPU, Triton's interpreter has to be chosen before anything imports Triton. They take
# a core each, so both releases run at once.
kernels=(-m pytest tests/kernels --require-triton --durations=5 -p no:cacheprovider)
next_log=$(mktemp)
OMP_NUM_THREADS=1 "$SGL_LIM_NEXT_PYTHON" "${kernels[@]}" >"$next_log" 2>&1 &
next=$!
OMP_NUM_THREADS=1 "$python" "${kernels[@]}" || { kill "$next"; exit 1; }
wait "$next" || { cat "$next_log"; exit 1; }
tail -n 12 "$next_log"
say "all of it took $((SECONDS - started)) s"
