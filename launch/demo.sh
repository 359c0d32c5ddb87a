#!/usr/bin/env bash
# The small reasoning model on this machine's CPU, dense and then with LessIsMore decode: the same problems, side by side.
#   usage: launch/demo.sh [--budget N] [--problems N] [--samples N] [--steps N]
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG"
exec "$LIM_ROOT/.venv/bin/python" -m sgl_lim.programs.demo "$@"
