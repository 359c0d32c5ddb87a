"""Do the documents lead where they say, and name every flag and no other?"""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sgl_lim.evaluate import options as evaluate_options
from sgl_lim.programs import compare_servers, run_options
from sgl_lim.serving.counters import COUNTERS
from sgl_lim.serving.tally import TALLIED
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


HOW_TO_EVALUATE = (ROOT / "docs" / "how-to-evaluate.md").read_text()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "sgl_lim.evaluate": evaluate_options.parse,
    "sgl_lim.programs": run_options.parse,
    "sgl_lim.programs.compare_servers": compare_servers._parse,
}


def commands(text: str) -> list[list[str]]:
    """The words of the commands of a page, without what starts Python."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


def test_the_commands_that_evaluate_are_taken() -> None:
    found = commands(HOW_TO_EVALUATE)
    assert set(PARSERS) <= {command[0] for command in found}
    for module, *words in found:
        if module in PARSERS:
            PARSERS[module](words)
        else:
            assert module == "sgl_lim.programs.compare" and all(re.fullmatch(r"\w+=\S+\.json", word) for word in words)


def test_the_page_that_reads_counters_names_those_there_are() -> None:
    named = set(re.findall(r"`((?:tokens|requests|decode)_\w+)`", HOW_TO_EVALUATE))
    assert {"tokens_scored", "tokens_attended", "requests_dense"} <= named <= set(COUNTERS)


def test_metrics_are_tabled_each_once() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    tabled = [
        name
        for row in re.findall(r"^\| (`\w+(?:_total|requests_dense)`.*?) \|", text, re.MULTILINE)
        for name in row.split(", ")
    ]
    assert sorted(name.strip("`").removesuffix("_total") for name in tabled) == sorted({**COUNTERS, **TALLIED})
