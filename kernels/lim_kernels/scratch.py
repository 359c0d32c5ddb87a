"""How many bytes the operators of a selection layer allocate on a GPU, from shapes alone.

A server counts them before it serves. They are all that one layer allocates, so that its peak is a little less.
"""

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.places import shallow_depth

ALIGNED = 16
_CHOICE_BYTES = 4 * (4 * 2048 + 1) + 8 * 2048 + 8 + 8
"""Of a row that chooses: its histogram, the candidates that are not decided by it, and what was decided."""


def row_places(width: int) -> int:
    """Places that a row of `width` scores has in memory."""
    return -(-width // ALIGNED) * ALIGNED


def logits_bytes(rows: int, heads: int, width: int) -> int:
    """Logits of so many rows and query heads."""
    return 4 * rows * heads * row_places(width)


def scores_bytes(rows: int, heads: int, width: int, sizes: SetSizes, aggregate: str) -> int:
    """What `score_tokens` allocates; of `heads` query heads one score a place, and the lists of "union"."""
    found = 4 * rows * row_places(width)
    middle = sizes.middle
    if aggregate != "union" or middle == 0:
        return found
    shallow = shallow_depth(middle)
    tops = [_power_of_two(2 * shallow), _power_of_two(max(middle + middle // 3, middle))]
    return found + 4 * rows * heads * (sum(tops) + 3) + 4 * (-(-rows // 4) * 4)


def choice_bytes(rows: int, width: int, budget: int, *, grouped: bool = False) -> int:
    """What `choose_tokens` allocates, or with groups `choose_for_groups`, which chooses for as many groups as rows."""
    blocks = -(-width // 2048)
    lines = 2 * rows if grouped else rows
    found = lines * (_CHOICE_BYTES + 4 * blocks + 4 * (budget + 1))
    return found + (4 * rows * row_places(width) + 36 * lines if grouped else 0)


def attention_bytes(rows: int, heads: int, kv_heads: int, value_dim: int, multiprocessors: int) -> int:
    """Partial results of `decode_with_scores` and `sparse_decode`, and their output of 16 bits."""
    items = 8 * max(1, 2 * multiprocessors // kv_heads) + rows
    return heads * (4 * items * (value_dim + 1) + rows * (2 * value_dim + 4))


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())
