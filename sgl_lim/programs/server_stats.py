"""What the server is and what its sparse decode did, from `GET /server_info` before and after a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from sgl_lim.programs.run_records import Measurement

_BLOCK = "lessismore"  # key of the plugin's block in each of `internal_states` of `/server_info`
# All but the first follow from, or explain, others.
_NOT_SETTINGS = ("counters", "layer_roles", "selection_layers_from", "selection_layers_measured")
_MONOTONE = (
    "decode_steps",
    "tokens_attended",
    "tokens_dense",
    "selections",
    "requests",
    "tokens_scored",
    "verifications",
)
_SPARED = 6
"""Tokens of the context or the KV pool that SGLang takes no prompt into."""
_KEY_SHARE = 0.5  # of a KV token's bytes its key has half


@dataclass(frozen=True)
class Counters:
    """The plugin's totals since the server started, summed over the DP groups."""

    decode_steps: int
    tokens_attended: int  # KV tokens that decode attended to
    tokens_dense: int  # KV tokens that dense decode would have attended to
    selections: int
    requests: int
    requests_dense: int  # never exceeded the budget so far: the only total that can go down
    tokens_scored: int = 0  # KV tokens of which a selection layer read the key alone; older servers have none
    verifications: int = 0  # of a lossless server, over requests; others have none, nor drafts
    drafts_proposed: int = 0
    drafts_accepted: int = 0


_NONE_COUNTED = {item.name: item.default for item in fields(Counters) if item.default is not MISSING}


@dataclass(frozen=True)
class ServerState:
    """One look at `/server_info`.

    `attention` is what decides a decode step's numbers, for a run's settings and for people. `counters` is None where
    decode is not LessIsMore. `startup` differs between two starts of a server (nearly always: it holds durations).
    """

    model: str
    version: str
    attention: Mapping[str, Any]
    counters: Counters | None
    startup: str
    max_input_tokens: int | None  # longest prompt taken; a prompt and its generation share about this much
    limited_by: str = "--context-length"
    """The server's flag that decides `max_input_tokens`."""

    def describe(self) -> str:
        """The configuration in one line."""
        attention = ", ".join(f"{name} {_plain(value)}" for name, value in self.attention.items() if value is not None)
        return f"{attention}; {self.model}, SGLang {self.version}"


def parse_server_info(info: Mapping[str, Any]) -> ServerState:
    """The state in an answer of `/server_info` of 0.5.17 or 0.5.23."""
    blocks = [state[_BLOCK] for state in info["internal_states"] if _BLOCK in state]
    attention: dict[str, Any]
    if blocks:
        attention = {"decode": "lessismore"}
        attention |= {name: value for name, value in blocks[0].items() if name not in _NOT_SETTINGS}
    else:
        backend = info.get("decode_attention_backend") or info.get("attention_backend")
        attention = {"decode": "dense", "backend": backend}
    attention |= {name: info.get(name) for name in ("kv_cache_dtype", "quantization")}
    return ServerState(
        model=info["model_path"],
        version=str(info.get("version", "unknown")),
        attention=attention,
        counters=_sum_counters(blocks) if blocks else None,
        startup=json.dumps(info.get("startup_time"), sort_keys=True),
        max_input_tokens=info.get("max_req_input_len"),
        limited_by=_limited_by(info),
    )


def _limited_by(info: Mapping[str, Any]) -> str:
    """SGLang takes prompts of six tokens less than the context or the KV pool, whichever is smaller."""
    longest, pool = info.get("max_req_input_len"), info.get("max_total_num_tokens")
    if longest is None or pool is None or pool - longest > _SPARED:
        return "--context-length"
    return "--max-total-tokens"


@dataclass(frozen=True)
class AttendedFraction:
    """The share of dense decode's KV that was read, a token that was only scored for half; None if it is not known."""

    value: float | None
    note: str
    delta: Counters | None = None


def attended_fraction(before: ServerState, after: ServerState) -> AttendedFraction:
    """The fraction between two looks at one server; requests of other clients count too."""
    if before.startup != after.startup or before.attention != after.attention:
        return AttendedFraction(None, "the server was restarted during the run")
    if before.counters is None or after.counters is None:
        return AttendedFraction(1.0, "dense")
    delta = Counters(**{name: value - asdict(before.counters)[name] for name, value in asdict(after.counters).items()})
    if any(getattr(delta, name) < 0 for name in _MONOTONE):
        return AttendedFraction(None, "the server was restarted during the run (its counters went down)")
    if delta.tokens_dense == 0:
        return AttendedFraction(None, "the server counted no decode step during the run", delta)
    return _fraction_of(delta)


def total_fraction(parts: Sequence[Measurement]) -> AttendedFraction:
    """The fraction over the invocations that one run took; those whose own is unknown are left out, and counted."""
    known = [part for part in parts if part.attended is not None]
    if not known:
        if not parts:
            return AttendedFraction(None, "nothing was measured")
        last = parts[-1].counters
        return AttendedFraction(None, parts[-1].note, None if last is None else Counters(**last))
    if all(part.counters is None for part in known):
        total = AttendedFraction(1.0, "dense")
    else:
        counted = [Counters(**part.counters) for part in known if part.counters is not None]
        delta = Counters(**{item.name: sum(getattr(part, item.name) for part in counted) for item in fields(Counters)})
        total = _fraction_of(delta)
    unknown = len(parts) - len(known)
    return replace(total, note=f"{total.note}; unknown of {unknown} invocations") if unknown else total


def _fraction_of(delta: Counters) -> AttendedFraction:
    scored = f", the keys alone of {delta.tokens_scored:,} more" if delta.tokens_scored else ""
    return AttendedFraction(
        (delta.tokens_attended + _KEY_SHARE * delta.tokens_scored) / delta.tokens_dense,
        f"{delta.tokens_attended:,} of {delta.tokens_dense:,} KV tokens{scored}, {delta.selections:,} selections in "
        f"{delta.decode_steps:,} decode steps",
        delta,
    )


def drafted(delta: Mapping[str, int]) -> dict[str, float] | None:
    """What became of drafts, from a difference of `Counters`; None if nothing was drafted."""
    proposed, verified = delta.get("drafts_proposed", 0), delta.get("verifications", 0)
    if not proposed or not verified:
        return None
    accepted = delta["drafts_accepted"]
    return {"acceptance": accepted / proposed, "tokens_a_verification": 1 + accepted / verified, "drafts": proposed}


def _sum_counters(blocks: list[Mapping[str, Any]]) -> Counters:
    # Totals with a default are missing from a plugin from before there was the total, and where nothing drafts.
    groups = [{**_NONE_COUNTED, **block["counters"]} for block in blocks]
    return Counters(**{item.name: sum(int(group[item.name]) for group in groups) for item in fields(Counters)})


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
