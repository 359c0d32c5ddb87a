"""Do ranks choose the right set whose lists of the union are shallow, and deepened where all together need it?"""

import pytest
import torch

from lim_kernels import SetSizes, choose_tokens, deepen_scores, score_tokens

SIZES = SetSizes(24, recent=6, sinks=2)
LENS = (150, 20, 120)
HEADS = 8


def logits_of(kind):
    """float32 [B, H, L]: heads that differ, that agree, or all in one batch; NaN beyond the rows."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(3, HEADS, max(LENS), generator=generator)
    alike = torch.randn(3, 1, max(LENS), generator=generator) + 0.01 * noise
    logits = {"differ": noise, "agree": alike, "ties": noise.round(), "both": torch.cat([noise[:1], alike[1:]])}[kind]
    beyond = torch.arange(max(LENS)) >= torch.tensor(LENS).unsqueeze(1)
    return logits.masked_fill(beyond.unsqueeze(1), float("nan"))


def combined(scores, seq_lens, implementation):
    """Each rank's scores, with the best of the others."""
    best = [choose_tokens(one, seq_lens, SIZES, implementation=implementation)[0].clamp(min=0).long() for one in scores]
    told = [one.gather(1, places) for one, places in zip(scores, best, strict=True)]
    for own in scores:
        for places, values in zip(best, told, strict=True):
            own.scatter_reduce_(1, places, values, reduce="amax")


@pytest.mark.parametrize("kind", ["differ", "agree", "ties", "both"])
def test_ranks_choose_the_set_of_all_heads(implementation, device, kind):
    logits, seq_lens = logits_of(kind).to(device), torch.tensor(LENS, dtype=torch.int32, device=device)
    how = {"implementation": implementation}
    shares = [(logits[:, first : first + 4], {"first_head": first, "num_heads": HEADS}) for first in (0, 4)]
    scores = [score_tokens(part, seq_lens, SIZES, shallow=True, **share, **how) for part, share in shares]
    combined(scores, seq_lens, implementation)
    shallow = [one.clone() for one in scores]
    for own, (part, share) in zip(scores, shares, strict=True):
        deepen_scores(own, part, seq_lens, SIZES, **share, **how)
    combined(scores, seq_lens, implementation)
    whole = score_tokens(logits, seq_lens, SIZES, implementation="reference")
    expected, _ = choose_tokens(whole, seq_lens, SIZES, implementation="reference")
    sets = [choose_tokens(own, seq_lens, SIZES, **how)[0] for own in scores]
    assert all(torch.equal(chosen, expected) for chosen in sets)
    too_shallow = [choose_tokens(own, seq_lens, SIZES, **how)[0] for own in shallow]
    enough = all(torch.equal(chosen, expected) for chosen in too_shallow)
    assert enough == (kind in ("differ", "ties")), "the case tells shallow lists that suffice from others"


def test_rows_in_which_enough_are_listed_stay_as_they_are(triton_runs, device):
    logits, seq_lens = logits_of("both").to(device), torch.tensor(LENS, dtype=torch.int32, device=device)
    share = {"first_head": 0, "num_heads": HEADS, "implementation": "triton"}
    scores = score_tokens(logits, seq_lens, SIZES, shallow=True, **share)
    before = scores.clone()
    deepen_scores(scores, logits, seq_lens, SIZES, **share)
    assert torch.equal(scores[0], before[0])
    assert (scores[2, 2:114] > before[2, 2:114]).any()
