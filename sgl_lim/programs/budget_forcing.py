"""Budget forcing, in SGLang's frontend language. Importing this imports SGLang (seconds)."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import sglang as sgl
from sglang.lang.interpreter import ProgramState

from sgl_lim.programs import frontend_state
from sgl_lim.programs.run_records import Generation
from sgl_lim.programs.thinking_budget import ThinkingBudget


@sgl.function
def budget_forcing(
    s: ProgramState, prompt: str, budget: ThinkingBudget, max_tokens: int, num_samples: int = 1, chat: bool = False
) -> list[Generation]:
    """Think no less and no more than a budget: ends that come too early are dropped, late thinking is cut.

    Args:
        s, prompt, chat: as in `solve`.
        budget: where thinking may end.
        max_tokens: most tokens of thinking and answer together; more than `budget.most`.
        num_samples: independent generations, in branches that share the prompt's KV.

    Returns:
        A generation a sample. Its text has what was said in between, its `completion_tokens` are all that the model
        generated, dropped ends included, and its prompt tokens and cached ones are those of all its requests.

    Raises:
        GenerationError: a request failed.
    """
    frontend_state.ask(s, prompt, chat)
    if chat:
        s += sgl.assistant_begin()
    opened = frontend_state.thinking_opened(s, chat)
    if num_samples == 1:
        return [replace(_think_and_answer(s, budget, max_tokens), thinking_opened=opened)]
    s.sync()  # the prompt is cached before the branches only if the text has arrived
    branches = s.fork(num_samples)
    try:
        frontend_state.raise_error(s)
        # A thread a branch, because what a branch asks next depends on what it got, and none waits for another.
        with ThreadPoolExecutor(num_samples) as threads:
            answered = threads.map(lambda branch: _think_and_answer(branch, budget, max_tokens), branches.states)
            return [replace(generation, thinking_opened=opened) for generation in answered]
    finally:
        branches.join()


@dataclass
class _Answering:
    """What one sample has come to."""

    state: ProgramState
    text: str = ""
    asked: list[Generation] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """All that was generated."""
        return sum(generation.completion_tokens for generation in self.asked)

    def say(self, text: str) -> None:
        """Put words into the model's mouth."""
        self.state += text
        self.text += text

    def generate(self, max_tokens: int, stop: str = "") -> str | int | None:
        """Go on; returns the stop string or token that ended it."""
        name = f"part_{len(self.asked)}"
        self.state += sgl.gen(name, max_tokens=max_tokens, stop=[stop] if stop else None)
        self.asked.append(frontend_state.generation(self.state, name))
        self.text += self.asked[-1].text
        return frontend_state.stopped_by(self.state, name)


def _think_and_answer(state: ProgramState, budget: ThinkingBudget, max_tokens: int) -> Generation:
    """One sample."""
    so_far, waits = _Answering(state), 0
    while True:
        matched = so_far.generate(budget.most - so_far.tokens, budget.end)
        cut = so_far.asked[-1].finish_reason == "length"
        if cut or waits == budget.waits or so_far.tokens >= budget.least:
            break
        so_far.say(budget.wait_text)
        waits += 1
    thinking = so_far.tokens
    forced = cut and thinking >= budget.most  # else the server's context is full, and there is no room for an answer
    closed = bool(budget.end) and matched == budget.end
    if forced or closed:
        so_far.say(budget.cut_text if forced else budget.end)
        so_far.generate(max_tokens - thinking)
    return replace(
        so_far.asked[-1],
        text=so_far.text,
        prompt_tokens=sum(generation.prompt_tokens for generation in so_far.asked),
        completion_tokens=so_far.tokens,
        cached_tokens=sum(generation.cached_tokens for generation in so_far.asked),
        tokens_dense=sum(generation.tokens_dense or 0 for generation in so_far.asked),
        thinking_tokens=thinking,
        waits=waits,
        forced=forced,
    )
