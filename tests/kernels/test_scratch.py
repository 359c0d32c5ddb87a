"""Do launchers allocate what is counted for them before a server serves?"""

from contextlib import contextmanager

import pytest
import torch

from lim_kernels import (
    Scaling,
    SetSizes,
    choose_for_groups,
    choose_tokens,
    decode_with_scores,
    find_prefix_groups,
    score_context,
    score_tokens,
    scratch,
    sparse_decode,
)
from lim_kernels.rehearsal import MULTIPROCESSORS
from support.launches import TRITON, empty, launches_recorded

pytestmark = pytest.mark.usefixtures("triton_runs")
SIZES = SetSizes(2048, recent=508, sinks=4)
SHAPES = [(1, 40_976), (64, 131_088), (3, 5_001)]


@contextmanager
def allocated():
    """A list that has the bytes of everything that was allocated inside, in the end."""
    found, inside = [], []
    with pytest.MonkeyPatch.context() as patch, launches_recorded():
        for name in ("empty", "zeros"):
            patch.setattr(torch, name, counting(getattr(torch, name), found, inside))
        yield found


def counting(make, found, inside):
    """`make`, which adds to `found`; not within another one: on meta tensors, zeros are made of what is empty."""

    def counted(*args, **kwargs):
        inside.append(make)
        tensor = make(*args, **kwargs)
        inside.pop()
        if not inside:
            found.append(tensor.nbytes)
        return tensor

    return counted


@pytest.mark.parametrize(("batch", "width"), SHAPES)
@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
def test_logits_and_scores(batch, width, aggregate):
    q, keys = empty(batch, 32, 128, dtype=torch.bfloat16), empty(64, 8, 128, dtype=torch.bfloat16)
    lens = empty(batch)
    with allocated() as found:
        lse, logits = score_context(q, keys, empty(batch, width), lens, Scaling(1.0), score_beyond=2048, **TRITON)
    assert scratch.logits_bytes(batch, 32, width) in found
    with allocated() as found:
        score_tokens(logits, lens, SIZES, aggregate=aggregate, lse=lse, **TRITON)
    assert sum(found) == scratch.scores_bytes(batch, 32, width, SIZES, aggregate)


@pytest.mark.parametrize(("batch", "width"), SHAPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_sets(batch, width, grouped):
    slots, lens, scores = empty(batch, width), empty(batch), empty(batch, width, dtype=torch.float32)
    with launches_recorded():
        groups = find_prefix_groups(slots, lens, granule=128, **TRITON) if grouped else None
    with allocated() as found:
        if groups is None:
            choose_tokens(scores, lens, SIZES, slots=slots, **TRITON)
        else:
            choose_for_groups(scores, lens, groups, SIZES, combine="max", slots=slots, **TRITON)
    assert sum(found) == scratch.choice_bytes(batch, width, SIZES.budget, grouped=grouped)


@pytest.mark.parametrize("batch", [1, 64, 256])
def test_attention(batch):
    q, cache = empty(batch, 32, 128, dtype=torch.bfloat16), empty(64, 8, 128, dtype=torch.bfloat16)
    counted = scratch.attention_bytes(batch, 32, 8, 128, MULTIPROCESSORS)
    width, lens = 131_088, empty(batch)
    slots, sets = empty(batch, width), empty(batch, 2048)
    with allocated() as found:
        decode_with_scores(q, cache, cache, slots, lens, Scaling(1.0), score_beyond=9, **TRITON)
    found.remove(scratch.logits_bytes(batch, 32, width))
    assert 0.45 * counted < sum(found) <= counted
    with allocated() as found:
        sparse_decode(q, cache, cache, sets, lens, scale=1.0, **TRITON)
    assert sum(found) <= counted
