"""Do gates learn what the recipe says, within bounded memory, and are they saved as they are read?"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from block_gates import train
from block_gates.data import ahead, batches, chain_rows, text_rows
from block_gates.loss import Attended, block_keys, gate_loss
from block_gates.model import TrainedGates
from block_gates.truth import block_truth, chunks, largest_weights
from transformers import Qwen3Config, Qwen3ForCausalLM

from lim_kernels.block_gates import Rotation
from sgl_lim.evaluate.checkpoint import Checkpoint, load
from sgl_lim.gates import load_gates, read_config
from sgl_lim.gates.weights import with_rotation
from support.gate_oracle import GateRule, angles, draw_gate, gate_key, gate_scores, rope
from support.package_tree import source_text
from support.wide_weights import draw_wide

MODELS = Path(__file__).parents[2] / "models"
RULE = GateRule(heads=4, kv_heads=2, dim=16, width=64, block=16)
LENGTH = 70


@pytest.fixture(scope="module")
def drawn():
    """A layer's queries and keys before their rotation, float64, and as the model has them."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(LENGTH, heads, RULE.dim, generator=generator).double() for heads in (RULE.heads, RULE.kv_heads))
    turned = [rope(x, RULE, torch.arange(LENGTH)).float().transpose(0, 1)[None] for x in (q, k)]
    return SimpleNamespace(q=q, k=k, turned=turned, gate=draw_gate(RULE, generator, torch.float32))


def by_hand(drawn, scale):
    """The loss of the second half's queries from its definition, query by query, in float64."""
    losses = []
    for position in range(LENGTH // 2, LENGTH):
        before = position // RULE.block
        keys = [gate_key(drawn.gate, drawn.k[n * 16 : n * 16 + 16], n * 16) for n in range(before)]
        scores = gate_scores(drawn.gate, drawn.q[position], torch.stack(keys), position)
        at, past = torch.tensor([position]), torch.arange(position + 1)
        q = rope(drawn.q[position][None], RULE, at)[0]
        k = rope(drawn.k[: position + 1], RULE, past)
        for head in range(RULE.kv_heads):
            truth = torch.zeros(before, dtype=torch.float64)
            for member in range(head * RULE.group, (head + 1) * RULE.group):
                weights = (k[:, head] @ q[member] * scale).softmax(0)
                largest = torch.stack([weights[n * 16 : n * 16 + 16].max() for n in range(before)])
                truth = torch.maximum(truth, largest)
            truth = truth / truth.sum()
            losses.append((truth * (truth.log() - scores[head].log_softmax(0))).sum())
    return torch.stack(losses).mean()


def test_the_loss_is_the_recipe_s(drawn):
    q, k = drawn.turned
    layer = Attended(q, k, 0.25, Rotation(angles(RULE.dim, 128, 1.0)))
    loss = gate_loss(drawn.gate.as_operand(), layer, block=RULE.block)
    torch.testing.assert_close(loss.double(), by_hand(drawn, 0.25), rtol=1e-4, atol=1e-5)
    twice = replace(layer, q=q.repeat(2, 1, 1, 1), k=k.repeat(2, 1, 1, 1))
    torch.testing.assert_close(gate_loss(drawn.gate.as_operand(), twice, block=RULE.block), loss)


def test_queries_without_a_block_before_them_teach_nothing(drawn):
    q, k = (x[:, :, :40] for x in drawn.turned)
    rotation = Rotation(angles(RULE.dim, 128, 1.0))
    gate = replace(drawn.gate.as_operand(), query=drawn.gate.as_operand().query.clone().requires_grad_())
    # The second half begins at 20, and the only block of 32 is complete before 32 … 39: its share is 1.
    loss = gate_loss(gate, Attended(q, k, 0.25, rotation), block=32)
    loss.backward()
    assert loss == 0 and not gate.query.grad.any()


def test_truth_knows_complete_blocks_before_the_query_alone(drawn):
    q, k = drawn.turned
    truth = block_truth(q[:, :, 40:], k, 40, scale=0.25, block=16)
    assert truth.shape == (1, 2, 30, 4)
    for place, position in enumerate(range(40, LENGTH)):
        before = position // 16
        assert (truth[0, :, place, :before] > 0).all() and not truth[0, :, place, before:].any()
    torch.testing.assert_close(truth.sum(-1), torch.ones(1, 2, 30))


@pytest.mark.parametrize("logit_bytes", [1, 40_000])
def test_truth_is_the_same_however_many_queries_are_taken_at_once(drawn, logit_bytes):
    q, k = drawn.turned
    how = {"scale": 0.25, "block": 16}
    expected = largest_weights(q[:, :, 40:], k, 40, **how)
    found = largest_weights(q[:, :, 40:], k, 40, **how, logit_bytes=logit_bytes)
    torch.testing.assert_close(found, expected)


def test_no_chunk_s_logits_take_more_than_allowed():
    shape = torch.Size((2, 4, 2048, 16))
    for allowed in (1 << 20, 1 << 24):
        found = list(chunks(shape, 4096, allowed))
        assert found[0][0] == 0 and found[-1][1] == 2048
        assert all(b[0] == a[1] for a, b in pairwise(found))
        assert all((last - first) * 2 * 4 * 4096 * 4 <= allowed for first, last in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 41}, r"queries among 70 keys, got \(41, 30\)"),
        ({"first": -1}, "queries among 70 keys"),
        ({"scale": 0.0}, "scale > 0, got 0.0"),
        ({"k": torch.zeros(1, 3, LENGTH, RULE.dim)}, r"q \[B, H, C, D\] and k \[B, H_kv, T, D\]"),
        ({"k": torch.zeros(1, 2, LENGTH, RULE.dim).half()}, r"q \[B, H, C, D\] and k \[B, H_kv, T, D\]"),
        ({"k": torch.zeros(1, 2, RULE.dim, LENGTH).transpose(2, 3)}, "rows that are contiguous"),
        ({"implementation": "cuda"}, "implementation among reference, triton"),
    ],
)
def test_operands_without_a_truth_are_refused(drawn, change, message):
    q, k = drawn.turned
    operands = {"q": q[:, :, 40:], "k": k, "first": 40, "scale": 0.25, "block": 16} | change
    with pytest.raises(ValueError, match=message):
        block_truth(**operands)


def test_keys_are_those_that_are_served(drawn):
    rotation = Rotation(angles(RULE.dim, 128, 1.0))
    keys = block_keys(drawn.gate.as_operand(), drawn.turned[1], RULE.block, rotation)
    assert keys.shape == (1, 2, LENGTH // 16, RULE.width)
    for block in range(LENGTH // 16):
        expected = gate_key(drawn.gate, drawn.k[block * 16 : block * 16 + 16], block * 16)
        torch.testing.assert_close(keys[0, :, block].double(), expected, rtol=1e-4, atol=1e-4)


class Words:
    """A tokenizer of words, by their length."""

    def encode(self, text):
        return [len(word) for word in text.split()]

    def beginning(self):
        return [99]


def test_rows_have_the_length_that_was_asked_for_and_depend_on_the_seed(tmp_path: Path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "code.py").write_text(source_text(1, 4000))
    for make in (lambda seed: text_rows(Words(), [tmp_path], 64, seed), lambda seed: chain_rows(Words(), 64, seed)):
        rows = list(islice(make(1), 3))
        assert [len(row) for row in rows] == [64] * 3 and all(row[0] == 99 for row in rows)
        assert rows == list(islice(make(1), 3))
    assert next(chain_rows(Words(), 64, 1)) != next(chain_rows(Words(), 64, 2))
    mixed = batches([(1.0, iter([[1]] * 40)), (0.0, iter([[2]] * 40))], 8, 0)
    assert mixed().tolist() == [[1]] * 8
    with pytest.raises(ValueError, match=r"--roots .*: no text"):
        next(text_rows(Words(), [tmp_path / "nothing"], 64, 0))


def test_batches_are_drawn_ahead_in_an_order_that_no_thread_decides():
    drawn = []

    def source(n):
        made = count()

        def draw():
            # Of two sources the first is slow.
            time.sleep(0.0 if n else 0.02)
            drawn.append(n)
            return torch.tensor([n, next(made)])

        return draw

    with ThreadPoolExecutor(2) as pool:
        draw = ahead([source(0), source(1)], pool)
        assert [draw().tolist() for _ in range(6)] == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    assert drawn.count(0) == drawn.count(1) == 4


def test_a_draw_that_fails_ends_the_run():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=r"--roots .*: no text"):
        ahead([batches([(1.0, text_rows(Words(), [Path("nothing")], 64, 0))], 1, 0)], pool)()


class Letters(Words):
    """A tokenizer of letters."""

    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize(("encoder", "length"), [(Words(), 640), (Letters(), 2000)])
def test_a_row_of_chains_has_a_whole_solution_whatever_the_tokenizer(encoder, length):
    answer = encoder.encode("answer")
    for row in islice(chain_rows(encoder, length, 3), 5):
        first = row[: row.index(99, 1)] if 99 in row[1:] and isinstance(encoder, Words) else row
        assert any(first[n : n + len(answer)] == answer for n in range(len(first)))
        assert len(row) == length


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    rates = [train.learning_rate(step, 100, most=1.0, warmup=20) for step in range(101)]
    assert rates[0] == 0.05 and max(rates) == rates[20] == 1.0 and rates[100] == pytest.approx(0.01)
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model with a tokenizer of its own, as a folder."""
    from support.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)


def test_a_few_steps_train_gates_that_are_read_again(model: Path, tmp_path: Path, capsys):
    out = tmp_path / "gates"
    size = ["--block", "16", "--width", "64", "--length", "192", "--batch", "2", "--steps", "12", "--warmup", "2"]
    how = ["--chains", "1", "--lr", "0.01", "--device", "cpu", "--log-every", "4"]
    train.main(["--model-path", str(model), "--out", str(out), *size, *how])
    measured = json.loads((out / "training.json").read_text())
    assert (measured["steps"], measured["tokens"]) == (12, 12 * 2 * 192) and len(measured["held_out_by_layer"]) == 2
    assert measured["held_out_after"] < 0.9 * measured["held_out_before"]
    config = read_config(str(out))
    assert (config.block, config.width, config.base_model) == (16, 64, model.name)
    assert config.model["hidden_size"] == 64 and config.model["model_type"] == "qwen3"
    assert "step 12" in capsys.readouterr().out


def test_what_was_trained_is_what_is_loaded(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    tiny = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    draw_wide(tiny)
    checkpoint = Checkpoint(tiny, tokenizer=None)
    frozen = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    config = train.gate_config(checkpoint, "some/tiny", block=16, width=64)
    trainer = train.Trainer(checkpoint, config, lr=0.01)
    tokens = torch.randint(64, (2, 96))
    first = trainer.step(tokens, 0.01)
    for _ in range(8):
        last = trainer.step(tokens, 0.01)
    assert (last < first).all()
    assert all(torch.equal(weight, frozen[name]) for name, weight in tiny.state_dict().items())
    trainer.save(tmp_path)
    loaded = load_gates(str(tmp_path), checkpoint.shape, torch.float32)
    for layer, gate in enumerate(loaded):
        own = trainer.gates.gate(layer, None)
        for name in ("query", "key", "query_norm", "key_norm"):
            assert torch.equal(getattr(gate, name), getattr(own, name).detach().bfloat16().float())


def test_without_norms_there_are_none(tmp_path: Path):
    checkpoint_shape = SimpleNamespace(layers=1, heads=4, kv_heads=2, head_dim=16, group=2)
    config = SimpleNamespace(pools=("avg",), width=64, norm=False, block=16)
    gate = TrainedGates(config, checkpoint_shape).gate(0, None)
    assert gate.query_norm is None and gate.key_norm is None and gate.key.shape == (2, 16, 64)


@pytest.mark.parametrize("name", ["chain-tracer", "source-reader"])
def test_the_gates_of_a_model_here_know_where_it_looks(name: str):
    """Gates that nobody trained, or that belong to another layer, have twice the divergence or more."""
    folder = MODELS / name
    checkpoint = load(str(folder), device="cpu", dtype="float32")
    config = read_config(str(folder / "gates"))
    loaded = load_gates(str(folder / "gates"), checkpoint.shape, torch.float32)
    trainer = train.Trainer(checkpoint, config, lr=0.0)
    tokens = torch.tensor([next(chain_rows(checkpoint, 800, seed=5))])

    def divergence(gates: list) -> float:
        trainer.gates = SimpleNamespace(config=config, gate=lambda layer, own: with_rotation(gates[layer], own))
        return float(trainer.losses(tokens).mean())

    untrained = float(trainer.losses(tokens).mean())
    assert divergence(loaded) < min(untrained, divergence(loaded[::-1])) / 2
