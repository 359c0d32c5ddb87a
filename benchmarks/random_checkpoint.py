"""Write a checkpoint of random weights in a given shape, so that a real server can be measured without a download.

    python -m benchmarks.random_checkpoint benchmarks/shapes/qwen3-8b /dev/shm/qwen3-8b

Weights are as transformers initialises a model for training: norms multiply by 1, so that queries and keys differ from
token to token and a selection has something to rank. With SGLang's `--load-format dummy` they hardly do, all tokens
score alike, and what is measured is how a selection breaks ties.

The tokenizer has a word for each token id, `w0 w1 …`, so that clients that send text can be measured as well: a text of
n words is n tokens, whatever the model samples comes back as a word, and no word is special.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from sgl_lim import command


def write(shape: Path, folder: Path, seed: int, device: str) -> None:
    """Initialise a model of the shape in `shape`/config.json, in bfloat16, and save it in `folder` with a tokenizer."""
    config = AutoConfig.from_pretrained(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size, config.max_position_embeddings)


def write_tokenizer(folder: Path, words: int, longest: int) -> None:
    """Write the tokenizer of the words w0 … for token ids below `words` and texts of up to `longest` of them.

    Words are blank-separated; what is no such word reads as w0. Without a decoder the library joins words by blanks.
    """
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path, help="a folder with config.json")
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    write(args.shape, args.folder, args.seed, args.device)


if __name__ == "__main__":
    command.run(main)
