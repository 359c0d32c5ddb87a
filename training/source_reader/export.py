"""Write the source reader as a Hugging Face Qwen3 folder in shards below 16 MB, from a run's state.

PYTHONPATH=.:kernels:training python -m source_reader.export .ckpt/closed/state.pt models/source-reader
"""

import argparse
from pathlib import Path

import torch
from small_qwen3.export import SpecialIds, export_model
from small_qwen3.model import SmallQwen3

from .model import CONTEXT, PUBLISHED
from .tokenizer import BOS, EOS, PAD, load_tokenizer

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
SHARD_BYTES = 15_500_000


def export(model: SmallQwen3, folder: Path) -> None:
    """Write bfloat16 weights in shards, their index, configurations and the tokenizer."""
    size = 2 * sum(w.numel() for w in model.parameters())
    export_model(
        model,
        folder,
        load_tokenizer(),
        tokens=SpecialIds(BOS, EOS, PAD),
        special=SPECIAL,
        max_positions=CONTEXT,
        parts=-(-size // SHARD_BYTES),
        compact=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = SmallQwen3(PUBLISHED)
    model.load_hf_state_dict(torch.load(args.state, map_location="cpu", weights_only=False)["weights"])
    export(model, args.out)


if __name__ == "__main__":
    main()
