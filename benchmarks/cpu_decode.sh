#!/usr/bin/env bash
# Decode on a CPU: lessismore beside torch_native, the same settings, the same prompts, one after the other.
#   usage: benchmarks/cpu_decode.sh [MODEL [BUDGET]]
set -euo pipefail
source "$(dirname "$0")/../launch/env.sh"
cd "$LIM_ROOT"
trap stop_all EXIT
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG"
python=$LIM_ROOT/.venv/bin/python
model=${1:-models/chain-tracer} budget=${2:-256}
logs=$(mktemp -d)
# Tokens are streamed in chunks of 16, so that two cores are not busy with HTTP; the same for both servers.
common=(--model-path "$model" --device cpu --max-total-tokens 40000 --max-running-requests 16 --sleep-on-idle
    --stream-interval 16)

names=()
for backend in torch_native lessismore; do
    port=$(free_port "$python")
    flags=(--attention-backend "$backend")
    [[ $backend == lessismore ]] && flags+=(--lim-budget "$budget")
    start_server "$python" "$port" "$logs/$backend.log" "${common[@]}" "${flags[@]}"
    names+=("$backend=http://127.0.0.1:$port")
done
"$python" benchmarks/decode_throughput.py "${names[@]}" --output benchmarks/results/cpu_decode.csv
