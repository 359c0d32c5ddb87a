"""Servers for the served tests. They are shared: a session never has more than two alive."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.fleet import NEXT_PYTHON, Fleet, LimCase
from support.server import Server, ServerPool, ServerSpec

CHAIN_TRACER = Path(__file__).parents[2] / "models" / "chain-tracer"
QUICK_START = Path(__file__).parents[1] / "support" / "quick_start"


@pytest.hookimpl(tryfirst=True)  # before pytest groups them by case
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a server in one process, and start early what takes longest.

    Of a case's tests, those on its own server come first: others start servers that would take its place.
    Tests without servers come last: they are short, and fill what is left of either core.
    """
    for item in items:
        if item.get_closest_marker("served"):
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(
        key=lambda item: (item.get_closest_marker("served") is None, not shares_server(item), not asks_chains(item))
    )


def shares_server(item: pytest.Item) -> bool:
    """Whether a test runs on the server of its case."""
    return "server" in getattr(item, "fixturenames", ())


def asks_chains(item: pytest.Item) -> bool:
    """Whether a test runs on the server of the committed chain tracer, which several modules share."""
    return "chain_server" in getattr(item, "fixturenames", ())


def group_of(item: pytest.Item) -> str:
    """The case whose server a test shares, else its module, and with it the case that it is about."""
    if asks_chains(item):
        return "served/chain_server"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = str(parameters.get("case", ""))
    return case if shares_server(item) else f"served/{item.path.stem}/{case}"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The float64 oracle's matrices are tiny, and the servers want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def quick_start() -> Iterator[None]:
    """Every Python that is started by these tests imports sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(QUICK_START), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """The running servers."""
    servers = ServerPool(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, pool: ServerPool) -> Fleet:
    """Specs, models and dense answers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder of its own in one of the session
        shared = shared.parent
    return Fleet(tmp_path_factory.mktemp("fleet"), pool, shared=shared)


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> LimCase:
    """The lessismore server that a test is parametrised with. The session scope makes pytest group tests by it."""
    chosen: LimCase = request.param
    if chosen.release == "next" and not os.environ.get(NEXT_PYTHON):
        pytest.skip(f"{NEXT_PYTHON} does not name the Python of an environment with the next SGLang release")
    return chosen


@pytest.fixture
def server(case: LimCase, fleet: Fleet, pool: ServerPool) -> Server:
    """The server of `case`; several tests in a row get the same one."""
    return pool.get(fleet.lim_spec(case))


@pytest.fixture(scope="module")
def chain_server(pool: ServerPool) -> Server:
    """The committed chain tracer."""
    args = ("--attention-backend", "lessismore", "--lim-budget", "128", "--dtype", "float32", "--enable-metrics")
    args += ("--max-total-tokens", "16384", "--max-running-requests", "32")
    return pool.get(ServerSpec("chain", CHAIN_TRACER, args))
