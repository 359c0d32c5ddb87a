"""The reasoning programs, in SGLang's frontend language. Importing this imports SGLang (seconds)."""

from collections.abc import Callable
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState

from sgl_lim.programs.records import Generation


class GenerationError(RuntimeError):
    """A request of a program failed; the message is the server's."""


@sgl.function
def solve(s: ProgramState, prompt: str, chat: bool = False) -> list[Generation]:
    """Ask once.

    Args:
        s: the program's state; sampling parameters come from `solve.run(...)`.
        prompt: the text of the request, or of its user turn with `chat`.
        chat: use the endpoint's chat template.

    Raises:
        GenerationError: the request failed.
    """
    _ask(s, prompt, chat)
    _answer(s, chat)
    return [_generation(s)]


@sgl.function
def self_consistency(s: ProgramState, prompt: str, num_samples: int, chat: bool = False) -> list[Generation]:
    """Ask once and answer `num_samples` times, in branches that share the prompt's KV; give a temperature above 0.

    Arguments and errors as `solve`; the generations come in the order of the branches.
    """
    _ask(s, prompt, chat)
    # fork() caches the prefix before the branches start only if the text has arrived, and it looks before it waits.
    s.sync()
    branches = s.fork(num_samples)
    try:
        _raise_error(s)
        for branch in branches:
            _answer(branch, chat)
        return [_generation(branch) for branch in branches]
    finally:
        branches.join()  # ends the branches' threads, which would outlive an error otherwise


def connect(url: str, chat_template: str | None = None) -> RuntimeEndpoint:
    """The endpoint as a backend for `run`.

    Args:
        url: such as `http://127.0.0.1:30000`.
        chat_template: name of one of SGLang's frontend templates; None lets SGLang go by the model's path.
    """
    return RuntimeEndpoint(url, chat_template_name=chat_template)


def chat_templates() -> list[str]:
    """Names that `connect` takes."""
    from sglang.lang.chat_template import chat_template_registry

    return sorted(chat_template_registry)


def make_ask(
    backend: RuntimeEndpoint, *, num_samples: int | None, chat: bool, **sampling: Any
) -> Callable[[str], list[Generation]]:
    """A function from a prompt to its generations, for any thread.

    Args:
        backend: from `connect`.
        num_samples: branches of `self_consistency`; None for `solve`.
        chat: use the backend's chat template.
        sampling: `max_new_tokens`, `temperature`, `top_p`, … as of `SglFunction.run`.
    """

    def ask(prompt: str) -> list[Generation]:
        if num_samples is None:
            state = solve.run(prompt=prompt, chat=chat, backend=backend, **sampling)
        else:
            state = self_consistency.run(prompt=prompt, num_samples=num_samples, chat=chat, backend=backend, **sampling)
        return list(state.ret_value)

    return ask


def _ask(s: ProgramState, prompt: str, chat: bool) -> None:
    s += sgl.user(prompt) if chat else prompt


def _answer(s: ProgramState, chat: bool) -> None:
    s += sgl.assistant(sgl.gen("answer")) if chat else sgl.gen("answer")


def _raise_error(s: ProgramState) -> None:
    """Wait for the state and raise its failure, which the interpreter only stores: reading on gives a KeyError."""
    error = s.error()
    if error is None:
        return
    try:
        message = error.args[0]["error"]["message"]  # the body of an HTTP error, as RuntimeEndpoint raises it
    except (LookupError, TypeError):
        message = error
    raise GenerationError(str(message) or type(error).__name__) from error


def _generation(s: ProgramState) -> Generation:
    """Wait for the state's `answer`."""
    _raise_error(s)
    meta = s.get_meta_info("answer")
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        raise GenerationError(f"the server aborted the request: {finish.get('message') or 'no reason given'}")
    return Generation(
        text=s["answer"],
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"],
        finish_reason=finish["type"],
    )
