#!/usr/bin/env bash
# The small reasoning model on this machine's CPU, dense and then with LessIsMore decode: the same problems, side by side.
#   usage: launch/demo.sh [BUDGET]        PROBLEMS=6 SAMPLES=2 STEPS=48 may be set
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$LIM_ROOT"
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

budget=${1:-256}
problems=${PROBLEMS:-6} samples=${SAMPLES:-2} steps=${STEPS:-48}
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG"
python=$LIM_ROOT/.venv/bin/python
started=$SECONDS
out=$(mktemp -d "${TMPDIR:-/tmp}/sgl-lim-demo.XXXXXX")
server=(--model-path models/chain-tracer --max-total-tokens 60000 --max-running-requests 16
    --device cpu --sleep-on-idle)
# The demo runs on the CPU everywhere, so that its figures mean the same everywhere.
export CUDA_VISIBLE_DEVICES=

run() {
    local name=$1 port
    shift
    say "$name: $*"
    port=$(free_port "$python")
    start_server "$python" "$port" "$out/$name.log" "${server[@]}" "$@"
    "$python" -m sgl_lim.programs --endpoint "http://127.0.0.1:$port" --program self-consistency --samples "$samples" \
        --chains "$problems" --facts 330 --steps "$steps" --output "$out/$name.jsonl" --summary "$out/$name.json" >&2
    stop_all
}

say "$problems problems: 330 facts in the context, $steps links to follow, $samples answers each (logs in $out)"
run dense --attention-backend torch_native
run lessismore --attention-backend lessismore --lim-budget "$budget"
"$python" -m sgl_lim.programs.compare "dense=$out/dense.json" "lessismore=$out/lessismore.json"
say "took $((SECONDS - started)) s"
