"""Does teacher-forced decode equal the dense model where it should, and do the figures measure what they say?"""

import csv
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_qwen3.bench import ChainBench, half_interval, method_of, methods_of, write
from small_qwen3.decode import decode, prefill
from small_qwen3.model import SmallQwen3, finish, project, rope_table
from source_reader import accuracy
from source_reader.export import export
from source_reader.identifiers import find_occurrences, token_bytes
from source_reader.model import TINY
from source_reader.tokenizer import load_tokenizer

from sgl_lim.methods import METHODS, Role
from support.gates import spec_with_gates
from support.package_tree import source_text

SELECTION = (1,)


def named(name: str) -> str:
    """The spec of a method for a model of `TINY`'s shape."""
    return spec_with_gates(name, TINY.layers, TINY.heads, TINY.kv_heads, TINY.head_dim)


@pytest.fixture(scope="module")
def model() -> SmallQwen3:
    torch.manual_seed(0)
    model = SmallQwen3(TINY, dtype=torch.float32)
    model.initialise()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 8192, (150,))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_the_whole_length_is_dense(model: SmallQwen3, tokens: torch.Tensor, name: str) -> None:
    method = method_of(named(name), 256, SELECTION, 0.25)
    found = decode(model, prefill(model, tokens[:100]), tokens[100:], method, rows=16, recall=True)
    torch.testing.assert_close(found.logits, model(tokens[None])[0, 100:], rtol=1e-4, atol=1e-4)
    assert (found.attended == 1).all()
    if Role.SPARSE in method.layer_roles(TINY.layers):
        assert found.recall is not None
        torch.testing.assert_close(found.recall, torch.ones(50), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_steps_at_once_are_steps_one_by_one(model: SmallQwen3, tokens: torch.Tensor, name: str) -> None:
    method = method_of(named(name), 32, SELECTION, 0.25)
    context = prefill(model, tokens[:100])
    one, many = (decode(model, context, tokens[100:130], method, rows=r, recall=True) for r in (1, 30))
    torch.testing.assert_close(one.logits, many.logits, rtol=1e-4, atol=1e-4)
    lens = torch.arange(101, 131)
    # A set of pages lacks what the last page does.
    torch.testing.assert_close(one.attended, (32.0 - -lens % method.page) / lens)
    assert one.recall is not None and many.recall is not None and one.recall.max() < 1
    torch.testing.assert_close(one.recall, many.recall)
    dense = model(tokens[None])[0, 100:130]
    assert not torch.allclose(one.logits, dense, atol=1e-2)


def test_recall_of_a_window_against_its_definition(model: SmallQwen3, tokens: torch.Tensor) -> None:
    method = method_of("window", 32, (TINY.layers - 1,), 0.25)
    found = decode(model, prefill(model, tokens[:100]), tokens[100:101], method, recall=True)
    # Only the last layer is sparse, so its inputs are the dense model's.
    x = model.embed[tokens[:101]][None]
    cos, sin = rope_table(torch.arange(101), TINY)
    for i in range(TINY.layers):
        w = model.weights(i)
        q, k, v = project(x, w, cos, sin, TINY, torch.float32)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = finish(x, attended, w, TINY, torch.float32)
    weights = (q[0, :, -1] @ k[0, 0].T * TINY.scale).softmax(-1)
    seen = torch.cat((torch.arange(4), torch.arange(101 - 28, 101)))
    assert found.recall is not None
    torch.testing.assert_close(found.recall[0], weights[:, seen].sum(1).mean())


def test_methods_take_their_parameters_from_a_spec() -> None:
    method = method_of("lessismore:aggregate=sum:recency=0.5", 64, (2, 6), 0.25)
    assert (method.aggregate, method.recency, method.budget, method.selection_layers) == ("sum", 0.5, 64, (2, 6))
    auto = method_of("lessismore:aggregate=max:recency=auto", 64, (2, 6), 0.25)
    assert auto.window_varies and auto.sizes.recent + auto.sizes.sinks == 32
    for spec, reason in {
        "dense": "--lim-method must be one of",
        "lessismore:top_p=0.9": "--lim-aggregate union ranks by place",
        "lessismore:heads=2": "no parameter 'heads'; there are aggregate",
        "lessismore:budget=64": "give budget with --budgets",
        "lessismore:sinks=x": "sinks: expected a whole number, got 'x'",
        "lessismore:early_sets=on": "measure this on a server",
        "lessismore:selection_interval=2": "measure this on a server",
        "lessismore:prefix_selection=group": "measure this on a server",
    }.items():
        with pytest.raises(ValueError, match=reason):
            method_of(spec, 64, (2,), 0.25)


def test_tokens_are_their_bytes() -> None:
    tokenizer = load_tokenizer()
    pieces, text = token_bytes(tokenizer), "def größe(x):\n\treturn 'é日' + \x7f\u00ad\u00a0\n"
    ids = tokenizer.encode(text).ids
    assert b"".join(pieces[i] for i in ids).decode() == text
    assert [pieces[i] for i in (0, 1, 2)] == [b""] * 3


def test_names_are_distant_near_or_fresh() -> None:
    words = ["", "x", ".total", "_count", " +", " total", "_count", "\n", "return", "s", " lambda", " a", "_b", "("]
    words += ["\n"] * 20 + [" total", "_", "count", ")", " total", "_counts", " single_name"]
    found = find_occurrences([w.encode() for w in words], distance=20)
    names = [("".join(words[o.first : o.last + 1]), list(o.completion), o.kind) for o in found]
    assert names == [
        (".total_count", [3], "fresh"),
        (" total_count", [6], "near"),
        ("returns", [9], "fresh"),
        (" total_count", [35, 36], "distant"),
        (" total_counts", [39], "fresh"),
    ]


def test_a_search_is_of_every_choice_with_a_sparse_layer_behind_each() -> None:
    args = accuracy.parse(["text", "model", "--csv", "out.csv", "--methods", "lessismore", "--budgets", "64"])
    pairs = [method.selection_layers for _, method in list(methods_of(args, accuracy.every_choice(8, 2)))[1:]]
    assert pairs == [(a, b) for a in range(1, 5) for b in range(a + 2, 7)]


def test_a_search_asks_methods_without_selection_layers_once() -> None:
    args = accuracy.parse(["text", "model", "--csv", "out.csv", "--methods", "quest", "--budgets", "64"])
    assert [spec for spec, _ in methods_of(args, accuracy.every_choice(8, 2))] == ["full", "quest"]


@pytest.mark.parametrize("number", ["0", "6"])
def test_a_search_with_nothing_to_choose_from_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse(["text", "model", "--csv", "out.csv", "--search", number])
    assert f"--search {number}: no choice" in capsys.readouterr().err


def test_selection_beyond_the_model_is_refused(model: SmallQwen3, tmp_path: Path) -> None:
    args = accuracy.parse(["chains", str(tmp_path), "--csv", str(tmp_path / "out.csv"), "--selection", "1,9"])
    with pytest.raises(SystemExit, match="--selection: lessismore would select at 1,9 of 4 layers"):
        write(ChainBench(model, []), list(methods_of(args)), args)


def test_an_interval_is_the_means() -> None:
    rng = random.Random(0)
    values = [rng.random() for _ in range(2000)]
    assert half_interval(values) == pytest.approx(1.96 * math.sqrt(1 / 12 / 2000), rel=0.05)
    assert math.isnan(half_interval([1.0]))


@pytest.mark.parametrize("what", ["text", "chains"])
def test_a_whole_evaluation(model: SmallQwen3, tmp_path: Path, what: str) -> None:
    export(model, tmp_path / "model")
    ids = load_tokenizer().encode("\n".join(source_text(i) for i in range(12)), add_special_tokens=False).ids
    np.save(tmp_path / "held_out.npy", np.array(ids, np.uint16))
    out = tmp_path / "out.csv"
    sizes = ["--items", "3", "--length", "300", "--decoded", "40", "--distance", "64", "--facts", "12", "--steps", "3"]
    asked = ["--methods", "lessismore,window:sinks=0", "--budgets", "32,64", "--selection", "1", "--device", "cpu"]
    places = [what, str(tmp_path / "model"), "--data", str(tmp_path), "--csv", str(out)]
    accuracy.main([*places, *sizes, *asked], TINY)
    rows = list(csv.DictReader(out.open()))
    assert rows[0]["method"] == "full" and float(rows[0]["attended"]) == 1
    budgets = [(r["method"], r["budget"]) for r in rows[1:]]
    assert budgets == [(m, b) for m in ("lessismore", "window:sinks=0") for b in ("32", "64")]
    assert all(0 < float(r["recall"]) < 1 and float(r["attended"]) < 0.7 for r in rows[1:])
    if what == "text":
        assert float(rows[0]["agreement"]) == 1 and all(float(r["agreement"]) < 1 for r in rows[1:])
        assert float(rows[0]["perplexity"]) == pytest.approx(math.exp(float(rows[0]["loss"])), rel=1e-3)
        assert int(rows[0]["near_names"]) > 3
