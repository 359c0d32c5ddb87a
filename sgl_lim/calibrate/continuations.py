"""The user's prompts, continued greedily by the model with full attention."""

from collections.abc import Callable, Sequence

import torch

from sgl_lim.evaluate.checkpoint import Checkpoint, Prompt
from sgl_lim.evaluate.items import Item
from sgl_lim.evaluate.step_rows import Rows
from sgl_lim.methods import Full


def continued(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], *, tokens: int, done: Callable[[int], None]
) -> list[Item]:
    """An item a prompt, with at most so many tokens behind it; one that ends at once is left out.

    Args:
        done: is told how many tokens ran, as they did.
    """
    made: list[Prompt] = []
    for prompt in prompts:
        made.append(checkpoint.prefill(prompt, beside=made[-1] if made else None))
        done(len(prompt))
    right = [[int(prompt.logits[-1].argmax())] for prompt in made]
    # Slots of what is still to come; the tokens themselves are not known yet.
    tables = [rows.slots for one in made for rows in checkpoint.rows_behind([(one, [0] * tokens)], rows=tokens)[-1:]]
    ends = _ends(checkpoint)
    running = [n for n in range(len(made)) if right[n][-1] not in ends]
    while running:
        found = checkpoint.step(made[0].pool, _next(made, right, tables, running), Full()).logits.argmax(-1)
        done(len(running))
        for n, token in zip(running, found.tolist(), strict=True):
            right[n].append(token)
        running = [n for n in running if right[n][-1] not in ends and len(right[n]) < tokens]
    return [Item(list(one), rest, scored_from=1) for one, rest in zip(prompts, right, strict=True) if len(rest) > 1]


def _next(
    made: Sequence[Prompt], right: Sequence[Sequence[int]], tables: Sequence[torch.Tensor], running: Sequence[int]
) -> Rows:
    """One row for each prompt that runs: its last token."""
    device = tables[0].device
    lens = torch.tensor([len(made[n]) + len(right[n]) for n in running], dtype=torch.int32, device=device)
    slots = torch.zeros(len(running), max(tables[n].shape[1] for n in running), dtype=torch.int32, device=device)
    for row, n in enumerate(running):
        slots[row, : tables[n].shape[1]] = tables[n][-1]
    return Rows(torch.tensor([right[n][-1] for n in running], device=device), slots, lens)


def _ends(checkpoint: Checkpoint) -> set[int]:
    """Tokens that end a text."""
    configured = getattr(checkpoint.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return {token for token in (*found, checkpoint.tokenizer.eos_token_id) if token is not None}
