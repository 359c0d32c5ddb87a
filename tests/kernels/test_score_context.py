"""Are scores the logits of every row and their lse, from keys alone, and is nothing read for rows that need none?"""

import pytest
import torch

from decode_operands import draw_slots, operands
from lim_kernels import Scaling, decode_with_scores, find_prefix_groups, score_context
from test_decode_triton import FP8, PRECISIONS, SHAPES, SWEPT, sweep, within
from test_grouped_decode import CASES, grouped_operands


def exact_scores(q, k, slots, length, scaling):
    """One row in float64: logits [H, length] and lse [H]."""
    keys = k[slots[:length].long()].double().repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    logits = torch.einsum("hd,lhd->hl", q.double(), keys) * scaling.scale * scaling.k_scale
    if scaling.logit_cap:
        logits = scaling.logit_cap * torch.tanh(logits / scaling.logit_cap)
    return logits, logits.logsumexp(1)


def assert_scores(results, q, k, slots, seq_lens, scaling, beyond=0):
    """Results (lse, logits) of the rows beyond `beyond`, against float64."""
    lse, logits = results
    assert lse.dtype == logits.dtype == torch.float32
    assert lse.shape == q.shape[:2] and logits.shape == (*lse.shape, slots.shape[1])
    for row, length in enumerate(seq_lens.tolist()):
        if length > beyond:
            exact, exact_lse = exact_scores(q[row], k, slots[row], length, scaling)
            torch.testing.assert_close(logits[row, :, :length].double(), exact, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(lse[row].double(), exact_lse, rtol=1e-5, atol=2e-5)


def scaling_of(dim, precision, logit_cap=0.0):
    """With a key scale where keys are quantised."""
    return Scaling(dim**-0.5, logit_cap, k_scale=0.7 if PRECISIONS[precision][1] == FP8 else 1.0)


@pytest.mark.parametrize("logit_cap", [0.0, 5.0], ids=["plain", "capped"])
@sweep(SHAPES, SWEPT, ["fp32", "bf16-fp8"])
def test_scores_are_logits_and_their_lse(implementation, device, shape, precision, logit_cap):
    scaling, shape = scaling_of(SHAPES[shape].dim, precision, logit_cap), SHAPES[shape]
    dtype, cache_dtype = PRECISIONS[precision]
    heads = shape.heads, shape.kv_heads, shape.dim, shape.dim
    rows = {"batch": len(shape.lens), "num_slots": shape.width + 30, "device": device}
    q, k, _, generator = operands(*heads, dtype, cache_dtype=cache_dtype, **rows)
    seq_lens = torch.tensor(shape.lens, device=device)
    slots = draw_slots((len(shape.lens), shape.width), seq_lens, len(k), generator, device=device)
    beyond = sorted(shape.lens)[len(shape.lens) // 2] - 1
    how = {"score_beyond": beyond, "implementation": implementation}
    results = score_context(q, k, slots, seq_lens, scaling, **how)
    assert_scores(results, q, k.float(), slots, seq_lens, scaling, beyond)


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 64), (5, 1, 80), (4, 1, 256)], ids=str)
def test_scores_are_those_of_attention(implementation, device, heads):
    q, k, v, generator = operands(*heads, heads[2], torch.float32, device=device)
    seq_lens = torch.tensor([33, 1, 20], device=device)
    slots = draw_slots((3, 33), seq_lens, 97, generator, device=device)
    lse, logits = score_context(q, k, slots, seq_lens, Scaling(0.125), implementation=implementation)
    _, lse_of, logits_of = decode_with_scores(q, k, v, slots, seq_lens, Scaling(0.125), implementation=implementation)
    torch.testing.assert_close(lse, lse_of)
    for row, length in enumerate(seq_lens.tolist()):
        torch.testing.assert_close(logits[row, :, :length], logits_of[row, :, :length])


@sweep(CASES, ("g2", "g5"), ["fp32", "bf16-fp8"])
def test_every_row_is_scored_as_if_alone(implementation, device, shape, precision):
    q, k, _, slots, seq_lens = grouped_operands(shape, precision, device)
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    assert shape == "one row" or int((groups.counts > 0).sum()) > 0
    beyond = int(seq_lens.float().quantile(0.3))
    scaling = scaling_of(q.shape[2], precision, 4.0 if shape == "g5" else 0.0)
    how = {"groups": groups, "score_beyond": beyond, "implementation": implementation}
    assert_scores(score_context(q, k, slots, seq_lens, scaling, **how), q, k.float(), slots, seq_lens, scaling, beyond)


def test_a_group_s_slots_are_read_from_one_row(implementation, device):
    q, k, _, slots, seq_lens = grouped_operands("g2", "fp32", device)
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    poisoned = slots.clone()
    for row in range(1, len(slots)):
        # Slot 0 holds NaN: a row that reads for itself what it follows others in gives NaN.
        poisoned[row, : groups.already_read[row]] = 0
    assert int(groups.already_read.sum()) > 100
    results = score_context(q, k, poisoned, seq_lens, Scaling(0.3), groups=groups, implementation=implementation)
    assert_scores(results, q, k, slots, seq_lens, Scaling(0.3))


def test_groups_may_leave_out_leading_places(implementation, device):
    """As where there is room for a kept set before the slots."""
    q, k, _, slots, seq_lens = grouped_operands("g2", "fp32", device)
    room = torch.zeros(len(slots), 7, dtype=slots.dtype, device=device)
    extended, ends = torch.cat([room, slots], dim=1), seq_lens + 7
    uses_set = torch.zeros(len(slots), dtype=torch.uint8, device=device)
    groups = find_prefix_groups(slots, seq_lens, granule=4, set_columns=7, uses_set=uses_set)
    lse, logits = score_context(q, k, extended, ends, Scaling(0.3), groups=groups, implementation=implementation)
    assert_scores((lse, logits[:, :, 7:]), q, k, slots, seq_lens, Scaling(0.3))


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_nothing_is_read_for_rows_that_need_no_logits(implementation, device, grouped):
    q, k, _, slots, seq_lens = grouped_operands("g2", "fp32", device)
    beyond = int(seq_lens.float().quantile(0.6))
    groups = find_prefix_groups(slots, seq_lens, granule=4) if grouped else None
    wanted = {slot for row, n in enumerate(seq_lens.tolist()) if n > beyond for slot in slots[row, :n].tolist()}
    unread = torch.tensor([slot not in wanted for slot in range(len(k))], device=device)
    assert int(unread.sum()) > 20
    poisoned = k.masked_fill(unread.view(-1, 1, 1), float("nan"))
    # A slot far outside the cache: whoever reads it does not go on.
    beside = torch.where((seq_lens > beyond).unsqueeze(1) | grouped, slots, 2**30)
    how = {"groups": groups, "score_beyond": beyond, "implementation": implementation}
    results = score_context(q, poisoned, beside, seq_lens, Scaling(0.3), **how)
    assert_scores(results, q, k, slots, seq_lens, Scaling(0.3), beyond)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_operands_may_be_views_into_wider_buffers(triton_runs, device, index_dtype):
    q, k, _, generator = operands(8, 2, 48, 48, torch.float16, batch=5, num_slots=300, device=device)
    counts = torch.tensor([200, 1, 64, 199, 7])
    slots = draw_slots((5, 200), counts, 300, generator, device=device).to(index_dtype)
    fused = within(q.view(5, 8 * 48), (5, 8 * 48 + 2 * 96), float("nan")).unflatten(1, (8, 48))
    view_k = within(k, (300, 3, 56), float("nan"))
    view_slots, view_lens = within(slots, (5, 300), 0), within(counts.to(slots).view(5, 1), (5, 4), 300).squeeze(1)
    results = score_context(fused, view_k, view_slots, view_lens, Scaling(0.2), implementation="triton")
    assert_scores(results, q, k, slots, counts, Scaling(0.2))


def test_operands_that_do_not_fit_are_refused(device):
    q, k, _, slots, seq_lens = grouped_operands("g2", "fp32", device)
    groups = find_prefix_groups(slots[:3], seq_lens[:3], granule=4)
    for change, message in (
        ({"groups": groups}, "groups of 9 rows"),
        ({"slots": slots[:3]}, r"slots \[9, L\]"),
        ({"slots": slots.float()}, "integer slots"),
        ({"seq_lens": seq_lens[:3]}, r"seq_lens \[9\]"),
        ({"k_cache": k[..., :8]}, r"k_cache \[num_slots, H_kv, 16\]"),
        ({"implementation": "cuda"}, "implementation among"),
    ):
        call = {"q": q, "k_cache": k, "slots": slots, "seq_lens": seq_lens, "scaling": Scaling(0.3)} | change
        with pytest.raises(ValueError, match=f"score_context: expected {message}"):
            score_context(**call)
