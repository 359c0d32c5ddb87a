"""Which of PyTorch's causal attention kernels a device runs fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model import Shape

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
TOLERANCE = 0.02  # of two bf16 kernels' results and gradients, relative to their norm


@contextmanager
def causal_kernel(name: str) -> Iterator[None]:
    """Within it, `scaled_dot_product_attention` prefers the kernel of that name, then flash, then math."""
    order = dict.fromkeys((BACKENDS[name], SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    with sdpa_kernel(list(order), set_priority=True):
        yield


def fastest_kernel(shape: Shape, *, rows: int, length: int, device: torch.device) -> str:
    """ "cudnn" or "flash", whichever is faster at this size; cuDNN only if it agrees with flash."""
    if device.type != "cuda":
        return "math"
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(rows, heads, length, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    operands = [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in sizes]
    flash, flash_ms = _measure(operands, SDPBackend.FLASH_ATTENTION)
    try:
        cudnn, cudnn_ms = _measure(operands, SDPBackend.CUDNN_ATTENTION)
    except RuntimeError as error:
        print(f"attention: flash {flash_ms:.2f} ms; cuDNN cannot: {str(error).splitlines()[0]}")
        return "flash"
    apart = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(cudnn, flash, strict=True))
    print(f"attention at {rows}x{length}: flash {flash_ms:.2f} ms, cuDNN {cudnn_ms:.2f} ms, apart by {apart:.1e}")
    return "cudnn" if apart < TOLERANCE and cudnn_ms < flash_ms else "flash"


def _measure(operands: list[torch.Tensor], backend: SDPBackend) -> tuple[list[torch.Tensor], float]:
    """Output and gradients, and milliseconds of one forward and backward pass."""
    q, k, v = (o.clone().requires_grad_() for o in operands)
    with sdpa_kernel(backend):
        for repeat in range(4):
            if repeat == 1:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            gradients = torch.autograd.grad(out.square().mean() * 1e3, (q, k, v))
        end.record()
    torch.cuda.synchronize()
    return [out.detach(), *gradients], begin.elapsed_time(end) / 3
