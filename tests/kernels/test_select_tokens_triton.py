"""Do the Triton kernels give what the reference gives: scores of heads, and sets of scores, each by itself?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, choose_tokens, score_tokens

pytestmark = pytest.mark.usefixtures("triton_runs")

NONE = float("nan")
SIZES = {
    "one": SetSizes(1, recent=0, sinks=0),
    "few": SetSizes(8, recent=2, sinks=1),
    "many": SetSizes(64, recent=16, sinks=4),
    "no-middle": SetSizes(20, recent=16, sinks=4),
}


def draw_logits(kind, batch, heads, length, *, seed=0):
    """float32 [batch, heads, length] by how the heads' top lists relate."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, heads, length, generator=generator)
    if kind == "ties":
        return noise.round()
    if kind == "equal":
        return torch.zeros_like(noise)
    if kind == "alike":
        # One order for all heads but for neighbours: all short lists together hold little more than one of them.
        return torch.randn(batch, 1, length, generator=generator) + 0.01 * noise
    if kind == "masked":
        masked = torch.rand(noise.shape, generator=generator) < 0.95
        masked[:, :, 0] = False
        return noise.masked_fill(masked, float("-inf"))
    if kind == "wide":
        return noise * 10.0 ** torch.randint(-40, 30, noise.shape, generator=generator)
    return noise


def batch_of(logits, lens, device, *, recent=0):
    """Logits and int32 lengths on `device`; what lies at or beyond a row's length is poisoned."""
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    beyond = torch.arange(logits.shape[-1]) >= seq_lens.unsqueeze(1)
    beyond = beyond if logits.dim() == 2 else beyond.unsqueeze(1)
    return logits.masked_fill(beyond, NONE).to(device), seq_lens.to(device)


def candidates_of(seq_lens, length, sizes):
    """bool [B, L]: where scores are defined."""
    positions = torch.arange(length, device=seq_lens.device)
    lens = seq_lens.unsqueeze(1)
    return (lens > sizes.budget) & (positions >= sizes.sinks) & (positions < lens - sizes.recent)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "alike", "masked", "wide"])
def test_union_scores_choose_the_reference_set(device, kind, sizes, heads):
    logits, seq_lens = batch_of(draw_logits(kind, 3, heads, 700), (700, 65, 1), device)
    assert_union_like_reference(logits, seq_lens, sizes)


@pytest.mark.parametrize("kind", ["random", "alike"])
def test_union_of_an_odd_number_of_heads(device, kind):
    logits, seq_lens = batch_of(draw_logits(kind, 1, 33, 300), (300,), device)
    assert_union_like_reference(logits, seq_lens, SIZES["many"])


def assert_union_like_reference(logits, seq_lens, sizes, **share):
    """Same set, and the same scores of the chosen: Triton need not score tokens that cannot be chosen."""
    exact = score_tokens(logits, seq_lens, sizes, **share, implementation="reference")
    scores = score_tokens(logits, seq_lens, sizes, **share, implementation="triton")
    expected, counts = choose_tokens(exact, seq_lens, sizes, implementation="reference")
    chosen, _ = choose_tokens(scores, seq_lens, sizes, implementation="reference")
    assert torch.equal(chosen, expected)
    free = (torch.arange(chosen.shape[1], device=chosen.device) < counts.unsqueeze(1)) & candidates_of(
        seq_lens, logits.shape[2], sizes
    ).gather(1, chosen.clamp(min=0).long())
    chosen = chosen.clamp(min=0).long()
    assert torch.equal(scores.gather(1, chosen)[free], exact.gather(1, chosen)[free])
    assert (scores <= exact)[candidates_of(seq_lens, logits.shape[2], sizes)].all()


def test_rows_whose_heads_agree_lie_next_to_rows_whose_heads_do_not(device):
    logits = torch.cat([draw_logits(kind, 1, 8, 500) for kind in ("random", "alike", "equal", "ties")])
    logits, seq_lens = batch_of(logits, (500, 500, 400, 333), device)
    assert_union_like_reference(logits, seq_lens, SIZES["many"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("numbers", [0, 3])
def test_a_row_that_is_not_numbers_ends_and_spoils_no_other(device, numbers):
    logits, seq_lens = batch_of(draw_logits("random", 2, 2, 100), (100, 90), device)
    logits[0, :, numbers:] = NONE
    scores = score_tokens(logits, seq_lens, SIZES["few"], implementation="triton")
    exact = score_tokens(logits, seq_lens, SIZES["few"], implementation="reference")
    chosen, expected = (choose_tokens(s, seq_lens, SIZES["few"], implementation="triton")[0] for s in (scores, exact))
    assert torch.equal(chosen[1], expected[1])


def test_union_of_many_blocks(device):
    logits, seq_lens = batch_of(draw_logits("random", 2, 2, 9001), (9001, 4097), device)
    assert_union_like_reference(logits, seq_lens, SIZES["many"])
    logits, seq_lens = batch_of(draw_logits("ties", 2, 2, 9001), (9001, 4097), device)
    assert_union_like_reference(logits, seq_lens, SIZES["many"])


@pytest.mark.parametrize("kind", ["random", "alike", "ties"])
def test_union_of_the_largest_middle_budget(device, native, kind):
    logits, seq_lens = batch_of(draw_logits(kind, 3, 8, 20000), (20000, 8205, 8000), device)
    assert_union_like_reference(logits, seq_lens, SetSizes(8192 + 12, recent=8, sinks=4))


def test_union_beyond_the_largest_middle_budget_is_refused(device):
    logits, seq_lens = batch_of(draw_logits("equal", 1, 1, 10), (10,), device)
    with pytest.raises(ValueError, match="middle budget of at most"):
        score_tokens(logits, seq_lens, SetSizes(1 << 20, recent=0, sinks=0), implementation="triton")


@pytest.mark.parametrize("kind", ["random", "alike"])
def test_union_of_one_rank_s_heads(device, kind):
    logits, seq_lens = batch_of(draw_logits(kind, 2, 3, 400), (400, 399), device)
    sizes = SIZES["many"]
    scores = []
    for implementation in ("reference", "triton"):
        shares = [
            score_tokens(
                logits[:, first : first + 1],
                seq_lens,
                sizes,
                first_head=first,
                num_heads=3,
                implementation=implementation,
            )
            for first in range(3)
        ]
        scores.append(torch.stack(shares).amax(0))
    sets = [choose_tokens(combined, seq_lens, sizes, implementation="reference")[0] for combined in scores]
    whole = score_tokens(logits, seq_lens, sizes, implementation="reference")
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], choose_tokens(whole, seq_lens, sizes, implementation="reference")[0])


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("given_lse", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize("aggregate", ["max", "sum"])
@pytest.mark.parametrize("heads", [1, 5, 33])
@pytest.mark.parametrize("kind", ["random", "ties", "masked", "low"])
def test_softmax_scores_are_the_reference_s(device, kind, heads, aggregate, given_lse):
    lens, sizes = (2100, 1024, 65, 64, 1), SIZES["many"]
    logits = draw_logits(kind, len(lens), heads, 2100)
    if kind == "low":
        # One token outweighs all: log-weights of the others are about -200.
        logits[:, :, 0] = 200.0
    logits, seq_lens = batch_of(logits, lens, device)
    # A view: scores of a captured graph are computed on the front of a wider buffer.
    wide = torch.full((len(lens), heads, 2200), NONE, device=device)
    wide[:, :, :2100] = logits
    how = {"aggregate": aggregate}
    if given_lse:
        valid = logits.masked_fill(logits.isnan(), float("-inf"))
        how["lse"] = valid.double().logsumexp(2).float()
    exact = score_tokens(logits, seq_lens, sizes, **how, implementation="reference")
    scores = score_tokens(wide[:, :, :2100], seq_lens, sizes, **how, implementation="triton")
    # Of sinks and window as well: what they weigh decides adaptive budgets.
    defined = candidates_of(seq_lens, 2100, SetSizes(sizes.budget, recent=0, sinks=0))
    # A weight below float32's range is zero: what "sum" gives below -87 tells only that.
    floor = -80.0 if aggregate == "sum" else -1e9
    torch.testing.assert_close(scores[defined].clamp(min=floor), exact[defined].clamp(min=floor), rtol=1e-5, atol=2e-5)


SCORES = {
    "random": lambda noise: noise,
    "ties": lambda noise: noise.round(),
    "equal": torch.zeros_like,
    "below-bins": lambda noise: noise - 200.0,
    "below-and-inside": lambda noise: noise * 100.0,
    "above-bins": lambda noise: noise + 1e6,
    "one-bin": lambda noise: noise * 1e-6 - 3.0,
    "unlisted": lambda noise: torch.where(noise > 1.9, -noise, float("-inf")),
    "all-unlisted": lambda noise: torch.full_like(noise, float("-inf")),
    "signed-zeros": lambda noise: noise * 0.0,
}


def assert_chooses_like_reference(scores, seq_lens, sizes, **how):
    expected = choose_tokens(scores, seq_lens, sizes, **how, implementation="reference")
    results = choose_tokens(scores, seq_lens, sizes, **how, implementation="triton")
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == torch.int32 and torch.equal(result, right)


@pytest.mark.parametrize("to_slots", [False, True], ids=["positions", "slots"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES.keys())
def test_choose_gives_the_reference_s_set(device, make, sizes, to_slots):
    # Tokens enough for the deciding bin to hold more than any list of its candidates; rows within the budget beside.
    lens = (5000, 20, 2049, 64, 65, 1)
    scores = make(torch.randn(len(lens), 5000, generator=torch.Generator().manual_seed(3)))
    scores, seq_lens = batch_of(scores, lens, device)
    scores = scores.masked_fill(~candidates_of(seq_lens, 5000, sizes), NONE)
    slots = torch.randint(1, 1 << 30, scores.shape, dtype=torch.int32, device=device) if to_slots else None
    assert_chooses_like_reference(scores, seq_lens, sizes, slots=slots)


def test_slots_are_those_of_the_positions(device):
    scores, seq_lens = batch_of(torch.randn(3, 300), (300, 30, 9), device)
    wide = torch.arange(7, 7 + 3 * 400, dtype=torch.int32, device=device).view(3, 400)
    sizes = SetSizes(32, recent=5, sinks=2)
    positions, counts = choose_tokens(scores, seq_lens, sizes, implementation="triton")
    slots, _ = choose_tokens(scores, seq_lens, sizes, slots=wide[:, :300], implementation="triton")
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(slots[row, :count], wide[row][positions[row, :count].long()])
        assert (slots[row, count:] == 0).all() and (positions[row, count:] == -1).all()


@pytest.mark.parametrize("length", [1, 40, 64])
def test_budgets_wider_than_the_context_keep_it_whole(device, length):
    scores, seq_lens = batch_of(torch.randn(2, length), (length, 1), device)
    for budget in (64, 5000):
        assert_chooses_like_reference(scores, seq_lens, SetSizes(budget, recent=8, sinks=4))


def test_choose_on_views_with_long_indices(device):
    wide = torch.randn(3, 700, generator=torch.Generator().manual_seed(4)).to(device)
    seq_lens = torch.tensor([600, 64, 333], device=device)
    assert_chooses_like_reference(wide[:, :600], seq_lens, SIZES["many"])


def test_choose_whatever_the_scores_sizes_and_lengths(device):
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        lens = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=3))
        budget = data.draw(st.integers(1, 300))
        sinks = data.draw(st.integers(0, budget))
        sizes = SetSizes(budget, data.draw(st.integers(0, budget - sinks)), sinks)
        noise = torch.randn(
            len(lens), max(lens), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        )
        scores = SCORES[data.draw(st.sampled_from(sorted(SCORES)))](noise)
        assert_chooses_like_reference(*batch_of(scores, lens, device), sizes)

    check()


def test_choose_a_budget_of_thousands(device, native):
    scores, seq_lens = batch_of(torch.randn(3, 70000), (70000, 8192, 8193), device)
    assert_chooses_like_reference(scores, seq_lens, SetSizes(8192, recent=2048, sinks=4))
