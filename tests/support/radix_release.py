"""What SGLang's scheduler calls on its caches, for each supported release, and what those calls read.

`RELEASE` is the installed one's; its functions take real `Req`s and a stand-in of a `ScheduleBatch`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import Req, release_req
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocation import alloc_for_decode, alloc_for_extend
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.runtime_context import get_context, get_server_args


@contextmanager
def sglang_config() -> Iterator[None]:
    """Publish a server configuration for a while: SGLang's cache functions read it."""
    with get_context().override_server_args(attention_backend="torch_native", device="cpu"):
        yield


class Release17:
    """0.5.17: `RadixCache` in Python, what a request holds is written on the request."""

    checkpoints_in_free_group = False

    @staticmethod
    def allocator(size: int, page_size: int):
        from sgl_lim.cpu.page_allocator import TorchPagedAllocator

        return TorchPagedAllocator(size, page_size, torch.float32, "cpu", kvcache=None, need_sort=False)

    @staticmethod
    def cache(params: CacheInitParams):
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache(params)

    row = staticmethod(lambda req: req.req_pool_idx)
    prefix = staticmethod(lambda req: len(req.prefix_indices))
    protected = staticmethod(lambda req: req.cache_protected_len)
    lock = staticmethod(lambda tree, req: tree.inc_lock_ref(req.last_node))
    unlock = staticmethod(lambda tree, req: tree.dec_lock_ref(req.last_node))

    @staticmethod
    def extend(req: Req, batch: SimpleNamespace, end: int) -> None:
        req.set_extend_range(len(req.prefix_indices), end)
        alloc_for_extend(batch)
        req.kv_committed_len = end

    @staticmethod
    def decode(batch: SimpleNamespace) -> None:
        alloc_for_decode(batch, token_per_req=1)
        for req in batch.reqs:
            req.kv_committed_len += 1

    @staticmethod
    def checkpoint(tree, req: Req) -> None:
        common.maybe_cache_unfinished_req(req, tree, chunked=req.extend_range.end < len(req.full_untruncated_fill_ids))

    @staticmethod
    def release(tree, req: Req, keep: bool) -> None:
        common.release_kv_cache(req, tree, is_insert=keep)

    @staticmethod
    def retract(**kwargs) -> None:
        release_req(server_args=get_server_args(), **kwargs)


class Release23:
    """0.5.23: `UnifiedRadixCache`, over its Rust core by default, and a `ReqKvInfo` of what a request holds."""

    checkpoints_in_free_group = True

    @staticmethod
    def allocator(size: int, page_size: int):
        allocator = PagedTokenToKVPoolAllocator(size, page_size, torch.float32, "cpu", kvcache=None, need_sort=False)
        allocator.use_triton_kernels = False  # beside a GPU it would launch them on the CPU's tensors
        return allocator

    @staticmethod
    def cache(params: CacheInitParams):
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params.tree_components = (ComponentType.FULL,)
        return UnifiedRadixCache(params)

    row = staticmethod(lambda req: req.kv.req_pool_idx)
    prefix = staticmethod(lambda req: req.prefix_len)
    protected = staticmethod(lambda req: req.kv.cache_protected_len)

    @staticmethod
    def lock(tree, req: Req) -> None:
        req.lock = tree.lock(req.last_node)

    @staticmethod
    def unlock(tree, req: Req) -> None:
        tree.unlock(req.lock)
        req.lock = None

    @staticmethod
    def extend(req: Req, batch: SimpleNamespace, end: int) -> None:
        req.extend_end = end
        alloc_for_extend(batch)

    @staticmethod
    def decode(batch: SimpleNamespace) -> None:
        alloc_for_decode(batch, token_per_req=1)

    @staticmethod
    def checkpoint(tree, req: Req) -> None:
        common.checkpoint_kv_cache(req, tree)

    @staticmethod
    def release(tree, req: Req, keep: bool) -> None:
        common.release_kv_cache(req, tree, checkpoint=keep)

    retract = staticmethod(release_req)


RELEASE = Release23 if hasattr(BasePrefixCache, "checkpoint") else Release17
