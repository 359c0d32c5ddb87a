"""Drafts read what their own verification left, whatever is rejected, on SGLang's own caches; answers read everything.

The pool's keys and values follow from the slot, so a round can be looked at once the world has committed it.
"""

import os

import pytest
import torch

pytest.importorskip("sglang.srt.mem_cache.radix_cache")

from lim_kernels import sparse_decode
from lim_patches.row_generations import keep_generations
from sgl_lim.methods import Role
from support.fake_backend import (
    BUDGET,
    DIM,
    EXTEND,
    HEADS,
    IDLE,
    LAYERS,
    Dense,
    batch_of,
    build,
    layer_named,
    lossless,
    run_role,
    verification,
    verify,
)
from support.lossless_world import drawn, lossless_config
from support.radix_world import random_schedule

SCHEDULES = int(os.environ.get("RADIX_SCHEDULES", "200"))
SINKS, TOKENS, ROOM = 2, 4, 16
ROWS, WIDTH, SLOTS = 5, 90, 400


@pytest.fixture(scope="module", autouse=True)
def _config():
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    clear = ReqToTokenPool.clear
    with lossless_config(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReqToTokenPool, "clear", lambda pool: keep_generations(clear, pool))
        yield


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(SLOTS - 1, generator=generator)[:WIDTH] + 1 for _ in range(ROWS)]).int()


def random_queries(count, seed):
    return torch.randn(count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def placed(draft, rows, lens):
    """KV slots that each row of a draft step attends to, in layers of the first set."""
    draft.init_forward_metadata(batch_of(rows, lens))
    read = draft.lim.plan.dense
    return [slots[:end].tolist() for slots, end in zip(read.slots, read.ends.tolist(), strict=True)]


def chosen_by_a_step(table, rows, lens, q, granule=None, num_slots=SLOTS, **values):
    """KV slots that an ordinary step of these rows chooses by its keys alone, in a pool of the same size."""
    plain = build(table, granule=granule, num_slots=num_slots, selection_attends="set", **values)
    plain.init_forward_metadata(batch_of(rows, lens))
    layer = layer_named(1)
    plain.forward_decode(q.flatten(1), None, None, layer, batch_of(rows, lens), False)
    chosen = plain.lim.plan.chosen
    return [slots[:end].tolist() for slots, end in zip(chosen.slots, chosen.ends.tolist(), strict=True)]


def exact(lim, slots, q):
    """Attention in float64 of one query [H, D] over these KV slots."""
    out, _ = sparse_decode(
        q[None].double(),
        lim.pool.k.double(),
        lim.pool.v.double(),
        torch.tensor([slots]),
        torch.tensor([len(slots)]),
        scale=0.3,
    )
    return out[0].float()


@pytest.mark.parametrize("granule", [None, 4])
def test_a_verification_on_a_cpu_is_dense_attention_of_every_token(table, granule):
    table[2, :40] = table[1, :40]
    target, _ = lossless(table, TOKENS, granule=granule)
    target.lim.dense_by_kernels = True
    rows, lens, q = [1, 2, 4], [41, 50, 7], random_queries(3 * TOKENS, 3)
    for out in verify(target, verification(rows, lens, TOKENS), q):
        for n, (row, length) in enumerate(zip(rows, lens, strict=True)):
            for i in range(TOKENS):
                place = n * TOKENS + i
                wanted = exact(target.lim, table[row, : length + i + 1].tolist(), q[place])
                torch.testing.assert_close(out[place], wanted, rtol=1e-4, atol=1e-5)
    assert "extend" not in target.calls


def test_branches_and_the_tokens_of_a_row_are_read_once_on_a_cpu(table):
    table[2, :64] = table[1, :64]
    target, _ = lossless(table, TOKENS)
    target.lim.dense_by_kernels = True
    target.init_forward_metadata(verification([1, 2], [70, 80], TOKENS))
    read = target.lim.verify.attend
    assert read.context.groups.already_read.tolist() == [0, 64] and read.context.ends.tolist() == [70, 80]
    assert read.run.tolist() == [table[1, 70:74].tolist(), table[2, 80:84].tolist()]


def test_where_the_dense_backend_verifies_its_attention_is_untouched(table):
    target, _ = lossless(table, TOKENS)
    batch, q = verification([1, 2], [41, 50], TOKENS), random_queries(2 * TOKENS, 3)
    outs = verify(target, batch, q)
    assert target.calls.count("extend") == LAYERS and all(torch.equal(out, q) for out in outs)
    assert target.lim.verify.attend is None


@pytest.mark.parametrize("values", [{}, {"top_p": 0.9, "aggregate": "max"}, {"recency": "auto", "aggregate": "sum"}])
def test_the_first_token_chooses_and_the_draft_reads_its_set_and_what_came_since(table, values):
    target, draft = lossless(table, TOKENS, num_slots=SLOTS, **values)
    # Peaked, so that sets whose sizes follow the attention are small.
    rows, lens, q = [1, 3], [41, 60], 8 * random_queries(2 * TOKENS, 5)
    verify(target, verification(rows, lens, TOKENS), q)
    chosen = chosen_by_a_step(table, rows, [length + 1 for length in lens], q[::TOKENS], **values)
    assert "top_p" not in values or min(len(slots) for slots in chosen) < BUDGET
    for kept in range(1, TOKENS + 1):
        behind = [length + kept + 1 for length in lens]
        expected = [
            slots + table[row, length + 1 : length + kept + 1].tolist()
            for row, length, slots in zip(rows, lens, chosen, strict=True)
        ]
        assert placed(draft, rows, behind) == expected


def test_rows_that_choose_together_draft_on_what_they_chose(table):
    table[2, :40] = table[1, :40]
    values = {"granule": 4, "prefix_selection": "group", "aggregate": "max"}
    target, draft = lossless(table, TOKENS, num_slots=SLOTS, **values)
    rows, lens, q = [1, 2], [41, 50], random_queries(2 * TOKENS, 5)
    verify(target, verification(rows, lens, TOKENS), q)
    assert target.lim.verify.guide.shared is not None
    chosen = chosen_by_a_step(table, rows, [length + 1 for length in lens], q[::TOKENS], **values)
    expected = [[*slots, int(table[row, n + 1])] for row, n, slots in zip(rows, lens, chosen, strict=True)]
    assert placed(draft, rows, [length + 2 for length in lens]) == expected


def test_every_kv_head_drafts_on_its_own_set(table):
    target, draft = lossless(table, TOKENS, num_slots=SLOTS, scope="kv_head")
    q = random_queries(TOKENS, 5)
    verify(target, verification([1], [41], TOKENS), q)
    draft.init_forward_metadata(batch_of([1], [43]))
    read = draft.lim.plan.dense
    plain = build(table, granule=None, num_slots=SLOTS, selection_attends="set", scope="kv_head")
    plain.init_forward_metadata(batch_of([1], [42]))
    plain.forward_decode(q[:1].flatten(1), None, None, layer_named(1), batch_of([1], [42]), False)
    for head in range(2):
        chosen = plain.lim.plan.chosen.slots[0, head].tolist()
        assert read.slots[0, head, : int(read.ends[0, head])].tolist() == [*chosen, int(table[1, 42])]


def test_all_layers_of_a_draft_attend_to_the_set_before_them(table):
    target, draft = lossless(table, TOKENS, num_slots=SLOTS, selection_layers=(1, 2))
    verify(target, verification([1], [41], TOKENS), random_queries(TOKENS, 5))
    draft.init_forward_metadata(batch_of([1], [43]))
    plan = draft.lim.plan
    tenants = torch.zeros(ROWS, dtype=torch.int64)
    (first, second), _ = draft.lim.drafts.sets.place(torch.tensor([1]), tenants, table[1:2], plan.seq_lens)
    q = random_queries(1, 2)
    for role, read in ((Role.DENSE, first), (Role.SELECT, first), (Role.SELECT, second), (Role.SPARSE, second)):
        out = run_role(draft, plan, role, 1)
        slots = read.slots[0, : int(read.ends[0])].tolist()
        torch.testing.assert_close(out[0], exact(draft.lim, slots, q[0]), rtol=1e-4, atol=1e-5)
    assert draft.lim.decodes(Role.DENSE)


def test_decode_steps_of_the_target_are_dense_and_those_of_the_draft_are_not(table):
    target, draft = lossless(table, TOKENS, granule=None)
    batch, q = batch_of([1], [60]), random_queries(1, 2)
    target.init_forward_metadata(batch)
    assert torch.equal(target.forward_decode(q.flatten(1), None, None, layer_named(2), batch, False), q.flatten(1))
    assert target.calls[-1] == "decode" and "decode" not in draft.calls
    draft.init_forward_metadata(batch)
    draft.forward_decode(q.flatten(1), None, None, layer_named(0), batch, False)
    assert "decode" not in draft.calls


@pytest.mark.parametrize("mode", [EXTEND, IDLE])
def test_a_prefill_forgets_the_sets_of_its_rows_and_an_idle_step_does_not(table, mode):
    target, draft = lossless(table, TOKENS, num_slots=SLOTS)
    verify(target, verification([1, 2], [41, 41], TOKENS), random_queries(2 * TOKENS, 5))
    window = [*range(SINKS), *range(43 - BUDGET + SINKS, 43)]
    target.init_forward_metadata(batch_of([1], [43], mode=mode))
    first, second = placed(draft, [1, 2], [43, 43])
    assert (first == table[1, window].tolist()) == (mode == EXTEND)
    assert second != table[2, window].tolist()


def test_a_method_whose_budget_no_row_outgrows_drafts_on_everything(table):
    target, draft = lossless(table, TOKENS, budget=128)
    verify(target, verification([1], [41], TOKENS), random_queries(TOKENS, 5))
    assert target.lim.verify.guide is None and target.lim.drafts.sets is None
    draft.init_forward_metadata(batch_of([1], [43]))
    assert draft.lim.plan.context.ends.tolist() == [43] and draft.lim.plan.dense is draft.lim.plan.context


def test_unguided_drafts_select_for_themselves(table):
    target, draft = lossless(table, TOKENS, guided=False)
    verify(target, verification([1], [41], TOKENS), random_queries(TOKENS, 5))
    draft.init_forward_metadata(batch_of([1], [43]))
    assert draft.lim.plan.placed is None and len(draft.lim.plan.select) == 1


class Replay:
    """Graphs of both backends are imitated by beginning their steps anew on the buffers that were captured."""

    def __init__(self, backend, capture):
        backend.init_cuda_graph_state(4, 4 * TOKENS)
        backend.init_forward_metadata_out_graph(capture, in_capture=True)
        backend.init_forward_metadata_in_graph(capture)
        self.backend = backend

    def run(self, batch, table):
        """The step's plan, on a table that is overwritten meanwhile."""
        before = table.clone()
        self.backend.init_forward_metadata_out_graph(batch)
        table.fill_(-1)
        self.backend.init_forward_metadata_in_graph(batch)
        table.copy_(before)


def test_captured_steps_read_buffers_of_their_own(table):
    target, draft = lossless(table, TOKENS, num_slots=SLOTS)
    verifies = Replay(target, verification([0, 0], [1, 1], TOKENS))
    drafts = Replay(draft, batch_of([0, 0], [1, 1]))
    batch, q = verification([3, 0], [41, 1], TOKENS), random_queries(2 * TOKENS, 5)
    verifies.run(batch, table)
    for index in range(LAYERS):
        target.forward_extend(q.flatten(1), None, None, layer_named(index), batch, False)
    drafts.run(batch_of([3, 0], [43, 1]), table)
    read = draft.lim.plan.dense
    (chosen,) = chosen_by_a_step(table, [3], [42], q[:1])
    assert read.slots[0, : int(read.ends[0])].tolist() == [*chosen, int(table[3, 42])]
    assert read.ends.tolist() == [BUDGET + 1, 1]


def test_graphs_of_more_rows_than_the_first_ones_are_refused(table):
    target, _ = lossless(table, TOKENS)
    target.lim.snapshot.reserve(4)
    target.lim.snapshot.reserve(2)
    with pytest.raises(RuntimeError, match="graphs of 5 rows cannot read what graphs of 4 rows"):
        target.lim.snapshot.reserve(5)


class Driven:
    """Both backends over a world, beside a plain account of the sets that its requests have."""

    def __init__(self, world, granule):
        self.world = world
        self.target, self.draft = lossless(
            world.table, world.drafts + 1, Dense, granule=granule, num_slots=len(world.filled)
        )
        for backend in (self.target, self.draft):
            backend.lim.rows.req_generation = world.generations
        self.sets = {}  # of a row's tenancy: length when chosen, positions
        self.seed, self.seen = 0, {"set": 0, "window": 0, "whole": 0}

    def round(self, requests):
        """Look at the round that the world has just committed of these requests."""
        world = self.world
        rows, starts = [r.row for r in requests], [world.last[r][0] for r in requests]
        for step in range(world.drafts):
            lens = [start + step + 1 for start in starts]
            found = placed(self.draft, rows, lens)
            assert found == [self.expected(r, length) for r, length in zip(requests, lens, strict=True)]
        self.seed += 1
        q = random_queries(len(requests) * (world.drafts + 1), self.seed)
        verify(self.target, verification(rows, starts, world.drafts + 1), q)
        first = [start + 1 for start in starts]
        chosen = chosen_by_a_step(world.table, rows, first, q[:: world.drafts + 1], num_slots=len(world.filled))
        # Rows that are verified beside a longer one leave a set too: all they have.
        long = max(starts) + world.drafts + 1 > BUDGET
        for request, length, slots in zip(requests, first, chosen, strict=True):
            places = world.table[request.row, :length].tolist()
            if long:
                self.sets[self.tenancy(request)] = length, [places.index(slot) for slot in slots]

    def tenancy(self, request):
        return request.row, int(self.world.generations[request.row])

    def expected(self, request, length):
        """KV slots that a draft of this length attends to; none but the request's own, nor one of a rejected token."""
        at, positions = self.sets.get(self.tenancy(request), (0, []))
        if length <= BUDGET:
            kind, positions = "whole", range(length)
        elif positions and 0 < length - at <= ROOM:
            kind, positions = "set", [*positions, *range(at, length)]
        else:
            kind, positions = "window", [*range(SINKS), *range(length - BUDGET + SINKS, length)]
        self.seen[kind] += 1
        start, _ = self.world.last[request]
        for position in positions:
            if position < start:
                slot = int(self.world.table[request.row, position])
                assert int(self.world.content[slot]) == request.path[position]
        return self.world.table[request.row, list(positions)].tolist()


@pytest.mark.parametrize("page", [1, 16])
def test_any_schedule(page):
    seen = {"set": 0, "window": 0, "whole": 0}
    for seed in range(SCHEDULES // 4):
        draw, world = drawn(seed, page)
        driven, done = Driven(world, draw.choice((None, 4))), []
        try:
            for name in random_schedule(draw, world):
                done.append(name)
                if name == "decode" and world.last:
                    driven.round(list(world.last))
        except Exception as error:
            raise AssertionError(f"page size {page}, seed {seed}, after {done}: {error}") from error
        for kind, count in driven.seen.items():
            seen[kind] += count
    assert min(seen.values()) > SCHEDULES / 4, f"schedules hardly do anything: {seen}"
