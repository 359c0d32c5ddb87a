#!/usr/bin/env bash
# Everything CI checks, on a machine without a GPU: style, types, unit and kernel tests, served tests on real servers.
#   usage: launch/test.sh [pytest arguments]      e.g. launch/test.sh tests/kernels -k union
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"

venv=$LIM_ROOT/.venv next=$LIM_ROOT/.venv-$LIM_SGLANG_NEXT
python=$venv/bin/python
set_up() { ensure_venv "$venv" "$LIM_SGLANG" dev,test,bench; }
if (($#)); then set_up; exec "$python" -m pytest "$@"; fi

started=$SECONDS
export SGL_LIM_NEXT_PYTHON=$next/bin/python
cores=$(nproc)
export OMP_NUM_THREADS=1

logs=$(mktemp -d)
trap 'stop_all; rm -r "$logs"' EXIT

# job NAME COMMAND…: runs beside others, one a core. The first one that fails shows all it printed and ends the others.
job() {
    while (($(jobs -rp | wc -l) >= cores)); do wait -n; done
    set -m  # in a process group of its own
    logged "$@" </dev/null &
    set +m
    LIM_GROUPS+=("$!")
}
logged() {
    name=$1 log=$logs/$1 began=$SECONDS
    shift
    trap 'cat "$log"; say "$name failed"' EXIT
    trap 'trap - EXIT; exit 1' TERM  # because another one failed
    "$@" >"$log" 2>&1
    trap - EXIT
    say "$name took $((SECONDS - began)) s"
    sed -n '/slowest .*durations/,$p' "$log"
}
style() {
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
}
tests() { "$1" -m pytest -p no:cacheprovider --durations=5 "${@:2}"; }

job "set-up of SGLang $LIM_SGLANG_NEXT" ensure_venv "$next" "$LIM_SGLANG_NEXT" test
next_set_up=$!
set_up
say "set-up took $((SECONDS - started)) s"

# The longest come first, and every test is in one of them. Tests that share servers share a job.
# tests/kernels has processes of its own: without a GPU, Triton's interpreter has to be chosen before Triton is imported.
own_servers=(tests/served/test_{calibration,churn,command_line,programs,refusals}.py)
no_servers=(tests/programs tests/training tests/calibrate)
kernels=(tests/kernels --require-triton)
job "style and types" style
job "shared servers" tests "$python" tests/served "${own_servers[@]/#/--ignore=}" -k "not next"
wait "$next_set_up"
job "servers of SGLang $LIM_SGLANG_NEXT" tests "$python" tests/served -k next
job "servers of their own" tests "$python" "${own_servers[@]}" -k "not next"
job "kernels" tests "$python" "${kernels[@]}"
job "kernels on SGLang $LIM_SGLANG_NEXT" tests "$SGL_LIM_NEXT_PYTHON" "${kernels[@]}"
job "programs" tests "$python" "${no_servers[@]}"
job "all others" tests "$python" "${no_servers[@]/#/--ignore=}" --ignore=tests/kernels --ignore=tests/served
job "unit tests on SGLang $LIM_SGLANG_NEXT" tests "$SGL_LIM_NEXT_PYTHON" tests/{methods,settings,serving,cpu,patches}
while (($(jobs -rp | wc -l))); do wait -n; done  # not in their order, so that none outlives a failed one for long
for group in "${LIM_GROUPS[@]}"; do wait "$group"; done
say "all of it took $((SECONDS - started)) s"
