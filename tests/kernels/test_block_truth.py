"""Does Triton say of blocks what the reference does, whatever the shape, and read no later key?"""

from dataclasses import dataclass

import pytest
import torch
from block_gates.truth import block_truth
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    first: int
    count: int
    block: int


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SHAPES = {
    "group-of-3": Shape(2, 9, 3, 64, 300, first=150, count=150, block=16),
    "no-group": Shape(1, 2, 2, 128, 257, first=101, count=156, block=64),
    "group-of-4-and-later-keys": Shape(1, 8, 2, 64, 333, first=200, count=70, block=64),
    "all-queries": Shape(1, 3, 1, 64, 150, first=0, count=150, block=32),
    "group-of-7-odd-width": Shape(1, 7, 1, 80, 131, first=33, count=97, block=16),
    "wide": Shape(1, 2, 1, 256, 130, first=65, count=65, block=64),
    "one-query": Shape(2, 4, 2, 128, 129, first=128, count=1, block=64),
    "first-query": Shape(1, 2, 1, 64, 40, first=0, count=1, block=16),
    "no-block": Shape(1, 4, 2, 64, 40, first=20, count=20, block=64),
}


def draw(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Queries and keys as layers have them, heads within tokens; keys after the last query are NaN."""
    generator = torch.Generator().manual_seed(5)
    q, k = (
        torch.randn(shape.batch, shape.length, heads, shape.dim, generator=generator).to(device, dtype).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads)
    )
    end = shape.first + shape.count
    k[:, :, end:] = float("nan")
    return q[:, :, shape.first : end], k


def agree(shape: Shape, dtype: torch.dtype, device: str, *, tolerance: float) -> None:
    q, k = draw(shape, dtype, device)
    # Some queries look at few keys.
    how = {"scale": 3 * shape.dim**-0.5, "block": shape.block}
    found = block_truth(q, k, shape.first, **how, implementation="triton")
    expected = block_truth(q.float(), k.float(), shape.first, **how, implementation="reference")
    assert found.shape == (shape.batch, shape.kv_heads, shape.count, shape.length // shape.block)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)
    assert torch.equal(found > 0, expected > 0)


# Wide heads in float32 have no kernel: see the refusals below.
CASES = {
    f"{name}-{dtype}": (shape, DTYPES[dtype])
    for name, shape in SHAPES.items()
    for dtype in DTYPES
    if (name, dtype) != ("wide", "fp32")
}


@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES)
def test_triton_agrees_with_the_reference(shape, dtype, device, triton_runs):
    # In the interpreter products of bf16 are made in float32.
    agree(shape, dtype, device, tolerance=1e-3 if (device, dtype) == ("cuda", torch.bfloat16) else 1e-4)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_triton_agrees_at_the_sizes_of_training(block, device, native):
    agree(Shape(2, 9, 3, 64, 4096, first=2048, count=2048, block=block), torch.bfloat16, device, tolerance=1e-3)
    agree(Shape(1, 32, 8, 128, 4096, first=2048, count=2048, block=block), torch.bfloat16, device, tolerance=1e-3)


def test_blocks_and_widths_without_a_kernel_are_refused(triton_runs):
    q = k = torch.zeros(1, 1, 96, 16)
    with pytest.raises(ValueError, match=r"a power of two, 16 or more.*reference.*48"):
        block_truth(q, k, 0, scale=1.0, block=48, implementation="triton")
    wide = torch.zeros(1, 1, 32, 256)
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        block_truth(wide, wide, 0, scale=1.0, block=16, implementation="triton")
