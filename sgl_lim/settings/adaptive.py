"""What sets have whose sizes follow the attention that their tokens hold, and what they cannot be combined with."""

from typing import TYPE_CHECKING, Any

from sgl_lim.methods import LessIsMore
from sgl_lim.methods.ranked import Ranked

if TYPE_CHECKING:
    from sgl_lim.settings.config import LimConfig

WIDEST_WINDOW = 0.5
"""Share of the budget that `--lim-recency auto` gives the window at most."""


def parameters(config: "LimConfig") -> dict[str, Any]:
    """Of the method: `recency`, and what makes sizes adaptive."""
    floor = max(1, config.budget // 8) if config.top_p_floor is None else config.top_p_floor
    return {
        "recency": WIDEST_WINDOW if config.auto_recency else config.recency,
        "auto_recency": config.auto_recency,
        "top_p": config.top_p,
        "top_p_floor": floor,
    }


def problems(config: "LimConfig") -> list[str]:
    """Reasons why `--lim-top-p`, its floor and `--lim-recency auto` cannot work; empty if they can."""
    found = _value_problems(config)
    flags = [] if config.top_p is None else [f"--lim-top-p {config.top_p}"]
    flags += ["--lim-recency auto"] if config.auto_recency else []
    reasons = []
    if config.aggregate == "union":
        reasons.append("needs the weights of tokens, and --lim-aggregate union ranks by place; take sum or max")
    if config.prefix_selection == "group":
        reasons.append("sizes each set by itself, not --lim-prefix-selection group; leave one of them out")
    if config.early_sets is True:
        reasons.append("makes sets of different sizes, and --lim-early-sets on keeps them; leave one of them out")
    interval = config.selection_interval
    if isinstance(interval, int) and interval > 1:
        reasons.append(
            f"makes sets of different sizes, and --lim-selection-interval {interval} keeps them; leave one of them out"
        )
    if config.record_budgets is not None:
        reasons.append("finds budgets, and calibration records given ones; leave the flag out")
    found += [f"{flag} {reason}" for flag in flags for reason in reasons]
    kind = config.kind
    if kind is not None and not issubclass(kind, Ranked):
        found += [f"{flag}: --lim-method {config.method} weighs no tokens; leave the flag out" for flag in flags]
    elif kind is not None and not issubclass(kind, LessIsMore) and config.auto_recency:
        found.append(f"--lim-recency auto: --lim-method {config.method} keeps no window; leave the flag out")
    return found


def is_share(value: object) -> bool:
    """Whether a value is a number between 0 and 1, these included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _value_problems(config: "LimConfig") -> list[str]:
    found = []
    if config.top_p is not None and (not is_share(config.top_p) or config.top_p in (0, 1)):
        found.append(f"--lim-top-p must lie between 0 and 1, got {config.top_p!r}; leave it out for whole budgets")
    floor = config.top_p_floor
    if floor is None:
        return found
    if not isinstance(floor, int) or isinstance(floor, bool) or floor < 1:
        found.append(f"--lim-top-p-floor must be a positive integer, got {floor!r}")
    elif isinstance(config.budget, int) and floor > config.budget:
        found.append(f"--lim-top-p-floor {floor} exceeds --lim-budget {config.budget}; lower it")
    if config.top_p is None:
        found.append("--lim-top-p-floor does nothing without --lim-top-p; leave it out")
    return found
