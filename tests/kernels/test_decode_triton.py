"""Do the Triton decode kernels give what the reference gives in float64, over shapes, precisions and plans?"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_operands import assert_close_to_exact, draw_slots, eager_attention, operands, rounding
from lim_kernels import Scaling, decode_with_scores, sparse_decode

pytestmark = pytest.mark.usefixtures("triton_runs")

FP8 = torch.float8_e4m3fn
# q and cache
PRECISIONS = {
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp16-fp8": (torch.float16, FP8),
    "bf16-fp8": (torch.bfloat16, FP8),
}


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    width: int
    lens: tuple[int, ...]


SHAPES = {
    "one-slot": Shape(2, 2, 128, 128, 1, (1,)),
    "d64-g1": Shape(3, 3, 64, 64, 63, (63, 1)),
    "d24v40-g5": Shape(10, 2, 24, 40, 64, (64, 63, 2)),
    "d80-g7": Shape(14, 2, 80, 80, 65, (1, 65, 64)),
    "d96-g8": Shape(8, 1, 96, 96, 1000, (1000, 1)),
    "d128-g4": Shape(8, 2, 128, 128, 1000, (1, 1000, 1, 130, *range(1, 13), 999)),
    "d128-g16": Shape(32, 2, 128, 128, 1000, (1000,)),
    "d256-g2": Shape(4, 2, 256, 256, 129, (65, 128, 129)),
}

SWEPT = ("d24v40-g5", "d96-g8", "d128-g4")
"""Shapes of every precision: odd dimensions, rows of several chunks, and many rows. The others are of fp32 alone."""


def sweep(shapes, swept, precisions):
    """Parameters `shape` and `precision`: fp32 with all shapes, other precisions with the swept ones."""
    names = [(shape, name) for shape in shapes for name in precisions if name == "fp32" or shape in swept]
    return pytest.mark.parametrize(("shape", "precision"), names, ids=["-".join(pair) for pair in names])


def attend(op, q, k, v, slots, counts, scaling, **how):
    """`op` over these operands; `sparse_decode` takes the scaling as keywords."""
    if op is sparse_decode:
        return op(q, k, v, slots, counts, **vars(scaling), **how)
    return op(q, k, v, slots, counts, scaling, **how)


def assert_like_reference(results, q, k, v, slots, counts, scaling):
    """Results (out, lse[, logits]) of Triton, row by row, against the reference on float64 copies of the operands."""
    op = decode_with_scores if len(results) == 3 else sparse_decode
    wide = [t.contiguous().double() for t in (q, k, v)]
    exact = attend(op, *wide, slots, counts, scaling, implementation="reference")
    scale, v_scale = scaling.scale * scaling.k_scale, scaling.v_scale
    torch.testing.assert_close(results[1].double(), exact[1], rtol=1e-4, atol=1e-4)
    group = q.shape[1] // k.shape[1]
    lens = (counts if counts.dim() == 2 else counts.unsqueeze(1)).expand(-1, k.shape[1])
    sets = (slots if slots.dim() == 3 else slots.unsqueeze(1)).expand(-1, k.shape[1], -1)
    for row in range(len(q)):
        for head in range(k.shape[1]):
            mine = slice(group * head, group * (head + 1))
            chosen = sets[row, head, : lens[row, head]].long()
            keys, values = (t[chosen, head : head + 1].to(q.dtype) for t in (k.contiguous(), v.contiguous()))
            eager = eager_attention(q[row, mine], keys, values, scale, scaling.logit_cap) * v_scale
            # tanh by way of exp errs by float32's eps on its whole range, where torch's is exact near zero.
            spare = rounding(values) * v_scale * max(1.0, scaling.logit_cap / 4)
            assert_close_to_exact(results[0][row, mine], exact[0][row, mine], eager, q.dtype, spare)
    return exact


@sweep(SHAPES, SWEPT, PRECISIONS)
def test_sparse_decode(device, shape, precision):
    shape, precision = SHAPES[shape], PRECISIONS[precision]
    q, k, v, generator = operands(
        shape.heads,
        shape.kv_heads,
        shape.dim,
        shape.dim_v,
        precision[0],
        cache_dtype=precision[1],
        batch=len(shape.lens),
        num_slots=shape.width + 30,
        device=device,
    )
    counts = torch.tensor(shape.lens, dtype=torch.int32, device=device)
    slots = draw_slots((len(shape.lens), shape.width), counts, len(k), generator, device=device)
    scaling = Scaling(shape.dim**-0.5, **({"k_scale": 0.7, "v_scale": 1.9} if precision[1] == FP8 else {}))
    results = sparse_decode(q, k, v, slots, counts, **vars(scaling), implementation="triton")
    assert_like_reference(results, q, k, v, slots, counts, scaling)


@pytest.mark.parametrize("logit_cap", [0.0, 5.0], ids=["plain", "capped"])
@sweep(SHAPES, SWEPT, ["fp32", "bf16-fp8"])
def test_decode_with_scores(device, shape, precision, logit_cap):
    shape, (dtype, cache_dtype) = SHAPES[shape], PRECISIONS[precision]
    q, k, v, generator = operands(
        shape.heads,
        shape.kv_heads,
        shape.dim,
        shape.dim_v,
        dtype,
        cache_dtype=cache_dtype,
        batch=len(shape.lens),
        num_slots=shape.width + 30,
        device=device,
    )
    seq_lens = torch.tensor(shape.lens, device=device)
    slots = draw_slots((len(shape.lens), shape.width), seq_lens, len(k), generator, device=device)
    beyond = sorted(shape.lens)[len(shape.lens) // 2] - 1
    scaling = Scaling(shape.dim**-0.5, logit_cap, k_scale=1.3)
    how = {"score_beyond": beyond, "implementation": "triton"}
    results = decode_with_scores(q, k, v, slots, seq_lens, scaling, **how)
    exact = assert_like_reference(results, q, k, v, slots, seq_lens, scaling)
    for row, length in enumerate(shape.lens):
        if length > beyond:
            written, expected = results[2][row, :, :length].double(), exact[2][row, :, :length]
            torch.testing.assert_close(written, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("counts_per_head", [True, False])
def test_sets_of_kv_heads_may_differ_in_length(device, counts_per_head):
    q, k, v, generator = operands(12, 3, 64, 64, torch.float16, batch=3, num_slots=400, device=device)
    lens = torch.tensor([[1, 300, 65], [64, 2, 1], [299, 300, 17]])
    lens = lens if counts_per_head else lens[:, 2]
    slots = draw_slots((3, 3, 300), lens if counts_per_head else lens.view(3, 1), 400, generator, device=device)
    lens = lens.to(device)
    results = sparse_decode(q, k, v, slots, lens, scale=0.125, implementation="triton")
    assert_like_reference(results, q, k, v, slots, lens, Scaling(0.125))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", [sparse_decode, decode_with_scores], ids=["sparse", "scores"])
def test_operands_may_be_views_into_wider_buffers(device, op, index_dtype):
    q, k, v, generator = operands(8, 2, 48, 40, torch.float16, batch=5, num_slots=300, device=device)
    counts = torch.tensor([200, 1, 64, 199, 7])
    slots = draw_slots((5, 200), counts, 300, generator, device=device).to(index_dtype)
    # q is what a fused projection of q, k and v gives; caches and indices are columns of larger buffers.
    fused = within(q.view(5, 8 * 48), (5, 8 * 48 + 2 * 96), float("nan"))
    view_k, view_v = within(k, (300, 2, 56), float("nan")), within(v, (300, 3, 48), float("nan"))
    view_slots, view_counts = within(slots, (5, 300), 0), within(counts.to(slots).view(5, 1), (5, 4), 300).squeeze(1)
    assert not any(t.is_contiguous() for t in (fused, view_k, view_v, view_slots, view_counts))
    views = fused.unflatten(1, (8, 48)), view_k, view_v, view_slots, view_counts
    results = attend(op, *views, Scaling(0.2), implementation="triton")
    exact = assert_like_reference(results, q, k, v, slots, counts.to(device), Scaling(0.2))
    for row, length in enumerate(counts.tolist()):
        if op is decode_with_scores:
            assert (results[2][row, :, :length].double() - exact[2][row, :, :length]).abs().max() < 1e-5


def within(tensor, shape, around):
    """A view with the tensor's values at the start of each dimension of a buffer that is `around` elsewhere."""
    buffer = torch.full(shape, 0, dtype=tensor.dtype, device=tensor.device).fill_(around)
    view = buffer[tuple(slice(0, n) for n in tensor.shape)]
    return view.copy_(tensor)


def test_query_dimensions_need_not_be_adjacent(device):
    q, k, v, generator = operands(4, 2, 32, 32, torch.float32, device=device)
    counts = torch.tensor([9, 3, 1], device=device)
    slots = draw_slots((3, 9), counts, 97, generator, device=device)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    results = sparse_decode(transposed, k, v, slots, counts, scale=0.2, implementation="triton")
    assert_like_reference(results, q, k, v, slots, counts, Scaling(0.2))


def test_large_logits_neither_overflow_nor_vanish(device):
    q, k, v, generator = operands(4, 2, 32, 32, torch.float32, num_slots=700, device=device)
    counts = torch.tensor([600, 599, 64], device=device)
    slots = draw_slots((3, 600), counts, 700, generator, device=device)
    results = sparse_decode(q, k, v, slots, counts, scale=60.0, implementation="triton")
    torch.testing.assert_close(
        results,
        sparse_decode(q, k, v, slots, counts, scale=60.0, implementation="reference"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("multiprocessors", [4, 132])
def test_every_row_is_covered_whatever_the_mixture_of_lengths(device, multiprocessors, monkeypatch):
    """The cut of rows into chunks is planned from all rows' lengths and the size of the device."""
    from lim_kernels import split_decode, triton_support

    for module in (triton_support, split_decode):
        monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors, raising=False)
    lens = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 700)), min_size=1, max_size=20)

    @settings(max_examples=15, deadline=None)
    @given(lens, st.integers(0, 40), st.sampled_from([1, 2, 3]))
    def check(lens, spare, kv_heads):
        q, k, v, generator = operands(
            2 * kv_heads, kv_heads, 16, 16, torch.float32, batch=len(lens), num_slots=800, device=device
        )
        counts = torch.tensor(lens, device=device)
        slots = draw_slots((len(lens), max(lens) + spare), counts, 800, generator, device=device)
        results = sparse_decode(q, k, v, slots, counts, scale=0.25, implementation="triton")
        expected = sparse_decode(q, k, v, slots, counts, scale=0.25, implementation="reference")
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)

    check()
