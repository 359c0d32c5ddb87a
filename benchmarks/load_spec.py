"""Which load to put on a server, and the flags that say so: `--load`, or one load by flags of its own."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LoadSpec:
    """A closed loop of clients. What is None depends on the server: see `sizes`."""

    input_len: int = 3600  # prompt tokens
    output_len: int = 512  # tokens to generate
    concurrency: int | None = None
    requests: int | None = None
    time_limit: float | None = None  # seconds; None: until all requests have ended
    underway: bool = False

    def __str__(self) -> str:
        """As `--load` takes it."""
        values = {key: getattr(self, field) for key, (field, _) in _KEYS.items()}
        return ",".join(key if value is True else f"{key}={value:.10g}" for key, value in values.items() if value)

    def sizes(self, info: Mapping[str, Any]) -> tuple[int, int]:
        """Clients and requests on the server of which `info` is the `/server_info`."""
        clients = self.concurrency or fitting_concurrency(info, self.input_len, self.output_len)
        requests = self.requests or clients * (1 + self.underway)
        return min(clients, requests), requests


def fitting_concurrency(info: Mapping[str, Any], input_len: int, output_len: int) -> int:
    """How many requests fill the KV pool without waiting for one another, by an answer of `/server_info`.

    The scheduler admits a request where its tokens and one page more are free.
    """
    groups = info["internal_states"]
    page = info.get("page_size") or 1
    pages = -(-(input_len + output_len) // page) + 1
    fitting = max(1, info["max_total_num_tokens"] // (pages * page))
    most = groups[0].get("effective_max_running_requests_per_dp") or info.get("max_running_requests")
    return (min(fitting, most) if most else fitting) * len(groups)


def positive(text: str) -> int:
    """A whole number above 0, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def clients(text: str) -> int | None:
    """A number of clients; None for `auto`."""
    return None if text == "auto" else positive(text)


def seconds(text: str) -> float:
    """A time above 0, from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def bare(text: str) -> bool:
    """True, for a key that stands alone."""
    if text:
        raise argparse.ArgumentTypeError(f"takes no value, got {text!r}")
    return True


_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "input": ("input_len", positive),
    "output": ("output_len", positive),
    "concurrency": ("concurrency", clients),
    "requests": ("requests", positive),
    "time_limit": ("time_limit", seconds),
    "underway": ("underway", bare),
}
"""Keys of `--load`: the field of `LoadSpec`, and what reads its value."""


def parse_load(text: str) -> LoadSpec:
    """`input=512,output=16384,concurrency=64,underway` as a load; ArgumentTypeError says what is wrong with it."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in _KEYS:
            raise argparse.ArgumentTypeError(f"{text!r}: unknown key {key!r}; known are {', '.join(_KEYS)}")
        field, read = _KEYS[key]
        if field in found:
            raise argparse.ArgumentTypeError(f"{text!r}: {key} is given twice")
        try:
            found[field] = read(value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {key}: {error}") from None
    missing = [key for key in ("input", "output") if _KEYS[key][0] not in found]
    if missing:
        raise argparse.ArgumentTypeError(f"{text!r}: {' and '.join(missing)} missing; such as input=512,output=16384")
    return LoadSpec(**found)


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--load` and the flags of a single load; the latter stand in the namespace only if they were given."""
    parser.add_argument(
        "--load",
        type=parse_load,
        action="append",
        default=[],
        metavar="SPEC",
        help="input=TOKENS,output=TOKENS and, if wanted, concurrency=N, requests=N, time_limit=S and underway, as the "
        "flags of a single load explain them; repeat it to measure several loads on each server",
    )
    single = parser.add_argument_group("the one load without --load", argument_default=argparse.SUPPRESS)
    single.add_argument("--input-len", type=positive, help=f"prompt tokens (default: {LoadSpec.input_len})")
    single.add_argument("--output-len", type=positive, help=f"tokens to generate (default: {LoadSpec.output_len})")
    single.add_argument(
        "--concurrency",
        type=clients,
        metavar="N",
        help="clients; auto (the default): as many as fill the server's KV pool",
    )
    single.add_argument("--requests", type=positive, help="in all (default: one a client; two with --underway)")
    single.add_argument("--time-limit", type=seconds, metavar="S", help="abort what runs after S seconds of load")
    single.add_argument(
        "--underway",
        action="store_true",
        default=argparse.SUPPRESS,
        help="begin as a loop that has run for long: the first request of each client has a part of its output in its "
        "prompt, evenly spread. With --time-limit the steady figures then need no whole generation",
    )


def chosen_loads(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[LoadSpec]:
    """The loads of a parsed command line; a parser error for both ways of naming them."""
    given = {field.name: getattr(args, field.name) for field in fields(LoadSpec) if hasattr(args, field.name)}
    if args.load and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{flags} and --load exclude each other: say it in each --load, such as --load {args.load[0]}")
    return args.load or [LoadSpec(**given)]
