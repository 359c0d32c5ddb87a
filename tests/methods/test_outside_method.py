"""A method of another package: one file and one entry point, and everything that follows from its declaration."""

import argparse
import sys

import pytest
import torch

from sgl_lim.methods import Role, registry
from sgl_lim.methods.registry import GROUP, Methods
from sgl_lim.settings import config, flags
from sgl_lim.settings.config import configure
from support.driven_layers import decode_of, int32, layer_of, plan_of
from support.outside_package import EVERY_NTH, install


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The method is installed; whoever looks for methods finds it."""
    install(tmp_path, EVERY_NTH, GROUP, "every_nth:EveryNth")
    monkeypatch.syspath_prepend(tmp_path)
    found = Methods()
    for module in (registry, config, flags):
        monkeypatch.setattr(module, "METHODS", found)
    yield found
    sys.modules.pop("every_nth", None)


def test_its_parameters_are_flags_and_are_checked(outside, monkeypatch, capsys):
    monkeypatch.setenv(config.ENV, "")
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    assert flags.take_flags(parser.parse_args(["--lim-method", "every-nth", "--lim-stride", "3"])) == [
        "--lim-method",
        "--lim-stride",
    ]
    assert flags.load().build().settings() == {"budget": 2048, "stride": 3} and flags.load().problems() == []
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "every so many are kept, 25% with 4 (default 4; methods: every-nth)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"stride": 0}, "--lim-stride must be a positive integer, got 0"),
        ({"stride": 1}, "--lim-stride 1 skips nothing"),
        ({"early_sets": True}, "--lim-early-sets on: --lim-method every-nth selects nothing that could be kept"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(outside, values, reason):
    (problem,) = configure(method="every-nth", **values).problems()
    assert problem.startswith(reason)


def test_its_layers_attend_to_its_set(outside):
    method = configure(method="every-nth", budget=8, stride=3).build()
    decode = decode_of(method, heads=2)
    slots = torch.arange(100, 140, dtype=torch.int32).expand(2, -1)
    plan = plan_of(decode, slots, int32([30, 5]))
    assert list(method.layer_roles(3)) == [Role.DENSE, Role.SPARSE, Role.SPARSE]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 4, generator=generator) for n in (2, 200, 200))
    out = decode.run(plan, Role.SPARSE, layer_of(q, k, v, 0.5))
    for row, positions in enumerate(([0, 3, 6, 9, 26, 27, 28, 29], [0, 1, 2, 3, 4])):
        keys, values = (x[100 + torch.tensor(positions)] for x in (k, v))
        weights = (torch.einsum("hd,thd->ht", q[row], keys) * 0.5).softmax(1)
        torch.testing.assert_close(out[row], torch.einsum("ht,thd->hd", weights, values))


def test_its_pages_need_to_see_what_is_written(outside):
    class Paged(outside["every-nth"]):
        page = 16

    assert outside["every-nth"]().flags_that_follow_writes() == []
    assert Paged().flags_that_follow_writes() == ["--lim-method every-nth"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "from sgl_lim.methods import Full\n\n\nclass Impostor(Full):\n    name = 'quest'\n",
            ValueError,
            "impostor:Impostor has the name 'quest', which is taken; give it another",
        ),
        (
            "import a_module_that_is_not_there",
            ImportError,
            "impostor:Impostor cannot be loaded .ModuleNotFoundError.*repair or uninstall its package",
        ),
        (
            "from sgl_lim.methods.base import Method\n\n\nclass Impostor(Method):\n    pass\n",
            TypeError,
            "expected a subclass of Method with a name, got impostor:Impostor; repair or uninstall",
        ),
        ("Impostor = 3", TypeError, "expected a subclass of Method with a name, got impostor:Impostor"),
    ],
    ids=["taken", "broken", "nameless", "no-class"],
)
def test_what_is_no_method_of_its_own_is_refused(tmp_path, monkeypatch, text, error, message):
    module = tmp_path / "impostor.py"
    module.write_text(text)
    install(tmp_path / "site", module, GROUP, "impostor:Impostor")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "impostor", raising=False)
    with pytest.raises(error, match=message):
        len(Methods())
    sys.modules.pop("impostor", None)
