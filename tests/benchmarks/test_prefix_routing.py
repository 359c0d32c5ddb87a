"""The load that compares a router's policies, and what its rows say."""

import pytest

from benchmarks.prefix_routing import Reply, agreement, counted, parse_arguments, shuffled_prompts

SERVER = ["--", "--model-path", "m"]


def test_requests_of_a_prefix_share_it_and_nothing_more() -> None:
    shape = ["--prefixes", "3", "--branches", "4", "--prefix-len", "20", "--tail-len", "5"]
    args = parse_arguments([*shape, *SERVER])
    prompts = shuffled_prompts(args)
    assert prompts == shuffled_prompts(args) and args.arguments == SERVER[1:]
    prefixes = [tuple(prompt[:20]) for prompt in prompts]
    assert len(prompts) == 12 and {prefixes.count(one) for one in prefixes} == {4} and len(set(prefixes)) == 3
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 12
    assert prefixes != [prefix for _ in range(4) for prefix in dict.fromkeys(prefixes)], (
        "taking turns would be a rhythm"
    )


def test_counters_are_summed_over_the_servers() -> None:
    before = [
        {"tokens_shared": 5, "rows_grouped": 1, "requests": 2},
        {"tokens_shared": 0, "rows_grouped": 0, "requests": 1},
    ]
    after = [
        {"tokens_shared": 9, "rows_grouped": 4, "requests": 8},
        {"tokens_shared": 3, "rows_grouped": 2, "requests": 3},
    ]
    assert counted(before, after) == {"tokens_shared": 7, "rows_grouped": 5, "requests_by_server": "6/2"}
    assert counted([{}, {}], [{}, {}]) == {"tokens_shared": "", "rows_grouped": "", "requests_by_server": "/"}


def test_agreement_is_a_share() -> None:
    one, other = Reply((1, 2), 9, 0), Reply((1, 3), 9, 8)
    assert agreement([one, other], [one, one]) == 0.5 and agreement([one], [Reply((1, 2), 9, 8)]) == 1
    with pytest.raises(ValueError):
        agreement([one], [one, one])
