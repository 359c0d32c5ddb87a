"""Sets that outlive a step: are they kept and read as they should, and does a request begin with what is remembered?"""

from dataclasses import replace

import pytest

from support.fleet import LAYERS, MAIN, NEXT_CASES, ROLES, SELECTION_LAYERS, Fleet, LimCase, random_prompt
from support.server import Server, ServerPool
from support.step_checks import check_attention, exact_logits, served_set

INTERVAL, TOKENS = 3, 12
pytestmark = pytest.mark.served
on_both_releases = pytest.mark.parametrize("case", [MAIN, NEXT_CASES[0]], ids=str, indirect=True)
on_one_release = pytest.mark.parametrize("case", [MAIN], ids=str, indirect=True)
PROMPT = random_prompt(500, 700)


@pytest.fixture
def every_third(case: LimCase, fleet: Fleet, pool: ServerPool) -> Server:
    spec = fleet.lim_spec(case)
    args = (*spec.args, "--lim-selection-interval", str(INTERVAL))
    return pool.get(replace(spec, name=f"{spec.name}-every-third", args=args))


@pytest.fixture
def early(case: LimCase, fleet: Fleet, pool: ServerPool) -> Server:
    spec = fleet.lim_spec(case)
    return pool.get(replace(spec, name=f"{spec.name}-early", args=(*spec.args, "--lim-early-sets", "on")))


def middle(kept: list[int], case: LimCase) -> list[int]:
    """The set without sinks and window."""
    rule = case.rule
    recent = rule.budget - rule.sinks - int(rule.budget * (1 - rule.recency))
    return kept[rule.sinks : len(kept) - recent]


@on_both_releases
def test_a_set_is_kept_between_selections(case: LimCase, fleet: Fleet, every_third: Server) -> None:
    every_third.flush_cache()
    before = every_third.counters()
    with fleet.probe.recording():
        every_third.generate_one(PROMPT, TOKENS)
    steps = fleet.probe.steps(LAYERS)
    assert len(steps) >= TOKENS - 1
    chosen: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for record in step:
            layer, length = record["layer"], int(record["seq_lens"][0])
            place = f"step {number}, layer {layer}"
            q, k, v = record["q"][0], record["keys"][0, :length], record["values"][0, :length]
            if record["role"] != "dense":
                kept = served_set(record, 0, length)
            if record["role"] == "select" and number % INTERVAL == 0:
                exact, slack = exact_logits(q, k, record["scale"])
                assert case.rule.explains(kept, exact, length, slack), place
                chosen[layer] = middle(kept, case)
                check_attention(q, k, v, record["scale"], record["out"][0], place)
            elif record["role"] != "dense":
                # Selection layers attend to the set as well, and it is theirs of the last selection.
                if record["role"] == "select":
                    assert middle(kept, case) == chosen[layer], place
                assert kept[-1] == length - 1, place
                check_attention(q, k[kept], v[kept], record["scale"], record["out"][0], place)
    grown = every_third.counted_since(before)
    assert grown["selections"] == len(SELECTION_LAYERS) * -(-grown["decode_steps"] // INTERVAL)
    lengths = range(len(PROMPT) + 1, len(PROMPT) + 1 + grown["decode_steps"])
    full = [LAYERS - ROLES.count("sparse") if n % INTERVAL == 0 else ROLES.count("dense") for n in range(len(lengths))]
    attended = [layers * n + (LAYERS - layers) * case.rule.budget for layers, n in zip(full, lengths, strict=True)]
    assert grown["tokens_attended"] == sum(attended)


@on_both_releases
def test_forks_and_later_turns_begin_warm(case: LimCase, every_third: Server) -> None:
    every_third.flush_cache()
    first = every_third.generate_one(PROMPT, TOKENS)
    before = every_third.counters()
    every_third.generate([[*PROMPT, *random_prompt(3 + n, 710 + n)] for n in range(3)], TOKENS)
    every_third.generate_one([*PROMPT, *first.tokens, *random_prompt(4, 720)], TOKENS)
    grown = every_third.counted_since(before)
    assert (grown["requests"], grown["warm_starts"]) == (4, 4)
    every_third.generate_one(random_prompt(500, 730), TOKENS)
    assert every_third.counters()["warm_starts"] == before["warm_starts"] + 4, "nothing is known of a new prompt"


@on_both_releases
def test_a_flush_forgets_everything(case: LimCase, every_third: Server) -> None:
    every_third.generate_one(PROMPT, TOKENS)
    for _ in range(2):
        every_third.flush_cache()
        before = every_third.counters()
        every_third.generate_one(PROMPT, TOKENS)
        grown = every_third.counted_since(before)
        assert (grown["requests"], grown["warm_starts"]) == (1, 0)
        assert grown["selections"] == len(SELECTION_LAYERS) * -(-grown["decode_steps"] // INTERVAL)


@on_both_releases
def test_answers_do_not_depend_on_the_batch(case: LimCase, every_third: Server) -> None:
    prompts = [random_prompt(length, 740 + length) for length in (61, 400, 613, 250)]
    every_third.flush_cache()
    alone = [every_third.generate_one(prompt, TOKENS).tokens for prompt in prompts]
    every_third.flush_cache()
    assert [answer.tokens for answer in every_third.generate(prompts, TOKENS)] == alone


@on_one_release
def test_early_layers_attend_to_the_set_of_the_step_before(case: LimCase, fleet: Fleet, early: Server) -> None:
    early.flush_cache()
    before = early.counters()
    with fleet.probe.recording():
        early.generate_one(PROMPT, TOKENS)
    steps = fleet.probe.steps(LAYERS)
    assert len(steps) >= TOKENS - 1
    rule, last = case.rule, None
    for number, step in enumerate(steps):
        for record in step:
            layer, length = record["layer"], int(record["seq_lens"][0])
            place = f"step {number}, layer {layer}"
            q, k, v = record["q"][0], record["keys"][0, :length], record["values"][0, :length]
            attended = list(range(length))
            if record["role"] == "dense" and last is not None:
                forced = rule.forced(length)
                attended = forced[: rule.kept_sinks] + last + forced[rule.kept_sinks :]
                assert len(attended) == rule.budget
            if record["role"] == "select":
                exact, slack = exact_logits(q, k, record["scale"])
                assert rule.explains(served_set(record, 0, length), exact, length, slack), place
            if record["role"] == "sparse":
                attended = served_set(record, 0, length)
            check_attention(q, k[attended], v[attended], record["scale"], record["out"][0], place)
        last = middle(served_set(step[SELECTION_LAYERS[0]], 0, length), case)
    grown = early.counted_since(before)
    lengths = range(len(PROMPT) + 1, len(PROMPT) + 1 + grown["decode_steps"])
    full = [LAYERS - ROLES.count("sparse"), *[len(SELECTION_LAYERS)] * (len(lengths) - 1)]
    attended = [layers * n + (LAYERS - layers) * rule.budget for layers, n in zip(full, lengths, strict=True)]
    assert grown["tokens_attended"] == sum(attended)
    assert grown["selections"] == len(SELECTION_LAYERS) * grown["decode_steps"]


@on_one_release
def test_early_layers_of_a_fork_attend_to_what_its_prefix_remembers(case: LimCase, early: Server) -> None:
    early.flush_cache()
    early.generate_one(PROMPT, TOKENS)
    before = early.counters()
    early.generate_one([*PROMPT, *random_prompt(3, 730)], TOKENS)
    grown = early.counted_since(before)
    assert (grown["requests"], grown["warm_starts"]) == (1, 1)
    lengths = range(len(PROMPT) + 4, len(PROMPT) + 4 + grown["decode_steps"])
    selecting = len(SELECTION_LAYERS)
    assert grown["tokens_attended"] == sum(selecting * n + (LAYERS - selecting) * case.rule.budget for n in lengths)
