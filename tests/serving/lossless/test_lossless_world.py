"""SGLang's own caches under rounds of drafts: does every slot have one owner, and does nothing rejected stay?"""

import os

import pytest

pytest.importorskip("sglang.srt.mem_cache.radix_cache")

from support.lossless_world import drawn, lossless_config
from support.radix_world import random_schedule

SCHEDULES = int(os.environ.get("RADIX_SCHEDULES", "200"))


@pytest.fixture(scope="module", autouse=True)
def _config():
    with lossless_config():
        yield


@pytest.mark.parametrize("page", [1, 16])
def test_every_slot_has_one_owner_whatever_is_rejected(page):
    rounds = 0
    for seed in range(SCHEDULES // 2):
        draw, world = drawn(seed, page)
        done = []
        try:
            for name in random_schedule(draw, world):
                done.append(name)
                world.check()
                rounds += len(world.last) if name == "decode" else 0
        except Exception as error:
            raise AssertionError(f"page size {page}, seed {seed}, after {done}: {error}") from error
    assert rounds > 2 * SCHEDULES, f"schedules hardly verify anything: {rounds} rows"
