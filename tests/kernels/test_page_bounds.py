"""Do both implementations bound and score pages as a plain account says?"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import bound_pages, choose_pages, expand_pages, score_pages
from lim_kernels.page_bounds import PAGE, PageBounds

EXAMPLES = {"reference": 60, "triton": 12}
HEADS = [(1, 1, 64), (6, 3, 80), (16, 1, 128), (8, 8, 33), (48, 2, 64), (10, 2, 128)]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
LOW = [torch.bfloat16, torch.float16]


def unknown_bounds(pages, kv_heads, dim, dtype, device):
    """Bounds that nobody learnt are recognised."""
    return PageBounds(*(torch.full((pages, kv_heads, dim), float("nan"), dtype=dtype, device=device) for _ in range(2)))


def drawn_bounds(pages, kv_heads, dim, dtype, device, generator):
    """Bounds of pages 1 …; those of page 0 are poisoned."""
    low, high = torch.randn(2, pages, kv_heads, dim, generator=generator).sort(0).values.to(dtype)
    low[0], high[0] = float("nan"), float("nan")
    return PageBounds(low.to(device), high.to(device))


def drawn_rows(lens, width, pages, generator, device, group=1):
    """int32 [B, width] slots of rows whose tokens fill pages in order; what lies beyond a row's length is no slot.

    Args:
        group: physical runs of so many pages, as a server has with a larger page.
    """
    firsts = torch.randperm(pages // group - 1, generator=generator) + 1
    slots, used = torch.full((len(lens), -(-width // 16) * 16), -(1 << 20), dtype=torch.int32), 0
    for row, length in enumerate(lens):
        runs = -(-length // (PAGE * group))
        own = firsts[used : used + runs, None] * PAGE * group + torch.arange(PAGE * group)
        slots[row, :length] = own.flatten()[:length].int()
        used += runs
    assert used <= len(firsts)
    return slots.to(device)[:, :width]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, None), *((dtype, None) for dtype in LOW), *zip(LOW, FP8, strict=True)],
    ids=str,
)
def test_bounds_are_those_of_what_was_written(implementation, device, dtype, cache_dtype, index_dtype):
    @settings(max_examples=EXAMPLES[implementation] // 2, deadline=None)
    @given(st.sampled_from(HEADS), st.integers(0, 2**31))
    def check(heads, seed):
        run_writes(*heads[1:], dtype, cache_dtype, index_dtype, random.Random(seed), implementation, device)

    check()


def run_writes(kv_heads, dim, dtype, cache_dtype, index_dtype, draw, implementation, device):
    """Prefills in chunks, mixed and padded batches, single tokens, and new owners of old pages."""
    pages = 24
    bounds = unknown_bounds(pages, kv_heads, dim, dtype, device)
    cache = torch.full((pages * PAGE, kv_heads, dim), float("nan"), device=device).to(cache_dtype or dtype)
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    free, live, known = list(range(1, pages)), [], {}
    draw.shuffle(free)
    for _ in range(draw.randint(2, 5)):
        if live and draw.random() < 0.3:
            # What the pages held and bounded stays until they are written.
            free += {slot // PAGE for slot in live.pop(draw.randrange(len(live)))}
        if len(free) > 6 and (not live or draw.random() < 0.6):
            live.append([])
        written = []
        for tokens in live:
            # A prefill's chunk ends anywhere; a decoding row has one token.
            chunk = draw.choice([1, 1, 15, 16, 17, 33]) if tokens else draw.choice([1, 5, 16, 40])
            for _ in range(chunk):
                if len(tokens) % PAGE == 0:
                    if not free:
                        break
                    tokens.append(free.pop() * PAGE)
                else:
                    tokens.append(tokens[-1] + 1)
                written.append(tokens[-1])
        written += [0] * draw.choice([0, 0, 3])
        if not written:
            continue
        at = torch.tensor(written, dtype=torch.int64, device=device)
        new = torch.randn(len(written), kv_heads, dim, generator=generator)
        # Of padded rows that differ, nobody tells which one wrote last.
        new[at.cpu() == 0] = 1.0
        new = new.to(cache_dtype or dtype).to(device)
        raw = torch.uint8 if cache_dtype else dtype
        cache.view(raw)[at] = new.view(raw)
        bound_pages(bounds, cache, at.to(index_dtype), implementation=implementation)
        for page in {slot // PAGE for slot in written}:
            known[page] = 1 + max(slot for slot in written if slot // PAGE == page)
        for page in range(pages):
            if page not in known:
                assert bounds.lows[page].isnan().all() and bounds.highs[page].isnan().all()
                continue
            keys = cache[page * PAGE : known[page]].to(dtype)
            assert torch.equal(bounds.lows[page], keys.amin(0)) and torch.equal(bounds.highs[page], keys.amax(0))


def exact_scores(q, bounds, slots, length):
    """float64 [H_kv, P] of one row, and how far low-precision products in any order may be from them."""
    kv_heads = bounds.lows.shape[1]
    pages = slots[:length:PAGE].long() // PAGE
    low, high = bounds.lows[pages].double(), bounds.highs[pages].double()
    queries = q.double().unflatten(0, (kv_heads, -1))
    # [H_kv, G, P, D]
    terms = torch.maximum(*(queries.unsqueeze(2) * side.transpose(0, 1).unsqueeze(1) for side in (low, high)))
    slack = 2 * q.shape[1] * torch.finfo(torch.float32).eps * terms.abs().sum(3)
    return terms.sum(3).amax(1), slack.amax(1)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_page_s_score_is_the_largest_bound_of_its_query_heads(implementation, device, heads, dtype):
    generator = torch.Generator().manual_seed(sum(heads))
    count, kv_heads, dim = heads
    lens, width, pages = [1, 1203, 16, 47, 1190], 1207, 400
    bounds = drawn_bounds(pages, kv_heads, dim, dtype, device, generator)
    q = torch.randn(len(lens), count, dim, generator=generator).to(dtype).to(device)
    slots = drawn_rows(lens, width, pages, generator, device, group=2)
    seq_lens = torch.tensor(lens, device=device)
    scores = score_pages(q, bounds, slots, seq_lens, implementation=implementation)
    assert scores.shape == (len(lens), kv_heads, -(-width // PAGE)) and scores.dtype == torch.float32
    for row, length in enumerate(lens):
        exact, slack = exact_scores(q[row], bounds, slots[row], length)
        assert ((scores[row, :, : exact.shape[1]].double() - exact).abs() <= slack).all()


def test_rows_within_the_limit_are_not_scored(device, triton_runs):
    generator = torch.Generator().manual_seed(0)
    bounds = drawn_bounds(30, 2, 64, torch.float32, device, generator)
    slots, lens = drawn_rows([40, 41], 48, 30, generator, device), torch.tensor([40, 41], device=device)
    scores = score_pages(
        torch.ones(2, 2, 64, device=device), bounds, slots, lens, score_beyond=40, implementation="triton"
    )
    assert scores[0].isnan().all() and scores[1].isfinite().all()


def test_bound_score_choose_and_expand_find_the_best_pages(implementation, device):
    """Keys of whole numbers, whose bounds are exact, so that sets are equal whatever the order of summation."""
    generator = torch.Generator().manual_seed(3)
    lens, budget, kv_heads, how = [130, 64, 401, 17, 400], 64, 2, {"implementation": implementation}
    slots = drawn_rows(lens, max(lens), 90, generator, device)
    cache = torch.randint(-4, 5, (90 * PAGE, kv_heads, 64), generator=generator).float().to(device)
    q = torch.randint(-4, 5, (len(lens), 6, 64), generator=generator).float().to(device)
    bounds, seq_lens = unknown_bounds(90, kv_heads, 64, torch.float32, device), torch.tensor(lens, device=device)
    for row, length in enumerate(lens):
        bound_pages(bounds, cache, slots[row, :length], **how)
    scores = score_pages(q, bounds, slots, seq_lens, score_beyond=budget, **how)
    chosen = choose_pages(scores, seq_lens, page=PAGE, most=budget // PAGE, **how)
    sets, counts = expand_pages(*chosen, slots, seq_lens, page=PAGE, **how)
    for row, length in enumerate(lens):
        for head in range(kv_heads):
            members = [list(range(first, min(first + PAGE, length))) for first in range(0, length, PAGE)]
            places = [cache[slots[row, held].long(), head] for held in members]
            queries = q[row].unflatten(0, (kv_heads, -1))[head]
            best = [float((queries.relu() @ k.amax(0) - (-queries).relu() @ k.amin(0)).max()) for k in places]
            ranked = sorted(range(len(members) - 1), key=lambda page, best=best: (-best[page], page))
            kept = sorted([*ranked[: budget // PAGE - 1], len(members) - 1])
            held = [int(slots[row, t]) for page in kept for t in members[page]]
            assert sets[row, head, : int(counts[row, head])].tolist() == held
            assert length > budget or len(held) == length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"written": torch.ones(3)}, r"written int32 or int64 \[N\]"),
        ({"written": torch.ones(3, 1, dtype=torch.int64)}, r"written int32 or int64 \[N\]"),
        ({"k_cache": torch.ones(64, 1, 8)}, r"k_cache floating \[num_slots, 2, 8\]"),
        ({"k_cache": torch.ones(64, 2, 8, dtype=torch.uint8)}, r"k_cache floating"),
        ({"bounds": PageBounds(torch.ones(4, 2, 8), torch.ones(4, 2, 9))}, "contiguous lows and highs"),
        ({"bounds": PageBounds(*[torch.ones(4, 2, 8).to(FP8[0])] * 2)}, "at least 16 bits"),
        ({"implementation": "cuda"}, "implementation among"),
    ],
)
def test_bad_writes_are_named(change, message):
    call = {
        "bounds": PageBounds(torch.ones(4, 2, 8), torch.ones(4, 2, 8)),
        "k_cache": torch.ones(64, 2, 8),
        "written": torch.ones(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        bound_pages(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, r"q floating \[B, H, 8\] with H a multiple of 2"),
        ({"q": torch.ones(2, 4, 8, dtype=torch.int32)}, "q floating"),
        ({"slots": torch.ones(2, 9, dtype=torch.int64)}, r"slots int32 \[2, L\]"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens int32 or int64 \[2\]"),
    ],
)
def test_bad_scores_are_named(change, message):
    call = {
        "q": torch.ones(2, 4, 8),
        "bounds": PageBounds(torch.ones(4, 2, 8), torch.ones(4, 2, 8)),
        "slots": torch.ones(2, 9, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        score_pages(**{**call, **change})
