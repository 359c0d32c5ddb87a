#!/usr/bin/env bash
# Everything CI checks, on a machine without a GPU: style, types, unit and kernel tests, served tests on real servers.
#   usage: launch/test.sh [pytest arguments]      e.g. launch/test.sh tests/kernels -k union
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"

venv=$LIM_ROOT/.venv next=$LIM_ROOT/.venv-$LIM_SGLANG_NEXT
python=$venv/bin/python
# pytest runs on every core, on four at most: each of its processes keeps up to two servers of 2.5 GB.
workers=$(env -u OMP_NUM_THREADS nproc)
((workers <= 4)) || workers=4
# Servers share the cores, so none may have threads that spin while they wait.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# Of the 33,000 modules in an environment a quarter is ever imported. Python compiles those when it needs them.
export PIP_NO_COMPILE=1
set_up() { ensure_venv "$venv" "$LIM_SGLANG" dev,test,bench,clients,router; }
if (($#)); then set_up; exec "$python" -m pytest "$@"; fi

logs=$(mktemp -d)
next_set_up=
end() {
    if [[ $next_set_up ]]; then kill -TERM -- "-$next_set_up" 2>/dev/null || true; fi
    rm -r "$logs"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

style() {
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    "$venv/bin/lint-imports" --no-logo
}
# part NAME COMMAND…: says how long it took.
part() {
    local name=$1 began=$SECONDS
    shift
    say "$name"
    "$@"
    say "$name took $((SECONDS - began)) s; $SECONDS s since the start"
}
# tests PYTHON PATH…: in the order of collection, in which the longest come first. Tests that share a server or a module
# share a process; see the conftest files.
tests() {
    "$1" -m pytest -q -p no:cacheprovider --durations=10 -n "$workers" --dist loadgroup --no-loadscope-reorder "${@:2}" |
        tee -a "$logs/tests"
}

# The second environment is set up while style and kernels are checked in the first.
set -m  # in a process group of its own
ensure_venv "$next" "$LIM_SGLANG_NEXT" test >"$logs/next" 2>&1 </dev/null &
next_set_up=$!
set +m
part "set-up of SGLang $LIM_SGLANG" set_up
part "style and types" style
# Kernels have a session of their own: without a GPU, Triton's interpreter has to be chosen before Triton is imported.
part "kernels" tests "$python" tests/kernels --require-triton
wait "$next_set_up" || { cat "$logs/next" >&2; die "SGLang $LIM_SGLANG_NEXT could not be set up"; }
next_set_up=
export SGL_LIM_NEXT_PYTHON=$next/bin/python
part "all other tests, with servers of both releases" tests "$python" tests --ignore=tests/kernels
part "unit tests on SGLang $LIM_SGLANG_NEXT" tests "$SGL_LIM_NEXT_PYTHON" tests/{methods,settings,serving,cpu,patches}
# The kernels are the same there, and so is what the interpreter makes of most cases: two of each test tell whether this
# Triton still reads them as meant. All of them are compiled, for one of the two GPUs.
part "kernels on SGLang $LIM_SGLANG_NEXT" tests "$SGL_LIM_NEXT_PYTHON" tests/kernels --require-triton --cases 2 \
    --deselect "tests/kernels/test_compile.py::test_every_kernel_compiles_as_launched[89]"

total() { grep -E ' in [0-9.]+s' "$logs/tests" | grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'; }
printf '%d passed, %d failed\n' "$(total passed)" "$(total failed)"
