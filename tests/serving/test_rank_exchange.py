"""Do ranks that tell one another their best tokens choose the set of all heads, and in how many bytes?"""

import pytest
import torch

from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.serving import ranks
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.serving.ranks import RankExchange
from support.driven_layers import build_method, int32, layer_of, plan_of
from support.gloo_ranks import run_ranks

HEADS, KV_HEADS, DIM, WIDTH, SCALE = 8, 8, 8, 300, 0.6
LENS = [300, 299, 40, 200, 3]
BUDGET = 40
CASES = {
    "union": {},
    "max": {"aggregate": "max"},
    "union-kv-head": {"scope": "kv_head"},
    "max-kv-head": {"scope": "kv_head", "aggregate": "max"},
    "tidaldecode": {"method": "tidaldecode"},
    "union-groups": {"prefix_selection": "group"},
    "max-groups": {"prefix_selection": "group", "aggregate": "max"},
    "max-window-found": {"aggregate": "max", "recency": "auto"},
    "sum": {"aggregate": "sum"},
    "sum-top-p": {"aggregate": "sum", "top_p": 0.6},
}
TOLD = {"union": 2, "union-kv-head": 2, "tidaldecode": 2}
"""Of cases in which ranks tell their best tokens: how often; once where it is not here."""
WHOLE = ("max-window-found", "sum", "sum-top-p")


def method_of(case):
    values = {"method": "lessismore", "recency": 0.25, "sinks": 2, **CASES[case]}
    return build_method(values.pop("method"), budget=BUDGET, selection_layers=(1,), **values)


def operands(agree, kv_heads):
    """Slots of five rows of which three share a prefix, a query, keys and values; heads agree or do not."""
    generator = torch.Generator().manual_seed(5)
    slots = (torch.randperm(5 * WIDTH, generator=generator) + 1).view(5, WIDTH).int()
    slots[1, :128], slots[3, :64] = slots[0, :128], slots[0, :64]
    q = torch.randn(5, HEADS, DIM, generator=generator)
    k, v = (torch.randn(5 * WIDTH + 1, kv_heads, DIM, generator=generator) for _ in range(2))
    if agree:
        # One order for all heads but for little: short lists of all of them hold few tokens.
        q, k = q[:, :1] + 0.01 * q, k[:, :1] + 0.01 * k
    return slots, q, k, v


def choose(case, agree, heads, combine, kv_heads=KV_HEADS):
    """The positions that a rank with these query heads chooses for each row, and for each of its KV heads."""
    slots, q, k, v = operands(agree, kv_heads)
    group, last = HEADS // kv_heads, heads.first + heads.own
    held = slice(heads.first // group, -(-last // group))
    decode = LayerDecode(method_of(case), heads, combine)
    layer = layer_of(q[:, heads.first : last].contiguous(), k[:, held].contiguous(), v[:, held].contiguous(), SCALE)
    plan = plan_of(decode, slots, int32(LENS), granule=32)
    decode.run(plan, Role.SELECT, layer)
    chosen, ends = plan.chosen.slots, plan.chosen.ends
    if chosen.dim() == 2:
        chosen, ends = chosen.unsqueeze(1), ends.unsqueeze(1)
    return [[chosen[row, head, : ends[row, head]].tolist() for head in range(chosen.shape[1])] for row in range(5)]


def on_rank(group, case, agree, kv_heads):
    """What one rank chooses, and the bytes that it received."""
    # Rows this small would be told whole.
    ranks.WHOLE_BYTES = 0
    own = HEADS // group.world_size
    sharing = max(1, group.world_size // kv_heads)
    heads = HeadsOfRank(group.rank_in_group * own, own, HEADS, sharing)
    together = sharing if method_of(case).per_kv_head else group.world_size
    first = group.rank_in_group // together * together
    combine = RankExchange(group, first, together) if together > 1 else None
    return choose(case, agree, heads, combine, kv_heads), group.received


@pytest.mark.parametrize("number", [2, 4, 8])
def test_ranks_choose_what_one_rank_would(number):
    for received_of_all in run_ranks(number, on_rank_all_cases):
        for (case, agree, kv_heads), (chosen, received) in received_of_all.items():
            expected = choose(case, agree, HeadsOfRank(0, HEADS, HEADS), None, kv_heads)
            per_kv_head = len(expected[0]) > 1
            rank_sets = [[row[0]] if not per_kv_head else row for row in expected]
            assert_part(chosen, rank_sets, case)
            assert received == bytes_told(case, number, kv_heads), case


def on_rank_all_cases(group):
    """`on_rank` of all cases, in one set of processes."""
    found = {}
    for case in CASES:
        for agree in (False, True):
            kv_heads = 1 if "kv-head" in case or case == "tidaldecode" else KV_HEADS
            group.received = 0
            found[case, agree, kv_heads] = on_rank(group, case, agree, kv_heads)
    return found


def assert_part(chosen, expected, case):
    """The sets of one rank's KV heads are among those of all, which are one set if there is one for all heads."""
    assert len(chosen[0]) == 1
    for row, sets in enumerate(chosen):
        assert sets[0] in expected[row], f"{case}, row {row}"


def bytes_told(case, number, kv_heads):
    """What a rank receives from the others in one selection."""
    if case in WHOLE:
        return 4 * len(LENS) * WIDTH * (number - 1)
    return TOLD.get(case, 1) * 8 * len(LENS) * BUDGET * (number - 1)


def in_slices(group, how, shape):
    """Whole rows combined in slices, and by all ranks for themselves; and the bytes of either."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(group.rank_in_group)) * 20
    exchange = RankExchange(group, 0, group.world_size)
    whole = exchange(scores, how)
    first = group.received
    return exchange._in_slices(scores, how), whole, group.received - first, first


@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_slices_give_whole_rows_to_the_bit(how):
    shape = (3, 2, 500)
    for slices, whole, received, received_whole in run_ranks(4, in_slices, how, shape):
        assert torch.equal(slices, whole)
        # 128 places for each of four ranks, twice.
        assert received == 2 * 4 * 6 * 128 * 3
        assert received_whole == 4 * 3000 * 3


def test_a_batch_of_64_rows_of_131072_is_told_in_a_few_megabytes():
    """Bytes that each of eight ranks receives in one selection, as the page on deployment has them."""
    rows, width, budget, others = 64, 131_072, 2048, 7
    whole, entries = 4 * rows * width * others, 8 * rows * budget * others
    assert RankExchange(None, 0, 8).pays(rows, width, budget)
    assert (round(whole / 1e6), round(entries / 1e6, 1), round(2 * entries / 1e6, 1)) == (235, 7.3, 14.7)


def test_a_small_batch_is_told_whole():
    assert not RankExchange(None, 0, 8).pays(1, 131_072, 2048)
    assert RankExchange(None, 0, 8).pays(2, 131_072, 2048)
    assert not RankExchange(None, 0, 2).pays(8, 131_072, 2048)
    assert RankExchange(None, 0, 2).pays(9, 131_072, 2048)
    # Nor where as many tokens are chosen as there are.
    assert not RankExchange(None, 0, 8).pays(64, 4096, 2048)
