# Sourced by the recipes: virtual environments, servers, and the end of every process they start.
# shellcheck shell=bash

LIM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LIM_SGLANG=0.5.17
LIM_SGLANG_NEXT=0.5.23
# No model or tokenizer is ever looked up on a hub: the demo and the tests run without a network once installed.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# ensure_venv DIR SGLANG_VERSION [EXTRAS]: a virtual environment with that SGLang and this checkout, made once.
ensure_venv() {
    local dir=$1 version=$2 extras=${3:-} want python
    want="sglang $version $(cksum <"$LIM_ROOT/pyproject.toml")"
    # An environment with extras serves who needs none.
    [[ -f $dir/.lim-ready && $(<"$dir/.lim-ready") == "$want ["*"${extras}]" ]] && return
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or later is needed, and $python is not; install it or set PYTHON"
    say "setting up $(basename "$dir") with SGLang $version (several GB, a few minutes)"
    # A first try that failed half way leaves a python without pip.
    "$dir/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$dir" ||
        die "python venv module missing; on Debian and Ubuntu: apt-get install python3-venv"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "sglang==$version"
    # One environment at a time: a build of this checkout writes into it.
    flock "$LIM_ROOT/pyproject.toml" "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
        "sglang==$version" -e "$LIM_ROOT${extras:+[$extras]}"
    printf '%s [%s]' "$want" "$extras" >"$dir/.lim-ready"
}

LIM_GROUPS=()

# stop_all: ends every process group that start_server began. Set as the trap of EXIT by whoever starts servers.
stop_all() {
    local group
    for group in ${LIM_GROUPS[@]+"${LIM_GROUPS[@]}"}; do kill -TERM -- "-$group" 2>/dev/null || true; done
    for group in ${LIM_GROUPS[@]+"${LIM_GROUPS[@]}"}; do
        for _ in {1..50}; do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.1; done
        kill -KILL -- "-$group" 2>/dev/null || true
    done
    LIM_GROUPS=()
}

free_port() { "$1" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start_server PYTHON PORT LOG FLAGS…: starts a server in a process group of its own and waits until it answers.
start_server() {
    local python=$1 port=$2 log=$3 group
    shift 3
    command -v setsid >/dev/null || die "setsid (util-linux) not found; these recipes are for Linux"
    setsid "$python" -m sglang.launch_server --host 127.0.0.1 --port "$port" "$@" >"$log" 2>&1 </dev/null &
    group=$!
    disown  # ended by stop_all, without a word from the shell
    LIM_GROUPS+=("$group")
    local deadline=$((SECONDS + 300))
    until "$python" - "$port" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5)
PY
    do
        kill -0 "$group" 2>/dev/null || { tail -n 40 "$log" >&2; die "the server ended while starting; its log is $log"; }
        ((SECONDS < deadline)) || die "the server does not answer after 300 s; its log is $log"
        sleep 0.5
    done
}
