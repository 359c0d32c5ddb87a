"""The few HTTP calls that are not generations, with errors for people. Standard library only."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any


class EndpointError(RuntimeError):
    """The endpoint is not there or does not answer as a SGLang server; the message says what to check."""


def server_info(url: str) -> dict[str, Any]:
    """`GET /server_info`: the launch configuration and each DP group's `internal_states`.

    Raises:
        EndpointError: no server answers, or it is not SGLang.
    """
    info = request_json(f"{url}/server_info")
    if not isinstance(info, dict) or "model_path" not in info or "internal_states" not in info:
        raise EndpointError(f"{url}/server_info answers, but not as a SGLang server does; is --endpoint right?")
    return info


def count_tokens(url: str, texts: Sequence[str]) -> list[int] | None:
    """Token counts of `texts` by the server's own tokenizer, with the special tokens that a prompt gets.

    None if the server cannot say: 0.5.17 answers 500 where the tokenizer's files set no `model_max_length`.
    """
    try:
        answer = request_json(f"{url}/tokenize", {"prompt": list(texts)})
    except EndpointError:
        return None
    return [int(count) for count in answer["count"]]


def has_token(url: str, text: str) -> bool | None:
    """Whether the server's tokenizer has one token for the whole of `text`; None if the server cannot say."""
    try:
        ids = request_json(f"{url}/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        if len(ids) != 1:
            return False
        # The other way round too: an unknown text is one unknown token to some tokenizers.
        back = request_json(f"{url}/detokenize", {"tokens": ids, "skip_special_tokens": False})["text"]
    except EndpointError:
        return None
    return bool(back == text)


def is_alive(url: str, *, attempts: int = 3, pause: float = 1.0) -> bool:
    """Whether the HTTP server answers; `attempts` tries, `pause` seconds apart."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        try:
            request_json(f"{url}/model_info")
        except EndpointError:
            continue
        return True
    return False


def request_json(url: str, payload: object | None = None, *, timeout: float = 30.0) -> Any:
    """GET, or POST with a payload, and parse the JSON answer. `timeout` in seconds.

    Raises:
        EndpointError: no connection, an HTTP error, or no JSON.
    """
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise EndpointError(f"{url}: HTTP {error.code} {error.reason}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise EndpointError(
            f"{url}: no answer ({reason}); is the server up? Start one with: python -m sglang.launch_server"
        ) from error
    except http.client.HTTPException as error:
        raise EndpointError(f"{url}: the answer is not HTTP ({error!r}); is --endpoint a SGLang server?") from error
    except ValueError as error:
        raise EndpointError(f"{url}: the answer is not JSON; is --endpoint a SGLang server?") from error
