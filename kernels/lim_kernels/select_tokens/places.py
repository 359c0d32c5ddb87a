"""What `api` and all implementations share of the union: ranks of a group may mix implementations."""

MAX_UNION = 8192
"""Largest middle budget that Triton's "union" takes: a list that one program orders."""


_SHALLOW = 4


def shallow_depth(middle: int) -> int:
    """How deep the lists of "union" are first: a quarter of the middle budget."""
    return max(1, -(-middle // _SHALLOW))


def rank_unit(middle: int, num_heads: int) -> float:
    """Power of two that scales the keys of `union` into [0, 16), where scores are binned finely; exact in float32."""
    return 2.0 ** -max(0, (middle * num_heads - 1).bit_length() - 4)
