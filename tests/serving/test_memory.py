"""Is memory counted before it is taken, cut to what fits, and refused with a way out where nothing does?"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lim_kernels import scratch
from lim_kernels.block_gates import Gate
from sgl_lim.gates import GateConfig
from sgl_lim.gates.weights import save_gates
from sgl_lim.methods import HeadsOfRank
from sgl_lim.serving.gate_store import GateStore
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.memory import SHARE, Shapes, fit, memory_needed
from sgl_lim.serving.page_store import PageStore
from sgl_lim.serving.reads import SCORE_BYTES
from sgl_lim.serving.snapshot import Snapshot
from sgl_lim.settings.config import RefusedConfig
from support.driven_layers import build_method

GB = 10**9


def shapes(method, *, batch=64, width=131_072, heads=32, kv_heads=8, ranks=1):
    """Of Qwen3-8B."""
    return Shapes(
        batch=batch,
        width=width,
        heads=HeadsOfRank(0, heads // ranks, heads),
        kv_heads=max(1, kv_heads // ranks),
        head_dim=128,
        roles=method.layer_roles(36),
        request_rows=300,
        slots=760_000,
    )


def ranked(**values):
    return build_method("lessismore", selection_layers=(2, 12), **values)


def test_64_rows_of_131072_tokens_are_scored_at_once():
    needed = memory_needed(ranked(), shapes(ranked()))
    assert needed.parts == 1 and needed.step["logits"] == 4 * 64 * 32 * 131_072
    assert 1.07 * GB < sum(needed.step.values()) < 1.2 * GB
    assert needed.static == {"slots of the batch": 4 * 64 * 131_072}


def test_rows_that_arrive_are_counted_where_something_is_kept_of_them():
    slots = 4 * 64 * 131_072
    for method, counted in (
        (ranked(), 0),
        (ranked(selection_interval=4), slots),
        (build_method("quest"), slots),
    ):
        alone = shapes(method)
        needed = [sum(memory_needed(method, one).step.values()) for one in (alone, replace(alone, arrives=True))]
        assert needed[1] - needed[0] == counted, method


def test_ranks_share_the_logits():
    whole, part = (memory_needed(ranked(), shapes(ranked(), ranks=ranks)).step["logits"] for ranks in (1, 8))
    assert whole == 8 * part
    told = [memory_needed(ranked(**how), shapes(ranked(), ranks=8)).step for how in ({}, {"aggregate": "sum"})]
    assert [round(step["exchange between ranks"] / 1e6) for step in told] == [27, 134]
    alone = memory_needed(ranked(scope="kv_head"), shapes(ranked(), ranks=8)).step
    assert (
        alone["exchange between ranks"] == memory_needed(ranked(), shapes(ranked())).step["exchange between ranks"] == 0
    )


@pytest.mark.parametrize("values", [{}, {"aggregate": "max"}, {"prefix_selection": "group"}], ids=str)
def test_less_room_makes_parts_and_little_room_refuses(values):
    method = ranked(**values)
    served = shapes(method)
    limit, whole = fit(method, served, 140 * GB)
    assert (limit, whole.parts) == (min(SCORE_BYTES, whole.step["logits"]), 1)
    seen = set()
    for share in (0.95, 0.4):
        free = int(share * whole.total / SHARE)
        limit, needed = fit(method, served, free)
        assert needed == memory_needed(method, served, limit)
        assert needed.total <= SHARE * free and needed.parts > 1
        seen.add(needed.parts)
    assert len(seen) == 2
    with pytest.raises(RefusedConfig) as refused:
        fit(method, served, GB // 8)
    for word in ("--mem-fraction-static", "--context-length", "--cuda-graph-max-bs-decode", "131072", "64 rows"):
        assert word in str(refused.value)


def test_bounds_of_pages_may_take_more_than_half():
    method = build_method("quest")
    served = shapes(method)
    bounds = memory_needed(method, served).total
    assert fit(method, served, int(1.3 * bounds))[1].total == bounds
    with pytest.raises(RefusedConfig):
        fit(method, served, int(1.2 * bounds))


def test_batches_that_are_larger_than_the_limit_are_scored_in_equal_parts():
    needed = memory_needed(ranked(), shapes(ranked(), batch=256))
    assert needed.parts == 3 and needed.step["logits"] <= SCORE_BYTES
    assert "scored in 3 parts" in str(needed)


def test_nothing_is_selected_where_no_row_outgrows_the_budget():
    needed = memory_needed(ranked(), shapes(ranked(), width=2048))
    assert needed.step == {} and needed.parts == 1


def test_what_is_kept_is_what_is_allocated():
    method = ranked(selection_interval=4)
    served = replace(shapes(method, width=5000), request_rows=9, slots=7000)
    kept = KeptSets(method.keeping, method.sizes, 2, num_rows=9, num_slots=7000, device="cpu")
    memory = [tensor for name, tensor in vars(kept.memory).items() if name not in ("lengths", "ages")]
    found = sum(tensor.nbytes for tensor in memory) + 2 * 4 * 9
    counted = memory_needed(method, served).static
    assert counted["kept sets"] == found
    snapshot = Snapshot(torch.zeros(9, 5000, dtype=torch.int32), room=method.budget)
    snapshot.reserve(64)
    assert counted["slots of the batch"] == snapshot._captured.nbytes


def test_bounds_of_pages_are_what_is_allocated():
    method = build_method("quest")
    served = replace(shapes(method, width=5000), slots=7000)
    key = torch.zeros(7000, 8, 128, dtype=torch.bfloat16)
    pool = SimpleNamespace(size=7000 - 16, page_size=16, get_key_buffer=lambda layer: key)
    store = PageStore(pool, range(2, 36), torch.bfloat16)
    found = sum(side.nbytes for layer in range(2, 36) for side in vars(store.of_layer(layer)).values())
    needed = memory_needed(method, served)
    assert needed.static["bounds of pages"] == found
    assert needed.step["scores"] == 4 * 64 * 8 * scratch.row_places(313)


def test_gate_keys_are_what_is_allocated(tmp_path):
    config = GateConfig.of({"seerattn_q_head_pooling_type": "Qproj", "seerattn_k_seq_pooling_type": "Kmaxminavg"})
    save_gates(tmp_path, config, [])
    method = build_method("seerattention", gates=str(tmp_path))
    served = replace(shapes(method, width=5000), slots=7000)
    key = torch.zeros(7000, 8, 128, dtype=torch.bfloat16)
    pool = SimpleNamespace(size=7000 - 64, page_size=64, get_key_buffer=lambda layer: key)
    weights = (torch.zeros(8, size, config.width, dtype=torch.bfloat16) for size in (4 * 128, 3 * 128))
    gate = Gate(*weights, None, None, config.pools, None)
    store = GateStore(pool, dict.fromkeys(range(36), gate), dict.fromkeys(range(36)), {}, config.block)
    assert memory_needed(method, served).static["gate keys"] == store.nbytes
