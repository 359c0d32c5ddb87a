"""What programs do with a frontend state: ask, answer, read a generation. Importing this imports SGLang (seconds)."""

import sglang as sgl
from sglang.lang.interpreter import ProgramState

from sgl_lim.programs import proxies
from sgl_lim.programs.run_records import Generation, dense_reads
from sgl_lim.programs.thinking_tags import opens_thinking


class GenerationError(RuntimeError):
    """A request of a program failed; the message is the server's."""


def ask(s: ProgramState, prompt: str, chat: bool) -> None:
    """Put the prompt, in a user turn with `chat`."""
    s += sgl.user(prompt) if chat else prompt


def answer(s: ProgramState, chat: bool) -> None:
    """Generate `answer`, in an assistant turn with `chat`."""
    s += sgl.assistant(sgl.gen("answer")) if chat else sgl.gen("answer")


def thinking_opened(s: ProgramState, chat: bool) -> bool:
    """Whether the prompt opens the thinking, with what the chat template puts before an answer."""
    executor = s.stream_executor
    prompt = executor.text()
    if chat and executor.cur_role is None:
        prompt += executor.chat_template.get_prefix_and_suffix("assistant", executor.messages_)[0]
    return opens_thinking(prompt)


def raise_error(s: ProgramState) -> None:
    """Wait for the state and raise its failure, which the interpreter only stores: reading on gives a KeyError."""
    error = s.error()
    if error is None:
        return
    try:
        message = error.args[0]["error"]["message"]  # the body of an HTTP error, as RuntimeEndpoint raises it
    except (LookupError, TypeError):
        message = error
    backend = s.stream_executor.backend
    raise GenerationError(f"{message or type(error).__name__}{proxies.through(backend.base_url)}") from error


def generation(s: ProgramState, name: str = "answer", opened: bool = False) -> Generation:
    """Wait for what the state generates under `name`, whose prompt `opened` the thinking or not.

    Raises:
        GenerationError: the request failed, or the server aborted it.
    """
    raise_error(s)
    meta = s.get_meta_info(name)
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        raise GenerationError(f"the server aborted the request: {finish.get('message') or 'no reason given'}")
    return Generation(
        text=s[name],
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"],
        finish_reason=finish["type"],
        tokens_dense=dense_reads(meta["prompt_tokens"], meta["completion_tokens"]),
        thinking_opened=opened,
    )


def stopped_by(s: ProgramState, name: str) -> str | int | None:
    """The stop string or the token that ended a generation; None where a length did."""
    matched: str | int | None = s.get_meta_info(name)["finish_reason"].get("matched")
    return matched
