"""Random-weight checkpoints over the chain task's vocabulary, for tests that need a model's shape and not its skill."""

import json
from pathlib import Path

from sgl_lim.tasks.chains import vocabulary
from support.wide_weights import draw_wide


def write_tiny_model(
    folder: Path,
    *,
    layers: int = 6,
    hidden: int = 128,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 32,
    context: int = 4096,
    seed: int = 0,
) -> Path:
    """Write a Qwen3 checkpoint (float32, word-level tokenizer) and return `folder`.

    Weights are drawn wider than usual, so that attention is peaked and a wrong token set changes the output.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = vocabulary()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=words.index("<bos>"),
        eos_token_id=words.index("<eos>"),
        pad_token_id=words.index("<pad>"),
    )
    model = Qwen3ForCausalLM(config)
    draw_wide(model, qk_norms=1.7)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|v\d+|\d+|->|[a-z]+|\S"), "removed", invert=True)
    bos = words.index("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    generation = {"bos_token_id": bos, "eos_token_id": words.index("<eos>"), "pad_token_id": words.index("<pad>")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
