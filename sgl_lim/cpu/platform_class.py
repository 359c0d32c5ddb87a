"""The platform class behind `platform.activate`, apart because importing SGLang's platform types is slow."""

import os

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
"""How threads wait. Measured on two cores: as fast as without on an idle machine, nearly as fast as 0 spins beside
other work."""


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """An out-of-tree platform, so that SGLang picks no vendor kernel by name, with the stock memory pools."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: object) -> None:
        """Let the OpenMP threads of the processes to come soon sleep while they wait, unless the user chose otherwise.

        By default they spin for long, and beside other work a thread that spins keeps the core from the one it waits
        for. Threads that sleep at once are slow on an idle machine, because most waits are short. So GNU's runtime,
        which torch brings, is told to spin a little first; other runtimes know the policy alone.
        SGLang calls this where it resolves arguments, before it spawns the processes that compute, so the variables are
        there when they load their OpenMP runtime.
        """
        if OPENMP.keys().isdisjoint(os.environ):
            os.environ.update(OPENMP)

    def get_dispatch_key_name(self) -> str:
        """Custom operators run their torch implementation, `forward_native`."""
        return "native"

    def get_default_attention_backend(self) -> str:
        """Dense backend where the user names none."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """KV pool of GQA, MQA and MHA models (0.5.17)."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> None:
        """KV pool by kind (0.5.23): None is SGLang's own, which runs on any torch device."""
        return

    def get_paged_allocator_cls(self) -> type:
        """Allocator for `page_size > 1`: SGLang's, with torch in place of Triton where the release has only Triton."""
        from sglang.srt.mem_cache.allocator import paged

        if hasattr(paged, "alloc_decode_naive"):
            return paged.PagedTokenToKVPoolAllocator
        from sgl_lim.cpu.page_allocator import TorchPagedAllocator

        return TorchPagedAllocator

    def is_pin_memory_available(self, device: object = None) -> bool:
        """There is no device to pin host memory for."""
        return False
