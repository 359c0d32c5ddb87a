"""Two servers behind SGLang's router: do requests with a common prefix meet on one of them?"""

from dataclasses import replace
from pathlib import Path

import pytest
import requests

from sgl_lim.programs import replicas
from sgl_lim.programs.replicas import RouterLaunch, running_router
from sgl_lim.programs.server_process import claim_port
from support.fleet import MAIN, Fleet, random_prompt
from support.server import ANSWER_TIMEOUT_S, Answer, Server, ServerPool, answer_from, launch_env

pytestmark = pytest.mark.served

PREFIXES, BRANCHES, LENGTH = 3, 4, 300
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def workers(fleet: Fleet, pool: ServerPool) -> list[Server]:
    """Two servers that differ in nothing that a router sees."""
    if not replicas.installed():
        pytest.skip("sglang-router is not installed; it comes with the extra `router`")
    spec = fleet.lim_spec(MAIN)
    other = replace(spec, name=f"{spec.name}-second")
    return [pool.get(spec, beside=other), pool.get(other)]


@pytest.mark.parametrize(("policy", "cold"), [("cache_aware", PREFIXES), ("round_robin", 2 * PREFIXES)])
def test_requests_with_a_common_prefix_meet(workers: list[Server], policy: str, cold: int, tmp_path: Path) -> None:
    """An odd number of prefixes, so that taking turns sends each prefix to both servers."""
    for worker in workers:
        worker.flush_cache()
    prefixes = [random_prompt(LENGTH, seed) for seed in range(PREFIXES)]
    prompts = [[*prefix, 20 + branch] for branch in range(BRANCHES) for prefix in prefixes]
    before = [worker.counters()["requests"] for worker in workers]
    urls = [worker.url for worker in workers]
    launch = RouterLaunch(urls, policy, tmp_path / "router.log", claim_port(), environment=launch_env())
    with running_router(launch, timeout=120) as url:
        answers = [ask(url, prompt) for prompt in prompts]
    assert sum(answer.cached_tokens < LENGTH for answer in answers) == cold
    served = [worker.counters()["requests"] - count for worker, count in zip(workers, before, strict=True)]
    # Nothing waits here, so that a router that looks for prefixes has no reason to take the other server.
    assert sum(served) == len(prompts) and (policy == "cache_aware" or min(served) == max(served))
    alone = workers[0].generate(prompts, NEW_TOKENS)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]


def ask(url: str, prompt: list[int]) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    reply = requests.post(f"{url}/generate", json=body, timeout=ANSWER_TIMEOUT_S)
    assert reply.status_code == 200, reply.text
    return answer_from(reply.json())
