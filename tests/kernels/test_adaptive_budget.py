"""Do rows get the budget and the window that their attention asks for, and the same from every implementation?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, adapt_budgets, choose_tokens

EXAMPLES = {"reference": 300, "triton": 25}
NONE = float("nan")
OFF = 2 ** (1 / 16)
"""What binning may do to a share: 2**(1/32) above the fraction's line, and below it."""
SCORES = {
    "random": lambda noise: noise * 2 - 9,
    "ties": lambda noise: noise.round() - 9,
    "flat": lambda noise: noise * 0 - 7,
    # No log-weight over all heads is larger than the logarithm of their number.
    "wide": lambda noise: (noise * 20 - 60).clamp(max=5.0),
    "masked": lambda noise: torch.where(noise > 1, noise - 5, float("-inf")),
    "recent": lambda noise: noise - 0.05 * torch.arange(noise.shape[1]).flip(0),
    "early": lambda noise: noise - 0.05 * torch.arange(noise.shape[1]),
}
"""Log-weights from noise [B, L]."""


@st.composite
def batches(draw):
    """Scores float32 [B, L] of rows longer than the budget and not, NaN where they are not defined, and sizes."""
    sinks = draw(st.integers(0, 6))
    budget = draw(st.integers(2 * sinks + 2, 200))
    lens = draw(st.lists(st.integers(1, 1200), min_size=1, max_size=4))
    noise = torch.randn(len(lens), max(lens), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    scores = SCORES[draw(st.sampled_from(sorted(SCORES)))](noise)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    defined = (torch.arange(noise.shape[1]) < seq_lens.unsqueeze(1)) & (seq_lens.unsqueeze(1) > budget)
    recent = draw(st.one_of(st.none(), st.integers(0, budget - sinks)))
    how = {
        "find_recent": recent is None,
        "top_p": draw(st.floats(0.01, 0.99)),
        "floor": draw(st.integers(1, budget)),
    }
    if recent is None and draw(st.booleans()):
        how["top_p"] = None
    # Where a window is to be found, none that is given may matter.
    sizes = SetSizes(budget, recent=10**6 if recent is None else recent, sinks=sinks)
    return scores.masked_fill(~defined, NONE), seq_lens, sizes, how


def shares_of(scores):
    """What the tokens of one row hold of its attention, in float64."""
    weights = [math.exp(score - max(scores)) if max(scores) > -math.inf else 0.0 for score in scores]
    return [weight / (sum(weights) or 1.0) for weight in weights]


def test_a_set_holds_the_share_and_no_smaller_one_does(implementation, device):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(batches())
    def check(case):
        scores, seq_lens, sizes, how = case
        how["implementation"] = implementation
        budgets, recents = adapt_budgets(scores.to(device), seq_lens.to(device), sizes, **how)
        assert budgets.dtype == recents.dtype == torch.int32
        sets, counts = choose_tokens(
            scores.nan_to_num(0.0),
            seq_lens,
            SetSizes(sizes.budget, recent=0, sinks=sizes.sinks),
            budgets=budgets.cpu(),
            recents=recents.cpu(),
            implementation="reference",
        )
        for row, length in enumerate(seq_lens.tolist()):
            size, recent = budgets[row].item(), recents[row].item()
            if length <= sizes.budget:
                assert size == length
                continue
            least = max(how["floor"], sizes.sinks + recent + 1)
            if how["top_p"] is None:
                assert size == sizes.budget
                continue
            assert min(least, sizes.budget) <= size <= sizes.budget and counts[row] == size
            shares = shares_of(scores[row, :length].tolist())
            chosen = sets[row, :size].tolist()
            if size < sizes.budget and any(shares):
                assert sum(shares[t] for t in chosen) >= how["top_p"] / OFF - 1e-5
            if size > least:
                free = [shares[t] for t in chosen if sizes.sinks <= t < length - recent]
                assert sum(shares[t] for t in chosen) - min(free) <= how["top_p"] * OFF + 1e-5

    check()


def test_a_window_holds_the_share_of_the_attention_that_it_has_of_the_budget(implementation, device):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(batches())
    def check(case):
        scores, seq_lens, sizes, how = case
        how |= {"find_recent": True, "implementation": implementation}
        _, recents = adapt_budgets(scores.to(device), seq_lens.to(device), sizes, **how)
        windows = [max(1, sizes.budget * part // 16) for part in range(1, 9)]
        for row, length in enumerate(seq_lens.tolist()):
            recent = recents[row].item()
            least = max(windows[0], min(32, max(1, sizes.budget // 4)))
            if length <= sizes.budget:
                assert recent == least
                continue
            shares = shares_of(scores[row, :length].tolist())
            held = [sum(shares[length - window :]) for window in windows]
            enough = [share >= part / 16 * OFF + 1e-5 for part, share in enumerate(held, start=1)]
            maybe = [share >= part / 16 / OFF - 1e-5 for part, share in enumerate(held, start=1)]
            assert recent >= max((w for w, sure in zip(windows, enough, strict=True) if sure), default=least)
            assert recent >= least
            assert recent in {least, *(w for w, may in zip(windows, maybe, strict=True) if may)}

    check()


def one_row(weights, device):
    """Scores float32 [1, L] whose weights are powers of two, which binning does not round beside each other."""
    return torch.tensor([weights], dtype=torch.float64).log().float().to(device), torch.tensor([len(weights)]).to(
        device
    )


@pytest.mark.parametrize(("top_p", "size"), [(0.5, 500), (0.25, 250), (0.0625, 63), (0.003, 16)])
def test_equal_tokens_are_taken_in_proportion(implementation, device, top_p, size):
    scores, seq_lens = one_row([0.001] * 1000, device)
    sizes, how = SetSizes(600, recent=10, sinks=2), {"floor": 16, "implementation": implementation}
    budgets, recents = adapt_budgets(scores, seq_lens, sizes, top_p=top_p, **how)
    assert budgets.tolist() == [size] and recents.tolist() == [10]


def test_what_sinks_and_window_hold_counts_first(implementation, device):
    # Half of the attention at the sink, a quarter in the window, a quarter on 64 of the others.
    weights = [0.5, *[2.0**-60] * 500, *[2.0**-8] * 64, *[2.0**-60] * 500, *[2.0**-6] * 16]
    scores, seq_lens = one_row(weights, device)
    how = {"sizes": SetSizes(256, recent=16, sinks=1), "implementation": implementation}
    found = {p: adapt_budgets(scores, seq_lens, top_p=p, **how)[0].item() for p in (0.4, 0.7, 0.875, 0.99)}
    assert found == {0.4: 18, 0.7: 18, 0.875: 17 + 32, 0.99: 17 + 62}


@pytest.mark.parametrize(
    ("last", "window"),
    [([1.0] * 10, 80), ([1.0] + [0.0] * 79, 80), ([1.0] + [0.0] * 80, 32), ([1.0] * 5 + [0.5] * 5, 80)],
    ids=["near", "at-the-end", "just-beyond", "uneven"],
)
def test_windows_reach_for_attention_and_no_further(implementation, device, last, window):
    scores, seq_lens = one_row([*[0.0] * 400, *last], device)
    how = {"sizes": SetSizes(160, recent=0, sinks=0), "find_recent": True, "implementation": implementation}
    budgets, recents = adapt_budgets(scores, seq_lens, **how)
    assert recents.tolist() == [window] and budgets.tolist() == [160]


def test_weights_that_lie_apart_as_far_as_can_be(implementation, device):
    scores = torch.full((3, 300), float("-inf"))
    scores[0, 7] = 0.0  # one token holds everything
    scores[1] = -500.0  # all below the bins: all alike
    scores[2] = torch.linspace(30.0, -60.0, 300)  # heavier than weights are
    budgets, _ = adapt_budgets(
        scores.to(device),
        torch.tensor([300, 300, 300], device=device),
        SetSizes(200, recent=4, sinks=1),
        top_p=0.5,
        implementation=implementation,
    )
    assert budgets[:2].tolist() == [6, 150] and 6 <= budgets[2] <= 200


@pytest.mark.parametrize("long", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES.keys())
def test_triton_finds_the_reference_s_sizes(device, triton_runs, make, long):
    lens = (5000, 20, 2049, 64, 65, 1, 4096)
    noise = torch.randn(len(lens), 5100, generator=torch.Generator().manual_seed(3))
    seq_lens = torch.tensor(lens, dtype=torch.int64 if long else torch.int32)
    beyond = torch.arange(5100) >= seq_lens.unsqueeze(1)
    # A view: scores of a step lie on the front of a wider buffer.
    scores = make(noise).masked_fill(beyond, NONE).to(device)[:, :5000]
    # float16's numbers are few: many lie on the edges of bins.
    for values in (scores, scores.half().float()):
        for how in ({"find_recent": True}, {"top_p": 0.7}, {"find_recent": True, "top_p": 0.95, "floor": 9}):
            how = {"sizes": SetSizes(64, recent=7, sinks=4), **how}
            expected = adapt_budgets(values, seq_lens.to(device), **how, implementation="reference")
            found = adapt_budgets(values, seq_lens.to(device), **how, implementation="triton")
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_triton_finds_the_reference_s_sizes_for_a_window_of_many_chunks(device, triton_runs):
    scores = torch.randn(2, 6000, generator=torch.Generator().manual_seed(8)).to(device) * 4 - 12
    seq_lens = torch.tensor([6000, 4001], device=device)
    for find_recent in (True, False):
        how = {"sizes": SetSizes(3500, recent=3000, sinks=4), "top_p": 0.98, "find_recent": find_recent}
        found, expected = (adapt_budgets(scores, seq_lens, **how, implementation=i) for i in ("triton", "reference"))
        assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("bad", [NONE, float("inf")])
def test_a_row_that_is_not_numbers_spoils_no_other(implementation, device, bad):
    scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(6)).to(device)
    seq_lens = torch.tensor([300, 290], device=device)
    how = {"find_recent": True, "top_p": 0.5, "implementation": implementation}
    how["sizes"] = SetSizes(64, recent=0, sinks=4)
    alone = [sizes[1].item() for sizes in adapt_budgets(scores, seq_lens, **how)]
    scores[0, 5:] = bad
    budgets, recents = adapt_budgets(scores, seq_lens, **how)
    assert [budgets[1], recents[1]] == alone
    assert 4 + recents[0] < budgets[0] <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 3, 4)}, r"scores float32 \[B, L\]"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens \[2\]"),
        ({"top_p": None}, "top_p or find_recent=True"),
        ({"top_p": 1.0}, "top_p between 0 and 1"),
        ({"floor": 0}, "floor of 1 to 6"),
        ({"floor": 7}, "floor of 1 to 6"),
        ({"sizes": SetSizes(6, recent=5, sinks=2)}, r"budget >= recent \+ sinks"),
        ({"find_recent": True, "sizes": SetSizes(6, recent=0, sinks=4)}, r"budget >= recent \+ sinks"),
        ({"implementation": "cuda"}, "implementation among reference"),
    ],
    ids=["scores", "rows", "nothing", "share", "no-floor", "high-floor", "window", "half", "implementation"],
)
def test_bad_operands_are_named(change, message):
    call = {
        "scores": torch.zeros(2, 9),
        "seq_lens": torch.tensor([9, 5], dtype=torch.int32),
        "sizes": SetSizes(6, recent=3, sinks=2),
        "top_p": 0.5,
    } | change
    with pytest.raises(ValueError, match=message):
        adapt_budgets(call.pop("scores"), call.pop("seq_lens"), **call)
