"""What the Triton launchers share.

Addresses are int64: a kernel widens the number of a row or a head before it multiplies it by a stride. Positions within
a row, and blocks of them, stay int32: no row has 2**31.
"""

from functools import cache

import torch
import triton


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, of the current one for tensors without memory; a few for the interpreter."""
    if device.type not in ("cuda", "meta") or not torch.cuda.is_available():
        return 4
    if device.type == "meta":
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan_block(batch: int) -> int:
    """Room for a batch's rows: 16, 64, 256, or a larger power of two.

    Kernels that plan for all rows are compiled for each. Up to 256 there are half as many as there are powers of two.
    """
    return next((room for room in (16, 64, 256) if batch <= room), 1 << (batch - 1).bit_length())


def per_row_empty(count: int, batch: int, *, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Uninitialised [count, batch] whose rows start at multiples of 16 bytes.

    Triton compiles a kernel anew for a pointer that does not.
    """
    return torch.empty(count, _padded(batch), dtype=dtype, device=device)[:, :batch]


_PROGRAMS_A_MULTIPROCESSOR = 32
_PROGRAMS_A_LINE = 4


def programs_along(blocks: int, lines: int, device: torch.device) -> int:
    """Programs for each of `lines` rows (or heads of rows) whose blocks they take in turn.

    A captured graph has one grid for all lengths, and buffers as wide as the pool's rows. A program for every block of
    these would mostly start in order to end: 0.65 ns each on an H200, which 131,072 places for 64 rows of 32 heads make
    40 us. So a few programs a line stride over the blocks that the line's length gives it, more where lines are few.
    """
    return max(1, min(blocks, max(_PROGRAMS_A_LINE, _PROGRAMS_A_MULTIPROCESSOR * multiprocessors(device) // lines)))


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, where `tl.dot` of bfloat16 operands is wrong."""
    return bool(triton.knobs.runtime.interpret)


def _padded(length: int) -> int:
    return -(-length // 16) * 16


def readable_width(tensor: torch.Tensor) -> int:
    """How far the rows of `tensor` [..., L] may be read: L, or L rounded up where rows are padded.

    A mask that ends at a multiple of 16 lets Triton load vectors; one that ends at a row's length makes it load
    element by element.
    """
    length = tensor.shape[-1]
    padded = _padded(length)
    ends = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    inside = ends + padded - length < tensor.untyped_storage().nbytes() // tensor.element_size()
    return padded if inside and tensor.stride(-2) >= padded and tensor.stride(-1) == 1 else length


def padded_empty(*shape: int, device: torch.device) -> torch.Tensor:
    """Uninitialised float32 whose rows start at multiples of 16 elements."""
    *rows, length = shape
    return torch.empty(*rows, _padded(length), dtype=torch.float32, device=device)[..., :length]
