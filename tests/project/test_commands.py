"""Commands whose imports take seconds: something to read at once, and Ctrl-C that ends them quietly."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stub_endpoint import StubEndpoint

from sgl_lim import command

ROOT = Path(__file__).parents[2]
SLOW = ["sgl_lim.calibrate", "sgl_lim.evaluate", "benchmarks.decode_step", "benchmarks.random_checkpoint"]


def start(code: str | None = None, module: str = "", *argv: str) -> "subprocess.Popen[str]":
    what = ["-c", code] if code else ["-m", module, *argv]
    return subprocess.Popen([sys.executable, *what], cwd=ROOT, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("module", SLOW)
def test_they_speak_before_their_imports_and_can_be_interrupted(module: str) -> None:
    """The first line is read while PyTorch is not there yet: what is sent then meets an import."""
    with start(None, module, "--help") as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline() == f"{module}: loading PyTorch and what else it needs\n"
        process.send_signal(signal.SIGINT)
        said, help_text = process.stderr.read(), process.stdout.read()
    assert process.returncode == 130, said
    assert said == "interrupted\n" and not help_text


def test_a_run_can_be_interrupted_while_sglang_is_imported(tmp_path: Path) -> None:
    """The server has answered, and SGLang's import takes longer than the wait."""
    with StubEndpoint() as stub:
        argv = ["--endpoint", stub.url, "--needles", "2", "--chat-template", "chatml", "--output", str(tmp_path / "o")]
        with start(None, "sgl_lim.programs", *argv) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stderr.readline() == f"looking at {stub.url} and the problems\n"
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert not stub.generate_requests


def test_an_interrupted_command_has_no_traceback() -> None:
    # In naps: a signal that arrives just before a long sleep begins would be noticed when the sleep ends.
    naps = "[time.sleep(0.1) for _ in range(6000)]"
    code = f"from sgl_lim import command; import time; command.run(lambda: print(1, flush=True) or {naps})"
    with start(f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in said


def test_every_command_takes_the_interrupt_back() -> None:
    """The package lets Ctrl-C end a command at once until `run`; one that never calls it would leave servers behind."""
    sources = [*ROOT.glob("sgl_lim/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    entries = [text for text in (path.read_text() for path in sources) if '__name__ == "__main__"' in text]
    assert len(entries) > 10 and all("command.run(" in text for text in entries)


def test_a_command_keeps_its_exit_code() -> None:
    for code, returned in ((0, None), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as raised:
            command.run(lambda returned=returned: returned)  # type: ignore[misc]
        assert (raised.value.code or 0) == code


def test_other_processes_are_left_alone() -> None:
    """A server imports the package too, and has its own ways with Ctrl-C."""
    code = "import signal, sgl_lim; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    with start(f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}") as process:
        assert process.stdout is not None and process.stdout.read() == "True\n"
