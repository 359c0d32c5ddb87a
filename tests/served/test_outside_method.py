"""A server of a method that another package offers."""

from sgl_lim.methods.registry import GROUP
from support.fleet import COMMON_ARGS, random_prompt
from support.outside_package import EVERY_NTH, install
from support.server import ServerSpec


def test_a_method_of_another_package_is_served(pool, fleet, tmp_path):
    env = install(tmp_path, EVERY_NTH, GROUP, "every_nth:EveryNth")
    args = ("--attention-backend", "lessismore", "--lim-method", "every-nth", "--lim-budget", "64")
    spec = ServerSpec("outside", fleet.model("gqa"), (*args, "--lim-stride", "3", *COMMON_ARGS), env=env)
    server = pool.get(spec)
    server.generate([random_prompt(300, 1), random_prompt(40, 2)], 8)
    shown = server.lessismore()
    assert (shown["method"], shown["budget"], shown["stride"]) == ("every-nth", 64, 3)
    assert 0 < shown["counters"]["tokens_attended"] < 0.7 * shown["counters"]["tokens_dense"]
    pool.discard(server)
