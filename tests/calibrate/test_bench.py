"""What candidates are compared by: parts of items, coverage, and the search over them."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sgl_lim.calibrate.bench import ItemScore, Part, work
from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.continuations import continued
from sgl_lim.calibrate.coverage import CoveragePass, record
from sgl_lim.calibrate.explore import Effort, Space, Trials, explore
from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.choices import method_of
from sgl_lim.evaluate.items import Item, Suite
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.step_rows import Rows
from sgl_lim.methods import Full

VOCABULARY, DEPTH, BUDGET = 96, 4, 24


class Tokenizer:
    eos_token_id = None


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Random weights, drawn wide, so that attention is peaked."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return Checkpoint(model, Tokenizer())


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def suites() -> list[Suite]:
    shared = tokens(64, 1)
    needles = tuple(Item([*shared, *tokens(9, n)], tokens(7, 10 + n), scored_from=4) for n in range(3))
    return [Suite("t", "text", (Item(tokens(20, 2), tokens(12, 3), scored_from=1),)), Suite("n", "needles", needles)]


def by_hand(checkpoint: Checkpoint, item: Item, method) -> tuple[float, float, float, bool, float]:
    """Counted tokens, divergence, agreement, whether all is right, and log-probability, sequence by sequence."""
    prompt = checkpoint.prefill(item.prompt)
    dense, found = (
        checkpoint.decode(prompt, item.right[:-1], one, rows=64).logits.log_softmax(-1)[item.scored_from - 1 :]
        for one in (Full(), method)
    )
    right = torch.tensor(item.right[item.scored_from :])
    lens = torch.arange(len(right)) + len(item.prompt) + item.scored_from
    counts = lens > method.budget
    divergence = ((dense.exp() * (dense - found)).sum(-1) * counts).sum().item()
    agreed = ((dense.argmax(-1) == found.argmax(-1)) & counts).sum().item()
    sure = found.gather(1, right[:, None]).sum().item()
    return counts.sum().item(), divergence, agreed, bool((found.argmax(-1) == right).all()), sure


@pytest.mark.parametrize("rows", [5, 64])
def test_a_part_scores_as_items_one_by_one(checkpoint: Checkpoint, suites: list[Suite], rows: int) -> None:
    told: list[int] = []
    part = Part(checkpoint, suites, rows=rows, done=told.append)
    assert sum(told) == sum(work(suites))
    method = method_of("lessismore", BUDGET, (1,))
    for score, (suite, item) in zip(part.score(method), [(s, i) for s in suites for i in s.items], strict=True):
        expected = by_hand(checkpoint, item, method)
        found = (score.tokens, score.divergence, score.agreed, score.whole, score.log_probability)
        assert found == pytest.approx(expected, abs=1e-3) and (score.suite, score.task) == (suite.name, suite.task)
        assert score.divergence > 0.01
    # Of the text, the first five tokens are within the budget.
    assert [score.tokens for score in part.score(method)][:2] == [7, 3]
    for score, full in zip(part.score(Full()), part.full, strict=True):
        assert (score.divergence, score.whole, score.log_probability) == (
            0,
            full.whole,
            pytest.approx(full.log_probability, abs=1e-4),
        )


def test_of_an_item_that_ends_what_full_attention_says_behind_it_counts(checkpoint: Checkpoint) -> None:
    method, prompt, right = method_of("lessismore", BUDGET, (1,)), tokens(40, 5), tokens(8, 6)
    dense = checkpoint.decode(checkpoint.prefill(prompt), right, Full(), rows=64).logits
    longer = [*right, int(dense[-1].argmax())]
    scores = [
        Part(checkpoint, [Suite("c", "chains", (item,))], rows=5, done=lambda _: None).score(method)
        for item in (Item(prompt, right, ends=True), Item(prompt, longer))
    ]
    assert scores[0] == scores[1] and scores[0][0].tokens == len(right)


def test_coverage_is_attention_that_lies_in_the_sets(checkpoint: Checkpoint) -> None:
    """Two layers of one step, whose attention and sets are computed here."""
    torch.manual_seed(3)
    rule, length, rows = method_of("lessismore", BUDGET, (0,)), 60, 4
    lens = torch.arange(length - rows + 1, length + 1, dtype=torch.int32)
    slots = torch.arange(64, dtype=torch.int32).repeat(rows, 1)
    pool = Pool(used=length)
    one = CoveragePass(rule, pool, Rows(torch.zeros(rows, dtype=torch.int64), slots, lens), heads=6, depth=2)
    sets, weights = [], []
    for layer in range(2):
        k, v = (torch.randn(1, 2, length, 8) for _ in range(2))
        pool.store(layer, torch.arange(length), k, v)
        q = 3 * torch.randn(1, 6, rows, 8)
        out = one.attend(layer, q, k[:, :, -rows:], v[:, :, -rows:], 8**-0.5)
        logits = torch.einsum("hrd,hld->rhl", q[0], k[0].repeat_interleave(3, 0)) * 8**-0.5
        logits = logits.masked_fill(torch.arange(length) >= lens[:, None, None], -math.inf)
        weights.append(logits.softmax(-1))
        expected = torch.einsum("rhl,hld->rhd", weights[-1], v[0].repeat_interleave(3, 0))
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
        chosen, counts = rule.choose(
            rule.score(logits, lens, lse=logits.logsumexp(-1), kv_heads=2, heads=one._heads), lens, None
        )
        sets.append([set(row[:count].tolist()) for row, count in zip(chosen, counts, strict=True)])
    for i, j in ((0, 0), (0, 1), (1, 1)):
        shares = [weights[j][row][:, sorted(sets[i][row])].sum(-1).mean().item() for row in range(rows)]
        assert one.sums[i, j].item() == pytest.approx(sum(shares), abs=1e-4)
    assert one.sums[1, 0] == 0 and one.rows == rows


def test_what_is_recorded_is_a_mean_over_rows_beyond_the_budget(checkpoint: Checkpoint, suites: list[Suite]) -> None:
    part = Part(checkpoint, suites, rows=16, done=lambda _: None)
    recall = record(checkpoint, part.pool, part.rows, method_of("lessismore", BUDGET, (0,)))
    assert all(0 < recall[i][j] <= 1 for i in range(DEPTH) for j in range(i, DEPTH))
    with pytest.raises(ValueError, match="longer than the budget 100"):
        record(checkpoint, part.pool, part.rows, method_of("lessismore", 100, (0,)))


def test_a_prompt_is_continued_greedily_until_its_end(checkpoint: Checkpoint) -> None:
    prompts = [tokens(20, 5), tokens(33, 6)]
    told: list[int] = []
    found = continued(checkpoint, prompts, tokens=10, done=told.append)
    for prompt, item in zip(prompts, found, strict=True):
        text = list(prompt)
        with torch.inference_mode():
            for _ in range(10):
                text.append(int(checkpoint.prefill(text).logits[-1].argmax()))
        assert (item.prompt, item.right, item.scored_from) == (prompt, text[len(prompt) :], 1)
    assert sum(told) == 53 + 18
    ending = Tokenizer()
    ending.eos_token_id = found[0].right[4]
    stops = Checkpoint(checkpoint.model, ending)
    assert continued(stops, prompts, tokens=10, done=told.append)[0].right == found[0].right[:5]


class FakePart:
    """A world in which layer 9 has to read a set of layer 6 or 7, and all else costs little."""

    def __init__(self) -> None:
        self.full = [ItemScore("t", "text", 100, 0.0, 100.0, False, 0.0)]
        self.scored: list[Candidate] = []

    def score(self, candidate: Candidate) -> list[ItemScore]:
        self.scored.append(candidate)
        read = max((layer for layer in candidate.layers if layer < 9), default=0)
        loss = (0.2 if read not in (6, 7) else 0.0) + 0.1 / (1 + len(candidate.layers)) + 0.001 * candidate.layers[0]
        return [ItemScore("t", "text", 100, 100 * loss, 90.0, False, 0.0)]


def test_the_search_finds_what_coverage_does_not_show() -> None:
    recall = [[1.0 if i == j else 0.9 - 0.02 * (j - i) for j in range(12)] for i in range(12)]
    parts = {0: FakePart(), 1: FakePart()}
    trials = Trials(parts, lambda candidate: candidate)
    spaced = Candidate((2, 5, 8), "set")
    effort = Effort(first=6, rounds=4, each=4, finalists=6, refine=2)
    found = explore(trials, recall, Space(12, 3, 2.0, ("set", "context")), effort, [spaced])
    best = min(found, key=lambda one: one.divergence)
    read = max(layer for layer in best.candidate.layers if layer < 9)
    assert best.candidate.layers[0] == 0 and len(best.candidate.layers) == 4 and read in (6, 7)
    # The reference reads more than the limit and is there all the same; nothing is decoded twice.
    assert found[0].candidate == spaced and len(set(parts[0].scored)) == len(parts[0].scored)
    assert len(parts[0].scored) <= effort.quick + 3 and {one.attends for one in parts[0].scored} == {"set", "context"}
    assert all(one.candidate.full_reads <= 2.0 for one in found[1:])
    again = explore(
        Trials({0: FakePart(), 1: FakePart()}, lambda candidate: candidate),
        recall, Space(12, 3, 2.0, ("set", "context")), effort, [spaced],
    )  # fmt: skip
    assert again == found


class TellsMore(FakePart):
    """The same world on more items, which also show that a layer behind 9 has to select."""

    def score(self, candidate: Candidate) -> list[ItemScore]:
        (found,) = super().score(candidate)
        loss = found.divergence + (0.0 if 10 in candidate.layers else 5.0)
        return [replace(found, divergence=loss)]


def test_what_only_the_larger_part_tells_is_found_in_the_end() -> None:
    recall = [[1.0 if i == j else 0.9 - 0.02 * (j - i) for j in range(12)] for i in range(12)]

    def best(refine: int) -> tuple[int, ...]:
        trials = Trials({0: FakePart(), 1: TellsMore()}, lambda candidate: candidate)
        effort = Effort(first=6, rounds=4, each=16, finalists=4, refine=refine)
        found = explore(trials, recall, Space(12, 3, 2.0, ("set",)), effort, [])
        assert len(trials.tried(1)) <= effort.finalists + effort.refined
        return min(found, key=lambda one: one.divergence).candidate.layers

    assert 10 not in best(0) and 10 in best(3)
