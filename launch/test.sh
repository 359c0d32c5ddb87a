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

# Tests without servers take a core each, so they run in two chains at once; servers take what there is and come last.
# tests/kernels has processes of its own: without a GPU, Triton's interpreter has to be chosen before Triton is imported.
export OMP_NUM_THREADS=1
kernels=(tests/kernels --require-triton --durations=5)
others=(tests/programs tests/training tests/calibration)
say "tests without servers"
beside_log=$(mktemp)
beside() {
    set -e
    "$SGL_LIM_NEXT_PYTHON" -m pytest -p no:cacheprovider tests/unit
    "$SGL_LIM_NEXT_PYTHON" -m pytest -p no:cacheprovider "${kernels[@]}"
    "$python" -m pytest -p no:cacheprovider --durations=5 "${others[@]}"
}
(beside) >"$beside_log" 2>&1 &
chain=$!
trap 'kill "$chain" 2>/dev/null || true' EXIT
"$python" -m pytest --durations=5 --ignore=tests/kernels --ignore=tests/served "${others[@]/#/--ignore=}"
"$python" -m pytest "${kernels[@]}"
wait "$chain" || { cat "$beside_log"; exit 1; }
trap - EXIT
grep -E "^=+ .*(passed|failed)" "$beside_log"
unset OMP_NUM_THREADS
say "tests on servers"
"$python" -m pytest --durations=15 tests/served
say "all of it took $((SECONDS - started)) s"
