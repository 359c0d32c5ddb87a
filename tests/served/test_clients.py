"""Clients that others wrote, as their users call them: OpenAI's for Python, bench_serving, lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from sgl_lim.tasks.chains import ChainProblem, generate_chains, parse_answer
from support.server import Server

pytestmark = pytest.mark.served

TOKENS = 8 * 24 + 8
PROMPT = next(generate_chains(1, num_facts=64, num_steps=24, seed=11)).prompt  # beyond the server's budget


def test_openai_client(chain_server: Server) -> None:
    """Its completion, whole and streamed, is the text of `/generate`, and its usage counts the same tokens."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS}
    expected = chain_server.post("/generate", {"text": PROMPT, "sampling_params": sampling}).json()
    before = chain_server.counters()
    with openai.OpenAI(base_url=f"{chain_server.url}/v1", api_key="none") as client:
        (model,) = client.models.list().data
        asked = {"model": model.id, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        answer = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        with pytest.raises(openai.BadRequestError, match="longer than"):
            client.completions.create(**{**asked, "prompt": PROMPT * 200})
    generated = expected["meta_info"]["completion_tokens"]
    assert answer.choices[0].text == expected["text"]
    assert answer.choices[0].finish_reason == expected["meta_info"]["finish_reason"]["type"]
    assert answer.usage is not None and answer.usage.completion_tokens == generated
    assert answer.usage.prompt_tokens == expected["meta_info"]["prompt_tokens"]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected["text"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == generated
    grown = chain_server.counted_since(before)
    assert grown["tokens_attended"] < grown["tokens_dense"], "both answers were decoded sparsely"


def test_bench_serving(chain_server: Server, tmp_path: Path) -> None:
    """Every request ends with all its tokens, and the server decoded them sparsely."""
    before, result = chain_server.counters(), tmp_path / "result.jsonl"
    model = chain_server.get("/server_info").json()["model_path"]
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", chain_server.url]
    command += ["--model", model, "--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--random-input-len", "200", "--random-output-len", "24", "--num-prompts", "6", "--seed", "3"]
    command += ["--max-concurrency", "3", "--flush-cache", "--disable-tqdm", "--output-file", str(result)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-4000:]
    found = json.loads(result.read_text().splitlines()[-1])
    assert (found["completed"], found["total_output_tokens"]) == (6, 6 * 24), ended.stdout[-4000:]
    grown = chain_server.counted_since(before)
    assert grown["requests"] >= 6 and grown["tokens_attended"] < grown["tokens_dense"]


def test_lm_evaluation_harness(chain_server: Server, tmp_path: Path) -> None:
    """A task from a local file, by `local-completions`: it gets the texts of `/generate`, and grades them as we do."""
    pytest.importorskip("lm_eval", reason="the extra `clients` is not installed")
    problems = list(generate_chains(3, num_facts=64, num_steps=8, seed=12))
    sampling = {"temperature": 0, "max_new_tokens": 72}
    body = {"text": [problem.prompt for problem in problems], "sampling_params": sampling}
    expected = [answer["text"] for answer in chain_server.post("/generate", body).json()]
    folder, results = tmp_path / "task", tmp_path / "results"
    write_task(folder, problems)
    model = {"model": "chain-tracer", "base_url": f"{chain_server.url}/v1/completions", "num_concurrent": 2}
    model |= {"tokenizer_backend": "None", "tokenized_requests": False}
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    command += ["--tasks", "chains", "--include_path", str(folder), "--output_path", str(results), "--log_samples"]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **offline}
    ended = subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout[-4000:]
    (samples,) = results.rglob("samples_chains_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in rows] == expected
    right = [float(parse_answer(text) == problem.answer) for text, problem in zip(expected, problems, strict=True)]
    assert [row["exact_match"] for row in rows] == right


def write_task(folder: Path, problems: list[ChainProblem]) -> None:
    """A task of the harness: its items, and its configuration. JSON is YAML too."""
    folder.mkdir()
    rows = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
    (folder / "chains.jsonl").write_text("\n".join(rows))
    task = {
        "task": "chains",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "chains.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 72, "temperature": 0},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": "answer 0*(\\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "chains.yaml").write_text(json.dumps(task))
