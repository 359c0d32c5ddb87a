"""Are the decode references attention, over slots, against float64?"""

import pytest
import torch

import oracle
from lim_kernels import decode_with_scores, sparse_decode

HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (5, 1)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(heads, kv_heads, dim, dim_v, dtype, batch=3, num_slots=97, seed=0):
    """Random operands, drawn in their own dtype; slot 0 is poisoned, because no valid slot of a test names it."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, dim, generator=generator).to(dtype)
    k = torch.randn(num_slots, kv_heads, dim, generator=generator).to(dtype)
    v = torch.randn(num_slots, kv_heads, dim_v, generator=generator).to(dtype)
    k[0], v[0] = float("nan"), float("nan")
    return q, k, v, generator


def assert_close_to_exact(out, exact, lowest, dtype):
    """Error against float64 within twice the low-precision eager computation's, plus a rounding band."""
    band = torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * (lowest.double() - exact).abs().max() + band


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (80, 80), (24, 40)], ids=["d64", "d80", "d24v40"])
@pytest.mark.parametrize("logit_cap", [0.0, 3.0], ids=["plain", "capped"])
def test_sparse_decode_is_attention_over_the_slots(shape, dim, dim_v, dtype, logit_cap):
    q, k, v, generator = operands(*shape, dim, dim_v, dtype)
    counts = torch.tensor([13, 1, 7], dtype=torch.int32)
    slots = torch.stack([1 + torch.randperm(96, generator=generator)[:13] for _ in range(3)]).int()
    for row, count in enumerate(counts):
        slots[row, count:] = 0 if row == 2 else -1
    out, lse = sparse_decode(q, k, v, slots, counts, scale=dim**-0.5, logit_cap=logit_cap)
    assert out.dtype == dtype and out.shape == (3, shape[0], dim_v)
    for row, count in enumerate(counts.tolist()):
        chosen = slots[row, :count].long()
        exact, exact_lse = oracle.attention(q[row], k[chosen], v[chosen], scale=dim**-0.5, logit_cap=logit_cap)
        eager = eager_attention(q[row], k[chosen], v[chosen], dim**-0.5, logit_cap)
        assert_close_to_exact(out[row], exact, eager, dtype)
        torch.testing.assert_close(lse[row].double(), exact_lse, rtol=1e-4, atol=1e-4)


def eager_attention(q, keys, values, scale, logit_cap):
    """The same attention in the operands' own precision."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys, values))
    logits = (keys @ q.unsqueeze(2)).squeeze(2) * scale
    if logit_cap:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    return (logits.softmax(1).unsqueeze(1) @ values).squeeze(1)


def test_one_set_per_kv_head():
    q, k, v, generator = operands(8, 2, 32, 32, torch.float32)
    slots = 1 + torch.randint(96, (3, 2, 9), generator=generator)
    counts = torch.tensor([[9, 4], [1, 9], [5, 5]])
    out, lse = sparse_decode(q, k, v, slots, counts, scale=0.2)
    for row in range(3):
        for head in range(2):
            chosen = slots[row, head, : counts[row, head]]
            mine = slice(4 * head, 4 * head + 4)
            exact, exact_lse = oracle.attention(
                q[row, mine], k[chosen][:, head : head + 1], v[chosen][:, head : head + 1], scale=0.2
            )
            torch.testing.assert_close(out[row, mine].double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[row, mine].double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_fp8_keys_and_values():
    q, k, v, generator = operands(4, 2, 32, 32, torch.float32)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    slots = 1 + torch.randint(96, (3, 11), generator=generator)
    counts = torch.full((3,), 11)
    out, _ = sparse_decode(q, k8, v8, slots, counts, scale=0.2)
    expected, _ = sparse_decode(q, k8.float(), v8.float(), slots, counts, scale=0.2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_decode_with_scores_is_dense_attention_and_its_logits(shape, dtype):
    q, k, v, generator = operands(*shape, 64, 64, dtype)
    seq_lens = torch.tensor([33, 1, 20])
    slots = torch.stack([1 + torch.randperm(96, generator=generator)[:33] for _ in range(3)])
    for row, length in enumerate(seq_lens.tolist()):
        slots[row, length:] = 0
    out, lse, logits = decode_with_scores(q, k, v, slots, seq_lens, scale=0.125)
    assert logits.dtype == torch.float32 and logits.shape == (3, shape[0], 33)
    group = shape[0] // shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        chosen = slots[row, :length]
        exact, exact_lse = oracle.attention(q[row], k[chosen], v[chosen], scale=0.125)
        assert_close_to_exact(out[row], exact, eager_attention(q[row], k[chosen], v[chosen], 0.125, 0.0), dtype)
        torch.testing.assert_close(lse[row].double(), exact_lse, rtol=1e-4, atol=1e-4)
        wide = k[chosen].double().repeat_interleave(group, dim=1)
        exact_logits = torch.einsum("hd,lhd->hl", q[row].double(), wide) * 0.125
        torch.testing.assert_close(logits[row, :, :length].double(), exact_logits, rtol=1e-5, atol=1e-5)


def test_whole_context_as_a_set_is_dense_attention():
    q, k, v, generator = operands(8, 2, 32, 32, torch.float32)
    slots = torch.stack([1 + torch.randperm(96, generator=generator)[:21] for _ in range(3)])
    seq_lens = torch.tensor([21, 3, 10])
    dense, dense_lse, _ = decode_with_scores(q, k, v, slots, seq_lens, scale=0.3)
    sparse, sparse_lse = sparse_decode(q, k, v, slots, seq_lens, scale=0.3)
    assert torch.equal(dense, sparse) and torch.equal(dense_lse, sparse_lse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "H_kv dividing 3"),
        ({"k_cache": torch.zeros(9, 2, 4)}, r"\[num_slots, H_kv, 8\]"),
        ({"v_cache": torch.zeros(9, 1, 8)}, "v_cache"),
        ({"slots": torch.zeros(1, 4, dtype=torch.int32)}, r"slots \[2, K\]"),
        ({"slots": torch.zeros(2, 4)}, "integer slots"),
        ({"counts": torch.ones(3, dtype=torch.int32)}, r"counts \[2\]"),
        ({"implementation": "sdpa"}, "implementation among"),
    ],
    ids=["heads", "dim", "values", "rows", "float-slots", "counts", "implementation"],
)
def test_bad_operands_are_named(change, message):
    call = {
        "q": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(9, 2, 8),
        "v_cache": torch.zeros(9, 2, 8),
        "slots": torch.ones(2, 4, dtype=torch.int32),
        "counts": torch.ones(2, dtype=torch.int32),
    } | change
    with pytest.raises(ValueError, match=message):
        sparse_decode(**call, scale=1.0)
