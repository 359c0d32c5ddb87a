"""A lossless server's sampled answers against exact probabilities of the dense model, computed by transformers."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_checkpoint import write_tokenizer
from support.exact_sampling import VOCAB, Parameters, adjusted, exact_answers, fit
from support.fleet import NEXT_PYTHON, interpreter
from support.server import Server, ServerPool, ServerSpec
from support.wide_weights import draw_wide

pytestmark = pytest.mark.served

LENGTH = 4
"""The prefill answers the first token, rounds the others."""
AT_ONCE, BATCHES = 50, {"current": 16, "next": 6}
"""Requests of each kind in a batch, and batches by SGLang's release."""
END = 5
LIKELY = 1e-4


def outside_pairs(answered: Sequence[int]) -> set[int]:
    """What the regular expression below forbids."""
    return set(range(VOCAB)) - ({2, 3, 4} if len(answered) % 2 else {0, 1})


REGEX = "((w0|w1)(w2|w3|w4)){9}"
KINDS = {
    "temperature": Parameters(temperature=0.8),
    "top-k": Parameters(top_k=3),
    "top-p": Parameters(temperature=1.3, top_p=0.7),
    "min-p": Parameters(min_p=0.2),
    "frequency penalty": Parameters(frequency_penalty=1.0),
    "presence penalty": Parameters(presence_penalty=1.5),
    "repetition penalty": Parameters(repetition_penalty=1.7),
    "fewest tokens": Parameters(min_new_tokens=3, stop_token_ids=(END,)),
    "logit bias": Parameters(logit_bias={1: 2.0, 3: -1.5}),
    "grammar": Parameters(forbidden=outside_pairs),
}


def prompt() -> list[int]:
    return torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(2)).tolist()


def write_six_words(folder: Path) -> Path:
    """A Qwen3 checkpoint of six words, w0 to w5, whose attention is peaked, so that drafts by few tokens often fail."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    draw_wide(model, qk_norms=2.0)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB, 512)
    return folder


class Dense:
    """The checkpoint in float64, one forward pass for each answer so far."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self._logits: dict[tuple[int, ...], list[float]] = {}
        with torch.no_grad():
            for length in range(LENGTH):
                answers = list(itertools.product(range(VOCAB), repeat=length))
                tokens = torch.tensor([[*prompt(), *answer] for answer in answers])
                self._logits.update(zip(answers, model(tokens).logits[:, -1].tolist(), strict=True))

    def __call__(self, answered: Sequence[int]) -> list[float]:
        return self._logits[tuple(answered)]


def as_request(kind: Parameters) -> dict[str, Any]:
    """Sampling parameters as SGLang's `/generate` takes them."""
    names = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    sent: dict[str, Any] = {name: getattr(kind, name) for name in (*names, "min_new_tokens")}
    sent |= {"top_k": kind.top_k if kind.top_k < VOCAB else -1, "max_new_tokens": LENGTH, "ignore_eos": True}
    sent |= {"regex": REGEX} if kind.forbidden else {}
    sent |= {"stop_token_ids": list(kind.stop_token_ids)} if kind.stop_token_ids else {}
    sent |= {"logit_bias": {str(token): bias for token, bias in kind.logit_bias.items()}} if kind.logit_bias else {}
    return sent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_six_words(tmp_path_factory.mktemp("six-words"))


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("next", marks=pytest.mark.skipif(NEXT_PYTHON not in os.environ, reason=f"no {NEXT_PYTHON}")),
    ],
)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lossless(checkpoint: Path, release: str, pool: ServerPool) -> Server:
    args = ("--attention-backend", "lessismore", "--lim-budget", "16", "--lim-selection-layers", "1")
    args += ("--speculative-algorithm", "LESSISMORE", "--speculative-num-steps", "2", "--lim-vary-drafts", "off")
    args += ("--max-running-requests", "640", "--max-total-tokens", "40000", "--dtype", "float32")
    # SGLang compiles one of its penalties, which takes two minutes on a busy machine.
    env = (("TORCHDYNAMO_DISABLE", "1"),)
    return pool.get(ServerSpec(f"lossless-sampling-{release}", checkpoint, args, env, interpreter(release)))


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Dense:
    return Dense(checkpoint)


def test_sampled_answers_are_the_dense_models(dense: Dense, release: str, lossless: Server) -> None:
    params = [as_request(kind) for kind in KINDS.values() for _ in range(AT_ONCE)]
    answers: dict[str, list[list[int]]] = {name: [] for name in KINDS}
    for _ in range(BATCHES[release]):
        body = {"input_ids": [prompt()] * len(params), "sampling_params": params}
        reply = lossless.post("/generate", body)
        assert reply.status_code == 200, reply.text
        tokens = [item["output_ids"] for item in reply.json()]
        for place, name in enumerate(KINDS):
            answers[name] += tokens[place * AT_ONCE : (place + 1) * AT_ONCE]
    fits = {
        name: fit(torch.tensor(answers[name]), exact_answers(kind, model=dense, before=(), length=LENGTH))
        for name, kind in KINDS.items()
    }
    counters = lossless.counters()
    assert min(fits.values()) > LIKELY, fits
    # Drafts were rejected and accepted, so that both were looked at.
    assert 0.1 < counters["drafts_accepted"] / counters["drafts_proposed"] < 0.9, counters


def test_logprobs_of_a_run_are_the_dense_models(dense: Dense, lossless: Server) -> None:
    several = 8
    params = [as_request(kind) for kind in KINDS.values() for _ in range(several)]
    body = {"input_ids": [prompt()] * len(params), "sampling_params": params, "return_logprob": True}
    reply = lossless.post("/generate", {**body, "top_logprobs_num": VOCAB, "token_ids_logprob": [3, 0]})
    assert reply.status_code == 200, reply.text
    kinds = [kind for kind in KINDS.values() for _ in range(several)]
    for kind, item in zip(kinds, reply.json(), strict=True):
        tokens, meta = item["output_ids"], item["meta_info"]
        for place, token in enumerate(tokens):
            logits = torch.tensor(adjusted(kind, tokens[:place], dense))
            expected = (logits / kind.temperature).log_softmax(-1)
            assert meta["output_token_logprobs"][place][:2] == [pytest.approx(expected[token].item(), abs=1e-3), token]
            top = {one[1]: one[0] for one in meta["output_top_logprobs"][place]}
            asked = {one[1]: one[0] for one in meta["output_token_ids_logprobs"][place]}
            assert list(asked) == [3, 0] and len(top) == VOCAB
            for found in (top, asked):
                for one, logprob in found.items():
                    possible = expected[one] > -50
                    assert logprob == pytest.approx(expected[one].item(), abs=1e-3) if possible else logprob < -50


def test_an_answer_that_no_token_can_go_on_ends_alone(lossless: Server) -> None:
    """After four words comes a character that no token has. Two drafts reach beyond it from the places before."""
    four_words = "((w0|w1)(w2|w3|w4)){2}"
    plain = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    hopeless, fewest = {**plain, "regex": four_words + "漢"}, {"min_new_tokens": 9, "stop_token_ids": [END]}
    # The grammar allows the first token, which is taken where nothing is left; the bias does not.
    biased = {**plain, "regex": "w2(w0|w1){8}", "logit_bias": {"0": -3e38, "1": -3e38}}
    kinds = [
        (hopeless, "after 4 generated tokens: its grammar"),
        ({**hopeless, "temperature": 1}, "after 4 generated tokens: its grammar"),
        ({**plain, "regex": four_words, **fewest}, "and min_new_tokens, which forbids to stop, allowed none"),
        (biased, "after 1 generated tokens: its grammar"),
        ({**biased, "temperature": 1}, "and logit_bias allowed none"),
        ({**hopeless, "max_new_tokens": 4}, None),
        (plain, None),
    ]

    def ask(sampling: dict[str, Any]) -> Any:
        return lossless.post("/generate", {"input_ids": prompt(), "sampling_params": sampling})

    alone = ask(plain).json()["output_ids"]
    with ThreadPoolExecutor(len(kinds)) as clients:
        for _ in range(3):
            replies = list(clients.map(lambda kind: ask(kind[0]), kinds))
            for reply, (_, said) in zip(replies, kinds, strict=True):
                assert reply.status_code == (400 if said else 200) and (said or "") in reply.text, reply.text
            assert replies[-2].json()["meta_info"]["finish_reason"]["type"] == "length"
            assert replies[-1].json()["output_ids"] == alone
    lossless.check_alive()
