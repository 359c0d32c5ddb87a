"""The few HTTP calls that are not generations of SGLang's frontend, with errors for people.

Every function takes `api_key`; without one the environment's is sent (`api_key.py`).
"""

import http.client
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import requests

from sgl_lim.programs import api_key as keys
from sgl_lim.programs import proxies


class EndpointError(RuntimeError):
    """The endpoint is not there or does not answer as a SGLang server; the message says what to check."""


def server_info(url: str, *, api_key: str | None = None) -> dict[str, Any]:
    """`GET /server_info`: the launch configuration and each DP group's `internal_states`.

    Raises:
        EndpointError: no server answers, or it is not SGLang.
    """
    info = request_json(f"{url}/server_info", api_key=api_key)
    if not isinstance(info, dict) or "model_path" not in info or "internal_states" not in info:
        raise EndpointError(f"{url}/server_info answers, but not as a SGLang server does; is --endpoint right?")
    return info


def count_tokens(url: str, texts: Sequence[str], *, api_key: str | None = None) -> list[int] | None:
    """Token counts of `texts` by the server's own tokenizer, with the special tokens that a prompt gets.

    None if the server cannot say: 0.5.17 answers 500 where the tokenizer's files set no `model_max_length`.
    """
    try:
        answer = request_json(f"{url}/tokenize", {"prompt": list(texts)}, api_key=api_key)
    except EndpointError:
        return None
    return [int(count) for count in answer["count"]]


def has_token(url: str, text: str, *, api_key: str | None = None) -> bool | None:
    """Whether the server's tokenizer has one token for the whole of `text`; None if the server cannot say."""
    try:
        asked = {"prompt": text, "add_special_tokens": False}
        ids = request_json(f"{url}/tokenize", asked, api_key=api_key)["tokens"]
        if len(ids) != 1:
            return False
        # The other way round too: an unknown text is one unknown token to some tokenizers.
        asked = {"tokens": ids, "skip_special_tokens": False}
        back = request_json(f"{url}/detokenize", asked, api_key=api_key)["text"]
    except EndpointError:
        return None
    return bool(back == text)


def is_alive(url: str, *, attempts: int = 3, pause: float = 1.0, api_key: str | None = None) -> bool:
    """Whether the HTTP server answers; `attempts` tries, `pause` seconds apart."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        try:
            request_json(f"{url}/model_info", api_key=api_key)
        except EndpointError:
            continue
        return True
    return False


def request_json(url: str, payload: object | None = None, *, timeout: float = 30.0, api_key: str | None = None) -> Any:
    """GET, or POST with a payload, and parse the JSON answer. `timeout` in seconds.

    Raises:
        EndpointError: no connection, an HTTP error, or no JSON.
    """
    with asked(url, payload, timeout=timeout, api_key=api_key) as response:
        try:
            return response.json()
        except requests.JSONDecodeError as error:
            where = f"{url}{proxies.through(url)}"
            raise EndpointError(f"{where}: the answer is not JSON; is --endpoint a SGLang server?") from error


@contextmanager
def asked(
    url: str,
    payload: Any = None,
    *,
    method: str | None = None,
    timeout: float,
    stream: bool = False,
    api_key: str | None = None,
) -> Iterator[requests.Response]:
    """An answer of status 200, whose body may be read in the context; with `stream` it is read while it comes.

    Args:
        url, payload: as in `request_json`.
        method: another than GET without a payload and POST with one.
        timeout: seconds without a byte.

    Raises:
        EndpointError: no connection, or an HTTP error, also while the body is read in the context.
    """
    proxies.keep_direct(url)
    where = f"{url}{proxies.through(url)}"
    try:
        headers = keys.headers(api_key)
    except keys.ApiKeyError as error:
        raise EndpointError(f"{where}: {error}") from error
    how = method or ("GET" if payload is None else "POST")
    try:
        # `auth` keeps requests from sending what ~/.netrc has for the host instead of the key.
        with requests.request(
            how, url, json=payload, headers=headers, auth=_as_it_is, timeout=timeout, stream=stream
        ) as response:
            if response.status_code != 200:
                what = f"HTTP {response.status_code} {response.reason}"
                raise EndpointError(f"{where}: {what}{keys.advice(response.status_code, had_key=bool(headers))}")
            yield response
    except requests.RequestException as error:
        raise EndpointError(f"{where}: {_said(error)}") from error


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _said(error: requests.RequestException) -> str:
    """What went wrong without an answer: the innermost cause says it, and not the layers of the client."""
    cause: BaseException = error
    while inner := _inner(cause):
        cause = inner
    if isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError):
        return f"the answer is not HTTP ({cause!r}); is --endpoint a SGLang server?"
    return f"no answer ({cause}); is the server up? Start one with: python -m sglang.launch_server"


def _inner(error: BaseException) -> BaseException | None:
    """What an error of requests or urllib3 wraps; not by `__context__`, which may be an error of ours."""
    wrapped = (getattr(error, "reason", None), *error.args, error.__cause__)
    return next((one for one in wrapped if isinstance(one, BaseException)), None)
