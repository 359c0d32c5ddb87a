"""Does the README show what a reader sees?"""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from sgl_lim.methods import LessIsMore
from sgl_lim.serving.metrics import summary
from sgl_lim.settings.layers import Layers

README = (Path(__file__).parents[2] / "README.md").read_text()


def shown() -> tuple[str, str]:
    """The two messages of a server that is ready, each as one line."""
    matched = re.search(r"```text\n(sgl-lim is on: .*?)\n(The server .*?)\n```", README, re.DOTALL)
    assert matched is not None, "the README shows no log"
    return " ".join(matched[1].split()), matched[2]


def test_the_start_line_is_what_a_server_logs() -> None:
    method = LessIsMore(selection_layers=(2, 12))
    lim = SimpleNamespace(
        method=method,
        roles=method.layer_roles(36),
        layers=Layers((2, 12), "context", "preset qwen3-8b"),
        dense_backend="fa3",
        granule=128,
        drafts=None,
        pages=None,
    )
    assert shown()[0] == f"sgl-lim is on: {summary(lim)}"


def test_the_ready_line_is_sglangs() -> None:
    package = find_spec("sglang")
    assert package is not None and package.submodule_search_locations
    server = Path(package.submodule_search_locations[0]) / "srt" / "entrypoints" / "http_server.py"
    assert f'"{shown()[1]}"' in server.read_text()
