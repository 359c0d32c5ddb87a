"""`python -m sgl_lim.programs`: from a command line to an output file and a summary."""

import json
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sgl_lim import command
from sgl_lim.programs import api_key, endpoint, proxies, run_options, server_stats, token_limits
from sgl_lim.programs.builtin_problems import BUILTIN, builtin_problems
from sgl_lim.programs.graders import Grader, GradingError
from sgl_lim.programs.grading import make_grader
from sgl_lim.programs.problems import (
    Problem,
    ProblemError,
    ProblemSet,
    chain_problems,
    jsonl_problems,
    needle_problems,
)
from sgl_lim.programs.progress import Progress
from sgl_lim.programs.run_options import Options
from sgl_lim.programs.run_records import Generation, Measurement, RecordError, RecordFile
from sgl_lim.programs.runner import Asking, EndpointLost, Invocation, run_items
from sgl_lim.programs.stop_signals import StopOnSignal
from sgl_lim.programs.summary import summarize, table
from sgl_lim.programs.thinking_budget import ThinkingBudget

OK, FAILED, USAGE = 0, 1, 2
_NAMES = {  # as functions
    "solve": "solve",
    "self-consistency": "self_consistency",
    "tree": "tree_of_thought",
    "budget-forcing": "budget_forcing",
}


class Exit(Exception):
    """Ends the program with a message and an exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Run:
    """Everything about a run that was settled before its first request."""

    options: Options
    problems: Sequence[Problem]
    grader: Grader
    before: server_stats.ServerState
    forcing: ThinkingBudget | None
    settings: dict[str, Any]
    resume_command: str


def main(argv: list[str]) -> int:
    """Run.

    Returns:
        The exit code: 0; 1 if the endpoint is down or nothing could be answered; 2 for arguments; 128 plus the
        signal's number if stopped by SIGINT or SIGTERM, and then threads may still wait for the server.
    """
    chosen = run_options.parse(argv)
    # Failed requests are reported with their problem; the interpreter also warns with each one's traceback.
    warnings.filterwarnings("ignore", message="Error in stream_executor")
    _say(f"looking at {chosen.endpoint} and the problems")
    try:
        return _run(prepare(chosen, argv))
    except Exit as error:
        _say(f"error: {error}")
        return error.code
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + signal.SIGINT


def prepare(chosen: Options, argv: list[str]) -> Run:
    """Find everything that can be wrong before a request is sent.

    Args:
        chosen: the options in `argv`.
        argv: the command line, for the command that resumes it.

    Raises:
        Exit: something is wrong.
    """
    try:
        source = _source(chosen)
        grader = make_grader(source.kind)
        for problem in source.problems[: chosen.limit]:
            grader.expected(problem)
        before = server_stats.parse_server_info(endpoint.server_info(chosen.endpoint, api_key=chosen.api_key))
        max_tokens = token_limits.max_tokens(chosen, source.problems, before)
        token_limits.check_tree(chosen, max_tokens)
        forcing = None
        if chosen.forcing is not None:
            forcing = token_limits.thinking_budget(chosen, token_limits.thinking_end(chosen), max_tokens)
        grader.check()
    except (ProblemError, token_limits.LimitError) as error:
        raise Exit(USAGE, str(error)) from error
    except (GradingError, endpoint.EndpointError) as error:
        raise Exit(FAILED, str(error)) from error
    settings = {
        "model": before.model,
        "attention": dict(before.attention),
        "program": _NAMES[chosen.program],
        "samples": chosen.samples,
        "tree": None if chosen.tree is None else asdict(chosen.tree),
        "forcing": None if forcing is None else asdict(forcing),
        "problems": dict(source.spec),
        "grader": grader.name,
        "chat_template": _chat_template(chosen, before.model),
        "max_tokens": max_tokens,
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
    }
    resume_command = api_key.command("sgl_lim.programs", argv)
    return Run(chosen, source.problems[: chosen.limit], grader, before, forcing, settings, resume_command)


def _source(chosen: Options) -> ProblemSet:
    if chosen.chains is not None:
        return chain_problems(chosen.chains, num_facts=chosen.facts, num_steps=chosen.steps, seed=chosen.seed)
    if chosen.needles is not None:
        return needle_problems(
            chosen.needles, sentences=chosen.sentences, keys=chosen.keys, seed=chosen.seed, chat=chosen.chat
        )
    assert chosen.problems is not None
    if chosen.problems in BUILTIN:
        return builtin_problems(chosen.problems, chosen.data_dir, template=chosen.prompt_template)
    if not Path(chosen.problems).exists():
        raise ProblemError(
            f"--problems {chosen.problems}: no such file, and no set of that name; there are {', '.join(BUILTIN)}"
        )
    return jsonl_problems(Path(chosen.problems), template=chosen.prompt_template)


def _chat_template(chosen: Options, model: str) -> str | None:
    """Name of the chat template; the frontend's own fallback, plain `USER:` text, is no model's, so it is refused."""
    if not chosen.chat:
        return None
    reasoning = _reasoning()
    names = reasoning.chat_templates()
    if chosen.chat_template is not None and chosen.chat_template not in names:
        raise Exit(USAGE, f"--chat-template: no template {chosen.chat_template!r}; there are {', '.join(names)}")
    name = _connect(chosen, chosen.chat_template).get_chat_template().name
    if name == "default" and chosen.chat_template is None:
        raise Exit(
            USAGE,
            f"--chat: SGLang's frontend knows no chat template by the model path {model!r}; name one with "
            f"--chat-template (chatml for Qwen3), of {', '.join(names)}",
        )
    return str(name)


def _ask(run: Run) -> Callable[[str], list[Generation]]:
    """The program as a function of the prompt; imports SGLang."""
    template, settings = run.settings["chat_template"], run.settings
    return _reasoning().make_ask(
        _connect(run.options, template),
        num_samples=run.options.samples,
        tree=run.options.tree,
        forcing=run.forcing,
        chat=template is not None,
        max_new_tokens=settings["max_tokens"],
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        top_k=settings["top_k"],
    )


def _reasoning() -> ModuleType:
    """The programs; importing them imports SGLang, and nothing was asked before that had to be kept."""
    with command.importing():
        from sgl_lim.programs import reasoning
    return reasoning


def _connect(chosen: Options, chat_template: str | None) -> Any:
    """The endpoint as the frontend's backend; imports SGLang."""
    reasoning = _reasoning()
    try:
        return reasoning.connect(chosen.endpoint, chat_template, chosen.api_key)
    except (OSError, RuntimeError) as error:
        where = f"{chosen.endpoint}{proxies.through(chosen.endpoint)}"
        raise Exit(FAILED, f"{where}: the endpoint went away before the first request ({error})") from error


def _run(run: Run) -> int:
    """Ask what the output does not hold yet, and sum up all of it."""
    try:
        records = RecordFile(run.options.output, run.settings)
    except RecordError as error:
        raise Exit(USAGE, f"--output: {error}") from error
    with records, StopOnSignal() as stop:
        if records.repaired:
            _say(f"{run.options.output}: removed a torn last line")
        todo = [problem for problem in run.problems if not records.finished(problem.id)]
        done = [records.rows[problem.id] for problem in run.problems if records.finished(problem.id)]
        _say(f"server: {run.before.describe()}")
        _say(f"{run.options.output}: {len(done)} of {len(run.problems)} problems answered before, {len(todo)} to ask")
        if not todo:
            return _sum_up(run, records, Invocation(0, 0, 0.0, stopped=False))
        key = run.options.api_key
        asking = Asking(
            _ask(run), run.options.concurrency, lambda: endpoint.is_alive(run.options.endpoint, api_key=key)
        )
        progress = Progress(len(run.problems), done=len(done), correct=sum(row.correct for row in done))
        try:
            invocation = run_items(
                todo,
                asking=asking,
                grader=run.grader,
                records=records,
                stop=stop.event,
                on_row=progress,
            )
        except (EndpointLost, RecordError) as error:
            raise Exit(FAILED, f"{error}\n{_how_to_resume(run, records)}") from error
        finally:
            progress.close()
        if invocation.items:
            _measure(run, records, invocation)
    if invocation.stopped:
        _say(f"interrupted: {_how_to_resume(run, records)}")
        return 128 + stop.signal_number
    return _sum_up(run, records, invocation)


def _measure(run: Run, records: RecordFile, invocation: Invocation) -> None:
    """Record what is known of this invocation beside its rows."""
    try:
        info = endpoint.server_info(run.options.endpoint, api_key=run.options.api_key)
        after = server_stats.parse_server_info(info)
    except endpoint.EndpointError as error:
        attended = server_stats.AttendedFraction(None, f"unknown: {error}")
    else:
        attended = server_stats.attended_fraction(run.before, after)
    counters = None if attended.delta is None else asdict(attended.delta)
    figures = invocation.items, invocation.output_tokens, invocation.seconds
    try:
        records.measured(Measurement(*figures, attended.value, attended.note, counters))
    except RecordError as error:
        raise Exit(FAILED, str(error)) from error


def _sum_up(run: Run, records: RecordFile, invocation: Invocation) -> int:
    rows = [records.rows[problem.id] for problem in run.problems]
    summary = summarize(
        rows,
        problems=len(run.problems),
        settings=run.settings,
        server=run.before,
        invocation=invocation,
        measurements=records.measurements,
    )
    print(table(summary), flush=True)
    if run.options.summary is not None:
        try:
            run.options.summary.parent.mkdir(parents=True, exist_ok=True)
            run.options.summary.write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise Exit(FAILED, f"--summary {run.options.summary}: {error.strerror or error}") from error
    if summary["errors"]:
        _say(f"{summary['errors']} problems failed and count nowhere above; to ask them again: {run.resume_command}")
    return OK if summary["answered"] else FAILED


def _how_to_resume(run: Run, records: RecordFile) -> str:
    answered = sum(records.finished(problem.id) for problem in run.problems)
    return (
        f"{answered} of {len(run.problems)} problems are answered in {run.options.output}; "
        f"to ask the rest: {run.resume_command}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
