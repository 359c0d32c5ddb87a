"""Where Triton kernels run: on a GPU, or in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-triton", action="store_true", help="fail where Triton kernels cannot run")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the interpreter where there is no GPU and nothing but this folder was asked for.

    In a run of more folders Triton may be imported already, and servers that are started would inherit the variable.
    """
    asked = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    alone = all(path.is_relative_to(HERE) for path in asked)
    if alone and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def triton_runs(request: pytest.FixtureRequest, device: str) -> None:
    """Skips where neither a GPU nor the interpreter is there; `--require-triton` makes that a failure."""
    from triton.runtime.interpreter import InterpretedFunction

    from lim_kernels.split_decode import merge_kernel

    if device == "cuda" or isinstance(merge_kernel, InterpretedFunction):
        return
    reason = "Triton runs neither on a GPU nor interpreted: run tests/kernels in a process of its own"
    if request.config.getoption("--require-triton", default=False):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def native(device: str, triton_runs: None) -> None:
    """Skips what would take minutes in the interpreter."""
    from triton import knobs

    if device != "cuda" or knobs.runtime.interpret:
        pytest.skip("takes minutes in Triton's interpreter; runs on a GPU")


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_runs")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN or the largest integer, so that results nobody wrote show."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        yield


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args, **kwargs) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return filled
