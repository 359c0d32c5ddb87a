"""Do messages about missing libraries name an installation that works, in the versions that the package asks for?"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_lim import command

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
SOURCES = sorted([*ROOT.glob("sgl_lim/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")])
ROWS = "backend,batch,context,step_ms,ratio,error\nfa3,1,1024,1.0,1.0,\n"


def test_no_message_spells_an_installation_itself() -> None:
    """The one place that spells them knows this environment, and what the project asks for."""
    assert not [path for path in SOURCES if re.search(r"pip install '", path.read_text())]


@pytest.mark.parametrize("module", command.REQUIREMENTS)
def test_the_command_installs_into_this_environment(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = command.REQUIREMENTS[module]
    assert f'"{requirement}"' in PROJECT, "no such requirement in pyproject.toml"
    monkeypatch.setattr(command, "_has_pip", lambda: False)
    assert shlex.split(command.how_to_install(module)) == [
        "uv",
        "pip",
        "install",
        "--python",
        sys.executable,
        requirement,
    ]
    monkeypatch.setattr(command, "_has_pip", lambda: True)
    assert shlex.split(command.how_to_install(module)) == [sys.executable, "-m", "pip", "install", requirement]


def test_asking_for_the_command_leaves_setuptools_importable() -> None:
    """Of a module named pip, setuptools must not see that anybody looks for it."""
    code = "from sgl_lim import command; print(command.how_to_install('gguf')); import setuptools"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
    assert (" -m pip install " in ended.stdout) == has_pip


def test_nothing_optional_is_imported_with_a_module() -> None:
    """A function that needs it can say how to get it; an import at the top of a file cannot."""
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & set(command.REQUIREMENTS), path


@pytest.mark.parametrize("figure", ["decode", "speedup", "throughput", "accuracy"])
def test_every_figure_says_what_it_lacks(figure: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    without = "import sys; sys.modules['matplotlib'] = None\nfrom benchmarks.plot import main; main(sys.argv[1:])"
    argv = [figure, str(tmp_path / "rows.csv"), "-o", str(tmp_path / "a.png")]
    ended = subprocess.run([sys.executable, "-c", without, *argv], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().endswith(command.how_to_install("matplotlib"))
