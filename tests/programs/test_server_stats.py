"""The server's state and the attended fraction between two looks at it."""

import socket
import threading
from dataclasses import replace
from typing import Any

import pytest
from stub_endpoint import COUNTERS, StubEndpoint

from sgl_lim.programs.endpoint import EndpointError, count_tokens, is_alive, server_info
from sgl_lim.programs.server_stats import Counters, ServerState, attended_fraction, drafted, parse_server_info


def state(*values: int) -> ServerState:
    stub = StubEndpoint(counters=dict(zip(COUNTERS, values, strict=True)) if values else None)
    return parse_server_info(stub.server_info())


def test_the_fraction_is_of_the_difference() -> None:
    fraction = attended_fraction(state(5, 1000, 1000, 1, 2, 2), state(15, 1300, 2000, 21, 4, 3))
    assert fraction.value == pytest.approx(0.3)
    assert fraction.delta == Counters(10, 300, 1000, 20, 2, 1)
    assert "300 of 1,000" in fraction.note


def test_a_token_whose_key_alone_was_read_counts_half() -> None:
    before, after = state(5, 1000, 1000, 1, 2, 2), state(15, 1300, 2000, 21, 4, 3)
    assert before.counters is not None and after.counters is not None
    before = replace(before, counters=replace(before.counters, tokens_scored=50))
    after = replace(after, counters=replace(after.counters, tokens_scored=450))
    fraction = attended_fraction(before, after)
    assert fraction.value == pytest.approx((300 + 400 / 2) / 1000)
    assert "300 of 1,000 KV tokens, the keys alone of 400 more" in fraction.note


def test_requests_that_outgrow_the_budget_are_no_restart() -> None:
    fraction = attended_fraction(state(5, 0, 0, 1, 2, 2), state(6, 1, 2, 2, 2, 0))
    assert fraction.value == 0.5


def test_a_dense_server_attends_all() -> None:
    fraction = attended_fraction(state(), state())
    assert (fraction.value, fraction.note, fraction.delta) == (1.0, "dense", None)


def test_dp_groups_are_summed() -> None:
    info: dict[str, Any] = StubEndpoint(counters=dict.fromkeys(COUNTERS, 3)).server_info()
    info["internal_states"] *= 2
    assert parse_server_info(info).counters == Counters(*[6] * 6)
    for block in info["internal_states"]:
        block["lessismore"]["counters"]["tokens_scored"] = 4
    assert parse_server_info(info).counters == Counters(*[6] * 6, tokens_scored=8)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(state(9, 9, 9, 9, 9, 9), state(1, 1, 1, 1, 1, 1), id="counters-down"),
        pytest.param(state(1, 1, 1, 1, 1, 1), replace(state(9, 9, 9, 9, 9, 9), startup="other"), id="counters-up"),
        pytest.param(state(), state(9, 9, 9, 9, 9, 9), id="dense-to-sparse"),
        pytest.param(state(9, 9, 9, 9, 9, 9), state(), id="sparse-to-dense"),
        pytest.param(state(), replace(state(), startup="other"), id="dense"),
    ],
)
def test_a_restart_gives_no_fraction(before: ServerState, after: ServerState) -> None:
    fraction = attended_fraction(before, after)
    assert fraction.value is None and "restarted" in fraction.note


def test_no_decode_step_gives_no_fraction() -> None:
    fraction = attended_fraction(state(1, 1, 1, 1, 1, 1), state(1, 1, 1, 1, 1, 1))
    assert fraction.value is None and "no decode step" in fraction.note


def test_the_line_names_what_decides_the_numbers() -> None:
    sparse = state(1, 1, 1, 1, 1, 1)
    for part in ("lessismore", "budget 256", "selection_layers 4 8", "aggregate union", "stub-model", "0.0.stub"):
        assert part in sparse.describe()
    assert "counters" not in sparse.attention and "layer_roles" not in sparse.attention
    assert "decode dense, backend torch_native" in state().describe()


def test_a_decode_backend_of_its_own_is_named() -> None:
    info = {**StubEndpoint().server_info(), "decode_attention_backend": "triton"}
    assert parse_server_info(info).attention["backend"] == "triton"


def test_over_http(stub: StubEndpoint) -> None:
    assert parse_server_info(server_info(stub.url)) == state()
    assert count_tokens(stub.url, ["a b", "c"]) == [2, 1]
    assert is_alive(stub.url)
    stub.can_tokenize = False
    assert count_tokens(stub.url, ["a b"]) is None


def test_no_server_is_said_so() -> None:
    with StubEndpoint() as stub:
        url = stub.url
    assert not is_alive(url, attempts=2, pause=0.01)
    with pytest.raises(EndpointError, match="is the server up"):
        server_info(url)


def test_another_server_is_said_so(stub: StubEndpoint) -> None:
    with pytest.raises(EndpointError, match="404"):
        server_info(f"{stub.url}/v1")


def test_what_speaks_no_http_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(4096)

        greeter = threading.Thread(target=greet, daemon=True)
        greeter.start()
        with pytest.raises(EndpointError, match="not HTTP"):
            server_info(f"http://127.0.0.1:{listener.getsockname()[1]}")
        greeter.join()


def test_drafts_are_told_where_there_were_any() -> None:
    info: dict[str, Any] = StubEndpoint(counters=dict.fromkeys(COUNTERS, 3)).server_info()
    assert drafted(vars(parse_server_info(info).counters)) is None
    counters = info["internal_states"][0]["lessismore"]["counters"]
    counters |= {"verifications": 10, "drafts_proposed": 60, "drafts_accepted": 45, "plain_rounds": 2}
    told = drafted(vars(parse_server_info(info).counters))
    assert told == {"acceptance": 0.75, "tokens_a_verification": 5.5, "drafts": 60}
