"""How a session of tests ends, which cases it runs, and which tests stay together when it has several processes."""

import os
import shutil
import signal
import tempfile
from typing import Any

import pytest

CALIBRATIONS = "LESSISMORE_CALIBRATIONS"
"""Names the folder of kept calibrations: what a developer measured must not decide the layers of a test's server."""
UNGROUPED = "kernels"
"""The folder whose tests share nothing that is dear: each may go where a core is free."""


def pytest_configure() -> None:
    """Let SIGTERM do what Ctrl-C does, so that fixtures stop the servers they started, and let Ctrl-C do it.

    Calibrations are kept in an empty folder.

    (pytest takes `SystemExit` for the failure of one test, and goes on.) A shell starts what it runs in the background
    with SIGINT ignored, `nohup` starts it with SIGHUP ignored, and programs under test would inherit that; a signal
    that is handled here is as usual for them.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.environ[CALIBRATIONS] = tempfile.mkdtemp(prefix="calibrations-")


def pytest_unconfigure() -> None:
    """Remove the folder of calibrations, which each process of a session has for itself."""
    shutil.rmtree(os.environ.pop(CALIBRATIONS), ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, metavar="N", help="run N cases of each parametrised test, from its first to its last"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin out the cases, and keep a module's tests in one process, as its fixtures are shared."""
    if config.option.cases:
        kept = {item for cases in by_function(items).values() for item in spread(cases, config.option.cases)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for item in items:
        if item.get_closest_marker("xdist_group") is None and item.path.parent.name != UNGROUPED:
            item.add_marker(pytest.mark.xdist_group("/".join(item.path.parts[-2:])))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Refuse a pytest-xdist that spreads groups, where every process would start every server.

    Raises:
        RuntimeError: it does not group with this pytest.
    """
    grouped = [one for one in ids if f"/{UNGROUPED}/" not in one]
    if node.config.option.dist == "loadgroup" and not all("@" in one for one in grouped):
        raise RuntimeError(f"pytest-xdist does not group with pytest {pytest.__version__}; install 'pytest<9.2'")


def by_function(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Items by their test function."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.split("[")[0], []).append(item)
    return found


def spread(cases: list[pytest.Item], number: int) -> list[pytest.Item]:
    """At most `number` of the cases, evenly from the first to the last."""
    if number >= len(cases):
        return cases
    last = len(cases) - 1
    return [cases[round(n * last / max(1, number - 1))] for n in range(number)]
