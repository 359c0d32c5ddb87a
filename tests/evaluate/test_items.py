"""Are items what they are said to be: as long as asked for, different, the same for the same seed?"""

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_reader.tokenizer import load_tokenizer

from sgl_lim.evaluate import sources
from sgl_lim.evaluate.items import (
    DEPTHS,
    ItemError,
    Sizes,
    chain_suite,
    most_that_fits,
    needle_suite,
    text_suite,
)

SIZES = Sizes(items=10, context=600, decoded=100, steps=4, facts=None, seed=3)


class Bytes:
    """A token for each byte, and one before a text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def beginning(self) -> list[int]:
        return [256]


class Pieces:
    """The source reader's tokens."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def beginning(self) -> list[int]:
        return [1]


def text_of(tokens: list[int]) -> str:
    return bytes(tokens[tokens[0] == 256 :]).decode()


def test_windows_of_text_do_not_overlap_and_follow_one_another() -> None:
    texts = [chr(ord("a") + i) * 1000 for i in range(10)]
    suite = text_suite(Bytes(), "own", texts, SIZES)
    windows = [item.prompt + item.right for item in suite.items]
    assert len(windows) == 10 and all(len(w) == 600 and w[0] == 256 for w in windows)
    assert all(len(item.right) == 101 and item.scored_from == 1 for item in suite.items)
    order = "".join(sources.shuffled(texts, "3/own"))
    assert "".join(text_of(w) for w in windows) == order[: 10 * 599]


def test_a_short_text_gives_fewer_windows_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(text_suite(Bytes(), "own", ["x" * 1300], SIZES).items) == 2
    assert "text own has 2 windows, not 10" in capsys.readouterr().err
    with pytest.raises(ItemError, match="text own has 500 tokens; --context 600"):
        text_suite(Bytes(), "own", ["x" * 500], SIZES)


@pytest.mark.parametrize(("name", "facts"), [("needle", 1), ("four_keys", 4)])
def test_a_fact_is_hidden_at_each_depth(name: str, facts: int) -> None:
    sizes = Sizes(**{**vars(SIZES), "context": 2000})
    suite = needle_suite(Bytes(), name, sizes)
    assert suite == needle_suite(Bytes(), name, sizes)
    assert [item.depth for item in suite.items] == [*DEPTHS, *DEPTHS]
    for item in suite.items:
        prompt, right = text_of(item.prompt), text_of(item.right)
        number = text_of(item.right[item.scored_from :])
        assert len(number) == 5 and number.isdigit() and prompt.count(f"{right[1:]}.") == 1
        assert prompt.count("The access code of the ") == facts
        assert 1800 < len(item.prompt) + len(item.right) <= 2000
        story = prompt[: prompt.index("\n\nQuestion")]
        assert abs(100 * story.index(right[1:]) / len(story) - item.depth) < 12
        assert prompt.endswith(f"What is the access code of the {right[24:-9]}?\nAnswer:")
    assert len({text_of(item.right) for item in suite.items}) == 10


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ItemError, match="--context 200: has no room"):
        needle_suite(Bytes(), "needle", Sizes(**{**vars(SIZES), "context": 200}))


def test_scored_tokens_of_any_tokenizer_hold_the_number() -> None:
    encoder = Pieces()
    for item in needle_suite(encoder, "needle", SIZES).items:
        number = encoder.tokenizer.decode(item.right[item.scored_from :]).strip()
        assert number.isdigit() and encoder.tokenizer.decode(item.right).endswith(number) and 1 <= len(number) <= 5


def test_chains_are_the_tokens_that_our_models_learnt() -> None:
    encoder = Pieces()
    item = chain_suite(encoder, SIZES).items[0]
    prompt, solution = encoder.tokenizer.decode(item.prompt[1:]), encoder.tokenizer.decode(item.right)
    assert prompt.endswith(" steps 4 :") and " answer " in solution
    assert item.prompt[1:] == encoder.encode(prompt) and item.right == encoder.encode(solution)
    # Whether the model knows that the chain is at its end counts as well.
    assert item.ends and item.fed == item.right


def test_chains_hold_as_many_facts_as_fit() -> None:
    suite = chain_suite(Pieces(), SIZES)
    lengths = [len(item.prompt) + len(item.right) for item in suite.items]
    assert 550 < max(lengths) <= 600
    assert all(item.prompt[0] == 1 and item.scored_from == 0 for item in suite.items)
    for wrong in ({"facts": 3}, {"facts": 400}, {"steps": 64}):
        with pytest.raises(ItemError, match="do not fit --context 600"):
            chain_suite(Pieces(), Sizes(**{**vars(SIZES), **wrong}))


def test_most_that_fits_is_the_last_within_the_room() -> None:
    assert [most_that_fits(lambda n: 3 * n, room, 20) for room in (-1, 0, 8, 9, 1000)] == [0, 0, 2, 3, 20]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(-5, 1500))
def test_most_that_fits_is_right_for_any_lengths(steps: list[int], room: int) -> None:
    lengths = list(itertools.accumulate(steps))
    fitting = [n for n, length in enumerate(lengths) if length <= room]
    assert most_that_fits(lengths.__getitem__, room, len(lengths) - 1) == max(fitting, default=0)


def test_few_lengths_are_asked_for_where_texts_grow_evenly() -> None:
    rng, asked = random.Random(0), []
    lengths = [90, *itertools.accumulate((rng.randint(8, 20) for _ in range(600)), initial=90)]

    def length(n: int) -> int:
        asked.append(n)
        return lengths[n]

    n = most_that_fits(length, 4096, 600)
    assert lengths[n] <= 4096 < lengths[n + 1] and len(asked) <= 6


def test_every_installation_has_texts() -> None:
    assert sum(map(len, sources.english())) > 200_000
    assert any("def " in text for text in sources.python()) and sum(map(len, sources.python())) > 1_000_000


def test_files_of_the_user_are_read_or_named(tmp_path: Path) -> None:
    good, empty = tmp_path / "good.txt", tmp_path / "empty.txt"
    good.write_text("größe")
    empty.write_text(" \n")
    assert sources.from_files([good]) == ["größe"]
    for path in (empty, tmp_path / "none.txt"):
        with pytest.raises(sources.SourceError, match=f"--text {path}"):
            sources.from_files([path])
