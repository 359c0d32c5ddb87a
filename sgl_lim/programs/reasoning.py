"""The reasoning programs, in SGLang's frontend language. Importing this imports SGLang (seconds)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState

from sgl_lim.programs import api_key as keys
from sgl_lim.programs import frontend_state, proxies
from sgl_lim.programs.budget_forcing import budget_forcing
from sgl_lim.programs.frontend_state import GenerationError
from sgl_lim.programs.run_records import Generation
from sgl_lim.programs.thinking_budget import ThinkingBudget
from sgl_lim.programs.tree_shape import TreeShape

__all__ = [
    "GenerationError",
    "budget_forcing",
    "chat_templates",
    "connect",
    "make_ask",
    "self_consistency",
    "solve",
    "tree_of_thought",
]


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
    frontend_state.ask(s, prompt, chat)
    opened = frontend_state.thinking_opened(s, chat)
    frontend_state.answer(s, chat)
    return [frontend_state.generation(s, opened=opened)]


@sgl.function
def self_consistency(s: ProgramState, prompt: str, num_samples: int, chat: bool = False) -> list[Generation]:
    """Ask once and answer `num_samples` times, in branches that share the prompt's KV; give a temperature above 0.

    Arguments and errors as `solve`; the generations come in the order of the branches.
    """
    frontend_state.ask(s, prompt, chat)
    # fork() caches the prefix before the branches start only if the text has arrived, and it looks before it waits.
    s.sync()
    opened = frontend_state.thinking_opened(s, chat)
    branches = s.fork(num_samples)
    try:
        frontend_state.raise_error(s)
        for branch in branches:
            frontend_state.answer(branch, chat)
        return [frontend_state.generation(branch, opened=opened) for branch in branches]
    finally:
        branches.join()  # ends the branches' threads, which would outlive an error otherwise


@sgl.function
def tree_of_thought(
    s: ProgramState, prompt: str, shape: TreeShape, answer_tokens: int, chat: bool = False
) -> list[Generation]:
    """Think in branches, keep the most probable paths, think on from each, and answer after the best of the last round.

    A path's score is the mean log-probability of its tokens, as the server sampled them: it costs no further request
    and needs no model that can judge. Give a temperature above 0, or the branches are equal. A thought that the model
    ends by itself is a whole answer: it competes with the other paths, and nobody thinks on from it.

    Args:
        s, prompt, chat: as in `solve`.
        shape: branches, rounds and lengths.
        answer_tokens: most tokens of the answer that follows the thoughts.

    Returns:
        One generation: the text of the best path and its answer, `other_tokens` on all other branches, and the prompt
        tokens and cached ones of all requests together.

    Raises:
        GenerationError: a request failed.
    """
    frontend_state.ask(s, prompt, chat)
    if chat:
        s += sgl.assistant_begin()
    s.sync()
    opened = frontend_state.thinking_opened(s, chat)
    asked: list[Generation] = []
    with ExitStack() as forks:
        paths = [_Path(s)]
        for _ in range(shape.depth):
            paths = _think_on(paths, shape, forks, asked)
        best = paths[0]
        if not best.ended:
            state = best.state
            state += sgl.gen("answer", max_tokens=answer_tokens)
            asked.append(frontend_state.generation(state))
            best = best.followed_by(asked[-1], state, ())
    return [
        Generation(
            text=best.text,
            prompt_tokens=sum(generation.prompt_tokens for generation in asked),
            completion_tokens=best.tokens,
            cached_tokens=sum(generation.cached_tokens for generation in asked),
            finish_reason=best.finish_reason,
            other_tokens=sum(generation.completion_tokens for generation in asked) - best.tokens,
            tokens_dense=sum(generation.tokens_dense or 0 for generation in asked),
            thinking_opened=opened,
        )
    ]


def connect(url: str, chat_template: str | None = None, api_key: str | None = None) -> RuntimeEndpoint:
    """The endpoint as a backend for `run`.

    Args:
        url: such as `http://127.0.0.1:30000`.
        chat_template: name of one of SGLang's frontend templates; None lets SGLang go by the model's path.
        api_key: of a protected server; None for the environment's.

    Raises:
        OSError, RuntimeError: the server does not answer, or refuses; the message may be its bare answer.
    """
    proxies.keep_direct(url)
    return RuntimeEndpoint(url, api_key=keys.effective(api_key), chat_template_name=chat_template)


def chat_templates() -> list[str]:
    """Names that `connect` takes."""
    from sglang.lang.chat_template import chat_template_registry

    return sorted(chat_template_registry)


def make_ask(
    backend: RuntimeEndpoint,
    *,
    num_samples: int | None,
    chat: bool,
    tree: TreeShape | None = None,
    forcing: ThinkingBudget | None = None,
    **sampling: Any,
) -> Callable[[str], list[Generation]]:
    """A function from a prompt to its generations, for any thread.

    Args:
        backend: from `connect`.
        num_samples: generations a prompt, in branches that share its KV; None for one.
        chat: use the backend's chat template.
        tree: shape of `tree_of_thought`; None for the other programs.
        forcing: budget of `budget_forcing`; None for the other programs.
        sampling: `max_new_tokens`, `temperature`, `top_p`, … as of `SglFunction.run`; the former is for a generation
            as it is graded, the thoughts before an answer included.
    """

    def ask(prompt: str) -> list[Generation]:
        if tree is not None:
            left = sampling["max_new_tokens"] - tree.path_tokens
            state = tree_of_thought.run(
                prompt=prompt, shape=tree, answer_tokens=left, chat=chat, backend=backend, **sampling
            )
        elif forcing is not None:
            state = budget_forcing.run(
                prompt=prompt,
                budget=forcing,
                max_tokens=sampling["max_new_tokens"],
                num_samples=num_samples or 1,
                chat=chat,
                backend=backend,
                **sampling,
            )
        elif num_samples is None:
            state = solve.run(prompt=prompt, chat=chat, backend=backend, **sampling)
        else:
            state = self_consistency.run(prompt=prompt, num_samples=num_samples, chat=chat, backend=backend, **sampling)
        return list(state.ret_value)

    return ask


@dataclass(frozen=True)
class _Path:
    """What was thought from the prompt on, and the state to think on from."""

    state: ProgramState
    text: str = ""
    tokens: int = 0
    finish_reason: str = "length"  # of the last thought
    logprobs: tuple[float, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the model came to an end by itself."""
        return self.finish_reason != "length"

    @property
    def score(self) -> float:
        """Mean log-probability of the tokens."""
        return sum(self.logprobs) / len(self.logprobs)

    def followed_by(self, generation: Generation, state: ProgramState, logprobs: Sequence[float]) -> "_Path":
        """This path and one generation more."""
        text, tokens = self.text + generation.text, self.tokens + generation.completion_tokens
        return _Path(state, text, tokens, generation.finish_reason, (*self.logprobs, *logprobs))


def _think_on(paths: list[_Path], shape: TreeShape, forks: ExitStack, asked: list[Generation]) -> list[_Path]:
    """One round: the best `shape.keep` of what grows from `paths`, best first. `asked` gets every thought."""
    growing = [path for path in paths if not path.ended]
    found = [path for path in paths if path.ended]
    branches = []
    for path in growing:
        group = path.state.fork(shape.branches // len(growing))
        forks.callback(group.join)
        for state in group.states:
            state += sgl.gen("thought", max_tokens=shape.thought_tokens, return_logprob=True)
        branches.append((path, group.states))
    for path, forked in branches:
        frontend_state.raise_error(path.state)
        for state in forked:
            asked.append(frontend_state.generation(state, "thought"))
            logprobs = [logprob for logprob, *_ in state.get_meta_info("thought")["output_token_logprobs"]]
            found.append(path.followed_by(asked[-1], state, logprobs))
    return sorted(found, key=lambda path: path.score, reverse=True)[: shape.keep]
