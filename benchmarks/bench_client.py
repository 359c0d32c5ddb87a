"""SGLang's own `bench_serving` as the client, its result in our figures."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.closed_loop import LoadError
from benchmarks.figures import Figures
from sgl_lim.programs import api_key, proxies


def run_bench_serving(
    url: str,
    info: Mapping[str, Any],
    *,
    concurrency: int,
    requests: int,
    input_len: int,
    output_len: int,
    seed: int,
    warmup: int,
) -> Figures:
    """The same closed loop by `sglang.bench_serving`; `info` is the server's `/server_info`.

    Its dataset `random-ids` counts upwards from random token ids over the whole vocabulary; it gives no steady window.
    Its `warmup` requests count in the server's attended fraction.

    Raises:
        LoadError: it failed, or not every request gave `output_len` tokens.
    """
    if info.get("skip_tokenizer_init"):
        raise LoadError(
            "bench_serving counts a token only where the stream carries text, and a server with --skip-tokenizer-init "
            "streams token ids alone; use --client own, or start the server with a tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.jsonl"
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
        command += ["--model", info["model_path"], "--tokenizer", info.get("tokenizer_path") or info["model_path"]]
        command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
        command += ["--random-input-len", str(input_len), "--random-output-len", str(output_len)]
        command += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--seed", str(seed)]
        command += ["--warmup-requests", str(warmup), "--flush-cache", "--disable-tqdm", "--output-file", str(result)]
        proxies.keep_direct(url)
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **_key()}
        )
        if run.returncode or not result.exists():
            raise LoadError(f"bench_serving ended with {run.returncode}\n{run.stdout[-4000:]}")
        return read_result(json.loads(result.read_text().splitlines()[-1]), requests, output_len)


def _key() -> dict[str, str]:
    """The variable by which `bench_serving` takes a key; none without a key."""
    key = api_key.effective(None)
    return {} if key is None else {"OPENAI_API_KEY": key}


def read_result(result: Mapping[str, Any], requests: int, output_len: int) -> Figures:
    """Figures from one line of `bench_serving --output-file`.

    Raises:
        LoadError: not every request gave `output_len` tokens.
    """
    done, tokens = result["completed"], result["total_output_tokens"]
    if done != requests or tokens != requests * output_len:
        raise LoadError(
            f"bench_serving reports {done} of {requests} requests and {tokens} of {requests * output_len} tokens"
        )
    return Figures(
        tokens_per_s=result["output_throughput"],
        steady_tokens_per_s=None,
        steady_s=None,
        ttft_ms=(result["median_ttft_ms"], result["p99_ttft_ms"]),
        tpot_ms=(result["median_tpot_ms"], result["p99_tpot_ms"]),
        done=done,
        mean_output=tokens / done,
        complete=True,
    )
