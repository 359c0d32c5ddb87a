"""The scale of a token's place in the union, which all implementations share: ranks of a group may mix them."""


def rank_unit(middle: int, num_heads: int) -> float:
    """Power of two that scales the keys of `union` into [0, 16), where scores are binned finely; exact in float32."""
    return 2.0 ** -max(0, (middle * num_heads - 1).bit_length() - 4)
