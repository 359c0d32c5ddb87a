"""Is the published checkpoint an ordinary Qwen3 that solves its task, and does evaluation measure what it says?"""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from chain_tracer import methods
from chain_tracer.data import EOS, IDS
from chain_tracer.decode import Policy, Reads, encode, prefill, score
from chain_tracer.export import build_tokenizer, export, mute_heads
from chain_tracer.model import ChainTracer, Shape, load_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sgl_lim.tasks.chains import generate_chains, make_chain, parse_answer, vocabulary

FOLDER = Path(__file__).parents[2] / "models" / "chain-tracer"
SELECTION = (2, 8)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def published():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def ours() -> ChainTracer:
    model = ChainTracer().to(torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, FOLDER)
    return model


@pytest.fixture(scope="module")
def problems():
    return list(generate_chains(3, num_facts=64, num_steps=6, seed=11))


def test_ids_are_the_vocabularys(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(range(512)) == vocabulary()
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert len(tokenizer) == 512


def test_text_survives_the_tokenizer_and_bos_comes_by_default(tokenizer) -> None:
    problem = make_chain(random.Random(5), num_facts=30, num_steps=12)
    text = f"{problem.prompt} {problem.solution}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [IDS[w] for w in text.split()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]


@pytest.mark.parametrize("text", ["?v17 steps 3:v17->v203+4=4;answer 4", "<bos>? v17 steps 3 :<eos>"])
def test_missing_blanks_change_nothing(tokenizer, text: str) -> None:
    spaced = text
    for word in ("?", ":", "->", "+", "=", ";", "<bos>", "<eos>"):
        spaced = spaced.replace(word, f" {word} ")
    assert tokenizer.encode(text, add_special_tokens=False) == [IDS[w] for w in spaced.split()]


def test_unknown_words_are_unknown(tokenizer) -> None:
    assert tokenizer.encode("v400 100 hello", add_special_tokens=False) == [IDS["<unk>"]] * 3


def test_detokenisation_only_appends(tokenizer, problems) -> None:
    ids, shown = tokenizer.encode(problems[0].solution, add_special_tokens=False), ""
    for n in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:n], skip_special_tokens=True)
        assert longer.startswith(shown) and len(longer) > len(shown)
        shown = longer


def test_the_files_are_small_and_say_what_they_should() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 16_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["torch_dtype"] == "bfloat16"
    generation = GenerationConfig.from_pretrained(FOLDER)
    assert (generation.do_sample, generation.eos_token_id) == (False, EOS)


def test_the_published_checkpoint_writes_chains_out(published, tokenizer, problems) -> None:
    for problem in problems:
        inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
        out = published.generate(**inputs, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert out[-1] == EOS
        assert (text, parse_answer(text)) == (problem.solution, problem.answer)


def test_our_model_is_transformers_qwen3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ChainTracer(Shape(layers=3), dtype=torch.float32)
    model.initialise()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    export(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(12, 512, (2, 300))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [Policy("full"), Policy("lessismore", 512, SELECTION), Policy("window", 512)])
def test_a_budget_of_the_whole_length_is_dense(ours: ChainTracer, problems, policy: Policy) -> None:
    prompts, solutions = encode(problems, "cpu")
    logits = ours(torch.cat((prompts, solutions), dim=1))
    dense = logits[:, prompts.shape[1] - 1 : -1].argmax(-1) == solutions
    right = score(ours, prefill(ours, problems), policy)
    assert torch.equal(right, dense)
    assert right.all()


def test_at_a_small_budget_only_the_selected_tokens_help(ours: ChainTracer, problems) -> None:
    batch = prefill(ours, problems)
    assert score(ours, batch, Policy("lessismore", 64, SELECTION)).all(dim=1).all()
    for window_only in (Policy("window", 64), Policy("window", 64, SELECTION)):
        assert not score(ours, batch, window_only).all(dim=1).any()


def test_tokens_read_follow_the_budget_and_the_attention(ours: ChainTracer, problems) -> None:
    batch = prefill(ours, problems)
    chains, first, words = len(problems), batch.keys[0].shape[2] + 1, batch.solution.shape[1] - 1
    lengths = range(first, first + words)
    layers = len(batch.keys)

    def reads(**how) -> int:
        counted = Reads()
        score(ours, batch, Policy("lessismore", 64, SELECTION, "sum", **how), counted)
        assert counted.dense == chains * layers * sum(lengths)
        return counted.attended

    full_layers = SELECTION[0] + len(SELECTION)
    fixed = chains * sum(full_layers * n + (layers - full_layers) * min(n, 64) for n in lengths)
    assert reads() == reads(recency=None) == fixed
    assert reads(top_p=0.3) < reads(top_p=0.7) < fixed
    # No share asks for less than 12 tokens of the window, 4 sinks and one more.
    assert reads(top_p=0.001) == chains * sum(full_layers * n + (layers - full_layers) * 17 for n in lengths)


def test_every_method_is_measured_through_the_code_of_a_served_step(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    asked = "lessismore,lessismore:scope=kv_head,lessismore:aggregate=sum:top_p=0.9,tidaldecode,quest,window"
    size = ["--items", "2", "--facts", "64", "--steps", "6", "--budgets", "64", "--device", "cpu"]
    methods.main([str(FOLDER), "--csv", str(out), "--methods", asked, *size])
    rows = {row["method"]: row for row in csv.DictReader(out.open())}
    assert list(rows) == ["full", *asked.split(",")]
    fractions = {name: float(row["attended_fraction"]) for name, row in rows.items()}
    assert fractions["full"] == 1 and fractions["lessismore:aggregate=sum:top_p=0.9"] < fractions["lessismore"] < 0.5
    # Two of twelve layers are dense.
    assert fractions["window"] == pytest.approx(2 / 12 + 10 / 12 * float(rows["window"]["attended"]), abs=1e-3)
    whole = {name: float(row["whole"]) for name, row in rows.items()}
    assert whole["full"] == whole["lessismore"] == 1 and whole["window"] == 0
    assert float(rows["full"]["whole_low"]) < 0.5 and float(rows["full"]["whole_high"]) == 1


def test_a_muted_head_writes_nothing() -> None:
    torch.manual_seed(0)
    model = ChainTracer(Shape(layers=1), dtype=torch.float32)
    model.initialise()
    kept = model.weights(0).o.detach().clone()
    mute_heads(model, 0, (2, 5))
    muted = model.weights(0).o.view(-1, 8, 64)
    assert not muted[:, [2, 5]].any()
    assert torch.equal(muted[:, [0, 1, 3, 4, 6, 7]], kept.view(-1, 8, 64)[:, [0, 1, 3, 4, 6, 7]])


@pytest.mark.parametrize(
    ("policy", "middle", "recent", "sinks"),
    [
        (Policy("lessismore", 256, SELECTION), 192, 60, 4),
        (Policy("lessismore", 64, SELECTION), 48, 12, 4),
        (Policy("lessismore", 12, SELECTION), 9, 3, 0),
        (Policy("window", 64), 0, 60, 4),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else f"{v.method}-{v.budget}",
)
def test_a_budget_is_split_as_the_paper_does(policy: Policy, middle: int, recent: int, sinks: int) -> None:
    assert (policy.middle, policy.recent, policy.sinks) == (middle, recent, sinks)


def test_the_committed_tokenizer_is_the_built_one() -> None:
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == json.loads(build_tokenizer().to_str())
