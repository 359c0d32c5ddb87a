"""Do the documents lead where they say, and name every flag and no other?"""

import argparse
import re
from pathlib import Path

import pytest

from sgl_lim.settings.flags import add_flags

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for folder in ("", "docs", "models/*", "training/*") for path in ROOT.glob(f"{folder}/*.md".lstrip("/"))
)
FLAG = re.compile(r"--lim-[a-z]+(?:-[a-z]+)*")


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def tabled_flags(text: str) -> list[str]:
    """The flags that tables explain: the first code of a row."""
    rows = re.findall(r"^\| *`(--lim-[^` ]+)", text, re.MULTILINE)
    return [row for row in rows if FLAG.fullmatch(row)]


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """The flags that the launcher takes."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text())
    for link in links:
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_table_of_settings_has_every_flag_once(flags: set[str]) -> None:
    assert sorted(tabled_flags((ROOT / "docs" / "settings.md").read_text())) == sorted(flags)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_no_flag_that_is_none(document: Path, flags: set[str]) -> None:
    assert set(FLAG.findall(document.read_text())) <= flags


def test_a_flag_is_not_taken_for_a_longer_one() -> None:
    table = "| `--lim-top-p-floor N` | tokens |\n| `--lim-top-p P` | a share, beside `--lim-scope` |\n"
    assert tabled_flags(table) == ["--lim-top-p-floor", "--lim-top-p"]
