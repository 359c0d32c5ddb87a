"""SGLang checks only some of the numbers of a request before its scheduler reckons with them.

Symptom: one request ends the server with all its requests, by an exception in the scheduler: with a token id beyond the
    vocabulary, with the log-probabilities of more tokens than there are, or with `"max_new_tokens": 2.5`.
Cause: `TokenizerManager` checks `token_ids_logprob`, the keys of `logit_bias` and the range of some parameters, but
    no other number that becomes an index or a number of the device, and no type. What it checks came with reports of
    the same kind, one by one, such as https://github.com/sgl-project/sglang/pull/28088.
Versions: all supported.
Remove when: SGLang answers such requests with 400.
"""

import functools
from collections.abc import Iterable
from typing import Any

import msgspec
from packaging.version import Version

TARGETS = ("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",)
MOST_INT32, MOST_INT64, MOST_FLOAT32 = 2**31 - 1, 2**63 - 1, 3.4e38
FREE = ("custom_params",)
"""Sampling parameters that are what a custom processor makes of them."""


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register() -> None:
    """Register the hook, which raises `ValueError`; SGLang answers it with 400."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], after_create, HookType.AFTER)


def after_create(request: Any, manager: Any, *args: object, **kwargs: object) -> None:
    """Refuse a tokenized request, of any endpoint, with all that is wrong with it.

    Raises:
        ValueError: with each value that is out of range or of another type, and what is expected.
    """
    found = list(mistyped(request.sampling_params)) or list(out_of_range(request, manager.model_config.vocab_size))
    if found:
        raise ValueError("; ".join(found))


@functools.cache
def declared(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Names and types of a msgspec structure's fields."""
    return tuple((field.name, field.type) for field in msgspec.structs.fields(kind) if field.name not in FREE)


def mistyped(params: Any) -> Iterable[str]:
    """Sampling parameters that are not of the type that SGLang declares."""
    its_kind: Any = type(params)
    for name, kind in declared(its_kind):
        try:
            msgspec.convert(getattr(params, name), kind)
        except msgspec.ValidationError as error:
            yield f"{name} is {getattr(params, name)!r}: {error}"


def out_of_range(request: Any, vocab_size: int) -> Iterable[str]:
    """What of a tokenized request the scheduler could not serve. Placeholders of images and audio are no token ids."""
    params = request.sampling_params
    if request.mm_inputs is None:
        yield from beyond_vocabulary("input_ids", request.input_ids, vocab_size)
    if params.min_new_tokens > 0:
        # Until then these tokens are suppressed, by index.
        yield from beyond_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)
    number, start = (getattr(request, name, None) or 0 for name in ("top_logprobs_num", "logprob_start_len"))
    if not 0 <= number <= vocab_size:
        yield f"top_logprobs_num (logprobs, top_logprobs) is {number}; the vocabulary has {vocab_size} tokens"
    if start < -1:
        yield f"logprob_start_len is {start}; use a place in the prompt, or -1 for generated tokens alone"
    biases = [bias for bias in (params.logit_bias or {}).values() if not abs(bias) <= MOST_FLOAT32]
    if biases:
        yield f"logit_bias has {biases[0]!r}; use numbers within ±{MOST_FLOAT32:.1e}"
    if params.top_k > MOST_INT32:
        yield f"top_k is {params.top_k}; use -1 for the whole vocabulary of {vocab_size} tokens"
    if abs(params.sampling_seed or 0) > MOST_INT64:
        yield f"sampling_seed is {params.sampling_seed}; use a number of 64 bits"


def beyond_vocabulary(name: str, ids: Iterable[int] | None, vocab_size: int) -> Iterable[str]:
    """A sentence if some of the ids are none of the vocabulary's."""
    wrong = [one for one in ids or () if not 0 <= one < vocab_size]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        yield f"{name} has {shown}; token ids of this model are 0 to {vocab_size - 1}"
