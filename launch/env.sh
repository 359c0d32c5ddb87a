# Sourced by the recipes: virtual environments.
# shellcheck shell=bash

LIM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LIM_SGLANG=0.5.17
LIM_SGLANG_NEXT=0.5.23
# No model or tokenizer is ever looked up on a hub: the demo and the tests run without a network once installed.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# aloud WHAT COMMAND…: runs the command, and says every 10 s for how long.
aloud() {
    local what=$1 alive status=0
    shift
    say "$what"
    # The lines end when this shell closes the pipe or dies, whatever ends it.
    exec {alive}> >(
        SECONDS=0
        while read -rt 10 || (($? > 128)); do printf '%s: %s s\n' "$what" "$SECONDS" >&2; done
    )
    "$@" {alive}>&- || status=$?
    exec {alive}>&-
    return "$status"
}

# ensure_venv DIR SGLANG_VERSION [EXTRAS]: a virtual environment with that SGLang and this checkout, made once.
ensure_venv() {
    local dir=$1 version=$2 extras=${3:-} want python
    want="sglang $version $(cksum <"$LIM_ROOT/pyproject.toml")"
    # An environment with extras serves who needs none.
    [[ -f $dir/.lim-ready && $(<"$dir/.lim-ready") == "$want ["*"${extras}]" ]] && return
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or later is needed, and $python is not; install it or set PYTHON"
    aloud "setting up $(basename "$dir") with SGLang $version (several GB, a few minutes)" \
        install_into "$dir" "$version" "$extras" "$python"
    printf '%s [%s]' "$want" "$extras" >"$dir/.lim-ready"
}

# install_into DIR SGLANG_VERSION EXTRAS PYTHON
install_into() {
    local dir=$1 version=$2 extras=$3 python=$4
    # A first try that failed half way leaves a python without pip.
    "$dir/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$dir" ||
        die "python venv module missing; on Debian and Ubuntu: apt-get install python3-venv"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "sglang==$version" &&
        # One environment at a time: a build of this checkout writes into it.
        flock "$LIM_ROOT/pyproject.toml" "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
        "sglang==$version" -e "$LIM_ROOT${extras:+[$extras]}"
}
