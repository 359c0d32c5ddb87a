"""SGLang takes it for granted that each row of logits leaves a token to choose.

Symptom: a `regex`, JSON schema or grammar that no token of the vocabulary fits, `min_new_tokens` where a grammar is at
    its end, or a `logit_bias` or custom processor that forbids all, ends the server at a temperature above 0, with all
    its requests: `probability tensor contains either inf, nan or element < 0` on a CPU, a device-side assertion on a
    GPU. A greedy request goes on with token 0.
Cause: the softmax of a row that is -inf throughout, or has +inf or NaN in it, is NaN, and `torch.multinomial` checks.
Versions: all supported.
Remove when: SGLang ends the request whose row has no token left.

What is done: such a row is made uniform before anything is sampled, and its request ends by `FINISH_ABORT`, without the
token. On an accelerator rows are looked at only where a request may have taken tokens away, and nothing waits for them:
what was found reaches the host with the sampled tokens.

A step of a speculative algorithm answers a run of tokens, whose last one is sampled from nothing then. The tokens
before it may hold a stop, or reach `max_new_tokens`. So SGLang looks at these first, and what goes on after them ends.
"""

from http import HTTPStatus
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

_SAMPLER = "sglang.srt.layers.sampler.Sampler"
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
TARGETS = (
    f"{_SAMPLER}._preprocess_logits",
    f"{_SAMPLER}.forward",
    "sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu",
    f"{_PROCESSOR}.process_batch_result_prefill",
    f"{_PROCESSOR}.process_batch_result_decode",
    "sglang.srt.managers.schedule_batch.Req.update_finish_state",
)
FOUND = "lim_rows_without_token"
"""Attribute by which bool [B] travels with a batch: of its sampling information, then of its logits output."""
_CHOSEN = "lim_chosen"
"""Attribute of a request whose run of tokens is to end it: how many of the run were chosen."""
_UNCHOSEN = "lim_unchosen"
"""Attribute of a request while SGLang looks for stops: the token that was sampled from nothing, if it was kept."""
MOST = 1e30
"""Logits count as no larger: divided by the lowest temperature, 1e-6, they are still finite in float32."""


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], after_preprocess, HookType.AFTER)
    HookRegistry.register(TARGETS[1], after_sampling, HookType.AFTER)
    HookRegistry.register(TARGETS[2], before_copy, HookType.BEFORE)
    for target in TARGETS[3:5]:
        HookRegistry.register(target, before_results, HookType.BEFORE)
    HookRegistry.register(TARGETS[5], before_stops, HookType.BEFORE)
    HookRegistry.register(TARGETS[5], after_stops, HookType.AFTER)


def make_choosable(logits: Tensor) -> Tensor:
    """Make rows of logits [B, V] uniform, in place, where no token can be chosen; bool [B] says which.

    A row of NaN is one of them. +inf becomes a large logit: its token is chosen.
    """
    most = min(MOST, torch.finfo(logits.dtype).max)
    # NaN compares false.
    left = logits.amax(dim=-1, keepdim=True) > -most
    logits.masked_fill_(~left, 0.0).clamp_(max=most)
    return ~left.squeeze(-1)


def after_preprocess(result: Tensor, sampler: Any, logits: Tensor, sampling_info: Any) -> None:
    """Look at logits after grammars, penalties, biases and custom processors."""
    if logits.device.type == "cpu" or may_take_tokens(sampling_info):
        setattr(sampling_info, FOUND, make_choosable(logits))


def may_take_tokens(sampling_info: Any) -> bool:
    """Whether a request of the batch asks for what can leave no token. This is known without the device."""
    asked = (sampling_info.logit_bias, sampling_info.acc_scaling_penalties)
    penalizer = sampling_info.penalizer_orchestrator
    return bool(
        sampling_info.grammars
        or sampling_info.has_custom_logit_processor
        or any(one is not None for one in asked)
        or (penalizer is not None and penalizer.is_required)
    )


def after_sampling(
    result: Tensor, sampler: Any, logits_output: Any, sampling_info: Any, *more: Any, **named: Any
) -> None:
    """Let what was found go along with the step's output."""
    setattr(logits_output, FOUND, getattr(sampling_info, FOUND, None))


def before_copy(result: Any, *args: object, **kwargs: object) -> None:
    """Copy what was found to the host with all else; the overlap scheduler waits for it later."""
    from sglang.srt.managers.utils import _async_d2h

    found = getattr(result.logits_output, FOUND, None)
    if found is not None:
        setattr(result.logits_output, FOUND, _async_d2h(found))


def before_results(processor: Any, batch: Any, result: Any, *args: object, **kwargs: object) -> None:
    """End the requests of a batch that had no token left, before SGLang looks at the tokens sampled for them."""
    found = getattr(getattr(result, "logits_output", None), FOUND, None)
    if found is None:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    runs = getattr(result, "accept_lens", None)
    # Rows that a beam search adds come after those of the batch's requests.
    for place, (req, without) in enumerate(zip(batch.reqs, found.tolist(), strict=False)):
        # A prompt's middle chunk samples nothing that counts; the other two are SGLang's own conditions.
        if not without or req.finished() or req.is_retracted or req.inflight_middle_chunks > 0:
            continue
        if runs is None:
            end(req)
        else:
            setattr(req, _CHOSEN, int(runs[place]) - 1)


def before_stops(req: Any, new_accepted_len: int = 1) -> tuple[tuple[Any, int], dict[str, Any]] | None:
    """Hide the token that was sampled from nothing from SGLang, which looks for stops in the run before it."""
    chosen = req.__dict__.pop(_CHOSEN, None)
    if chosen is None:
        return None
    # A grammar that refused the token would have the request end without a word.
    req.to_finish = None
    # Then it has left the run already, as has what comes after the end of a grammar.
    looked_at = min(new_accepted_len, chosen)
    ends = len(req.output_ids) - (new_accepted_len - looked_at)
    setattr(req, _UNCHOSEN, req.output_ids[ends:])
    del req.output_ids[ends:]
    if looked_at == 0:
        end(req)
    return (req, looked_at), {}


def after_stops(result: None, req: Any, new_accepted_len: int = 1) -> None:
    """End the request if nothing before did."""
    unchosen = req.__dict__.pop(_UNCHOSEN, None)
    if unchosen is None:
        return
    if not req.finished():
        end(req)
        req.finished_reason, req.to_finish = req.to_finish, None
    elif req.finished_len is None:
        req.finished_len = len(req.output_ids)
    req.output_ids.extend(unchosen)


def end(req: Any) -> None:
    """Let a request end when SGLang next looks, with what it has generated so far."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    params = req.sampling_params
    asked = {
        "its grammar (regex, json_schema, ebnf or structural_tag)": req.grammar is not None,
        "logit_bias": bool(params.logit_bias),
        "min_new_tokens, which forbids to stop,": params.min_new_tokens > len(req.output_ids),
        "its custom logit processor": bool(req.custom_logit_processor),
    }
    blamed = [name for name, is_asked in asked.items() if is_asked]
    where = f"no token of the vocabulary is left to choose after {len(req.output_ids)} generated tokens"
    if blamed:
        message = f"{where}: {' and '.join(blamed)} allowed none; loosen what was asked for"
        req.to_finish = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    else:
        message = f"{where}: the model's logits are not finite numbers; look at its weights, its adapter and --dtype"
        req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
    req.finished_len = len(req.output_ids)
