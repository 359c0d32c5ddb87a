"""Is what the model trains on the task, and does each row see what it should?"""

import random

import pytest
import torch
from chain_tracer.data import ANSWER, BOS, EOS, HEADER, IGNORE, PAD, Layout, draw_batch
from chain_tracer.masks import SINKS, TrainingMasks
from small_qwen3.masks import block_mask
from torch.nn.attention.flex_attention import create_block_mask

from sgl_lim.tasks.chains import make_chain, vocabulary

WORDS = vocabulary()


class Replay(random.Random):
    """A source of randomness that makes `make_chain` draw the problem that a text states."""

    def __init__(self, cycle: list[int], increments: list[int], order: list[int]) -> None:
        super().__init__()
        self.cycle, self.increments, self.order = cycle, iter(increments), order

    def sample(self, population, k):
        return self.cycle

    def randint(self, a, b):
        return next(self.increments)

    def shuffle(self, x):
        x[:] = [x[i] for i in self.order]


def restate(prompt: str) -> tuple[str, str]:
    """Prompt and solution that `make_chain` writes for the problem in `prompt`."""
    body, _, query = prompt.partition("? ")
    facts = [f.split() for f in body.split(" ;") if f.strip()]
    follow = {f[0]: (f[2], int(f[4])) for f in facts}
    start, steps = query.split()[0], int(query.split()[2])
    cycle = [start]
    while (after := follow[cycle[-1]][0]) != start:
        cycle.append(after)
    order = [cycle.index(f[0]) for f in facts]
    replay = Replay([int(n[1:]) for n in cycle], [follow[n][1] for n in cycle], order)
    problem = make_chain(replay, num_facts=len(facts), num_steps=steps)
    return problem.prompt, problem.solution


@pytest.mark.parametrize(("facts", "low", "high"), [(5, 1, 5), (64, 4, 64), (97, 31, 33)], ids=str)
def test_batches_have_the_tasks_format(facts: int, low: int, high: int) -> None:
    torch.manual_seed(facts)
    layout = Layout.fit(facts=facts, min_steps=low, max_steps=high, length=2048)
    tokens, targets = draw_batch(layout, 2, "cpu")
    seen = 0
    for row, wanted in zip(tokens, targets, strict=True):
        for document in range(layout.documents):
            begin = document * (layout.context + layout.chains * layout.chain)
            context = row[begin : begin + layout.context].tolist()
            assert context[0] == BOS
            for c in range(layout.chains):
                at = begin + layout.context + c * layout.chain
                chain, follow = row[at : at + layout.chain].tolist(), wanted[at : at + layout.chain].tolist()
                end = chain.index(EOS)
                assert set(chain[end + 1 :]) <= {PAD}
                assert follow == [IGNORE] * (HEADER - 1) + chain[HEADER : end + 1] + [IGNORE] * (layout.chain - end)
                prompt = " ".join(WORDS[i] for i in context[1:] + chain[:HEADER])
                solution = " ".join(WORDS[i] for i in chain[HEADER:end])
                assert low <= solution.count("->") <= high
                assert (prompt, solution) == restate(prompt)
                seen += 1
    assert seen == 2 * layout.documents * layout.chains
    assert (targets == ANSWER).sum() == seen


def test_restate_is_the_identity_on_make_chain() -> None:
    problem = make_chain(random.Random(3), num_facts=40, num_steps=9)
    assert restate(problem.prompt) == (problem.prompt, problem.solution)


def test_a_row_is_as_long_as_the_layout_says_or_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="needed for 400 facts"):
        Layout.fit(facts=400, min_steps=4, max_steps=64, length=2048)


@pytest.mark.parametrize("window", [12, 31])
def test_masks_against_their_definition(window: int) -> None:
    layout = Layout.fit(facts=7, min_steps=1, max_steps=3, length=300)
    masks = TrainingMasks(300, "cpu")
    masks.set(layout, window=window)
    document, chain, position, solution = layout.coordinates.tolist()
    for q in range(300):
        for k in range(300):
            reachable = document[q] == document[k] and position[k] <= position[q] and chain[k] in (0, chain[q])
            near = k == q or position[k] < SINKS or position[k] > position[q] - window
            assert masks.open[q, k] == reachable
            assert masks.closed[q, k] == (reachable and (near or not solution[q]))


def test_block_mask_is_pytorchs() -> None:
    layout = Layout.fit(facts=40, min_steps=1, max_steps=9, length=1024)
    masks = TrainingMasks(1024, "cpu")
    masks.set(layout, window=20, keep=0.1)
    for visible, rule in ((masks.open, masks._open_rule), (masks.closed, masks._closed_rule)):
        ours, theirs = block_mask(visible, rule), create_block_mask(rule, None, None, 1024, 1024, device="cpu")
        assert ours.seq_lengths == theirs.seq_lengths
        for name in (
            "kv_num_blocks",
            "kv_indices",
            "full_kv_num_blocks",
            "full_kv_indices",
            "q_num_blocks",
            "q_indices",
        ):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
