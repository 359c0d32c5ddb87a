"""The lossless mode's settings: how many tokens are drafted, and what does not go with it."""

from typing import Any

ALGORITHM = "LESSISMORE"
"""The name by which `--speculative-algorithm` turns the mode on."""
DEFAULT_STEPS = 6
"""Tokens drafted before a verification. With nine drafts in ten accepted, six gain most (`docs/lossless.md`)."""
MOST_STEPS = 15


def is_lossless(server_args: Any) -> bool:
    """Whether SGLang's server arguments ask for the lossless mode."""
    return str(getattr(server_args, "speculative_algorithm", None) or "").upper() == ALGORITHM


def steps_of(server_args: Any) -> int:
    """Tokens drafted before a verification, by whichever flag says so."""
    steps, tokens = server_args.speculative_num_steps, server_args.speculative_num_draft_tokens
    if steps is not None:
        return int(steps)
    return DEFAULT_STEPS if tokens is None else int(tokens) - 1


def problems(server_args: Any, backend: str, *, draft_pool_is_backed_up: bool) -> list[str]:
    """Reasons in SGLang's server arguments, as the user gave them, why the mode cannot work.

    Args:
        backend: the name of our attention backend.
        draft_pool_is_backed_up: whether SGLang's hierarchical cache takes the one KV pool for that of a draft model.
    """
    found = _steps_problems(server_args) + _other_flags_problems(server_args, backend)
    if server_args.pp_size > 1:
        found.append(f"--pp-size {server_args.pp_size}: the stages would have to draft together; use --tp-size instead")
    if server_args.enable_dp_attention:
        found.append("--enable-dp-attention: ranks without requests would have to draft along; leave the flag out")
    if server_args.disaggregation_mode != "null":
        found.append(
            f"--disaggregation-mode {server_args.disaggregation_mode}: an answer's first token is not handed over; "
            "use one server for both"
        )
    if server_args.enable_hierarchical_cache and draft_pool_is_backed_up:
        found.append(
            "--enable-hierarchical-cache: this SGLang would back up the KV pool twice, as the target's and as a draft "
            "model's; leave the flag out, or use SGLang 0.5.22 or later"
        )
    if server_args.enable_lora or server_args.lora_paths:
        found.append("--enable-lora: SGLang verifies drafts of adapters for NGRAM alone; leave it out")
    return found


def model_problems(model: Any) -> list[str]:
    """Reasons in SGLang's model config why the mode cannot work."""
    if not getattr(model, "is_multimodal", False):
        return []
    return [
        f"--speculative-algorithm {ALGORITHM}: a multimodal model counts positions otherwise than its KV slots; "
        "leave it out"
    ]


def _steps_problems(server_args: Any) -> list[str]:
    found, steps = [], steps_of(server_args)
    tokens, width = server_args.speculative_num_draft_tokens, server_args.speculative_eagle_topk
    if not 1 <= steps <= MOST_STEPS:
        found.append(
            f"--speculative-num-steps must lie between 1 and {MOST_STEPS}, got {steps}; each step drafts one token"
        )
    elif tokens is not None and int(tokens) != steps + 1:
        found.append(
            f"--speculative-num-draft-tokens {tokens}: {steps} steps draft {steps} tokens, and {steps + 1} are "
            "verified, with the one before them; leave the flag out"
        )
    if width not in (None, 1):
        found.append(f"--speculative-eagle-topk {width}: drafts are one chain, not a tree; leave the flag out")
    return found


def _other_flags_problems(server_args: Any, backend: str) -> list[str]:
    asked, found = f"--speculative-algorithm {ALGORITHM}", []
    if server_args.attention_backend != backend or server_args.prefill_attention_backend not in (None, backend):
        found.append(
            f"{asked} drafts, verifies and runs prompts by one backend; use --attention-backend {backend} alone"
        )
    if server_args.speculative_draft_model_path is not None:
        found.append(
            f"--speculative-draft-model-path {server_args.speculative_draft_model_path}: the model drafts for itself; "
            "leave the flag out"
        )
    named = server_args.speculative_draft_attention_backend
    if named is not None:
        found.append(f"--speculative-draft-attention-backend {named}: drafts are sparse decode; leave the flag out")
    if getattr(server_args, "grammar_backend", None) == "outlines":
        found.append(
            f"--grammar-backend outlines cannot go back along rejected drafts, and {asked} has them; use xgrammar"
        )
    for name in ("enable_mixed_chunk", "speculative_adaptive", "enable_return_hidden_states", "enable_watermark"):
        if getattr(server_args, name, False):
            found.append(f"--{name.replace('_', '-')} does not go with {asked}; leave one of them out")
    return found
