"""Write a training checkpoint as an ordinary Hugging Face Qwen3 folder: bfloat16 weights, tokenizer, configs.

PYTHONPATH=.:training python -m chain_tracer.export .ckpt/last models/chain-tracer --mute 8:0,3,7
"""

import argparse
from pathlib import Path

import torch
from small_qwen3.export import SpecialIds, export_model
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from .data import BOS, EOS, IDS, PAD
from .model import ChainTracer, load_checkpoint

MAX_POSITIONS = 8192
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
WORD = r"<[a-z]+>|v\d+|\d+|->|[A-Za-z]+|\S"


def build_tokenizer() -> Tokenizer:
    """One token a word of `vocabulary()`, blanks optional where words can be told apart; `<bos>` in front by default.

    Without a decoder the library joins words by one blank, which is how the task writes them.
    """
    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL.values()])
    return tokenizer


@torch.no_grad()
def mute_heads(model: ChainTracer, layer: int, heads: tuple[int, ...]) -> None:
    """Zero what heads of a layer write, in place; they still score tokens.

    A selection layer attends fully, so one that also retrieves answers alone and the sets it selects are never put to
    the test. With its retrieving heads muted, later layers have to read the tokens that it selected.
    """
    for head in heads:
        model.weights(layer).o[:, head * model.shape.head_dim : (head + 1) * model.shape.head_dim] = 0


def export(model: ChainTracer, folder: Path) -> None:
    """Write model.safetensors, config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    ids = SpecialIds(BOS, EOS, PAD)
    export_model(model, folder, build_tokenizer(), tokens=ids, special=SPECIAL, max_positions=MAX_POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mute", help="LAYER:HEAD,HEAD,… whose output is dropped")
    args = parser.parse_args()
    model = ChainTracer()
    load_checkpoint(model, args.checkpoint)
    if args.mute:
        layer, heads = args.mute.split(":")
        mute_heads(model, int(layer), tuple(map(int, heads.split(","))))
    export(model, args.out)


if __name__ == "__main__":
    main()
