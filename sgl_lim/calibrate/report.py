"""What a calibration prints: a small table, and last of all the choice and what it loses."""

from collections.abc import Sequence

from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.job import Job, Result
from sgl_lim.calibrate.outcome import Outcome, Retrieval
from sgl_lim.evaluate.output import aligned


def table(result: Result, job: Job) -> str:
    """The choice, what a server would take otherwise, what more and less would buy, and the frontier."""
    tasks = list(result.chosen.retrieval)
    lines = [["", "layers", "attends", "full reads", "KL", "agreement", *tasks]]
    rows = {"chosen": result.chosen, **result.named}
    shown = [*rows.items(), *(("frontier", one) for one in result.frontier if one not in rows.values())]
    for name, one in shown:
        lines.append([name, *_cells(one, tasks)])
    lines.append(["full attention", "", "", f"{job.space.depth}", "0", "100%", *_full(result.chosen, tasks)])
    what = "text" if any(name != "chains" for name in result.chosen.by_suite) else "chains"
    head = (
        f"budget {result.budget}, contexts of {job.sizes.context} tokens: {result.chosen.tokens} decoded tokens of "
        f"{what} that were held out, with 95% intervals"
    )
    return f"{head}\n{aligned(lines)}"


def conclusion(result: Result, job: Job) -> str:
    """Sentences: what was chosen, what it loses, and what the others lose."""
    chosen, budget = result.chosen, result.budget
    found = [
        f"Budget {budget}: layers {_layers(chosen.candidate)} select and attend to {_attended(chosen.candidate)}. A "
        f"step reads as much as {chosen.candidate.full_reads:g} of {job.space.depth} layers whole, beside the sets. "
        f"{_loss(chosen)}"
    ]
    found += [f"{_named(name)}, {_layers(one.candidate)}: {_loss(one)}" for name, one in result.named.items()]
    if not chosen.keeps:
        found.append(
            "What was chosen does not keep needles and chains as it should: allow more with --reads, or take a larger "
            "--budgets."
        )
    return "\n".join(found)


def _cells(one: Outcome, tasks: Sequence[str]) -> list[str]:
    error = "" if one.divergence_error is None else f" ±{1.96 * one.divergence_error:.3f}"
    share = one.agreement
    return [
        ",".join(map(str, one.candidate.layers)),
        one.candidate.attends,
        f"{one.candidate.full_reads:g}",
        f"{one.divergence:.3f}{error}",
        f"{100 * share.value:.1f}% [{100 * share.low:.1f}, {100 * share.high:.1f}]",
        *(_right(one.retrieval[task]) if task in one.retrieval else "-" for task in tasks),
    ]


def _right(one: Retrieval) -> str:
    return f"{round(one.right.value * one.items)} of {one.items}"


def _full(chosen: Outcome, tasks: Sequence[str]) -> list[str]:
    return [f"{round(one.full * one.items)} of {one.items}" for task in tasks if (one := chosen.retrieval[task])]


def _layers(candidate: Candidate) -> str:
    return ",".join(map(str, candidate.layers))


def _attended(candidate: Candidate) -> str:
    return "the sets that they choose" if candidate.attends == "set" else "the whole context"


def _named(name: str) -> str:
    return name[0].upper() + name[1:]


def _loss(one: Outcome) -> str:
    """What is lost, in one sentence."""
    suites = ""
    if len(one.by_suite) > 1:
        suites = " (" + ", ".join(f"{name} {100 * share:.1f}%" for name, share in one.by_suite.items()) + ")"
    found = [f"{100 * one.agreement.value:.1f}% of next tokens are those of full attention{suites}"]
    found += [
        f"{_right(retrieval)} {task} are right, densely {round(retrieval.full * retrieval.items)}"
        for task, retrieval in one.retrieval.items()
    ]
    return "; ".join(found) + "."
