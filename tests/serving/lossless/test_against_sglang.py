"""Penalties, filters, log-probabilities and grammars of a run against SGLang's own code, one token at a time."""

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from sgl_lim.serving.lossless.accept import Accepted
from sgl_lim.serving.lossless.distributions import rules_of
from sgl_lim.serving.lossless.grammar import RunGrammar
from sgl_lim.serving.lossless.logprobs import attach_logprobs
from sgl_lim.serving.lossless.penalties import PenaltyMemory
from support.sampling_info import TOP_K_ALL, sampling_info

VOCAB = 13


class Request:
    """SGLang's Req as far as penalties see it."""

    def __init__(self, rid: str, prompt: list[int], **params: Any) -> None:
        self.rid, self.origin_input_ids, self.output_ids = rid, array("q", prompt), array("q")
        self.sampling_params = SamplingParams(**params)
        self.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=3)
        self.eos_token_ids = {3}


def requests() -> list[Request]:
    return [
        Request("all", [1, 2], frequency_penalty=0.7, presence_penalty=-0.4, repetition_penalty=1.3, min_new_tokens=4),
        Request("none", [5]),
        Request("long", [1, 2, 3, 4], min_new_tokens=7, stop_token_ids=[6, 0]),
        Request("frequent", [9, 9, 9], frequency_penalty=1.5),
    ]


class Ordinary:
    """The logits of ordinary decoding, a token at a time: SGLang's penalizers without the overlap scheduler."""

    class Batch:
        device = "cpu"

    def __init__(self, reqs: list[Request]) -> None:
        self._batch = self.Batch()
        self._batch.reqs = reqs  # type: ignore[attr-defined]
        kinds = {
            penaltylib.BatchedFrequencyPenalizer,
            penaltylib.BatchedMinNewTokensPenalizer,
            penaltylib.BatchedPresencePenalizer,
            penaltylib.BatchedRepetitionPenalizer,
        }
        self._all = penaltylib.BatchedPenalizerOrchestrator(VOCAB, self._batch, kinds)

    def step(self, last: Tensor, logits: Tensor) -> Tensor:
        """Logits [B, V] after the answered tokens up to `last` int64 [B]."""
        self._all.cumulate_output_tokens(last)
        rows = torch.ones(len(last), 1)
        info = SamplingBatchInfo(
            *(rows, rows[:, 0], rows[:, 0], rows[:, 0], False, False, False, False, False, VOCAB),
            penalizer_orchestrator=self._all,
            device="cpu",
        )
        logits = logits.clone()
        info.copy_for_forward().apply_logits_bias(logits)
        return logits


def test_penalties_at_each_place_are_those_of_ordinary_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    # SGLang compiles one of its functions, which takes a minute here.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    torch.manual_seed(5)
    reqs, drafts = requests(), 3
    memory, ordinary = PenaltyMemory(VOCAB, "cpu"), Ordinary(reqs)
    memory.prefill(reqs)
    answers = torch.randint(VOCAB, (len(reqs), 40))
    answered = [0] * len(reqs)
    raw = torch.randn(len(reqs), 40, VOCAB)
    expected = torch.stack([ordinary.step(answers[:, place], raw[:, place]) for place in range(40)], 1)
    for _ in range(8):
        start = torch.tensor(answered)
        run = answers.gather(1, start[:, None] + torch.arange(drafts + 1))
        lens = torch.tensor([len(req.origin_input_ids) for req in reqs]) + start
        penalties = memory.of(reqs, run[:, 0], lens)
        assert penalties is not None
        places = (start[:, None] + torch.arange(drafts + 1))[:, :, None].expand(-1, -1, VOCAB)
        wanted = expected.gather(1, places)
        verified = raw.gather(1, places)
        for place in range(drafts):
            drafted = raw.gather(1, places)[:, place : place + 1]
            penalties.apply(drafted, run[:, 1 : place + 1], first=place)
            torch.testing.assert_close(drafted[:, 0], wanted[:, place])
        penalties.apply(verified, run[:, 1:], first=0)
        torch.testing.assert_close(verified, wanted)
        accept_lens = torch.randint(1, drafts + 2, (len(reqs),), dtype=torch.int32)
        penalties.learn(run[:, 1:], accept_lens)
        answered = [before + more for before, more in zip(answered, accept_lens.tolist(), strict=True)]


def test_requests_come_go_and_come_back() -> None:
    memory = PenaltyMemory(VOCAB, "cpu")
    first, second, plain = (
        Request("a", [1], frequency_penalty=1.0),
        Request("b", [1], frequency_penalty=2.0),
        requests()[1],
    )
    memory.prefill([first, plain])
    here = memory.of([first, plain], torch.tensor([4, 4]), torch.tensor([1, 1]))
    assert here is not None
    here.learn(torch.tensor([[7, 8], [7, 8]]), torch.tensor([2, 3]))
    memory.prefill([second])
    here = memory.of([plain, second, first], torch.tensor([8, 4, 2]), torch.tensor([4, 1, 3]))
    logits = torch.zeros(3, 1, VOCAB)
    assert here is not None
    here.apply(logits, torch.empty(3, 0, dtype=torch.int64), 0)
    assert [row.nonzero()[:, 1].tolist() for row in logits] == [[], [4], [2, 4, 7]]
    # The first is retracted: what it had answered by then counts, what was under way does not.
    assert memory.of([plain], torch.tensor([1]), torch.tensor([5])) is None
    first.output_ids.extend([4, 9])
    memory.prefill([first])
    here = memory.of([first], torch.tensor([9]), torch.tensor([3]))
    assert here is not None
    logits = torch.zeros(1, 1, VOCAB)
    here.apply(logits, torch.empty(1, 0, dtype=torch.int64), 0)
    assert logits[0, 0, 4] == -1 and logits[0, 0, 9] == -2 and logits.count_nonzero() == 2


def test_a_request_that_was_never_prefilled_is_named() -> None:
    with pytest.raises(RuntimeError, match="lost"):
        PenaltyMemory(VOCAB, "cpu").of([Request("lost", [1], min_new_tokens=2)], torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("with_min_p", [False, True])
def test_what_can_be_drawn_is_what_sglang_draws_from(with_min_p: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    rows = 60
    info = sampling_info(
        (0.3 + 2 * torch.rand(rows)).tolist(),
        [[TOP_K_ALL, 1, 4, 9][row % 4] for row in range(rows)],
        [[1.0, 0.5, 0.9][row % 3] for row in range(rows)],
        [[0.0, 0.1][row % 2] * with_min_p for row in range(rows)],
    )
    logits = 3 * torch.randn(rows, VOCAB)
    seen: list[Tensor] = []

    def multinomial(weights: Tensor, num_samples: int) -> Tensor:
        seen.append(weights.clone())
        return torch.zeros(len(weights), 1, dtype=torch.int64)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    probs = (logits / info.temperatures).softmax(-1)
    sglang_sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs, info.top_ks, info.top_ps, info.min_ps, with_min_p, None, torch.arange(rows)
    )
    ours = rules_of(info).probabilities(logits[:, None])[:, 0].sort(-1, descending=True).values
    torch.testing.assert_close(ours, seen[0] / seen[0].sum(-1, keepdim=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SGLang's kernels run on a GPU")
@pytest.mark.parametrize("with_min_p", [False, True])
def test_kernels_keep_what_sorting_keeps(with_min_p: bool) -> None:
    torch.manual_seed(8)
    rows, vocab = 48, 151_936
    info = sampling_info(
        [1.0] * rows,
        [[TOP_K_ALL, 1, 40, 1000][row % 4] for row in range(rows)],
        [[1.0, 0.5, 0.95][row % 3] for row in range(rows)],
        [[0.0, 0.02][row % 2] * with_min_p for row in range(rows)],
    )
    filters = rules_of(info, flashinfer=True).filters
    assert filters is not None
    names = ("top_ks", "top_ps", "min_ps")
    on_gpu = replace(filters, **{name: each.cuda() for name in names if (each := getattr(filters, name)) is not None})
    probs = (3 * torch.randn(rows, 7, vocab)).softmax(-1)
    expected, found = filters.keep_by_sorting(probs), on_gpu.keep_by_kernels(probs.cuda()).cpu()
    expected, found = expected / expected.sum(-1, keepdim=True), found / found.sum(-1, keepdim=True)
    # At a threshold rounding decides, so a token or two may differ, of next to no weight.
    assert float((expected - found).abs().sum(-1).max()) < 1e-3


@pytest.mark.parametrize("greedy", [False, True])
def test_logprobs_are_those_of_ordinary_decoding(greedy: bool) -> None:
    torch.manual_seed(7)
    logits = torch.randn(6, VOCAB)
    info = sampling_info([0.0, 0.0] if greedy else [0.5, 0.0])
    accepted = Accepted(
        torch.tensor([[4, 5, 0], [6, 7, 8]], dtype=torch.int32), torch.tensor([2, 3]), torch.tensor([5, 8])
    )
    batch = SimpleNamespace(
        seq_lens=torch.tensor([9, 9]), sampling_info=info, top_logprobs_nums=[2, 0], token_ids_logprobs=[None, [1, 3]]
    )
    out = SimpleNamespace(next_token_logits=None)
    attach_logprobs(batch, out, logits.clone(), accepted)
    expected = (logits.view(2, 3, VOCAB) / info.temperatures[:, :, None]).log_softmax(-1)
    torch.testing.assert_close(out.next_token_logprobs, expected.gather(2, accepted.tokens[:, :, None].long())[:, :, 0])
    best = expected.flatten(0, 1).topk(2)
    for place in range(6):
        top = 2 if place < 3 else 0
        assert out.next_token_top_logprobs_idx[place].tolist() == best.indices[place, :top].tolist()
        torch.testing.assert_close(out.next_token_top_logprobs_val[place], best.values[place, :top])
    torch.testing.assert_close(out.next_token_token_ids_logprobs_val[4], expected[1, 1, [1, 3]])


WORDS = ["a", "b", "c", "ab", "bc", "1", "2", "</s>"]


def grammar(regex: str) -> Any:
    """SGLang's grammar object over `WORDS`."""
    info = xgrammar.TokenizerInfo(WORDS, stop_token_ids=[7])
    compiled = xgrammar.GrammarCompiler(info).compile_regex(regex)
    matcher = xgrammar.GrammarMatcher(compiled, max_rollback_tokens=20)
    return xgrammar_backend.XGrammarGrammar(matcher, len(WORDS), compiled, None)


def test_a_grammar_is_walked_along_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    # This process has no server's platform, so masks are neither pinned nor applied by SGLang.
    monkeypatch.setattr(
        xgrammar_backend, "_allocate_token_bitmask", lambda vocab, rows: torch.full((rows, 1), -1, dtype=torch.int32)
    )
    regex, run = "(ab|bc)*[12]", [3, 3, 4, 5]  # "ab" was answered; "ab", "bc", "1" are drafted
    wrong = [3, 1, 0, 5]  # "b", "a" are drafted, and "a" is not allowed behind "b"
    reqs = [
        SimpleNamespace(grammar=grammar(regex)),
        SimpleNamespace(grammar=None),
        SimpleNamespace(grammar=grammar(regex)),
    ]
    for req in reqs:
        if req.grammar is not None:
            req.grammar.accept_token(3)
    batch = SimpleNamespace(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=len(WORDS), grammar_mask="old"))
    mask = RunGrammar(batch, torch.tensor([run, run, wrong])).mask(None)
    assert mask is not None
    bits = (mask.vocab_mask >> torch.arange(len(WORDS)) & 1).view(3, 4, len(WORDS)).bool()  # type: ignore[attr-defined]
    stepwise = grammar(regex)
    for place, token in enumerate(run):
        stepwise.accept_token(token)
        allowed = torch.full((1, 1), -1, dtype=torch.int32)
        stepwise.fill_vocab_mask(allowed, 0)
        assert bits[0, place].tolist() == (allowed[0] >> torch.arange(len(WORDS)) & 1).bool().tolist()
    assert bits[1].all()
    assert not bits[2, 1, 0] and bits[2, 1, 2]
    assert reqs[0].grammar.accepted_tokens == [3]
