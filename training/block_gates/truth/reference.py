"""What a gate learns: in which blocks the model's own attention has its largest weights.

    weight(h, t, j) = max over the query heads g of KV head h, and the keys s of block j, of
                      exp(scale q[g, t] · k[h, s] - lse(g, t))
    lse(g, t)       = log of the sum over all keys s <= t of exp(scale q[g, t] · k[h, s])

for the blocks j that are complete before t's own. The truth is this, divided by its sum over j. No gradient passes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_one_device, require_rows

LOGIT_BYTES = 1 << 30
"""Most memory that the reference's logits take at once."""


@torch.no_grad()
def block_truth(
    q: Tensor, k: Tensor, first: int, *, scale: float, block: int, implementation: str | None = None
) -> Tensor:
    """What the attention of queries at positions from `first` on says of blocks: float32 [B, H_kv, C, T // block].

    Each query's are 0 or more, and their sum is 1, or 0 where no block comes before its own. They are 0 for blocks that
    are not complete before the query's own.

    Args:
        q: [B, H, C, D], rotated.
        k: [B, H_kv, T, D], rotated, of q's dtype; T is at least first + C.
        scale: of logits, more than 0.
        block: keys of a block; a power of two, of 16 at least, for Triton.
        implementation: "reference" or "triton"; None for Triton on CUDA, the reference elsewhere.

    Raises:
        ValueError: operands that do not fit, or an unknown implementation.
    """
    op = "block_truth"
    fits = q.dim() == k.dim() == 4 and (q.shape[0], q.shape[3], q.dtype) == (k.shape[0], k.shape[3], k.dtype)
    require(fits and q.shape[1] % k.shape[1] == 0, op, "q [B, H, C, D] and k [B, H_kv, T, D]", (q.shape, k.shape))
    require(0 <= first <= k.shape[2] - q.shape[2], op, f"queries among {k.shape[2]} keys", (first, q.shape[2]))
    require(scale > 0, op, "scale > 0", scale)
    require_one_device(op, q, k)
    require_rows(op, q, k)
    weights = implementation_of(largest_weights, implementation, q)(q, k, first, scale=scale, block=block)
    return F.normalize(weights, p=1, dim=-1, eps=1e-9)


def largest_weights(
    q: Tensor, k: Tensor, first: int, *, scale: float, block: int, logit_bytes: int = LOGIT_BYTES
) -> Tensor:
    """`block_truth` before it is divided by its sum.

    Args:
        logit_bytes: so many queries are taken at once that their float32 logits take no more.
    """
    count = q.shape[2]
    made = [
        _weights(q[:, :, begin:end], k, first + begin, scale, block)
        for begin, end in chunks(q.shape, k.shape[2], logit_bytes)
    ]
    before = blocks_before(first, first + count, k.shape[2] // block, block, q.device)
    return torch.cat(made, dim=2) * before


def chunks(shape: torch.Size, length: int, logit_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of the queries [B, H, C, D] whose logits over `length` keys take no more memory than allowed."""
    batch, heads, count, _ = shape
    step = max(1, logit_bytes // (4 * batch * heads * length))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def _weights(q: Tensor, k: Tensor, first: int, scale: float, block: int) -> Tensor:
    """Largest weights of some queries, with those of blocks that are not complete before the query's own."""
    count, kv_heads, length = q.shape[2], k.shape[1], k.shape[2]
    # [B, H_kv, G * C, T]
    grouped = q.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = (grouped @ k.float().transpose(2, 3)).mul_(scale).unflatten(2, (-1, count))
    later = torch.arange(length, device=q.device) > torch.arange(first, first + count, device=q.device).unsqueeze(1)
    logits.masked_fill_(later, float("-inf"))
    blocks = length // block
    largest = logits[..., : blocks * block].unflatten(-1, (blocks, block)).amax(-1)
    return (largest - logits.logsumexp(-1, keepdim=True)).exp().amax(2)


def blocks_before(first: int, last: int, blocks: int, block: int, device: torch.device) -> Tensor:
    """bool [last - first, blocks]: those that are complete before each query's own block."""
    queries = torch.arange(first, last, device=device).unsqueeze(1)
    return torch.arange(blocks, device=device) < queries // block
