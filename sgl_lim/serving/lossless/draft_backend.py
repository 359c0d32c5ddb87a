"""The second attention backend of a model runner: one drafts, the other verifies, over one KV pool."""

from dataclasses import replace
from typing import Any

import torch

from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.backend import add_sparse_decode
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.draft_sets import Drafts, DraftSets
from sgl_lim.serving.lossless import versions
from sgl_lim.serving.snapshot import Snapshot
from sgl_lim.serving.state import LimState


def make_draft_backend(runner: Any, target_backend: Any, *, guided: bool, branches_once: bool = False) -> Any:
    """Make a backend's decode dense, and give another one its sparse decode.

    Called once, after the target's backend was built and before any graph is captured.

    Args:
        runner: SGLang's model runner.
        target_backend: what `sgl_lim.serving.backend.make` made for it. From now on its decode steps attend to
            everything, and it takes verifications too.
        guided: whether drafts attend to sets that the verification leaves, or decode as the method does.
        branches_once: whether our operators verify wherever prefix groups are looked for, as they read a prefix once
            that branches share. A CPU verifies by them in any case.

    Returns:
        An instance of the same dense backend whose decode steps are drafts. Its `lim` shares roles, counters and
        `drafts` with the target's, and has a snapshot and a plan of its own, because graphs of both read them.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    target: LimState = target_backend.lim
    target.branches_once = branches_once
    share_drafts(target, tokens=versions.draft_steps() + 1, guided=guided, overlap=versions.overlaps())
    backend = ATTENTION_BACKENDS[target.dense_backend](runner)
    add_sparse_decode(backend, draft_state(target))
    return backend


def share_drafts(target: LimState, *, tokens: int, guided: bool, overlap: bool) -> None:
    """Make a state lossless: what its decode says is the answer, and drafts come from elsewhere.

    Args:
        tokens: that one pass verifies of a row, at most.
        guided: as `make_draft_backend` has it; overlap: as `Counters` has it.
    """
    table, method, pool = target.rows.req_to_token, target.method, target.pool
    sets = None
    # Where rows are no wider than the budget, drafts read them whole.
    if guided and method.budget < table.shape[1]:
        assert isinstance(method, Ranked)
        kv_heads = pool.get_key_buffer(0).shape[1] if method.per_kv_head else 1
        sets = DraftSets(method, target.roles, tokens, num_rows=table.shape[0], kv_heads=kv_heads, device=table.device)
    read = torch.zeros(table.shape[0], dtype=torch.int64, device=table.device)
    target.drafts = Drafts(tokens=tokens, sets=sets, read=read)
    target.counters = Counters(
        method.budget,
        [target.role(layer) for layer in range(len(target.roles))],
        table.shape[0],
        table.device,
        overlap=overlap,
    )


def draft_state(target: LimState) -> LimState:
    """The state of the backend that drafts for a lossless one."""
    return replace(target, snapshot=Snapshot(target.rows.req_to_token), plan=None, verify=None, drafting=True)
