"""A protected server: the key reaches it by flag or environment, and shows up nowhere else."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_endpoint import StubEndpoint

from sgl_lim.programs import api_key, compare_servers
from sgl_lim.programs.cli import main
from sgl_lim.programs.endpoint import EndpointError, server_info
from sgl_lim.programs.server_process import launch_command

KEY = "kept-to-ourselves"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in api_key.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def protected() -> Iterator[StubEndpoint]:
    with StubEndpoint(api_key=KEY) as endpoint:
        yield endpoint


def argv(stub: StubEndpoint, folder: Path, *more: str) -> list[str]:
    sizes = ["--chains", "2", "--facts", "8", "--steps", "2"]
    paths = ["--output", str(folder / "out.jsonl"), "--summary", str(folder / "out.json")]
    return ["--endpoint", stub.url, *sizes, *paths, *more]


def everything_in(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.suffix != ".png")


@pytest.mark.parametrize("how", ["flag", *api_key.VARIABLES])
def test_a_run_reaches_it_and_does_not_tell(
    protected: StubEndpoint,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    if how != "flag":
        monkeypatch.setenv(how, KEY)
    assert main(argv(protected, tmp_path, *(["--api-key", KEY] if how == "flag" else []))) == 0
    assert len(protected.prompts) == 2
    assert KEY not in everything_in(tmp_path) + "".join(capsys.readouterr())


def test_our_variable_goes_before_that_of_openai(protected: StubEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    monkeypatch.setenv("SGLANG_API_KEY", f"{KEY}\n")
    assert server_info(protected.url)["model_path"] == protected.model_path
    with pytest.raises(EndpointError, match="refuses the API key"):
        server_info(protected.url, api_key="another")


@pytest.mark.parametrize("given", [(), ("--api-key", "wrong-one")])
def test_without_the_right_key_it_says_how(
    protected: StubEndpoint, given: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    assert main(argv(protected, tmp_path, *given)) == 1
    said = capsys.readouterr().err
    assert "HTTP 401" in said and "--api-key" in said and "SGLANG_API_KEY" in said and "OPENAI_API_KEY" in said
    assert "wrong-one" not in said and "Traceback" not in said


def test_a_failed_run_is_resumed_by_a_command_without_it(
    protected: StubEndpoint, tmp_path: Path, capsys: Capture
) -> None:
    protected.answer = lambda prompt: (400, "no")
    main(argv(protected, tmp_path, f"--api-key={KEY}"))
    said = capsys.readouterr().err
    assert "to ask them again: SGLANG_API_KEY=… python -m sgl_lim.programs" in said and KEY not in said
    assert KEY not in everything_in(tmp_path)


@pytest.mark.parametrize("key", ["", "two words", "a\nb", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    protected: StubEndpoint,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    with pytest.raises(SystemExit):
        main(argv(protected, tmp_path, f"--api-key={key}"))
    said = capsys.readouterr().err
    assert "argument --api-key: a key must be" in said and (not key or key not in said)
    monkeypatch.setenv("SGLANG_API_KEY", key)
    with pytest.raises(EndpointError, match="SGLANG_API_KEY" if key else "HTTP 401") as raised:
        server_info(protected.url)
    assert not key or key not in str(raised.value)


def test_servers_are_compared_with_it(protected: StubEndpoint, tmp_path: Path, capsys: Capture) -> None:
    sizes = ["--chains", "1", "--facts", "8", "--steps", "2", "--output", str(tmp_path)]
    compare_servers.main([f"a={protected.url}", f"b={protected.url}", *sizes, "--api-key", KEY])
    assert len(protected.prompts) == 2
    assert KEY not in everything_in(tmp_path) + "".join(capsys.readouterr())


def test_commands_leave_a_place_for_it() -> None:
    assert api_key.command("m", ["--seed", "1", "--api-key", KEY, "--limit", "2"]) == (
        "SGLANG_API_KEY=… python -m m --seed 1 --limit 2"
    )
    assert api_key.command("m", ["--seed", "1"]) == "python -m m --seed 1"
    shown = launch_command(["--api-key", KEY, "--tp-size", "2", f"--admin-api-key={KEY}"])
    assert shlex.split(shown)[3:] == ["--api-key", "…", "--tp-size", "2", "--admin-api-key=…"]


def test_an_endpoint_with_a_password_is_refused_unseen(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--endpoint", f"http://user:{KEY}@127.0.0.1:30000", "--chains", "1", "--output", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert "--api-key" in said and KEY not in said
