#!/usr/bin/env bash
# Decode on a CPU: torch_native, then our backend with everything dense, then LessIsMore; the same settings for all.
#   usage: benchmarks/cpu_decode.sh [MODEL [BUDGET [CSV]]]
# `full` is the control: what it gains over torch_native comes from taking the batch at once instead of request by
# request, and what lessismore gains over `full` from reading fewer tokens. Run it on a machine that does nothing else.
set -euo pipefail
source "$(dirname "$0")/../launch/env.sh"
cd "$LIM_ROOT"
ensure_venv "$LIM_ROOT/.venv" "$LIM_SGLANG"
model=${1:-models/chain-tracer} budget=${2:-256} output=${3:-out/cpu_decode.csv}
export CUDA_VISIBLE_DEVICES=
# Tokens are streamed in chunks of 16, so that two cores are not busy with HTTP; the same for all servers.
common="--model-path $(printf %q "$model") --device cpu --max-total-tokens 40000 --max-running-requests 16 --sleep-on-idle
    --stream-interval 16"
exec "$LIM_ROOT/.venv/bin/python" -m benchmarks.decode_throughput --common "$common" --output "$output" \
    --server "torch_native=--attention-backend torch_native" \
    --server "full=--attention-backend lessismore --lim-method full" \
    --server "lessismore=--attention-backend lessismore --lim-budget $budget"
