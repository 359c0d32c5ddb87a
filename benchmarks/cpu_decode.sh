#!/usr/bin/env bash
# Decode on a CPU: lessismore beside torch_native, the same settings, one after the other.
#   usage: benchmarks/cpu_decode.sh [MODEL [BUDGET [CSV]]]
set -euo pipefail
source "$(dirname "$0")/../launch/env.sh"
cd "$LIM_ROOT"
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG"
model=${1:-models/chain-tracer} budget=${2:-256} output=${3:-out/cpu_decode.csv}
export CUDA_VISIBLE_DEVICES=
# Tokens are streamed in chunks of 16, so that two cores are not busy with HTTP; the same for both servers.
common="--model-path $(printf %q "$model") --device cpu --max-total-tokens 40000 --max-running-requests 16 --sleep-on-idle
    --stream-interval 16"
exec "$LIM_ROOT/.venv/bin/python" benchmarks/decode_throughput.py --common "$common" --output "$output" \
    --server "torch_native=--attention-backend torch_native" \
    --server "lessismore=--attention-backend lessismore --lim-budget $budget"
