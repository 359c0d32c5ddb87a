"""Write a training checkpoint as an ordinary Hugging Face Qwen3 folder: bfloat16 weights, tokenizer, configs.

PYTHONPATH=.:training python -m chain_tracer.export .ckpt/last models/chain-tracer --mute 8:0,3,7
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from sgl_lim.tasks.chains import vocabulary

from .data import BOS, EOS, IDS, PAD
from .model import ChainTracer, Shape, load_checkpoint

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


def model_config(shape: Shape) -> dict[str, object]:
    """config.json in the form of the published Qwen3 checkpoints, which both Transformers 4 and 5 read."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": shape.layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD,
        "rms_norm_eps": shape.eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(vocabulary()),
    }


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
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: w.to("cpu", torch.bfloat16).contiguous() for n, w in model.hf_state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        **SPECIAL,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    configs = {"config": model_config(model.shape), "generation_config": generation}
    configs["tokenizer_config"] = tokenizer_config
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


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
