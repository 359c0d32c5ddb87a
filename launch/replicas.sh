#!/usr/bin/env bash
# Servers of one model behind SGLang's router, until Ctrl-C: requests with a common prefix meet on one server.
#   usage: launch/replicas.sh                                  two servers of the small reasoning model, on this CPU
#          launch/replicas.sh [options] -- SERVER ARGUMENTS    options: python -m sgl_lim.programs.replicas --help
#   e.g.   launch/replicas.sh --gpus-each 1 -- --model-path MODEL --attention-backend lessismore
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"
python=$LIM_ROOT/.venv/bin/python
extras=
"$python" -c 'import sglang_router' 2>/dev/null || extras=router
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG" $extras
if [[ " $* " != *" -- "* ]]; then
    set -- "$@" -- --model-path models/chain-tracer --device cpu --sleep-on-idle --attention-backend lessismore \
        --lim-budget 256 --max-total-tokens 32768 --max-running-requests 16
fi
exec "$python" -m sgl_lim.programs.replicas "$@"
