"""Are rounds counted by what was kept of them, and their reads by what was read?"""

import pytest
import torch

from support.fake_backend import BUDGET, DIM, HEADS, LAYERS, batch_of, lossless, verification, verify

TOKENS, ROWS = 4, 6


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(399, generator=generator)[:90] + 1 for _ in range(ROWS)]).int()
    return lossless(table, TOKENS, granule=None)


def queries(rows):
    return torch.randn(rows * TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(1))


def run_round(target, draft, rows, lens, kept):
    for step in range(TOKENS - 1):
        draft.init_forward_metadata(batch_of(rows, [length + step + 1 for length in lens]))
    verify(target, verification(rows, lens, TOKENS), queries(len(rows)))
    lim = target.lim
    lim.counters.record_round(
        torch.tensor(rows), torch.tensor(lens), torch.tensor(kept, dtype=torch.int32), TOKENS - 1, lim.drafts
    )


def test_hand_count(pair):
    target, draft = pair
    # A row that outgrew the budget, one that has not, and padding.
    run_round(target, draft, [1, 2, 0], [40, 5, 1], [3, 1, 1])
    # One layer selects. Without a set, the first row drafts on a window.
    read = LAYERS * (3 * BUDGET + 6 + 7 + 8)
    assert target.lim.counters.read() == {
        "decode_steps": 1,
        "tokens_attended": LAYERS * (44 + 9) + read,
        "tokens_scored": 41,
        "tokens_dense": LAYERS * (41 + 42 + 43 + 6),
        "selections": 1,
        "draft_tokens_attended": read,
        "requests": 2,
        "requests_dense": 1,
        "tokens_shared": 0,
        "rows_grouped": 0,
        "warm_starts": 0,
    }
    run_round(target, draft, [1], [43], [4])
    # On the set of length 41, and the tokens from there on: 44, 45, 46 long.
    behind = LAYERS * (3 * BUDGET + 3 + 4 + 5)
    assert target.lim.counters.read()["draft_tokens_attended"] == read + behind
    assert target.lim.counters.read()["decode_steps"] == 2


def test_a_plain_round_is_a_dense_decode_step(pair):
    target, draft = pair
    run_round(target, draft, [1], [40], [2])
    target.init_forward_metadata(batch_of([1], [43]))
    totals = target.lim.counters.read()
    assert totals["decode_steps"] == 2 and totals["requests"] == 1 and totals["requests_dense"] == 0
    assert totals["tokens_dense"] == LAYERS * (41 + 42 + 43)
    assert totals["tokens_attended"] - totals["draft_tokens_attended"] == LAYERS * (44 + 43)


def test_what_sglang_throws_away_does_not_count(pair):
    target, draft = pair
    run_round(target, draft, [1, 2], [40, 50], [2, 2])
    before = target.lim.counters.read()
    run_round(target, draft, [1, 2], [42, 52], [4, 1])
    target.lim.counters.discard(torch.tensor([1, 2]), [0])
    found = target.lim.counters.read()
    assert found["tokens_dense"] - before["tokens_dense"] == LAYERS * 53
    assert found["draft_tokens_attended"] - before["draft_tokens_attended"] == LAYERS * (3 * BUDGET + 2 + 3 + 4)
    assert found["decode_steps"] == 2


@pytest.mark.parametrize(("attends", "whole"), [("context", 2), ("set", 1)])
def test_unguided_drafts_count_what_their_roles_read(attends, whole):
    table = torch.arange(ROWS * 90, dtype=torch.int32).view(ROWS, 90) % 399 + 1
    target, draft = lossless(table, TOKENS, guided=False, granule=None, selection_attends=attends)
    run_round(target, draft, [1], [40], [2])
    read = sum(whole * length + (LAYERS - whole) * BUDGET for length in (41, 42, 43))
    assert target.lim.counters.read()["draft_tokens_attended"] == read
