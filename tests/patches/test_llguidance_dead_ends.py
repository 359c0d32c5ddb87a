"""Grammars of llguidance that allow nothing, in the walk that SGLang takes where a speculative algorithm verifies."""

from pathlib import Path

import pytest
import torch
from llguidance import grammar_from
from llguidance.hf import from_tokenizer
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.speculative.spec_utils import traverse_tree
from torch import Tensor
from transformers import AutoTokenizer

from lim_patches.llguidance_dead_ends import fill, roll_back

FOLDER = Path(__file__).parents[2] / "models" / "source-reader"
HOPELESS, DIGITS = r"[^\s\S]", r"[0-9]+"


@pytest.fixture(scope="module")
def tokenizer():
    huggingface = AutoTokenizer.from_pretrained(FOLDER)
    return from_tokenizer(huggingface, n_vocab=len(huggingface))


@pytest.fixture
def hooked(monkeypatch):
    """The hooks, as SGLang's registry applies them."""
    for name, hook in (("fill_vocab_mask", fill), ("rollback", roll_back)):
        original = getattr(GuidanceGrammar, name)
        monkeypatch.setattr(GuidanceGrammar, name, lambda *args, hook=hook, original=original: hook(original, *args))


def walk(grammar: GuidanceGrammar, run: list[int]) -> Tensor:
    """Masks of a run of tokens, the first of which is known."""
    mask = grammar.allocate_vocab_mask(8192, len(run), "cpu")
    following = torch.tensor([*range(1, len(run)), -1])
    traverse_tree(following, torch.full_like(following, -1), torch.tensor(run), grammar, mask)
    return mask


def allowed(mask: Tensor) -> list[int]:
    """Tokens that a row [W] of a mask allows."""
    return [32 * word + bit for word, bits in enumerate(mask.tolist()) for bit in range(32) if bits >> bit & 1]


def test_a_run_under_a_grammar_that_allows_nothing_ends_at_once(tokenizer, hooked):
    grammar = GuidanceGrammar(tokenizer, grammar_from("regex", HOPELESS))
    end = tokenizer.eos_token
    for run in ([5, 9, 9], [5, end, 9]):
        assert allowed(walk(grammar, run)[0]) == [end]
    assert not grammar.is_terminated(), "what was walked is taken back"
    grammar.accept_token(end)
    assert grammar.is_terminated()


def test_without_the_hooks_such_a_grammar_fails(tokenizer):
    with pytest.raises(ValueError, match="NoExtensionBias"):
        walk(GuidanceGrammar(tokenizer, grammar_from("regex", HOPELESS)), [5, 9])


def test_other_failures_are_told(tokenizer, hooked):
    grammar = GuidanceGrammar(tokenizer, grammar_from("regex", DIGITS))
    some = allowed(walk(grammar, [5])[0])
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        grammar.accept_token(next(token for token in range(20, 8192) if token not in some))
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        walk(grammar, [5])
