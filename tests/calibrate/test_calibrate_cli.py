"""The command's flags, prompts and refusals, none of which starts an engine."""

import csv
import json
import os
import subprocess
import sys

import pytest

from sgl_lim.calibrate import cli, report
from sgl_lim.calibrate.options import parse
from sgl_lim.calibrate.prompts import PromptError, chain_prompts, encode, file_prompts
from sgl_lim.calibrate.recording import Recording, ask_to_record, decoded_beyond
from sgl_lim.calibrate.search import measure
from sgl_lim.settings.config import ENV
from sgl_lim.tasks.chains import generate_chains
from support.tiny_model import write_tiny_model

BASE = ("--model-path", "m", "--output", "p.json")
CHAINS = (*BASE, "--chains", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (BASE, "one of the arguments --prompts --chains is required"),
        ((*CHAINS, "--prompts", "a.jsonl"), "argument --prompts: not allowed with argument --chains"),
        (("--chains", "2", "--output", "p.json"), "the following arguments are required: --model-path"),
        ((*CHAINS, "--output", "p.txt"), "argument --output: must end in .json, got 'p.txt'"),
        ((*CHAINS, "--chat"), "argument --chat: only with --prompts"),
        ((*CHAINS, "--limit", "3"), "argument --limit: only with --prompts"),
        ((*BASE, "--prompts", "a", "--seed", "3"), "argument --seed: only with --chains"),
        ((*CHAINS, "--facts", "8", "--steps", "9"), "argument --steps: must be at most --facts (8), got 9"),
        ((*CHAINS, "--budgets", "64", "x"), "argument --budgets: must be an integer, at least 1, got 'x'"),
        ((*CHAINS, "--budgets", "64", "64"), "argument --budgets: 64 occurs twice"),
        ((*CHAINS, "--selections", "0"), "argument --selections: must be at least 1, got 0"),
        ((*CHAINS, "--max-dense", "-1"), "argument --max-dense: must be at least 0, got -1"),
        ((*CHAINS, "--max-tokens", "1"), "argument --max-tokens: must be at least 2, got 1"),
        ((*CHAINS, "--concurrency", "0"), "argument --concurrency: must be at least 1, got 0"),
        ((*CHAINS, "--lim-budget", "64"), "argument --lim-budget: name the budgets with --budgets"),
        ((*CHAINS, "--lim-selection-layers=2,8"), "argument --lim-selection-layers: they are what is looked for"),
        ((*CHAINS, "--lim-preset", "p.json"), "argument --lim-preset: it is what is written"),
        ((*CHAINS, "--attention-backend", "fa3"), "argument --attention-backend: calibration runs on lessismore"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_flags_that_do_not_fit_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(list(flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_other_flags_go_to_the_server():
    options = parse([*CHAINS, "--tp-size", "2", "--budgets", "128", "64", "--lim-aggregate=max", "--dtype", "float32"])
    assert options.server == ("--tp-size", "2", "--lim-aggregate=max", "--dtype", "float32")
    assert options.budgets == (64, 128) and options.max_tokens == 8 * 48 + 8
    assert (options.csv.name, options.heat_map.name) == ("p.csv", "p.png")
    assert parse([*BASE, "--prompts", "a", "b"]).max_tokens == 256


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


def test_chains_depend_on_the_seed_alone():
    sizes = {"num_facts": 20, "num_steps": 3}
    assert chain_prompts(3, seed=5, **sizes)[:2] == chain_prompts(2, seed=5, **sizes)
    assert chain_prompts(2, seed=5, **sizes) != chain_prompts(2, seed=6, **sizes)
    assert chain_prompts(1, seed=5, **sizes) == [next(generate_chains(1, seed=5, **sizes)).prompt]


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


@pytest.mark.parametrize("budget", [1, 9, 10, 12, 14, 15, 40])
def test_decoded_tokens_beyond_a_budget(budget):
    lengths = [(10, 6), (14, 1), (3, 4), (12, 2)]
    # A request of 10 and 6 tokens decodes five times, its contexts then 11 to 15 tokens long.
    contexts = [prompt + step for prompt, completion in lengths for step in range(1, completion)]
    assert decoded_beyond(lengths, budget) == sum(context > budget for context in contexts)


def test_what_calibration_decides_leaves_the_variable_and_the_rest_stays(monkeypatch):
    before = {"budget": 9, "selection_layers": [1], "preset": "p", "aggregate": "max", "scope": "kv_head"}
    monkeypatch.setenv(ENV, json.dumps(before))
    ask_to_record((64, 128))
    assert json.loads(os.environ[ENV]) == {"aggregate": "max", "scope": "kv_head", "record_budgets": [64, 128]}


RECALL = [[1.0, 0.5, 0.25], [0.0, 0.875, 0.75], [0.0, 0.0, 0.625]]


def test_the_matrix_is_shown_and_written(tmp_path):
    lines = report.matrix_text(RECALL).split("\n")
    assert [line.split()[2:] for line in lines[1:]] == [["100", "50", "25"], [".", "88", "75"], [".", ".", "62"]]
    report.write_csv(tmp_path / "p.csv", Recording({64: RECALL}, {64: 7, 128: 0}, 9))
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["coverage"] for row in rows] == ["1.000000", "0.500000", "0.250000", "0.875000", "0.750000", "0.625000"]
    assert rows[2] == {"budget": "64", "chosen_at": "0", "read_at": "2", "coverage": "0.250000", "rows": "7"}
    assert report.choice_text(measure(RECALL, (0,)), 3) == (
        "selection layers 0: 37.50% of the attention of 2 sparse layers (41.67% weighted by depth), "
        "least at layer 2: 25.00%"
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of four layers."""
    return write_tiny_model(tmp_path_factory.mktemp("calibrate") / "tiny", layers=4, hidden=32, heads=2, context=256)


REFUSED = {
    "--selections 4 leaves no sparse layer in a model of 4 layers": ("--selections", "4"),
    "--max-tokens 300: the longest prompt of --chains has": ("--max-tokens", "300"),
    "--budgets: no context gets longer than 512, the smallest": ("--budgets", "512", "1024"),
    "--lim-selection-interval 2: calibration records": ("--lim-selection-interval", "2"),
    "--budgets 4 leaves no token beside --lim-sinks 4": ("--budgets", "4"),
    "--pp-size 2": ("--pp-size", "2"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_model_cannot_do_is_refused_before_an_engine_starts(tiny, tmp_path, monkeypatch, capsys, message):
    monkeypatch.setenv(ENV, "")
    monkeypatch.setattr(cli, "record", lambda *args, **options: pytest.fail("an engine would have started"))
    flags = ["--model-path", str(tiny), "--device", "cpu", "--output", str(tmp_path / "p.json")]
    flags += ["--chains", "1", "--facts", "8", "--steps", "2", "--budgets", "16", *REFUSED[message]]
    assert cli.main(flags) == 2
    assert message in capsys.readouterr().err


def test_unusable_outputs_and_models_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ENV, "")
    (tmp_path / "file").write_text("")
    chains = ["--chains", "1", "--device", "cpu", "--model-path", str(tmp_path / "none")]
    assert cli.main([*chains, "--output", str(tmp_path / "file" / "p.json")]) == 2
    assert "--output" in capsys.readouterr().err
    assert cli.main([*chains, "--output", str(tmp_path / "p.json")]) == 2
    assert "--model-path" in capsys.readouterr().err


def test_the_module_is_a_command(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "sgl_lim.calibrate", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0 and "--budgets" in ran.stdout
