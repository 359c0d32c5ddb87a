"""SGLang checks only some of the numbers of a request against its vocabulary.

Symptom: one request with a token id beyond the vocabulary, or that asks for the log-probabilities of more tokens than
    there are, ends the server with all its requests, by an index error in the scheduler.
Cause: `TokenizerManager` checks `token_ids_logprob` and the keys of `logit_bias`, and no other number that becomes an
    index or an int32 on the device.
Versions: all supported.
Remove when: SGLang answers such requests with 400.
"""

from collections.abc import Iterable
from typing import Any

from packaging.version import Version

TARGETS = ("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",)
MOST_INT32 = 2**31 - 1


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
        ValueError: with each number that is out of range, and the range.
    """
    found = list(problems(request, manager.model_config.vocab_size))
    if found:
        raise ValueError("; ".join(found))


def problems(request: Any, vocab_size: int) -> Iterable[str]:
    """What of a tokenized request the scheduler could not serve. Placeholders of images and audio are no token ids."""
    if request.mm_inputs is None:
        yield from beyond("input_ids", request.input_ids, vocab_size)
    params = request.sampling_params
    if params.min_new_tokens > 0:
        # Until then these tokens are suppressed, by index.
        yield from beyond("stop_token_ids", params.stop_token_ids, vocab_size)
    number, start = (getattr(request, name, None) or 0 for name in ("top_logprobs_num", "logprob_start_len"))
    if start < -1:
        yield f"logprob_start_len is {start}; use a place in the prompt, or -1 for generated tokens alone"
    if not 0 <= number <= vocab_size:
        yield f"top_logprobs_num (logprobs, top_logprobs) is {number}; the vocabulary has {vocab_size} tokens"
    if params.top_k > MOST_INT32:
        yield f"top_k is {params.top_k}; use -1 for the whole vocabulary of {vocab_size} tokens"


def beyond(name: str, ids: Iterable[int] | None, vocab_size: int) -> Iterable[str]:
    """A sentence if some of the ids are none of the vocabulary's."""
    wrong = [one for one in ids or () if not 0 <= one < vocab_size]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        yield f"{name} has {shown}; token ids of this model are 0 to {vocab_size - 1}"
