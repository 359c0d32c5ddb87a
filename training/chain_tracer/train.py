"""Train the chain tracer: plain until it retrieves, then with layers closed to the context at random.

    PYTHONPATH=.:training python -m chain_tracer.train --out .ckpt/first --minutes 8.5
    PYTHONPATH=.:training python -m chain_tracer.train --out .ckpt/last --minutes 8.5 --init-from .ckpt/first \\
        --start-stage close-400 --decay-from 0.5

Plain training retrieves in a few layers only, and then no fixed selection layers work. Closing random layers makes
every layer able to retrieve alone, so that the tokens one layer selects are those the next ones want.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from small_qwen3.masks import attend
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .data import ANSWER, HEADER, IGNORE, NODE, STEP_WORDS, Layout, draw_batch
from .masks import TrainingMasks
from .model import (
    ChainTracer,
    LayerWeights,
    Shape,
    finish,
    load_checkpoint,
    project,
    rms_norm,
    rope_table,
    save_checkpoint,
)

FIRST_CLOSABLE = 2  # layers below are dense whenever sparse decode is on
ANSWER_WEIGHT = 4.0  # a chain has one place to stop and dozens to go on
LAYOUT_STEPS = 8  # batches of one layout: its masks cost the host some milliseconds
ROLES = ("all", "node", "increment", "sum", "stop", "go on")


@dataclass(frozen=True)
class Stage:
    """Ranges that every batch draws from, and when the next stage begins."""

    name: str
    facts: tuple[int, int]
    steps: tuple[int, int]
    shares: tuple[float, float, float]  # of batches with one open layer, with two, with three or more; the rest: all
    leave_at: float  # accuracy of retrieved words (nodes, increments) over a log interval
    at_most: float  # share of the whole time


PLAIN = (0.0, 0.0, 0.0)
CLOSING = (0.3, 0.35, 0.15)
STAGES = (
    Stage("plain-6", (2, 6), (1, 6), PLAIN, leave_at=0.97, at_most=0.5),
    Stage("plain-16", (4, 16), (2, 16), PLAIN, leave_at=0.98, at_most=0.1),
    Stage("plain-64", (8, 64), (4, 64), PLAIN, leave_at=0.98, at_most=0.06),
    Stage("close-32", (8, 32), (4, 32), CLOSING, leave_at=0.97, at_most=0.1),
    Stage("close-128", (16, 128), (4, 64), CLOSING, leave_at=0.97, at_most=0.12),
    Stage("close-400", (64, 400), (4, 64), CLOSING, leave_at=0.99, at_most=0.25),
    Stage("finish", (64, 400), (4, 64), (0.15, 0.45, 0.15), leave_at=2.0, at_most=1.0),
)
CANDIDATES = ((2, 6), (2, 7), (2, 8), (3, 7), (3, 8), (4, 8))  # pairs of selection layers that a preset may name


def draw_open_layers(rng: random.Random, layers: int, shares: tuple[float, float, float]) -> frozenset[int]:
    """Which layers see the whole context in one batch.

    Layers 0 and 1 are dense in sparse decode whatever the selection layers are. Were they always open in training,
    the model could retrieve there alone and any method would look right; so they open only together with many others.
    """
    one, two, several = shares
    closable = range(FIRST_CLOSABLE, layers)
    low = range(FIRST_CLOSABLE) if rng.random() < 0.5 else ()
    draw = rng.random()
    if draw < one:
        return frozenset(rng.sample(closable, 1))
    if draw < one + two:
        return frozenset(rng.choice(CANDIDATES) if rng.random() < 0.5 else rng.sample(closable, 2))
    if draw < one + two + several:
        return frozenset((*low, *rng.sample(closable, rng.randint(3, len(closable)))))
    return frozenset((*low, *closable))


def draw_layout(rng: random.Random, stage: Stage, length: int) -> Layout:
    facts = rng.randint(*stage.facts)
    low, high = stage.steps[0], min(stage.steps[1], facts)
    most = high if rng.random() < 0.4 else rng.randint(low, high)
    return Layout.fit(facts=facts, min_steps=max(low, most // 3), max_steps=most, length=length)


def token_loss(x: Tensor, norm: Tensor, embed: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of residual rows x [B, L, hidden] against targets [B, L], and which rows are right."""
    logits = F.linear(rms_norm(x, norm, eps, torch.bfloat16), embed.to(torch.bfloat16)).float().flatten(0, 1)
    flat = targets.flatten()
    losses = F.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="none")
    weight = (flat != IGNORE).float() + (ANSWER_WEIGHT - 1) * (flat == ANSWER)
    return (losses * weight).sum() / weight.sum(), (logits.argmax(-1) == flat).view_as(targets)


def tally(right: Tensor, targets: Tensor, offset: Tensor) -> Tensor:
    """float32 [len(ROLES), 2]: right and asked, by role. `offset` [L]: place of the target in its chain's solution."""
    asked, field = targets != IGNORE, offset % STEP_WORDS
    node, end = targets >= NODE, targets == ANSWER
    roles = [asked, node & (field == 2), asked & (field == 4), asked & (field == 6), end, node & (field == 0)]
    return torch.stack([torch.stack([(right & r).sum(), r.sum()]) for r in roles]).float()


class Trainer:
    """Model, optimiser and compiled pieces of one run."""

    def __init__(self, model: ChainTracer, *, batch: int, length: int, lr: float, device: torch.device) -> None:
        self.model, self.batch, self.device = model, batch, device
        self.masks = TrainingMasks(length, device)
        self.lr = lr
        weights = list(model.parameters())
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        compiled: Callable = torch.compile if device.type == "cuda" else lambda f, **_: f
        shape, dtype = model.shape, model.dtype

        def layer(x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor) -> Tensor:
            q, k, v = project(x, w, cos, sin, shape, dtype)
            return finish(x, attend(q, k, v, mask), w, shape, dtype)

        self._layer = compiled(layer, dynamic=False, fullgraph=True)
        self._loss = compiled(token_loss, dynamic=False)
        self._tally = compiled(tally, dynamic=False)

    def set_layout(self, layout: Layout, *, window: int, keep: float) -> None:
        self.layout = layout
        self.masks.set(layout, window=window, keep=keep)
        self._rope = rope_table(self.masks.position, self.model.shape)
        self._offset = self.masks.position - layout.context - HEADER + 1

    def step(self, open_layers: frozenset[int], lr: float) -> tuple[Tensor, Tensor]:
        """One update; returns the loss and the tally, both on the device."""
        tokens, targets = draw_batch(self.layout, self.batch, self.device)
        x = F.embedding(tokens, self.model.embed)
        for i in range(self.model.shape.layers):
            mask = self.masks.open if i in open_layers else self.masks.closed
            x = self._layer(x, self.model.weights(i), *self._rope, mask)
        loss, right = self._loss(x, self.model.norm, self.model.embed, targets, self.model.shape.eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach(), self._tally(right, targets, self._offset)


def category(open_layers: frozenset[int], layers: int) -> int:
    """Index of the accuracy row of a batch: the layer if one is open, `layers` if two are, else `layers + 1`."""
    return min(open_layers) if len(open_layers) == 1 else layers if len(open_layers) == 2 else layers + 1


def run(trainer: Trainer, args: argparse.Namespace) -> None:
    """Train until the time is up, moving through the stages; prints a line every `args.log_every` seconds."""
    rng = random.Random(args.seed)
    layers, seconds = trainer.model.shape.layers, args.minutes * 60
    stage_index = [s.name for s in STAGES].index(args.start_stage)
    begin = stage_begin = logged = time.monotonic()
    step = steps_logged = 0
    counts = torch.zeros(layers + 2, len(ROLES), 2, device=trainer.device)
    while (now := time.monotonic()) - begin < seconds:
        stage = STAGES[stage_index]
        if step % LAYOUT_STEPS == 0:
            window = round(math.exp(rng.uniform(math.log(12), math.log(128))))
            keep = rng.uniform(0.02, 0.15) if rng.random() < 0.3 else 0.0
            trainer.set_layout(draw_layout(rng, stage, args.length), window=window, keep=keep)
        open_layers = draw_open_layers(rng, layers, stage.shares)
        done = (now - begin) / seconds
        lr = args.lr * min(1.0, (step + 1) / args.warmup, (1.0 - done) / max(1e-6, 1.0 - args.decay_from))
        loss, found = trainer.step(open_layers, lr)
        counts[category(open_layers, layers)] += found
        step += 1
        if step > 1 and time.monotonic() - logged < args.log_every:
            continue
        accuracy = (counts[..., 0] / counts[..., 1]).tolist()
        pooled = counts.sum(0)
        retrieved = (pooled[1:3, 0] / pooled[1:3, 1]).min().item()
        elapsed, logged = time.monotonic() - begin, time.monotonic()
        head = f"{elapsed:6.1f}s step {step} (+{step - steps_logged}) {stage.name} lr {lr:.1e}"
        print(f"{head} loss {loss.item():.4f}")
        for name, row in zip((*map(str, range(layers)), "two", "many"), accuracy, strict=True):
            if row[0] == row[0]:
                print(f"    open {name:>4}: " + "  ".join(f"{r} {a:.4f}" for r, a in zip(ROLES, row, strict=True)))
        counts.zero_()
        steps_logged = step
        late = logged - stage_begin > stage.at_most * seconds
        if step > 1 and (retrieved > stage.leave_at or late) and stage_index + 1 < len(STAGES):
            stage_index, stage_begin = stage_index + 1, logged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the float32 checkpoint")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--init-from", type=Path)
    parser.add_argument("--start-stage", default=STAGES[0].name, choices=[s.name for s in STAGES])
    parser.add_argument("--decay-from", type=float, default=1.0, help="share of the time after which lr falls to 0")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="rows of --length tokens")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--log-every", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="for trials only")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = ChainTracer(Shape(layers=args.layers)).to(device)
    if args.init_from:
        load_checkpoint(model, args.init_from)
    else:
        model.initialise()
    try:
        run(Trainer(model, batch=args.batch, length=args.length, lr=args.lr, device=device), args)
    finally:
        save_checkpoint(model, args.out)


if __name__ == "__main__":
    main()
