"""Is grouped decode the attention that every row would have alone, whatever the groups?"""

from dataclasses import replace

import pytest
import torch

from decode_operands import operands
from lim_kernels import Scaling, SetSizes, decode_with_scores, find_prefix_groups, grouped_decode, groups_of_sets
from prefix_rows import prefix_rows
from test_decode_triton import FP8, PRECISIONS, assert_like_reference, sweep

# query heads, KV heads, head dims of keys and values; rows, width, tokens between branches
CASES = {
    "g2": (4, 2, 16, 16, 9, 90, 12),
    "g1-d24v40": (3, 3, 24, 40, 17, 70, 30),
    "g5": (5, 1, 32, 32, 6, 200, 80),
    "g16": (32, 2, 16, 16, 7, 120, 25),
    "one row": (4, 2, 16, 16, 1, 40, 10),
    "d256": (4, 2, 256, 256, 4, 60, 20),
}


def grouped_operands(case, precision, device, seed=0):
    heads, kv_heads, dim, dim_v, batch, width, segment = CASES[case]
    slots, seq_lens = prefix_rows(batch, width, segment=segment, seed=seed)
    dtype, cache_dtype = PRECISIONS[precision]
    num_slots = int(slots.max()) + 1
    q, k, v, _ = operands(
        heads, kv_heads, dim, dim_v, dtype, cache_dtype=cache_dtype, batch=batch, num_slots=num_slots, device=device
    )
    return q, k, v, slots.to(device), seq_lens.to(device)


@sweep(CASES, ("g2", "g5"), ["fp32", "bf16-fp8"])
def test_every_row_attends_as_if_alone(implementation, device, shape, precision):
    q, k, v, slots, seq_lens = grouped_operands(shape, precision, device)
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    assert shape == "one row" or int((groups.counts > 0).sum()) > 0
    beyond = int(seq_lens.float().quantile(0.3))
    scaling = Scaling(q.shape[2] ** -0.5, logit_cap=4.0 if shape == "g5" else 0.0)
    if PRECISIONS[precision][1] == FP8:
        scaling = replace(scaling, k_scale=0.7, v_scale=1.9)
    out, lse, none = grouped_decode(q, k, v, slots, seq_lens, groups, scaling, implementation=implementation)
    assert none is None
    assert_like_reference((out, lse), q, k, v, slots, seq_lens, scaling)
    scored = {"scored": True, "score_beyond": beyond}
    results = grouped_decode(q, k, v, slots, seq_lens, groups, scaling, **scored, implementation=implementation)
    exact = assert_like_reference(results, q, k, v, slots, seq_lens, scaling)
    for row, length in enumerate(seq_lens.tolist()):
        if length > beyond:
            written, expected = results[2][row, :, :length].double(), exact[2][row, :, :length]
            torch.testing.assert_close(written, expected, rtol=1e-5, atol=2e-5)


def test_without_groups_it_is_decode_with_scores(implementation, device):
    q, k, v, slots, seq_lens = grouped_operands("g2", "fp32", device)
    # A granule longer than any row.
    groups = find_prefix_groups(slots, seq_lens, granule=1000)
    alone = decode_with_scores(q, k, v, slots, seq_lens, Scaling(0.3), implementation=implementation)
    results = grouped_decode(q, k, v, slots, seq_lens, groups, Scaling(0.3), scored=True, implementation=implementation)
    for ours, theirs in zip(results[:2], alone[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_group_s_slots_are_read_from_one_row(implementation, device):
    q, k, v, slots, seq_lens = grouped_operands("g2", "fp32", device)
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    expected = grouped_decode(q, k, v, slots, seq_lens, groups, Scaling(0.3), implementation=implementation)
    poisoned = slots.clone()
    for row in range(1, len(slots)):
        # Slot 0 holds NaN: a row that reads for itself what it follows others in gives NaN.
        poisoned[row, : groups.already_read[row]] = 0
    results = grouped_decode(q, k, v, poisoned, seq_lens, groups, Scaling(0.3), implementation=implementation)
    assert int(groups.already_read.sum()) > 100
    for ours, theirs in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_set_may_be_its_group_s_alone(implementation, device):
    # Without a window, a few tokens beyond the prefix get none of the budget.
    slots = torch.arange(1, 301, dtype=torch.int32).view(3, 100)
    slots[1, :96] = slots[0, :96]
    slots, seq_lens = slots.to(device), torch.tensor([100, 97, 100], device=device)
    groups = find_prefix_groups(slots, seq_lens, granule=16)
    in_sets, counts = groups_of_sets(seq_lens, groups, SetSizes(16, recent=0, sinks=0))
    assert in_sets.own_starts.tolist() == [16, 16, 0] and counts.tolist() == [16, 16, 16]
    sets = slots[:, 5:85:5].contiguous()
    q, k, v, _ = operands(4, 2, 16, 16, torch.float32, batch=3, num_slots=301, device=device)
    results = grouped_decode(q, k, v, sets, counts, in_sets, Scaling(0.3), implementation=implementation)
    assert_like_reference(results[:2], q, k, v, sets, counts, Scaling(0.3))


def test_bad_operands_are_named(device):
    q, k, v, slots, seq_lens = grouped_operands("g2", "fp32", device)
    groups = find_prefix_groups(slots[:3], seq_lens[:3], granule=4)
    with pytest.raises(ValueError, match="groups of 9 rows"):
        grouped_decode(q, k, v, slots, seq_lens, groups, Scaling(0.3))
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    with pytest.raises(ValueError, match=r"slots \[9, L\]"):
        grouped_decode(q, k, v, slots[:3], seq_lens, groups, Scaling(0.3))
    with pytest.raises(ValueError, match="implementation among"):
        grouped_decode(q, k, v, slots, seq_lens, groups, Scaling(0.3), implementation="cuda")
