"""What a run looks at while it trains: held-out loss and whole chains, dense and teacher-forced."""

import random

import torch
import torch.nn.functional as F
from small_qwen3.model import SmallQwen3
from tokenizers import Tokenizer
from torch import Tensor

from sgl_lim.tasks.chains import make_chain

from .tokenizer import BOS, EOS


@torch.no_grad()
def held_out_loss(model: SmallQwen3, text: Tensor, *, length: int, rows: int) -> float:
    """Mean loss in nats a token over `rows` windows spread over held-out text, each behind `<bos>`."""
    stride = max(1, (len(text) - length) // max(1, rows - 1))
    losses = []
    for start in range(0, len(text) - length + 1, stride)[:rows]:
        targets = text[start : start + length].long()
        tokens = torch.cat((targets.new_tensor([BOS]), targets[:-1]))
        losses.append(F.cross_entropy(model(tokens[None])[0], targets))
    return torch.stack(losses).mean().item()


@torch.no_grad()
def chain_accuracy(
    model: SmallQwen3, tokenizer: Tokenizer, *, facts: int, steps: int, chains: int, seed: int = 0
) -> tuple[float, float]:
    """Shares of chains whose every solution token, `<eos>` included, is the argmax, and of such tokens."""
    rights = []
    for index in range(chains):
        problem = make_chain(random.Random(f"{seed}/{index}"), num_facts=facts, num_steps=steps)
        prompt = tokenizer.encode(problem.prompt, add_special_tokens=False).ids
        solution = tokenizer.encode(f" {problem.solution}", add_special_tokens=False).ids
        row = torch.tensor([BOS, *prompt, *solution, EOS], device=model.embed.device)
        rights.append(model(row[None, :-1])[0, len(prompt) :].argmax(-1) == row[1 + len(prompt) :])
    whole = sum(bool(r.all()) for r in rights) / chains
    return whole, torch.cat(rights).float().mean().item()
