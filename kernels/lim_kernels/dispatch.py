"""What every operator's `api.py` shares: choice of an implementation by name, and checks of operands."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TypeVar, cast

from torch import Tensor

IMPLEMENTATIONS = ("reference", "triton")
Operator = TypeVar("Operator", bound=Callable[..., object])


def implementation_of(reference: Operator, implementation: str | None, operand: Tensor) -> Operator:
    """The function that runs an operator: its reference, or the one of the same name in `triton.py` beside it.

    Triton's is imported when it is wanted first: a CPU server needs no Triton.

    Args:
        reference: the operator's function in `reference.py`.
        implementation: "reference" or "triton", which is used or refused; None for Triton on CUDA and where a GPU's
            kernels are rehearsed (`lim_kernels.rehearsal`), the reference elsewhere.
        operand: a tensor on the operands' device.

    Raises:
        ValueError: an unknown name.
    """
    if implementation is None:
        implementation = "triton" if operand.device.type in ("cuda", "meta") else "reference"
    expected = f"implementation among {', '.join(IMPLEMENTATIONS)}"
    require(implementation in IMPLEMENTATIONS, reference.__name__, expected, repr(implementation))
    return reference if implementation == "reference" else _in_triton(reference)


@cache
def _in_triton(reference: Operator) -> Operator:
    folder = reference.__module__.rpartition(".")[0]
    return cast(Operator, getattr(import_module(f"{folder}.triton"), reference.__name__))


def require(condition: bool, op: str, expected: str, actual: object) -> None:
    """Raise ValueError("op: expected …, got …") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {actual}")


def require_rows(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless the last dimension of each tensor is contiguous, and one-dimensional ones are."""
    for tensor in tensors:
        contiguous = tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
        require(contiguous, op, "rows that are contiguous", tensor is not None and tensor.stride())


def require_one_device(op: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {str(tensor.device) for tensor in tensors}
    require(len(devices) == 1, op, "all operands on one device", sorted(devices))


def check_decode_operands(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, *indices: Tensor) -> None:
    """Check what decode operators have in common: q, the KV caches, and one device for them and `indices`.

    Args:
        op: operator name, for the message.
        q: [B, H, D]; k_cache, v_cache: [num_slots, H_kv, D], [num_slots, H_kv, D_v].
        indices: the operator's integer operands; their shapes are its own to check.

    Raises:
        ValueError: naming the operand, what was expected and what came.
    """
    require(q.dim() == 3 and q.is_floating_point(), op, "q floating [B, H, D]", f"{q.dtype} {list(q.shape)}")
    heads, dim = q.shape[1:]
    require(
        k_cache.dim() == 3 and k_cache.shape[2] == dim and heads % k_cache.shape[1] == 0,
        op,
        f"k_cache [num_slots, H_kv, {dim}] with H_kv dividing {heads}",
        list(k_cache.shape),
    )
    require(
        v_cache.dim() == 3 and v_cache.shape[:2] == k_cache.shape[:2],
        op,
        f"v_cache [{k_cache.shape[0]}, {k_cache.shape[1]}, D_v]",
        list(v_cache.shape),
    )
    dense = k_cache.stride(2) == 1 and v_cache.stride(2) == 1
    require(dense, op, "caches whose heads are contiguous", f"strides {k_cache.stride()} and {v_cache.stride()}")
    require_one_device(op, q, k_cache, v_cache, *indices)
