"""Measure the chain tracer under every method: accuracy against tokens attended, by the code of a served step.

    PYTHONPATH=.:kernels:training python -m chain_tracer.methods models/chain-tracer --csv out/methods.csv \\
        --methods lessismore,lessismore:scope=kv_head,tidaldecode,quest,window --budgets 32,64,128,256

`whole`: share of chains that are right from end to end, with its 95% interval. `attended_tokens` and
`attended_fraction`: tokens a layer and their share, over all layers; `attended`: the share that sparse layers read;
`recall`: the share of the full attention's weight, by head, that sets hold.
"""

import argparse

import torch
from small_qwen3.bench import ChainBench, add_flags, methods_of, write

from sgl_lim.tasks.chains import generate_chains

from .decode import encode
from .model import ChainTracer, Shape, load_checkpoint


def main(arguments: list[str] | None = None, shape: Shape | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, selection=(2, 8), budgets=(32, 64, 128, 256, 512))
    parser.add_argument("--facts", type=int, default=330)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args(arguments)
    args.what, args.size = "chains", f"{args.facts}/{args.steps}"
    model = ChainTracer(shape).to(args.device, torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, args.folder)
    problems = list(generate_chains(args.items, num_facts=args.facts, num_steps=args.steps, seed=args.seed))
    prompts, solutions = encode(problems, args.device)
    write(ChainBench(model, list(zip(prompts, solutions, strict=True))), list(methods_of(args)), args)


if __name__ == "__main__":
    main()
