#!/usr/bin/env bash
# The small reasoning model on this machine's CPU, dense and then with LessIsMore decode: the same problems, side by side.
#   usage: launch/demo.sh [--model smollm2] [--budget N] [--problems N] [--samples N] [--steps N]
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"
extras=
# The public checkpoint is converted once, which needs a package more.
if [[ " $* " == *smollm2* ]] && ! "$LIM_ROOT/.venv/bin/python" -c 'import gguf' 2>/dev/null; then
    extras=checkpoints
fi
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG" $extras
exec "$LIM_ROOT/.venv/bin/python" -m sgl_lim.programs.demo "$@"
