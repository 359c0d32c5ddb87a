"""Is decode attention over slots, against float64, with every implementation?"""

import pytest
import torch

from decode_operands import assert_attends, draw_slots, operands
from lim_kernels import Scaling, decode_with_scores, sparse_decode

HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (5, 1)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (80, 80), (24, 40)], ids=["d64", "d80", "d24v40"])
@pytest.mark.parametrize("logit_cap", [0.0, 3.0], ids=["plain", "capped"])
def test_sparse_decode_is_attention_over_the_slots(implementation, device, shape, dim, dim_v, dtype, logit_cap):
    q, k, v, generator = operands(*shape, dim, dim_v, dtype, device=device)
    counts = torch.tensor([13, 1, 7], dtype=torch.int32, device=device)
    slots = draw_slots((3, 13), counts, 97, generator, device=device)
    how = {"scale": dim**-0.5, "logit_cap": logit_cap}
    out, lse = sparse_decode(q, k, v, slots, counts, **how, implementation=implementation)
    assert out.dtype == dtype and out.shape == (3, shape[0], dim_v)
    for row, count in enumerate(counts.tolist()):
        chosen = slots[row, :count].long()
        assert_attends(out[row], lse[row], q[row], k[chosen], v[chosen], **how)


def test_one_set_per_kv_head(implementation, device):
    q, k, v, generator = operands(8, 2, 32, 32, torch.float32, device=device)
    counts = torch.tensor([[9, 4], [1, 9], [5, 5]], device=device)
    slots = draw_slots((3, 2, 9), counts, 97, generator, device=device)
    out, lse = sparse_decode(q, k, v, slots, counts, scale=0.2, implementation=implementation)
    for row in range(3):
        for head in range(2):
            chosen = slots[row, head, : counts[row, head]].long()
            mine = slice(4 * head, 4 * head + 4)
            keys, values = k[chosen][:, head : head + 1], v[chosen][:, head : head + 1]
            assert_attends(out[row, mine], lse[row, mine], q[row, mine], keys, values, scale=0.2)


def test_fp8_keys_and_values(implementation, device):
    q, k, v, generator = operands(4, 2, 32, 32, torch.float32, device=device)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    counts = torch.full((3,), 11, device=device)
    slots = draw_slots((3, 11), counts, 97, generator, device=device)
    out, _ = sparse_decode(q, k8, v8, slots, counts, scale=0.2, implementation=implementation)
    expected, _ = sparse_decode(q, k8.float(), v8.float(), slots, counts, scale=0.2, implementation=implementation)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_decode_with_scores_is_dense_attention_and_its_logits(implementation, device, shape, dtype):
    q, k, v, generator = operands(*shape, 64, 64, dtype, device=device)
    seq_lens = torch.tensor([33, 1, 20], device=device)
    slots = draw_slots((3, 33), seq_lens, 97, generator, device=device)
    out, lse, logits = decode_with_scores(q, k, v, slots, seq_lens, Scaling(0.125), implementation=implementation)
    assert logits.dtype == torch.float32 and logits.shape == (3, shape[0], 33)
    for row, length in enumerate(seq_lens.tolist()):
        chosen = slots[row, :length].long()
        assert_attends(out[row], lse[row], q[row], k[chosen], v[chosen], scale=0.125)
        wide = k[chosen].double().repeat_interleave(shape[0] // shape[1], dim=1)
        exact_logits = torch.einsum("hd,lhd->hl", q[row].double(), wide) * 0.125
        torch.testing.assert_close(logits[row, :, :length].double(), exact_logits, rtol=1e-5, atol=1e-5)


def test_whole_context_as_a_set_is_dense_attention(implementation, device):
    q, k, v, generator = operands(8, 2, 32, 32, torch.float32, device=device)
    seq_lens = torch.tensor([21, 3, 10], device=device)
    slots = draw_slots((3, 21), seq_lens, 97, generator, device=device)
    *dense, _ = decode_with_scores(q, k, v, slots, seq_lens, Scaling(0.3), implementation=implementation)
    sparse = sparse_decode(q, k, v, slots, seq_lens, scale=0.3, implementation=implementation)
    torch.testing.assert_close(tuple(dense), sparse)


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
