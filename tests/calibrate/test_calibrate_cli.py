"""The command: its flags, its refusals, and what it writes and says for a tiny model."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgl_lim.calibrate import cli, job
from sgl_lim.calibrate.explore import Effort
from sgl_lim.calibrate.job import Scale
from sgl_lim.calibrate.material import Counts
from sgl_lim.calibrate.options import parse
from sgl_lim.calibrate.prompts import PromptError, encode, file_prompts
from sgl_lim.settings import kept_calibration, preset_file
from sgl_lim.settings.config import ENV
from support.tiny_model import write_tiny_model

BASE = ("--model-path", "m", "--device", "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result of a test is kept for the user's servers."""
    monkeypatch.setenv(kept_calibration.FOLDER_ENV, str(tmp_path / "kept"))
    monkeypatch.delenv(ENV, raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "p.json"), "the following arguments are required: --model-path"),
        ((*BASE, "--output", "p.txt"), "argument --output: must end in .json, got 'p.txt'"),
        ((*BASE, "--no-keep"), "argument --no-keep: nothing would be written; name a file with --output"),
        ((*BASE, "--chat"), "argument --chat: only with --prompts"),
        ((*BASE, "--limit", "3"), "argument --limit: only with --prompts"),
        ((*BASE, "--budgets", "64", "x"), "argument --budgets: must be an integer, at least 1, got 'x'"),
        ((*BASE, "--budgets", "64", "64"), "argument --budgets: 64 occurs twice"),
        ((*BASE, "--reads", "0"), "argument --reads: must be a number from 0.5"),
        ((*BASE, "--max-dense", "-1"), "argument --max-dense: must be at least 0, got -1"),
        ((*BASE, "--max-tokens", "1"), "argument --max-tokens: must be at least 2, got 1"),
        ((*BASE, "--attends", "both"), "argument --attends: invalid choice: 'both'"),
        ((*BASE, "--lim-budget", "64"), "argument --lim-budget: name the budgets with --budgets"),
        ((*BASE, "--lim-selection-layers=2,8"), "argument --lim-selection-layers: they are what is looked for"),
        ((*BASE, "--lim-selection-attends", "set"), "argument --lim-selection-attends: it is looked for too; fix it"),
        ((*BASE, "--lim-preset", "p.json"), "argument --lim-preset: it is what is written"),
        ((*BASE, "--lim-early-sets", "on"), "argument --lim-early-sets: every step selects while layers"),
        ((*BASE, "--lim-method", "quest"), "--lim-method quest: it has no selection layers"),
        ((*BASE, "--lim-recency", "auto"), "--lim-recency auto"),
        ((*BASE, "--lim-sinks", "-1"), "--lim-sinks"),
        ((*BASE, "--tp-size", "2"), "unknown arguments --tp-size 2: calibration loads the model by transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_flags_that_do_not_fit_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(list(flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_of_the_rule_win_over_the_variable(monkeypatch):
    monkeypatch.setenv(ENV, json.dumps({"aggregate": "max", "sinks": 8, "budget": 9, "selection_layers": [1]}))
    options = parse([*BASE, "--budgets", "128", "64", "--lim-aggregate=sum", "--lim-scope", "kv_head"])
    assert options.rule.given == {"aggregate": "sum", "sinks": 8, "scope": "kv_head"}
    assert options.budgets == (64, 128) and options.attends == ("set", "context") and options.dtype == "float32"
    assert parse([*BASE, "--attends", "context"]).attends == ("context",)


def test_prompts_of_files_come_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one "}\n\n{"problem": "two", "answer": 3}\n')
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    prompts = file_prompts([tmp_path / "b.txt", tmp_path / "a.jsonl"])
    assert prompts[:2] == ["three\n\nfour", "one "]
    assert prompts[2].startswith("two\n") and "\\boxed{}" in prompts[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "No such file"),
        ("a.jsonl", b"\n", "no prompt in it"),
        ("a.txt", b" \n", "no prompt in it"),
        ("a.txt", b"\xff", "not UTF-8 text"),
        ("a.jsonl", b"{}\n", r"a\.jsonl:1: neither 'prompt' nor 'problem'"),
        ("a.jsonl", b'{"prompt": "x"}\n{\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "x"}\n' + b"[" * 100_000, r"a\.jsonl:2: JSON that Python does not read"),
        ("a.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: JSON that Python does not read"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", b'{"prompt": 4}\n', r"'prompt' must be a text that is not empty, got 4"),
        ("a.jsonl", b'{"problem": " "}\n', "'problem' must be a text that is not empty"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=f"--prompts .*{message}"):
        file_prompts([tmp_path / name])


class Tokenizer:
    """One token a character, as code points; special tokens are negative."""

    chat_template = "there"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [-1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def test_a_chat_prompt_is_a_user_turn_without_a_second_special_token():
    assert encode(["ab"], Tokenizer(), chat=False) == [[-1, 97, 98]]
    assert encode(["ab"], Tokenizer(), chat=True) == [[ord(letter) for letter in "<user>ab<assistant>"]]


def test_a_model_without_a_chat_template_cannot_chat():
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="--chat: the model's tokenizer has no chat template"):
        encode(["a"], tokenizer, chat=True)


SMALL = Scale(
    context=320,
    decoded=16,
    rows=64,
    counts=tuple(Counts(windows=1, others=0, facts=1, alike=0, chains=2) for _ in range(3)),  # type: ignore[arg-type]
    effort=Effort(first=4, rounds=1, each=3, finalists=3, refine=1),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model of four layers that knows the words of chains alone, and does none."""
    return write_tiny_model(tmp_path_factory.mktemp("calibrate") / "tiny", layers=4, hidden=32, heads=2, context=512)


@pytest.fixture
def small(monkeypatch) -> None:
    """Little work; chains are decoded whether or not the model does them."""
    monkeypatch.setattr(job, "ON_CPU", SMALL)
    monkeypatch.setattr(job, "_does_chains", lambda *_: True)


def test_equal_commands_write_equal_files_and_keep_them(tiny, small, tmp_path, capsys):
    command = ["--model-path", str(tiny), "--device", "cpu", "--budgets", "40", "64", "--lim-aggregate", "max"]
    for name in ("a", "b"):
        assert cli.main([*command, "--output", str(tmp_path / name / "p.json")]) == 0
    for suffix in (".json", ".csv"):
        one, other = ((tmp_path / name / "p").with_suffix(suffix).read_bytes() for name in ("a", "b"))
        assert one == other
    preset = preset_file.load(str(tmp_path / "a" / "p.json"))
    assert (preset.architecture, preset.num_layers, preset.rule["aggregate"]) == ("Qwen3ForCausalLM", 4, "max")
    assert [entry.budget for entry in preset.entries] == [40, 64]
    kept = kept_calibration.find(str(tiny), 4)
    assert kept is not None and kept.preset.entries == preset.entries
    rows = list(csv.DictReader((tmp_path / "a" / "p.csv").open()))
    for entry in preset.entries:
        of_budget = [row for row in rows if row["budget"] == str(entry.budget)]
        searched = [row for row in of_budget if row["part"] == "search"]
        # Spaced layers of four: 2 alone.
        assert entry.measured["beside"]["spaced default"]["selection_layers"] == [1]
        within = [row for row in searched if float(row["full_reads"]) <= 2.5 and row["keeps"] == "True"]
        least = min(float(row["kl"]) for row in within)
        layers = "-".join(map(str, entry.selection_layers))
        named = (layers, entry.selection_attends)
        chosen = next(row for row in within if (row["selection_layers"], row["attends"]) == named)
        assert float(chosen["kl"]) <= least + 0.0002
        assert {row["part"] for row in of_budget} == {"quick", "search", "held out", "coverage"}
        held = next(r for r in of_budget if r["part"] == "held out" and r["selection_layers"] == layers)
        assert float(held["agreement"]) == pytest.approx(entry.measured["agreement"], abs=1e-4)
    said = capsys.readouterr()
    last = said.out.rstrip().split("\n")
    chosen_lines = [n for n, line in enumerate(last) if line.startswith("Budget ")]
    kept_line = next(n for n, line in enumerate(last) if line.startswith("kept in "))
    assert "the next server on this checkpoint uses it" in last[kept_line] and chosen_lines[-1] > kept_line
    assert last[-1].startswith(("Spaced default", "One ", "What was chosen"))
    assert said.err.startswith("loading ") and "tokens to decode" in said.err
    assert "covers" not in said.out and "coverage" not in said.out


def test_prompts_of_ones_own_are_continued_and_decoded(tiny, small, tmp_path, capsys):
    prompts = tmp_path / "own.txt"
    prompts.write_text(" ".join(f"v{n} -> v{n + 7} + 3 ;" for n in range(40)))
    command = ["--model-path", str(tiny), "--device", "cpu", "--prompts", str(prompts), "--max-tokens", "20"]
    assert cli.main([*command, "--no-keep", "--output", str(tmp_path / "p.json")]) == 0
    entry = preset_file.load(str(tmp_path / "p.json")).entries[0]
    # A text of the user's is text; chains then are no more than that.
    assert 1 <= entry.measured["tokens"] <= 19 and entry.budget == 40
    assert not (tmp_path / "kept").exists() and "kept in" not in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(tiny, small, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "explore", stopped)
    assert cli.main(["--model-path", str(tiny), "--device", "cpu", "--output", str(tmp_path / "p.json")]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists() and not (tmp_path / "kept").exists()


REFUSED = {
    "--context 600: the model has positions for 512 tokens": ("--context", "600"),
    "--budgets 200: more than half of --context 320": ("--budgets", "200"),
    "--lim-budget 4 leaves no token beside --lim-sinks 4": ("--budgets", "4"),
    "--output /dev/null/p.json": ("--output", "/dev/null/p.json"),
    "--device cuda:99": ("--device", "cuda:99"),
    "--model-path no/such/model": ("--model-path", "no/such/model"),
    "--reads 0.5: one selection layer counts 1; raise it": ("--reads", "0.5", "--attends", "context"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_refused(tiny, small, capsys, message):
    assert cli.main(["--model-path", str(tiny), "--device", "cpu", "--context", "320", *REFUSED[message]]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_measured_is_refused_before_its_weights(tmp_path, capsys, monkeypatch):
    from transformers import MistralConfig

    MistralConfig(sliding_window=64).save_pretrained(tmp_path / "window")
    monkeypatch.setattr(cli, "load", lambda *_, **__: pytest.fail("weights would have been loaded"))
    assert cli.main(["--model-path", str(tmp_path / "window"), "--device", "cpu"]) == 2
    assert "sliding window of 64" in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_refused(tiny, small, tmp_path, capsys):
    prompts = tmp_path / "own.txt"
    command = ["--model-path", str(tiny), "--device", "cpu", "--prompts", str(prompts)]
    prompts.write_text("v1 -> v2 + 3 ; " * 80)
    assert cli.main([*command, "--max-tokens", "300"]) == 2
    assert "--max-tokens 300: the longest prompt of --prompts has 481 tokens" in capsys.readouterr().err
    prompts.write_text("v1 -> v2")
    assert cli.main([*command, "--max-tokens", "5"]) == 2
    assert "--budgets: no context of --prompts gets longer than 40" in capsys.readouterr().err


def test_the_module_is_a_command(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "sgl_lim.calibrate", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0 and "--budgets" in ran.stdout and "The rule:" in ran.stdout


def test_too_little_memory_is_told_with_the_way_out(tiny, small, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(cli, "calibrate", full)
    assert cli.main(["--model-path", str(tiny), "--device", "cpu", "--budgets", "40"]) == 2
    told = capsys.readouterr().err
    assert "--context 320; lower it" in told and "20.00 GiB" in told
