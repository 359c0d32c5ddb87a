"""Is a checkpoint's decode exact where it should be, and the same as that of our own models' bench?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from chain_tracer.model import ChainTracer
from small_qwen3.decode import decode as own_decode
from small_qwen3.decode import prefill as own_prefill
from small_qwen3.model import SmallQwen3
from small_qwen3.model import load_checkpoint as load_own
from source_reader.model import PUBLISHED
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

from sgl_lim.evaluate.checkpoint import Checkpoint, Prompt, check_config, load
from sgl_lim.evaluate.choices import FULL, ROUNDING, Choice, method_of
from sgl_lim.evaluate.items import Item, Suite
from sgl_lim.evaluate.measure import measure, measured
from sgl_lim.evaluate.step_rows import UnsupportedModel
from sgl_lim.methods import METHODS, Full
from support.gates import spec_with_gates
from support.tiny_transformers import DEPTH, KINDS, SIZES, VOCABULARY, tiny

ROOT = Path(__file__).parents[2]
PROMPT = 100


def named(name: str) -> str:
    """The spec of a method for `tiny` models."""
    return spec_with_gates(
        name, DEPTH, *(SIZES[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    )


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, (150,)).tolist()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(tiny("qwen3"), tokenizer=None)


@pytest.mark.parametrize("kind", KINDS)
def test_full_attention_is_that_of_transformers(kind: str, tokens: list[int]) -> None:
    model = tiny(kind)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    checkpoint = Checkpoint(model, tokenizer=None)
    prompt = checkpoint.prefill(tokens[:PROMPT])
    found = checkpoint.decode(prompt, tokens[PROMPT:], Full(), rows=16)
    torch.testing.assert_close(prompt.logits[0], expected[PROMPT - 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected[PROMPT:], rtol=1e-4, atol=1e-4)
    assert found.read.tolist() == list(range(PROMPT + 1, 151))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_a_budget_of_the_whole_length_is_dense(checkpoint: Checkpoint, tokens: list[int], name: str) -> None:
    prompt = checkpoint.prefill(tokens[:PROMPT])
    dense, found = (
        checkpoint.decode(prompt, tokens[PROMPT:], method, rows=50)
        for method in (Full(), method_of(named(name), 256, (1,)))
    )
    torch.testing.assert_close(found.logits, dense.logits, rtol=1e-4, atol=1e-4)
    assert (found.attended == 1).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_steps_at_once_are_steps_one_by_one(checkpoint: Checkpoint, tokens: list[int], name: str) -> None:
    method, prompt, fed = method_of(named(name), 32, (1,)), checkpoint.prefill(tokens[:PROMPT]), tokens[PROMPT:130]
    before = checkpoint.decode(prompt, fed, Full(), rows=30)
    one, many = (checkpoint.decode(prompt, fed, method, rows=rows) for rows in (1, 30))
    torch.testing.assert_close(one.logits, many.logits, rtol=1e-4, atol=1e-4)
    # A set of pages lacks what the last page does.
    torch.testing.assert_close(one.attended, torch.tensor([(32 - -n % method.page) / n for n in range(101, 131)]))
    assert not torch.allclose(one.logits, before.logits, atol=1e-2)
    after = checkpoint.decode(prompt, fed, Full(), rows=30)
    assert torch.equal(before.logits, after.logits), "decode left something in the prompt's cache"


def test_one_pass_is_decode_but_for_rounding(tokens: list[int]) -> None:
    """In float32, where a row of its own is not needed, so that a step too many or too few would show."""

    class Rounds(Checkpoint):
        rounds = True

    items = tuple(Item(tokens[:n], tokens[n : n + 40], scored_from=1) for n in (70, 100))
    rounds = Rounds(tiny("llama"), None)
    # The command asks what will be measured, to tell how long that takes, and hands it on.
    rows = measure(rounds, Suite("s", "text", items), measured(rounds, [FULL]), rows=32, done=lambda _: None)
    assert [row.choice for row in rows] == [FULL, ROUNDING]
    full, again = rows
    assert again.agreement.value == 1 and again.overlap == pytest.approx(1, abs=1e-4)
    assert (
        again.perplexity == pytest.approx(full.perplexity, rel=1e-3) and again.attended_tokens == full.attended_tokens
    )
    assert Checkpoint(tiny("llama").bfloat16(), None).rounds and not Checkpoint(tiny("llama"), None).rounds


def test_of_an_item_that_ends_what_full_attention_says_behind_it_counts(
    checkpoint: Checkpoint, tokens: list[int]
) -> None:
    prompt, right = tokens[:80], tokens[80:110]
    said = int(checkpoint.decode(checkpoint.prefill(prompt), right, Full(), rows=64).logits[-1].argmax())
    choices = [Choice("lessismore", method_of("lessismore", 32, (1,)))]
    ends, longer = (
        measure(checkpoint, Suite("s", "chains", (item,)), choices, rows=32, done=lambda _: None)
        for item in (Item(prompt, right, ends=True), Item(prompt, [*right, said]))
    )
    for one, other in zip(ends, longer, strict=True):
        assert (one.tokens, one.right, one.perplexity) == (31, other.right, other.perplexity)
        assert (one.agreement.value, one.overlap) == (other.agreement.value, other.overlap)


@pytest.mark.parametrize(
    "spec", ["lessismore:aggregate=max", "quest", "seerattention", "seerattention:gate_threshold=0.2"]
)
@pytest.mark.parametrize("name", ["chain-tracer", "source-reader"])
def test_our_models_decode_as_in_their_bench(name: str, spec: str) -> None:
    folder = ROOT / "models" / name
    own = ChainTracer(dtype=torch.float32) if name == "chain-tracer" else SmallQwen3(PUBLISHED, dtype=torch.float32)
    load_own(own, folder)
    own.requires_grad_(False)
    torch.manual_seed(2)
    tokens = torch.randint(12, VOCABULARY, (140,))
    shape = own.shape
    kind, *rest = spec.split(":")
    gates = spec_with_gates(kind, shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    method = method_of(":".join([gates, *rest]), 48, (2, 8))
    expected = own_decode(own, own_prefill(own, tokens[:120]), tokens[120:], method)
    checkpoint = load(str(folder), device="cpu", dtype="float32")
    found = checkpoint.decode(checkpoint.prefill(tokens[:120].tolist()), tokens[120:].tolist(), method, rows=20)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.attended, expected.attended)
    torch.testing.assert_close(found.read, expected.read)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(sliding_window=4096), "sliding window of 4096"),
        (Gemma3TextConfig(), "layers of sliding_attention"),
        (DeepseekV3Config(), "MLA"),
        (T5Config(), "encoder-decoder"),
    ],
    ids=["mistral", "gemma3", "deepseek", "t5"],
)
def test_other_attention_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"\({config.model_type}\) cannot be measured: .*{reason}"):
        check_config(config)


def test_a_window_that_is_off_is_no_window() -> None:
    check_config(Qwen3Config(sliding_window=4096, use_sliding_window=False))
    check_config(MistralConfig(sliding_window=None))


def test_a_layer_with_attention_of_its_own_is_refused(tokens: list[int]) -> None:
    class Own(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model: PreTrainedModel = tiny("llama")
    model.model.layers[2].self_attn = Own()
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: 3 of 4 layers attend by transformers'"):
        Checkpoint(model, tokenizer=None).prefill(tokens)


@pytest.mark.parametrize("name", ["lessismore", "lessismore:selection_attends=set", "tidaldecode"])
def test_sequences_together_are_sequences_one_by_one(checkpoint: Checkpoint, tokens: list[int], name: str) -> None:
    """Three of one pool, two of which share their beginning."""
    method = method_of(name, 32, (1,))
    prompts = [tokens[:70], [*tokens[:50], *tokens[60:90]], tokens[20:120]]
    fed = [tokens[100:117], tokens[5:14], tokens[:12]]
    alone = [checkpoint.decode(checkpoint.prefill(p), f, method, rows=64) for p, f in zip(prompts, fed, strict=True)]
    made: list[Prompt] = []
    for prompt in prompts:
        made.append(checkpoint.prefill(prompt, beside=made[-1] if made else None))
    assert made[1].slots[:48].tolist() == made[0].slots[:48].tolist() and made[1].slots[48] > made[0].slots[-1]
    for rows in (64, 7):
        batches = checkpoint.rows_behind(list(zip(made, fed, strict=True)), rows=rows)
        found = [checkpoint.step(made[0].pool, batch, method) for batch in batches]
        for name_of in ("logits", "attended", "read"):
            together, expected = (torch.cat([getattr(d, name_of) for d in some]) for some in (found, alone))
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_a_selection_layer_that_attends_to_its_set_reads_keys_and_the_set(
    checkpoint: Checkpoint, tokens: list[int]
) -> None:
    prompt = checkpoint.prefill(tokens[:PROMPT])
    small, large = (method_of("lessismore:selection_attends=set", budget, (1,)) for budget in (32, 256))
    found = checkpoint.decode(prompt, tokens[PROMPT:104], small, rows=4)
    # Of four layers the first is dense, the second reads keys and the set, the others the set.
    assert found.read.tolist() == pytest.approx([(n + n / 2 + 3 * 32) / 4 for n in range(101, 105)])
    within = checkpoint.decode(prompt, tokens[PROMPT:104], large, rows=4)
    assert within.read.tolist() == [101, 102, 103, 104]
