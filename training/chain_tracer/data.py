"""Training batches as token ids, drawn on the device: documents of one context and several chains through it.

A row of `length` tokens holds `documents` times (context, chain 1, …, chain C). The chains of a document are
alternatives: each continues the same context at the same positions and does not see the others, so one context's
prefill supervises C chains. The words are those of `sgl_lim.tasks.chains.make_chain`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sgl_lim.tasks.chains import MAX_INCREMENT, MODULUS, NUM_NODES, vocabulary

IDS = {word: i for i, word in enumerate(vocabulary())}
PAD, BOS, EOS, ANSWER = IDS["<pad>"], IDS["<bos>"], IDS["<eos>"], IDS["answer"]
NUMBER, NODE = IDS["0"], IDS["v0"]
HEADER = 5  # words of `? start steps n :`
FACT_WORDS, STEP_WORDS, ENDING = 6, 8, 3  # ENDING: `answer s <eos>`
IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """Where contexts and chains lie in a row; the same for every row of a batch."""

    facts: int
    min_steps: int
    max_steps: int
    documents: int
    chains: int
    length: int

    @classmethod
    def fit(cls, *, facts: int, min_steps: int, max_steps: int, length: int) -> "Layout":
        """Fill `length` with documents of about four chains each.

        Raises:
            ValueError: one context with one chain is longer than `length`.
        """
        context, chain = FACT_WORDS * facts + 1, HEADER + STEP_WORDS * max_steps + ENDING
        documents = max(1, length // (context + 4 * chain))
        chains = (length // documents - context) // chain
        if chains < 1:
            raise ValueError(f"length {length} is below {context + chain}, needed for {facts} facts, {max_steps} steps")
        return cls(facts, min_steps, max_steps, documents, chains, length)

    @property
    def context(self) -> int:
        """Tokens of a context: `<bos>` and the facts."""
        return FACT_WORDS * self.facts + 1

    @property
    def chain(self) -> int:
        """Tokens reserved for a chain: header, longest solution, ending."""
        return HEADER + STEP_WORDS * self.max_steps + ENDING

    @cached_property
    def coordinates(self) -> Tensor:
        """int64 [4, length] on cpu: document, chain (0: the context), position, 1 where a solution row lies."""
        own = torch.arange(self.chain)
        position = torch.cat([torch.arange(self.context)] + [self.context + own] * self.chains)
        chain = torch.cat([torch.zeros(self.context)] + [torch.full((self.chain,), c + 1) for c in range(self.chains)])
        solution = torch.cat([torch.zeros(self.context)] + [own >= HEADER] * self.chains)
        one = torch.stack([torch.zeros_like(position), chain.long(), position, solution.long()])
        row = one.repeat(1, self.documents)
        row[0] = torch.arange(self.documents).repeat_interleave(position.numel())
        rest = self.length - row.shape[1]
        tail = torch.zeros(4, rest, dtype=torch.long)
        tail[0], tail[2] = self.documents, torch.arange(rest)
        return torch.cat([row, tail], dim=1)


def draw_contexts(count: int, facts: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """cycle (node numbers) and increments, int64 [count, facts]; tokens int64 [count, 6·facts + 1] with `<bos>`."""
    cycle = torch.rand(count, NUM_NODES, device=device).argsort(dim=1)[:, :facts]
    increments = torch.randint(1, MAX_INCREMENT + 1, (count, facts), device=device)
    words = torch.stack([*_fact(cycle, cycle.roll(-1, dims=1), increments), torch.full_like(cycle, IDS[";"])], dim=-1)
    order = torch.rand(count, facts, device=device).argsort(dim=1)
    words = words.gather(1, order[:, :, None].expand_as(words)).flatten(1)
    return cycle, increments, torch.cat([torch.full_like(words[:, :1], BOS), words], dim=1)


def draw_chains(cycle: Tensor, increments: Tensor, layout: Layout) -> Tensor:
    """Tokens int64 [count, chains, layout.chain]: random starts and step counts, `<pad>` after `<eos>`."""
    count, device = cycle.shape[0], cycle.device
    sizes = (count, layout.chains)
    start = torch.randint(layout.facts, sizes, device=device)
    steps = torch.randint(layout.min_steps, layout.max_steps + 1, sizes, device=device)
    at = (start[..., None] + torch.arange(layout.max_steps + 1, device=device)) % layout.facts
    node = cycle[:, None].expand(-1, layout.chains, -1).gather(2, at)
    step = increments[:, None].expand(-1, layout.chains, -1).gather(2, at[..., :-1])
    total = step.cumsum(dim=-1) % MODULUS
    words = _fact(node[..., :-1], node[..., 1:], step)
    words += [torch.full_like(total, IDS["="]), total + NUMBER, torch.full_like(total, IDS[";"])]
    header = [torch.full_like(start, IDS["?"]), node[..., 0] + NODE, torch.full_like(start, IDS["steps"])]
    header += [steps + NUMBER, torch.full_like(start, IDS[":"])]
    tokens = torch.cat([torch.stack(header, dim=-1), torch.stack(words, dim=-1).flatten(2)], dim=-1)
    tokens = torch.nn.functional.pad(tokens, (0, ENDING), value=PAD)
    end = (HEADER + STEP_WORDS * steps)[..., None]
    tokens = tokens.masked_fill(torch.arange(layout.chain, device=device) > end, PAD)
    last = total.gather(2, steps[..., None] - 1) + NUMBER
    tokens = tokens.scatter(2, end, ANSWER).scatter(2, end + 1, last)
    return tokens.scatter(2, end + 2, EOS)


def draw_batch(layout: Layout, batch: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [batch, length].

    A target is the next word of the same chain, from the header's `:` to the last word before `<eos>`; `IGNORE`
    elsewhere.
    """
    cycle, increments, contexts = draw_contexts(batch * layout.documents, layout.facts, device)
    chains = draw_chains(cycle, increments, layout)
    following = chains.roll(-1, dims=-1)
    following[..., -1] = PAD
    following[..., : HEADER - 1] = PAD
    targets = torch.cat([torch.full_like(contexts, PAD), following.flatten(1)], dim=1).view(batch, -1)
    tokens = torch.cat([contexts, chains.flatten(1)], dim=1).view(batch, -1)
    rest = (0, layout.length - tokens.shape[1])
    tokens = torch.nn.functional.pad(tokens, rest, value=PAD)
    targets = torch.nn.functional.pad(targets, rest, value=PAD)
    return tokens, targets.masked_fill(targets == PAD, IGNORE)


def _fact(node: Tensor, successor: Tensor, increment: Tensor) -> list[Tensor]:
    """The words `a -> b + d` as token ids, one tensor a word."""
    arrow, plus = torch.full_like(node, IDS["->"]), torch.full_like(node, IDS["+"])
    return [node + NODE, arrow, successor + NODE, plus, increment + NUMBER]
