"""Do messages about missing libraries name an installation that works, in the versions that the package asks for?"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
SOURCES = [*ROOT.glob("sgl_lim/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")]
REQUIREMENTS = sorted(
    {
        (path.relative_to(ROOT).as_posix(), requirement)
        for path in SOURCES
        for requirement in re.findall(r"pip install '([^']+)'", path.read_text())
    }
)


def test_messages_about_both_libraries_are_found() -> None:
    assert {"math-verify", "matplotlib"} <= {re.split("[<>=]", requirement)[0] for _, requirement in REQUIREMENTS}


@pytest.mark.parametrize(("path", "requirement"), REQUIREMENTS)
def test_what_a_message_installs_is_what_the_project_asks_for(path: str, requirement: str) -> None:
    if requirement.startswith(".["):  # from a checkout, which benchmarks are run from
        assert path.startswith("benchmarks/") and f"\n{requirement[2:-1]} = [" in PROJECT
    else:
        assert f'"{requirement}"' in PROJECT, "no such requirement in pyproject.toml"
