"""The source reader's sizes: 21.4 million parameters, of which 3.1 in the tied embedding."""

from small_qwen3.model import Shape, SmallQwen3

from .tokenizer import VOCABULARY

CONTEXT = 8192
PUBLISHED = Shape(layers=12, hidden=384, heads=8, kv_heads=2, head_dim=64, ffn=896, vocab=VOCABULARY, rope_theta=1e5)
# For tests and trials: every part, in seconds on a CPU.
TINY = Shape(layers=4, hidden=64, heads=4, kv_heads=1, head_dim=16, ffn=128, vocab=VOCABULARY, rope_theta=1e5)


def count_parameters(shape: Shape) -> int:
    """Parameters of a model of this shape."""
    return sum(w.numel() for w in SmallQwen3(shape).parameters())
