"""Needles: is the code there once, where it is said to be, and are equal seeds equal?"""

import random
from itertools import islice

import pytest

from sgl_lim.tasks import filler
from sgl_lim.tasks.needles import DEPTHS, MAX_KEYS, draw_needle, generate_needles, parse_code


def test_the_code_lies_at_its_depth_and_every_key_is_there_once() -> None:
    for needle, text in generate_needles(10, sentences=100, keys=4, seed=3):
        for thing, code in zip(needle.things, needle.codes, strict=True):
            assert text.count(f"The access code of the {thing} is {code}.") == 1
        assert len(set(needle.codes)) == len(set(needle.things)) == 4
        at = text.index(f"{needle.lead} {needle.code}.") / len(text)
        assert abs(at - needle.depth / 100) < 0.06
        assert needle.things[0] in needle.question


def test_a_longer_run_contains_the_shorter_one_and_seeds_differ() -> None:
    long = list(generate_needles(7, sentences=20, keys=2, seed=1))
    assert long[:3] == list(generate_needles(3, sentences=20, keys=2, seed=1))
    assert [needle.depth for needle, _ in long[:5]] == list(DEPTHS)
    assert long[0] != next(generate_needles(1, sentences=20, keys=2, seed=2))


@pytest.mark.parametrize(("keys", "depth"), [(0, 50), (MAX_KEYS + 1, 50), (1, -1), (1, 101)])
def test_sizes_out_of_range_are_refused(keys: int, depth: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        draw_needle(random.Random(0), keys=keys, depth=depth)
    with pytest.raises(ValueError, match="sentences must be 5 or more, got 4"):
        next(generate_needles(1, sentences=4, keys=1, seed=0))


def test_filler_is_the_same_for_a_seed_and_various() -> None:
    some = list(islice(filler.sentences(random.Random(5)), 400))
    assert some == list(islice(filler.sentences(random.Random(5)), 400))
    assert len(set(some)) > 350 and all(s[0].isupper() and s.endswith(".") and len(s.split()) >= 6 for s in some)


def test_the_first_number_is_the_answer() -> None:
    assert parse_code(" The access code of the copper lantern is 48213. The other is 5.") == "48213"
    assert parse_code("I do not know.") is None
