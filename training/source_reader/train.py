"""Train the source reader from scratch on the packages installed beside the interpreter, in a given time.

    PYTHONPATH=.:kernels:training python -m source_reader.train --minutes 16.5 --data .ckpt/data \\
        --work .ckpt/closed --out models/source-reader
    … --minutes 16.5 --data .ckpt/data --work .ckpt/plain --out .ckpt/plain/model \\
        --no-closing --start-from .ckpt/closed/branch.pt

The minutes are those of the whole command: data, compilation, training, export. Learning rate, row length and the
closing of layers follow the clock. The same command goes on where a killed one was. `branch.pt` is the state before
the first layer closed: a run from it with `--no-closing` is the control.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import torch
from small_qwen3.attention import fastest_kernel
from small_qwen3.model import SmallQwen3

from .batches import ChainRows, Mixture, TextRows, load_text
from .corpus import package_folders
from .export import export
from .model import CONTEXT, PUBLISHED, TINY
from .muon import Optimiser
from .prepare import prepare, prepare_chains
from .quick_check import chain_accuracy, held_out_loss
from .schedule import Clock, Schedule
from .tokenizer import load_tokenizer
from .trainer import FOUND, Trainer

RESERVE = 15.0  # seconds for the last check and the export
SAVE_EVERY = 45.0
CHECK_EVERY = 60.0
LOG_EVERY = 10.0


class Log:
    """Means of what steps found, apart for batches with and without closed layers."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, len(FOUND) + 1, device=device)
        self._last = time.monotonic()
        self._tokens = 0

    def add(self, found: torch.Tensor, closed: bool, tokens: int) -> None:
        self._sums[int(closed), :-1] += found
        self._sums[int(closed), -1] += 1
        self._tokens += tokens

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last > LOG_EVERY

    def line(self) -> str:
        """The means since the last line, and tokens a second."""
        seconds = time.monotonic() - self._last
        parts = [f"{self._tokens / seconds / 1e3:.0f}K tokens/s"]
        for name, (*sums, count) in zip(("open", "closed"), self._sums.tolist(), strict=True):
            if count:
                parts.append(f"{name}: " + " ".join(f"{n} {s / count:.3f}" for n, s in zip(FOUND, sums, strict=True)))
        self._sums.zero_()
        self._last, self._tokens = time.monotonic(), 0
        return "  ".join(parts)


def build(args: argparse.Namespace, device: torch.device, schedule: Schedule) -> Trainer:
    """Model and optimiser from scratch, and the prepared data on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = SmallQwen3(TINY if args.tiny else PUBLISHED, dtype).to(device)
    model.initialise()
    weights = list(model.parameters())
    layers = [w for i in range(model.shape.layers) for w in model.weights(i) if w.ndim == 2]
    others = [w for w in weights if not any(w is m for m in layers)]
    optimiser = Optimiser(layers, others, lr=args.lr, adam_lr=args.adam_lr)
    text = load_text(args.data / "train.npy", device)
    mixtures = {}
    for length in (schedule.short, schedule.long):
        windows = TextRows(text, length=length, seed=args.seed)
        chains = ChainRows(args.data, length, device)
        rows = args.batch_tokens // length
        mixtures[length] = Mixture(windows, chains, rows=rows, chain_share=args.chain_share)
    share = round(args.batch_tokens // schedule.long * args.chain_share) / (args.batch_tokens // schedule.long)
    sizes = {"chain_share": share, "closed_length": schedule.long, "seed": args.seed}
    return Trainer(model, optimiser, mixtures, **sizes, device=device)


def warm_up(trainer: Trainer, args: argparse.Namespace, schedule: Schedule) -> None:
    """Choose the attention kernel and compile; what fails with cuDNN is tried again with flash attention."""
    rows = args.batch_tokens // schedule.long
    sizes = {"rows": rows, "length": schedule.long, "device": trainer.device}
    wanted = args.attention or fastest_kernel(trainer.model.shape, **sizes)
    trainer.use_kernel(wanted)
    try:
        with trainer.attention():
            trainer.warm_up(schedule.closing)
    except RuntimeError as error:
        if wanted != "cudnn" or args.attention:
            raise
        print(f"cuDNN attention failed in the compiled model, taking flash: {error}", flush=True)
        trainer.use_kernel("flash")
        with trainer.attention():
            trainer.warm_up(schedule.closing)
    trainer.tokens = 0


def check(trainer: Trainer, args: argparse.Namespace, length: int, *, rows: int, chains: int) -> str:
    """Held-out loss at `length` and chain accuracy at a size that fits it."""
    held_out = load_text(args.data / "held_out.npy", trainer.device)
    loss = held_out_loss(trainer.model, held_out, length=min(length, len(held_out)), rows=rows)
    facts, steps = (128, 32) if length >= 2048 else (8, 4)
    sizes = {"facts": facts, "steps": steps, "chains": chains}
    whole, tokens = chain_accuracy(trainer.model, load_tokenizer(), **sizes)
    return f"held out at {length}: {loss:.4f}  chains of {facts}/{steps}: whole {whole:.3f} tokens {tokens:.4f}"


def run(trainer: Trainer, args: argparse.Namespace, schedule: Schedule, clock: Clock) -> None:
    """Train until the clock's budget is used or the process is asked to end; states are kept on the way."""
    asked_to_end: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: asked_to_end.append(number))
    log = Log(trainer.device)
    saved = checked = time.monotonic()
    branch, state = args.work / "branch.pt", args.work / "state.pt"
    while (done := clock.done) < 1.0 and not asked_to_end:
        if done >= schedule.closing_from and args.start_from is None and not branch.exists():
            trainer.save(branch, used=clock.used, budget=clock.budget)
        length, before = schedule.length(done), trainer.tokens
        with trainer.attention():
            found, closed = trainer.step(length, schedule.factor(done), closing=schedule.closes(done))
        log.add(found, closed, trainer.tokens - before)
        if trainer.device.type == "cuda" and trainer.steps % 4 == 0:
            # The clock would run ahead of a device that still has work queued.
            torch.cuda.synchronize()
        if log.due:
            progress = f"{clock.used:6.1f}s {100 * done:4.1f}% step {trainer.steps} {trainer.tokens / 1e6:.1f}M tokens"
            print(f"{progress} at {length} lr {schedule.factor(done):.3f}  {log.line()}", flush=True)
        if time.monotonic() - checked > CHECK_EVERY:
            with trainer.attention():
                print(f"{clock.used:6.1f}s {check(trainer, args, length, rows=8, chains=16)}", flush=True)
            checked = time.monotonic()
        if time.monotonic() - saved > SAVE_EVERY:
            trainer.save(state, used=clock.used, budget=clock.budget)
            saved = time.monotonic()
    trainer.save(state, used=clock.used, budget=clock.budget)
    signal.signal(signal.SIGTERM, previous)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of the whole command")
    parser.add_argument("--data", type=Path, required=True, help="prepared data, made if absent")
    parser.add_argument("--work", type=Path, required=True, help="states of the run: state.pt, branch.pt")
    parser.add_argument("--out", type=Path, required=True, help="the published folder")
    parser.add_argument("--start-from", type=Path, help="a state of another run, for example its branch.pt")
    parser.add_argument("--closing", action=argparse.BooleanOptionalAction, default=True, help="close random layers")
    parser.add_argument("--closing-from", type=float, default=Schedule.closing_from, help="share of the time")
    parser.add_argument("--long-from", type=float, default=Schedule.long_from, help="share of the time")
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--chain-share", type=float, default=0.1875, help="of rows")
    parser.add_argument("--chain-tokens", type=int, default=50_000_000, help="drawn for each row length")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=("cudnn", "flash", "math"), help="of open layers; default: the faster")
    parser.add_argument("--files", type=int, help="train on this many files only")
    parser.add_argument("--tiny", action="store_true", help="a model and rows for trials on a CPU")
    parser.add_argument(
        "--packages", type=Path, action="append", help="folders of packages; default: this interpreter's"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    begin = time.monotonic()
    args = parse(arguments)
    device = torch.device(args.device)
    short, long = (128, 512) if args.tiny else (2048, CONTEXT)
    schedule = Schedule(short, long, long_from=args.long_from, closing_from=args.closing_from, closing=args.closing)
    # Worker processes fork before CUDA starts.
    text = prepare(args.data, args.packages or package_folders(), processes=args.processes, limit=args.files)
    for length in (short, long):
        rows = max(1, args.chain_tokens // length)
        prepare_chains(args.data, length, rows, seed=args.seed, processes=args.processes)
    print(f"{time.monotonic() - begin:.1f}s data: { {k: v['tokens'] for k, v in text.items() if isinstance(v, dict)} }")
    torch.manual_seed(args.seed)
    trainer = build(args, device, schedule)
    warm_up(trainer, args, schedule)
    used = time.monotonic() - begin
    print(f"{used:.1f}s ready, {sum(w.numel() for w in trainer.model.parameters()) / 1e6:.1f}M parameters", flush=True)
    budget = args.minutes * 60 - used - (0 if args.tiny else RESERVE)
    state_file = args.work / "state.pt"
    source = state_file if state_file.exists() else args.start_from
    if source is not None:
        state = torch.load(source, map_location=device, weights_only=False)
        trainer.load(state)
        clock = Clock(state["budget"], state["used"])
    elif budget <= 0:
        raise SystemExit(f"--minutes {args.minutes} leave nothing for training: getting ready took {used:.0f}s")
    else:
        clock = Clock(budget)
    run(trainer, args, schedule, clock)
    with trainer.attention():
        print(check(trainer, args, schedule.length(1.0), rows=4 if args.tiny else 32, chains=4 if args.tiny else 64))
    export(trainer.model, args.out)
    print(
        f"{trainer.steps} steps, {trainer.tokens / 1e6:.1f}M tokens, {clock.used:.0f}s of training, exported {args.out}"
    )


if __name__ == "__main__":
    main()
