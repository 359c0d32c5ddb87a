"""A child of a test's launcher is what a spawned process would be, and never a second launcher."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "support" / "quick_start" / "sitecustomize.py"
PROGRAMS = {
    "import os; os.write({fd}, os.environ['TOLD'].encode()); raise SystemExit(7)": (7, b"yes"),
    "raise ValueError('a program that fails')": (1, b""),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_child_runs_what_it_is_told(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)  # this process collects as before
    spec = importlib.util.spec_from_file_location("quick_start", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reader, writer = os.pipe()
    child = module.Child([])
    monkeypatch.setenv("TOLD", "yes")
    assert child.become(["python", "-c", program.format(fd=writer)], [writer]) == child.pid
    os.close(writer)
    code, told = PROGRAMS[program]
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == code
    with open(reader, "rb") as pipe:
        assert pipe.read() == told
