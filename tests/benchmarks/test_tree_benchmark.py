"""benchmarks/tree_of_thought.py against stub endpoints, and the tokenizer of random checkpoints."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from forced_model import ForcedModel

from benchmarks import tree_of_thought
from benchmarks.tree_of_thought import Load, Words
from programs.stub_endpoint import COUNTERS, StubEndpoint, _Handler
from sgl_lim.programs.tree import TreeShape

SIZES = ["--context", "50", "--branches", "4", "--keep", "2", "--depth", "2", "--thought-tokens", "6"]
QUICK = [*SIZES, "--answer-tokens", "3", "--check", "2", "--check-len", "12", "4", "--trees", "1", "3"]
TOKENS = 4 * 2 * 6 + 3


class TreeEndpoint(StubEndpoint):
    """Answers every request with as many words as it may have, `missing` aside."""

    missing = 0
    model: ForcedModel
    flushes = 0

    def __enter__(self) -> "TreeEndpoint":
        super().__enter__()
        self.model = ForcedModel()
        self._server.RequestHandlerClass.do_POST = _post  # type: ignore[attr-defined]
        self.finish_reason = {"type": "length"}
        return self

    def generate(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        words = max(0, request["sampling_params"]["max_new_tokens"] - self.missing)
        status, body = super().generate(request)
        body["text"], body["meta_info"]["completion_tokens"] = " w1" * words, words
        return status, body


def _post(handler: _Handler) -> None:
    stub = handler.endpoint
    assert isinstance(stub, TreeEndpoint)
    if handler.path.startswith("/flush_cache"):
        stub.flushes += 1
        handler._send(200, {})
        return
    length = int(handler.headers["Content-Length"])
    request = json.loads(handler.rfile.read(length))
    if handler.path == "/tokenize":
        handler._send(200, {"count": [len(text.split()) for text in request["prompt"]]})
    elif "input_ids" in request:
        handler._send(200, stub.model.answers(request))  # type: ignore[arg-type]
    else:
        handler._send(*stub.generate(request))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the import of torch that each machine line costs."""
    monkeypatch.setattr(tree_of_thought, "machine_line_apart", lambda: "some machine")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def prompts(stub: StubEndpoint) -> list[str]:
    """Texts of all requests without what was generated."""
    return [" ".join(r["text"].split()[:50]) for r in stub.generate_requests]


def test_a_row_for_each_server_and_number_of_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    with TreeEndpoint() as first, TreeEndpoint() as second:
        second.counters = dict.fromkeys((*COUNTERS, "tokens_shared", "rows_grouped"), 7)
        second.counters["tokens_attended"] = second.counters["tokens_dense"] = 0
        arguments = [f"a={first.url}", f"b={second.url}/", *QUICK, "--output", str(output)]
        assert tree_of_thought.main(arguments) == 0
        assert (first.flushes, second.flushes) == (2 * 3 + 3, 2 * 3 + 2)  # before each repeat and way of checking
        # Warm-ups and loads have contexts of their own, the same for both servers.
        assert len(set(prompts(first))) == 2 * (1 + 3) and set(prompts(first)) == set(prompts(second))
        asked = [r["sampling_params"] for r in first.generate_requests if r["sampling_params"]["max_new_tokens"]]
        assert all(parameters["ignore_eos"] and parameters["temperature"] == 1.0 for parameters in asked)
        assert [p["max_new_tokens"] for p in asked].count(3) == 3 * (1 + 3)  # answers, once a repeat
    rows = read_rows(output)
    assert [(row["server"], row["trees"], row["output_tokens"]) for row in rows] == [
        *(("a", "1", str(TOKENS)), ("a", "3", str(3 * TOKENS))),
        *(("b", "1", str(TOKENS)), ("b", "3", str(3 * TOKENS))),
    ]
    for base, row in zip(rows[:2], rows[2:], strict=True):
        assert base["ratio"] == base["trees_ratio"] == "1.0"
        for name, of in (("ratio", "tokens_per_s"), ("trees_ratio", "trees_tokens_per_s")):
            assert float(row[name]) == pytest.approx(float(row[of]) / float(base[of]), abs=0.01)
        assert float(row["seconds"]) >= float(row["prefill_s"])
        assert float(row["lowest"]) <= float(row["tokens_per_s"]) <= float(row["highest"]) and row["repeats"] == "3"
        assert float(row["tokens_per_s"]) == pytest.approx(int(row["output_tokens"]) / float(row["seconds"]), rel=0.05)
        assert (row["context"], row["thought_tokens"], row["answer_tokens"]) == ("50", "6", "3")
        assert (base["attended"], row["attended"], base["logits_error"] != "") == ("1.0", "0.25", True)
        assert (base["tokens_shared"], row["tokens_shared"], row["rows_grouped"]) == ("", "0", "0")
    table = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[2:] == [["| a", "1"], ["| b", "1"], ["| a", "3"], ["| b", "3"]]


def test_counters_are_differences_over_all_groups() -> None:
    def info(*values: int) -> dict[str, Any]:
        return {"internal_states": [{"lessismore": {"counters": {"tokens_shared": value}}} for value in values]}

    assert tree_of_thought.increase(info(3, 5), info(10, 7), "tokens_shared") == 9
    assert tree_of_thought.increase({"internal_states": [{}]}, {"internal_states": [{}]}, "tokens_shared") == ""


def test_other_lengths_than_asked_for_give_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    with TreeEndpoint() as good, TreeEndpoint() as bad:
        bad.missing = 1
        assert tree_of_thought.main([f"good={good.url}", f"bad={bad.url}", *QUICK, "--output", str(output)]) == 1
        shown = capsys.readouterr()
        assert "error: bad: 1 trees: " in shown.err and "tokens were generated instead of " in shown.err
        assert {row["server"] for row in read_rows(output)} == {"good"}
        assert tree_of_thought.main([f"bad={bad.url}", f"good={good.url}", *QUICK]) == 1
        assert "| good |" not in capsys.readouterr().out  # without a baseline


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_server_that_refuses_gives_no_row(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with TreeEndpoint() as stub:
        refusal = 400, {"error": {"message": "too long a prompt"}}
        monkeypatch.setattr(stub, "generate", lambda request: refusal)
        assert tree_of_thought.main([f"a={stub.url}", *QUICK]) == 1
    assert "too long a prompt" in capsys.readouterr().err


def test_no_speed_for_a_server_that_answers_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    with TreeEndpoint() as good, TreeEndpoint() as bad:
        bad.model.read = lambda row, step, context: context[1:]
        assert tree_of_thought.main([f"good={good.url}", f"bad={bad.url}", *QUICK]) == 1
        assert not bad.generate_requests
    assert "bad: its logits are 0." in capsys.readouterr().err


def test_a_load_counts_every_branch() -> None:
    load = Load(3, TreeShape(branches=4, keep=2, depth=2, thought_tokens=6), answer_tokens=3)
    assert load.output_tokens == 3 * TOKENS
    assert load.shortened().output_tokens == 3 * (4 * 2 * 4 + 1)


def test_contexts_are_words_of_the_range() -> None:
    words = Words.parse("w10-12")
    first, second = words.contexts(2, 40, "seed")
    assert first != second and {*first.split(), *second.split()} == {"w10", "w11", "w12"}
    assert len(first.split()) == 40 and words.contexts(2, 40, "seed") == [first, second]
    for wrong in ("w", "w9-3", "w1"):
        with pytest.raises(argparse.ArgumentTypeError, match="w0-9999"):
            Words.parse(wrong)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--server"),
        (["a=http://x", "--keep", "3"], "--branches 8 must be a multiple of --keep 3"),
        (["a=http://x", "--trees", "0"], "above 0"),
    ],
)
def test_wrong_command_lines_are_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tree_of_thought.parse_arguments(argv)
    assert said in capsys.readouterr().err


def test_the_words_of_a_random_checkpoint_are_its_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from benchmarks.random_checkpoint import write_tokenizer

    write_tokenizer(tmp_path, 300, 1000)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [5, 299, 0, 7]
    assert tokenizer("w5 w299\nw0 w7")["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w5 w299 w0 w7"
    assert tokenizer("w5 and w300")["input_ids"] == [5, 0, 0]
    every = list(range(300))
    assert tokenizer(tokenizer.decode(every, skip_special_tokens=True))["input_ids"] == every
    assert len(tokenizer) == 300 and tokenizer.model_max_length == 1000
