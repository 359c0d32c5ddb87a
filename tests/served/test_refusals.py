"""What cannot work ends the launcher before weights load, with every reason at once, each with its way out."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from support.fleet import Fleet
from support.server import QUICK, Outcome, ServerPool, run_launcher

pytestmark = pytest.mark.served

COMMON = (
    "--attention-backend",
    "lessismore",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--load-format",
    "dummy",
    # Should a refusal fail, the server must not take the machine's memory for its pool.
    "--max-total-tokens",
    "2048",
)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLA = {
    **SHAPE,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
NO_NCCL = (("SGLANG_NCCL_SO_PATH", "/nonexistent.so"),)  # 0.5.17 loads NCCL for CPU groups too, and fails
EAGLE = (
    *("--speculative-num-steps", "2"),
    *("--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", "3"),
)
SLIDING = {**SHAPE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}


@dataclass(frozen=True)
class Refusal:
    """A launch that must fail, and one pattern for each reason, in order."""

    args: tuple[str, ...]
    reasons: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    config: str | None = None  # JSON of a model that is a configuration only; else the tiny Qwen3


LAUNCHES = {
    "values-layers-and-sliding-window": Refusal(
        ("--lim-budget", "3", "--lim-recency", "1.5", "--lim-selection-layers", "2,12", "--kv-cache-dtype", "fp4_e2m1"),
        (
            r"--lim-recency must be between 0 and 1, or auto, got 1\.5",
            r"--lim-budget 3 leaves no token beside --lim-sinks 4; raise the budget",
            r"sliding-window .*; serve it with a dense --attention-backend",
            r"--lim-selection-layers 2,12 goes beyond the model's 4 layers; choose among 0 to 3",
            r"--kv-cache-dtype fp4_e2m1: .*; use auto",
        ),
        config=json.dumps(SLIDING),
    ),
    "negative-budget-and-pipeline": Refusal(
        ("--lim-budget", "-5", "--lim-selection-layers", "4,2", "--lim-preset", "none.json", "--pp-size", "2"),
        (
            r"--lim-budget must be a positive integer, got -5; the paper uses",
            r"--lim-selection-layers must increase, got 4,2",
            r"--lim-preset none\.json: No such file .*; write one with python -m sgl_lim\.calibrate",
            r"--pp-size 2: .*; use --tp-size instead",
        ),
        env=NO_NCCL,
    ),
    "dp-attention": Refusal(
        ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
        (r"--enable-dp-attention \(or --attn-dp-size above 1\): .*; on a CPU leave the flag out",),
        env=(("SGLANG_CPU_OMP_THREADS_BIND", "0|1"), *NO_NCCL),
    ),
    "speculative-on-a-cpu": Refusal(
        ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "{model}", *EAGLE),
        (r"--speculative-algorithm EAGLE: SGLang speculates on GPUs alone; on a CPU leave it out",),
    ),
    "lossless-with-what-cannot-be": Refusal(
        (
            *("--speculative-algorithm", "LESSISMORE", "--speculative-eagle-topk", "2", "--enable-mixed-chunk"),
            *("--speculative-draft-model-path", "{model}", "--disaggregation-mode", "decode"),
        ),
        (
            r"--speculative-eagle-topk 2: drafts are one chain, not a tree; leave the flag out",
            r"--speculative-draft-model-path .*: the model drafts for itself; leave the flag out",
            r"--enable-mixed-chunk does not go with --speculative-algorithm LESSISMORE; leave one of them out",
            r"--disaggregation-mode decode: .*; use one server for both",
        ),
    ),
    "lossless-by-pages": Refusal(
        ("--speculative-algorithm", "LESSISMORE", "--lim-method", "quest", "--page-size", "16"),
        (r"--lim-method quest: .*; take lessismore",),
    ),
    "mla": Refusal((), (r"MLA models .*; serve it with a dense --attention-backend",), config=json.dumps(MLA)),
}


@pytest.fixture(scope="module")
def outcomes(fleet: Fleet, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All launches, two at a time."""
    pool.close()
    folder, tiny = tmp_path_factory.mktemp("refusals"), fleet.model("gqa")

    def run(name: str) -> Outcome:
        refusal, model = LAUNCHES[name], tiny
        if refusal.config is not None:
            model = folder / name
            model.mkdir()
            (model / "config.json").write_text(refusal.config)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (model / file).write_bytes((tiny / file).read_bytes())
        return run_launcher(
            ["--model-path", str(model), *COMMON, *(arg.format(model=model) for arg in refusal.args)],
            cwd=folder,
            env=(*QUICK, *refusal.env),
        )

    with ThreadPoolExecutor(2) as runners:
        return dict(zip(LAUNCHES, runners.map(run, LAUNCHES), strict=True))


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launcher_refuses(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.code not in (None, 0)
    assert "Load weight begin" not in outcome.out + outcome.err
    assert "cannot serve this configuration:" in outcome.err
    told = outcome.err.split("cannot serve this configuration:", 1)[1].splitlines()[1:]
    reasons = [line.removeprefix("  - ") for line in told[: told_length(told)]]
    assert len(reasons) == len(LAUNCHES[name].reasons), reasons
    for reason, pattern in zip(reasons, LAUNCHES[name].reasons, strict=True):
        assert re.search(pattern, reason), reason


def told_length(lines: list[str]) -> int:
    """How many lines at the start are list items."""
    return next((i for i, line in enumerate(lines) if not line.startswith("  - ")), len(lines))
