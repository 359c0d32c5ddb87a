"""Forests of prefixes as the benchmarks' command lines write them."""

import argparse

import pytest

from benchmarks.forest import Forest


def test_levels_multiply_requests_and_add_tokens() -> None:
    forest = Forest.parse("1x4096/4x12288/8x256")
    assert (forest.batch, forest.context, forest.own) == (32, 16640, 256)
    assert forest.prefixes == "1x4096/4x12288" and str(forest) == "1x4096/4x12288/8x256"
    assert list(forest.shared()) == [(4096, 0, 32), *((12288, 8 * n, 8 * n + 8) for n in range(4))]


def test_requests_that_share_nothing() -> None:
    forest = Forest.parse("16x32768")
    assert (forest.batch, forest.context, forest.own, forest.prefixes) == (16, 32768, 32768, "")
    assert not list(forest.shared())


@pytest.mark.parametrize("text", ["16", "0x5", "16x", "16x32K", "-1x4", "1x2/", "/1x2", "1x2/3"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="16x32768"):
        Forest.parse(text)
