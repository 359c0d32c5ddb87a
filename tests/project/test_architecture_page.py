"""Does the architecture page speak of what is in the source?"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = [path for room in ("sgl_lim", "kernels", "patches") for path in (ROOT / room).rglob("*.py")]
WORDS = set(re.findall(r"\w+", "".join(path.read_text() for path in SOURCES)))
# Dotted names, files and identifiers; neither prose, nor flags, nor commands.
NAMES = sorted(set(re.findall(r"`([A-Za-z_][\w./]*[\w/])`", PAGE)))


def test_names_are_found() -> None:
    assert len(NAMES) > 40 and "plan_reads" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_the_page_exists(name: str) -> None:
    if "/" in name:
        assert (ROOT / name).exists()
    elif name.endswith((".py", ".toml")):
        assert (ROOT / name).exists() or any(path.name == name for path in SOURCES)
    else:
        assert name.rpartition(".")[2] in WORDS
