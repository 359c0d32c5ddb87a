"""Is nothing held out trained on, is the data the same every time, and do chain rows say what the task says?"""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from source_reader.batches import IGNORE, ChainRows, Mixture, TextRows
from source_reader.chains import ENDING, FACT, QUESTION, STEP, ChainWriter, Facts
from source_reader.corpus import HELD_OUT, Source, find_sources, package_folders, read_text
from source_reader.prepare import prepare, prepare_chains
from source_reader.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer

from sgl_lim.tasks.chains import MODULUS, NUM_NODES, make_chain
from support.package_tree import build_packages, source_text

CHAIN = re.compile(r"\? (v\d+) steps (\d+) : ((?:v\d+ -> v\d+ \+ \d = \d+ ; )+)answer (\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, [build_packages(tmp_path_factory.mktemp("packages"))], processes=1)
    prepare_chains(folder, 512, 6, seed=3, processes=1)
    return folder


def titles(tokenizer, file: Path) -> list[str]:
    return re.findall(r"^# ([\w/.\-]+)$", tokenizer.decode(np.load(file).tolist()), flags=re.MULTILINE)


def test_what_is_trained_on(tokenizer, data: Path) -> None:
    modules = [f"alpha/part{i}/module{j}.py" for i in range(3) for j in range(4)]
    assert titles(tokenizer, data / "train.npy") == modules + [f"beta/module{j}.py" for j in range(8)]


def test_what_is_held_out(tokenizer, data: Path) -> None:
    held_out = titles(tokenizer, data / "held_out.npy")
    # One text once, under the first name that it has.
    assert held_out == ["beta/compat/networkx.py", *[f"networkx/module{j}.py" for j in range(6)]]


def test_text_is_whole_and_files_end(tokenizer, data: Path) -> None:
    tokens = np.load(data / "train.npy")
    files = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)
    assert files[-1].size == 0 and len(files) == 21
    assert tokenizer.decode(files[0].tolist()) == f"# alpha/part0/module0.py\n{source_text(0).rstrip()}\n"


@pytest.mark.parametrize("name", ["networkx/a.py", "x/networkx/b.md", "networkx.py", "y/Jinja2/c.rst"])
def test_held_out_by_any_part_of_the_path(name: str) -> None:
    assert Source(name, Path(name)).held_out
    assert not Source(name.replace("networkx", "networky").replace("Jinja2", "jinja22"), Path(name)).held_out


def test_data_do_not_depend_on_processes(data: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "again", [build_packages(tmp_path / "packages")], processes=3)
    prepare_chains(tmp_path / "again", 512, 6, seed=3, processes=2)
    for file in ("train.npy", "held_out.npy", "chains-512.npy", "wanted-512.npy"):
        assert np.array_equal(np.load(data / file), np.load(tmp_path / "again" / file)), file


def test_without_held_out_text_nothing_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "module.py").write_text(source_text(1))
    with pytest.raises(ValueError, match="no held_out text"):
        prepare(tmp_path / "data", [tmp_path], processes=1)


def test_this_interpreter_has_text_of_both_kinds() -> None:
    sources = find_sources(package_folders())
    held_out = {s.name.split("/")[0] for s in sources if s.held_out}
    assert len(sources) > 1000 and len(held_out & set(HELD_OUT)) >= 2
    assert any(read_text(s.file) for s in sources if s.name.startswith("networkx/"))


def test_numbers_of_chains_are_single_tokens(tokenizer) -> None:
    for text in [f" {n}" for n in range(MODULUS)] + [str(n) for n in range(NUM_NODES)] + [" v", " ->", " steps"]:
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1, text


@pytest.mark.parametrize("text", ["def f(x):\n\treturn {'ä': x_1234}\r\n\n  # 日本\n", " a  b ", "<bo s>"])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS and tokenizer.decode(ids) == text


def test_special_tokens_come_first_and_training_is_deterministic(tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in (PAD, BOS, EOS)] == ["<pad>", "<bos>", "<eos>"]
    one, two = (train_tokenizer((source_text(i) for i in range(9)), 300).to_str() for _ in range(2))
    assert one == two


def test_chains_are_encoded_as_the_tokenizer_does(tokenizer) -> None:
    problem = make_chain(random.Random(2), num_facts=50, num_steps=20)
    writer = ChainWriter(tokenizer, np.zeros(1, np.uint16))
    text = f"{problem.prompt} {problem.solution}"
    assert writer.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert writer.encode(f" {text}") == tokenizer.encode(f" {text}", add_special_tokens=False).ids
    assert len(writer.encode(f" {text}")) == FACT * 50 + QUESTION + STEP * 20 + ENDING - 1


@pytest.mark.parametrize("facts", [2, 64, 400])
def test_questions_are_the_tasks(facts: int) -> None:
    task = make_chain(random.Random(facts), num_facts=facts, num_steps=min(facts, 64))
    rng = random.Random(facts)
    ours = Facts.draw(rng, facts)
    question, solution = ours.question(0, min(facts, 64))
    assert task.prompt.endswith(question) and task.solution == solution
    ours_facts, task_facts = (t.split(" ;") for t in (ours.context(rng), task.prompt.partition(" ?")[0]))
    assert sorted(f.strip() for f in ours_facts) == sorted(f.strip() for f in task_facts)


@pytest.mark.parametrize("length", [128, 512, 4096])
def test_chain_rows_ask_for_what_follows_from_them(tokenizer, length: int) -> None:
    other_text = np.array(tokenizer.encode(source_text(5, 400), add_special_tokens=False).ids, np.uint16)
    writer = ChainWriter(tokenizer, other_text)
    found, sizes = 0, set()
    for index in range(6):
        tokens, wanted = writer.row(random.Random(index), length)
        assert tokens[0] == BOS and not wanted[0] and len(tokens) == length
        text = tokenizer.decode(tokens.tolist())
        for match in CHAIN.finditer(text):
            before = text[: match.start()]
            facts = dict(re.findall(r"(v\d+) -> (v\d+ \+ \d) ;", before[before.rfind("answer") + 1 :] or before))
            node, total = match[1], 0
            for step in match[3].split(" ; ")[:-1]:
                left, result = step.split(" = ")
                if f"{left} ;" not in before:
                    pytest.fail(f"no fact for {left}")
                assert left.startswith(f"{node} ->")
                node, total = left.split()[2], (total + int(left[-1])) % MODULUS
                assert int(result) == total
            assert int(match[4]) == total and match[3].count(";") == int(match[2])
            found, sizes = found + 1, sizes | {(len(facts), int(match[2]))}
        asked = tokenizer.decode(tokens[wanted].tolist())
        assert not re.search(r"\+ \d ;", asked) and "?" not in asked
        if length < 4096:
            assert asked.count("answer") == text.count("answer")
    assert found >= 6 and len(sizes) >= 4


def test_every_window_comes_once_before_any_comes_again() -> None:
    rows = TextRows(torch.arange(1000, dtype=torch.int16), length=10, seed=0)
    for epoch in range(2):
        tokens, targets = rows.rows(99 * epoch, 99)
        starts = sorted(targets[:, 0].tolist())
        assert [b - a for a, b in itertools.pairwise(starts)] == [10] * 98
        assert (tokens[:, 0] == BOS).all() and torch.equal(tokens[:, 1:], targets[:, :-1])
    again = TextRows(torch.arange(1000, dtype=torch.int16), length=10, seed=0)
    assert torch.equal(again.rows(105, 7)[0], rows.rows(105, 7)[0])


def test_a_batch_has_both_kinds_of_row(data: Path) -> None:
    text = TextRows(torch.from_numpy(np.load(data / "train.npy").astype(np.int16)), length=512, seed=0)
    chains = ChainRows(data, 512, torch.device("cpu"))
    tokens, targets = Mixture(text, chains, rows=8, chain_share=0.25).batch(1)
    assert tokens.shape == targets.shape == (8, 512)
    assert (targets[:6] != IGNORE).all() and (targets[6:] == IGNORE).any(dim=1).all()
    wanted = targets[:, :-1] != IGNORE
    assert torch.equal(tokens[:, 1:][wanted], targets[:, :-1][wanted])
    assert torch.equal(tokens[6:], torch.from_numpy(np.load(data / "chains-512.npy")[2:4, :-1].astype(np.int64)))
