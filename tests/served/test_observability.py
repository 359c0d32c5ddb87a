"""What the server says about itself: the start-up line, the `/server_info` block, the counters, `/metrics`."""

from collections.abc import Sequence

import pytest

from support.fleet import LAYERS, MAIN, NEXT_CASES, ROLES, SELECTION_LAYERS, LimCase, random_prompt
from support.server import Server
from support.waiting import wait_until

pytestmark = [
    pytest.mark.served,
    pytest.mark.parametrize("case", [MAIN, NEXT_CASES[0]], ids=str, indirect=True),
]

JOBS = [(random_prompt(40, 300), 12), (random_prompt(250, 301), 20), (random_prompt(500, 302), 7)]
SUMS = ("tokens_attended", "tokens_dense", "selections", "requests", "requests_dense")


def expected_counts(jobs: Sequence[tuple[list[int], int]], case: LimCase) -> dict[str, int]:
    """Counts by hand.

    Prefill yields a request's first token, so N tokens take N - 1 decode steps, which see P + 1, … tokens. The overlap
    scheduler learns only afterwards that a request is finished; the step more that it starts is not counted.
    """
    budget = case.rule.budget
    contexts = [range(len(prompt) + 1, len(prompt) + tokens) for prompt, tokens in jobs]
    sparse = ROLES.count("sparse")
    lengths = [length for context in contexts for length in context]
    return {
        "decode_steps": len(lengths),  # where the requests come one after another
        "tokens_attended": sum((LAYERS - sparse) * n + sparse * min(n, budget) for n in lengths),
        "tokens_dense": LAYERS * sum(lengths),
        "selections": len(SELECTION_LAYERS) * sum(n > budget for n in lengths),
        "requests": len(jobs),
        "requests_dense": sum(max(context) <= budget for context in contexts),
        # Prompts have nothing in common, selection layers attend to all that they score, and nothing is drafted.
        **dict.fromkeys(("tokens_scored", "tokens_shared", "rows_grouped", "warm_starts", "draft_tokens_attended"), 0),
    }


def growth(server: Server, before: dict[str, int]) -> dict[str, int]:
    """How much the counters grew, once the server is idle."""
    server.flush_cache()
    return server.counted_since(before)


def test_the_start_up_line_says_what_is_on(case: LimCase, server: Server) -> None:
    (line,) = [line for line in server.log().splitlines() if "sgl-lim is on:" in line]
    for said in (
        "method lessismore",
        f"budget {case.rule.budget}, aggregate union, selection layers 1,3",
        "selection attends context, recency 0.25, sinks 4, scope global",
        "selection layers from --lim-selection-layers",
        "layers dense/select/sparse 1/2/3",
        "dense backend torch_native",
        "prefix selection request, selection interval 1, early sets off",
        "prefix groups on",
    ):
        assert said in line


def test_plugin_and_hooks_were_taken_without_complaint(server: Server) -> None:
    log = server.log()
    assert "Failed to execute general plugin" not in log
    assert "Failed to apply hooks" not in log


def test_server_info_shows_the_settings(case: LimCase, server: Server) -> None:
    block = server.lessismore()
    shown = {key: block[key] for key in ("method", "budget", "recency", "sinks", "aggregate", "dense_backend")}
    assert shown == {
        "method": "lessismore",
        "budget": case.rule.budget,
        "recency": 0.25,
        "sinks": 4,
        "aggregate": "union",
        "dense_backend": "torch_native",
    }
    assert block["selection_layers"] == list(SELECTION_LAYERS)
    assert block["selection_attends"] == "context" and block["selection_layers_measured"] is None
    assert block["layer_roles"] == list(ROLES)
    assert (block["prefix_groups"], block["selection_interval"], block["early_sets"]) == (True, 1, False)


def test_counters_of_requests_one_after_another_equal_a_hand_count(case: LimCase, server: Server) -> None:
    server.flush_cache()
    before = server.counters()
    for job in JOBS:
        server.generate_one(*job)
    assert growth(server, before) == expected_counts(JOBS, case)


def test_counters_of_requests_together_equal_a_hand_count(case: LimCase, server: Server) -> None:
    server.flush_cache()
    before = server.counters()
    server.generate_apart(JOBS)
    grown, expected = growth(server, before), expected_counts(JOBS, case)
    assert {name: grown[name] for name in SUMS} == {name: expected[name] for name in SUMS}
    assert max(tokens for _, tokens in JOBS) - 1 <= grown["decode_steps"] <= expected["decode_steps"]


def test_requests_of_one_token_decode_nothing(case: LimCase, server: Server) -> None:
    server.flush_cache()
    before = server.counters()
    jobs = [(random_prompt(length, 310 + length), 1) for length in (500, 300, 40)]
    for job in jobs:
        server.generate_one(*job)
    server.generate_apart(jobs)
    assert not any(growth(server, before).values())


def test_a_step_after_a_stop_token_is_not_counted(case: LimCase, server: Server) -> None:
    prompt, tokens = random_prompt(300, 320), 12
    ids = server.generate_one(prompt, tokens).tokens
    place = next(n for n in range(3, tokens) if ids[n] not in ids[:n])
    server.flush_cache()
    before = server.counters()
    sampling = {"temperature": 0, "max_new_tokens": tokens, "stop_token_ids": [ids[place]]}
    assert server.generate_one(prompt, sampling_params=sampling).finish == "stop"
    assert growth(server, before) == expected_counts([(prompt, place + 1)], case)


def test_a_cached_prompt_counts_as_a_new_request(case: LimCase, server: Server) -> None:
    server.generate_one(*JOBS[2])
    before = server.counters()
    assert server.generate_one(*JOBS[2]).cached_tokens > 0
    assert growth(server, before) == expected_counts(JOBS[2:], case)


def test_metrics_show_the_same_totals_once_idle(server: Server) -> None:
    server.generate_apart(JOBS)
    server.flush_cache()
    wanted = {f"sgl_lim_{name}": total for name, total in server.counters().items()}
    wait_until(lambda: lim_metrics(server) == wanted, f"/metrics shows {wanted}")


def lim_metrics(server: Server) -> dict[str, float]:
    """The plugin's samples at `/metrics`, counters without their suffix."""
    samples = {}
    for line in server.get("/metrics").text.splitlines():
        if line.startswith("sgl_lim_"):
            assert f'model_name="{server.spec.model}"' in line
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            samples[name.removesuffix("_total")] = float(value)
    return samples
