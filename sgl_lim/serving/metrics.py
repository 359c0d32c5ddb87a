"""What is on and what it did: the start-up line, the `/server_info` block, Prometheus counters."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sgl_lim.methods import Role
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.serving.counters import COUNTERS, NOT_MONOTONE, named
from sgl_lim.serving.draft_sets import Drafts
from sgl_lim.serving.state import LimState
from sgl_lim.serving.tally import TALLIED, Tally
from sgl_lim.settings.config import LimConfig

logger = logging.getLogger(__name__)

INFO_KEY = "lessismore"
PUBLISH_EVERY_S = 5.0


class _Published:
    """Prometheus counters of this process; created on first use, after SGLang chose the multiprocess directory."""

    def __init__(self, model_name: str, names: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        self._label = model_name
        self._counters = {
            name: Counter(f"sgl_lim_{name}", text, ["model_name"])
            for name, text in names.items()
            if name != NOT_MONOTONE
        }
        self._dense = Gauge(
            f"sgl_lim_{NOT_MONOTONE}", COUNTERS[NOT_MONOTONE], ["model_name"], multiprocess_mode="livesum"
        )
        self._last = dict.fromkeys(self._counters, 0)

    def publish(self, totals: dict[str, int]) -> None:
        """Show `totals` by the names that were given, and NOT_MONOTONE."""
        for name, counter in self._counters.items():
            counter.labels(self._label).inc(totals[name] - self._last[name])
            self._last[name] = totals[name]
        self._dense.labels(self._label).set(totals[NOT_MONOTONE])


class _PendingTotals:
    """Totals on their way from the device to the host."""

    def __init__(self, totals: Tensor) -> None:
        self.totals = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=totals.is_cuda)
        self.totals.copy_(totals, non_blocking=True)
        self._arrived = torch.cuda.Event() if totals.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def ready(self) -> bool:
        """Whether `totals` may be read."""
        return self._arrived is None or self._arrived.query()


class _State:
    """The backend of this scheduler process, and when its counters were last published."""

    lim: LimState | None = None
    tally: Tally | None = None
    drawn_acceptance: float | None = None
    model_name = ""
    enabled = False
    published: _Published | None = None
    pending: _PendingTotals | None = None
    dirty = False
    last = 0.0


def announce(lim: LimState, runner: Any) -> None:
    """Log remarks and the one line that says what is on; make `lim` the backend that `describe` and metrics show."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    first_rank = get_attn_tp_group().rank_in_group == 0
    _State.lim, _State.tally, _State.drawn_acceptance = lim, None, None
    _State.model_name = runner.server_args.served_model_name or runner.server_args.model_path
    _State.enabled = runner.server_args.enable_metrics and first_rank
    if first_rank:
        for remark in lim.layers.remarks:
            logger.warning("sgl-lim: %s", remark)
        logger.info("sgl-lim is on: %s", summary(lim))


def announce_lossless(tally: Tally, counts: Sequence[int], config: LimConfig) -> None:
    """Log the line that says that answers are the dense model's; make `tally` what `describe` and metrics show.

    Args:
        counts: numbers of drafts that a round may have, increasing.
    """
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    _State.tally, _State.drawn_acceptance = tally, config.drawn_acceptance
    if get_attn_tp_group().rank_in_group != 0:
        return
    if config.drawn_acceptance is not None:
        logger.warning(
            "sgl-lim: ANSWERS ARE WRONG. --lim-drawn-acceptance %g accepts drafts by chance, to measure speed on "
            "random weights",
            config.drawn_acceptance,
        )
    else:
        how = "the sets that verification chose" if config.drafts == "guided" else "sets of their own"
        logger.info(
            "sgl-lim is lossless: answers are the dense model's; up to %d tokens are drafted on %s, and one dense pass "
            "verifies them",
            counts[-1],
            how,
        )


def settings(lim: LimState) -> dict[str, Any]:
    """Configuration as resolved, builtins only."""
    lossless = {} if lim.drafts is None else _settings_of_drafts(lim.drafts)
    beside = {} if lim.pages is None else {"bytes_beside_pool": lim.pages.nbytes}
    return {
        **lossless,
        **beside,
        "method": lim.method.name,
        **lim.method.settings(),
        "selection_layers_from": lim.layers.source,
        "selection_layers_measured": None if lim.layers.measured is None else dict(lim.layers.measured),
        "layer_roles": [role.value for role in lim.roles],
        "dense_backend": lim.dense_backend,
        "prefix_groups": lim.granule is not None,
    }


def _settings_of_drafts(drafts: Drafts) -> dict[str, Any]:
    return {
        "lossless": True,
        "draft_tokens": drafts.tokens - 1,
        "drafts": "unguided" if drafts.sets is None else "guided",
    }


def summary(lim: LimState) -> str:
    """One line: method, its parameters that are set, layer plan, dense backend."""
    shown, own = settings(lim), parameters_of(type(lim.method))
    kinds = [role.value for role in Role if role is not Role.OWN or Role.OWN in lim.roles]
    counts = [str(shown["layer_roles"].count(kind)) for kind in kinds]
    values = {name: shown[name] for name in own if shown[name] is not None}
    return ", ".join(
        [
            f"method {lim.method.name}",
            *(f"{name.replace('_', ' ')} {own[name].form.show(value)}" for name, value in values.items()),
            f"selection layers from {lim.layers.source}{_measured(lim.layers.measured)}",
            f"layers {'/'.join(kinds)} {'/'.join(counts)}",
            f"dense backend {lim.dense_backend}",
            f"prefix groups {'on' if shown['prefix_groups'] else 'off'}",
        ]
    )


def _measured(found: Mapping[str, Any] | None) -> str:
    """What was measured, in parentheses: numbers and words, and those of each task. Nothing if nothing was."""
    texts = [_figure(name, value) for name, value in (found or {}).items()]
    shown = [text for text in texts if text]
    return f" ({', '.join(shown)})" if shown else ""


def _figure(name: str, value: object) -> str:
    """`agreement 0.945`, or `needle items 40 right 1`; blank for what is larger."""
    if isinstance(value, Mapping) and value and not any(isinstance(one, Mapping | list) for one in value.values()):
        text = " ".join(_figure(key, one) for key, one in value.items())
    elif isinstance(value, str | int | float):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    else:
        return ""
    return f"{name.replace('_', ' ')} {text}"


def describe() -> dict[str, Any] | None:
    """Block for `/server_info`: settings and counters, or None where this process has no lessismore backend."""
    if _State.lim is None:
        return None
    drawn = _State.drawn_acceptance
    wrong = {} if drawn is None else {"answers_are_wrong": True, "drawn_acceptance": drawn}
    return {**wrong, **settings(_State.lim), "counters": {**_State.lim.counters.read(), **_tallied()}}


def after_step(lim: LimState) -> None:
    """Called once a decode step: publish at most every few seconds, without ever waiting for a device."""
    _State.dirty = True
    if not _State.enabled:
        return
    if _State.pending is not None:
        if _State.pending.ready():
            _publish(_State.pending.totals)
            _State.pending = None
    elif time.monotonic() - _State.last > PUBLISH_EVERY_S:
        _State.last = time.monotonic()
        _State.pending = _PendingTotals(lim.counters.totals)


@contextmanager
def unpublished() -> Iterator[None]:
    """Publish nothing of the steps that run meanwhile: they are not counted in the end."""
    enabled, _State.enabled = _State.enabled, False
    try:
        yield
    finally:
        _State.enabled, _State.dirty, _State.pending = enabled, False, None


def on_idle() -> None:
    """Count and publish what is left. SGLang calls this when no batch runs, so waiting for the device costs nothing."""
    if _State.lim is None:
        return
    _State.lim.counters.settle()
    if not (_State.dirty and _State.enabled):
        return
    _State.dirty, _State.last, _State.pending = False, time.monotonic(), None
    _publish(_State.lim.counters.totals)


def on_discarded(rows: Tensor, places: list[int]) -> None:
    """SGLang threw away what a decode step computed for some of its rows; as `Counters.discard` takes them."""
    if _State.lim is not None:
        _State.lim.counters.discard(rows, places)


def _publish(totals: Tensor) -> None:
    if _State.published is None:
        _State.published = _Published(_State.model_name, {**COUNTERS, **({} if _State.tally is None else TALLIED)})
    _State.published.publish({**named(totals), **_tallied()})


def _tallied() -> dict[str, int]:
    """What became of drafts; nothing where there are none."""
    return {} if _State.tally is None else _State.tally.totals()
