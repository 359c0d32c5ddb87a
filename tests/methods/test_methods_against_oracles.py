"""Every method that is registered: its layers' sets are the oracle's and its attention is over them.

Servers are in tests/served, by the same checks.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lim_kernels import bound_pages, gate_keys
from lim_kernels.block_gates import GatedBlocks, Rotation
from lim_kernels.page_bounds import PAGE, PageBounds
from sgl_lim.methods import METHODS, Method, Role, SeerAttention
from support.driven_layers import attends_of, build_method, decode_of, layer_of, plan_of, scopes_of, sizes_of
from support.fleet import LAYERS, SELECTION_LAYERS
from support.gate_oracle import angles
from support.gates import WIDTH as GATE_WIDTH
from support.gates import published, with_gates
from support.set_oracle import SetRule
from support.step_checks import check_row, expected_roles

BUDGET, WIDTH, LENS, SCALE = 48, 301, [301, 48, 100, 7, 49, 176], 0.3
HEADS, KV_HEADS, DIM, SLOTS = 6, 3, 8, 2048
GATE_WEIGHTS = ("query", "key", "query_norm", "key_norm")
CASES = [
    (name, scope, attends)
    for name, kind in METHODS.items()
    for scope in scopes_of(kind)
    for attends in attends_of(kind)
]


def rule_of(name: str, scope: str, attends: str) -> SetRule:
    """The rule by the sizes that the method keeps to, whatever it is given."""
    return SetRule(name, BUDGET, *sizes_of(METHODS[name]), "max", scope, attends)


def drawn_rows(generator: torch.Generator, width: int) -> tuple[Tensor, Tensor]:
    """Slots int32 [B, width] of rows of whole pages, the first two of which share a prefix, and lengths int32 [B]."""
    pages = (torch.randperm(SLOTS // PAGE - 1, generator=generator) + 1)[: len(LENS) * 20].view(len(LENS), 20)
    pages[1, :2] = pages[0, :2]
    slots = (pages.unsqueeze(2) * PAGE + torch.arange(PAGE)).flatten(1)[:, :width]
    return slots.int(), torch.tensor(LENS, dtype=torch.int32).clamp(max=width)


def learnt(method: Method, layer: int, keys: Tensor, slots: Tensor, lens: Tensor) -> PageBounds | GatedBlocks:
    """What is known of the rows' pages; what of others is poisoned."""
    if isinstance(method, SeerAttention):
        return gated(layer, keys, slots, lens)
    sides = (torch.full((SLOTS // PAGE, *keys.shape[1:]), float("nan")) for _ in range(2))
    bounds = PageBounds(*sides)
    for row, length in enumerate(lens.tolist()):
        bound_pages(bounds, keys, slots[row, :length])
    return bounds


def gated(layer: int, keys: Tensor, slots: Tensor, lens: Tensor) -> GatedBlocks:
    """The gate keys of the rows' complete blocks."""
    gate = published(LAYERS, HEADS, KV_HEADS, DIM)[layer]
    made = torch.full((SLOTS // PAGE, KV_HEADS, GATE_WIDTH), float("nan"))
    operand = gate.as_operand(positions=WIDTH + 1)
    operand = replace(operand, **{name: getattr(operand, name).float() for name in GATE_WEIGHTS})
    blocks = GatedBlocks(operand, made, PAGE, Rotation(angles(DIM, WIDTH + 1, 1.0)))
    for row, length in enumerate(lens.tolist()):
        gate_keys(blocks, keys, slots[row, :length], torch.arange(length))
    return blocks


def build(name: str, scope: str, attends: str) -> Method:
    """A method with this scope, if it has a choice, and such selection layers, if it has any."""
    values = {"budget": BUDGET, "recency": 0.25, "sinks": 4, "aggregate": "max", "selection_layers": SELECTION_LAYERS}
    values |= with_gates(name, LAYERS, HEADS, KV_HEADS, DIM)
    return build_method(name, **values, scope=scope, selection_attends=attends)


def run(name: str, scope: str, attends: str, width: int = WIDTH, granule: int | None = None) -> list[dict]:
    """One step of a small model's layers, recorded as the servers' probe does."""
    generator = torch.Generator().manual_seed(8)
    slots, lens = drawn_rows(generator, width)
    decode = decode_of(build(name, scope, attends), HEADS)
    plan, records = plan_of(decode, slots, lens, granule), []
    for layer, role in enumerate(decode.method.layer_roles(LAYERS)):
        q = torch.randn(len(LENS), HEADS, DIM, generator=generator)
        k, v = (torch.randn(SLOTS, KV_HEADS, DIM, generator=generator) for _ in range(2))
        known = learnt(decode.method, layer, k, slots, lens) if role is Role.OWN else None
        out = decode.run(plan, role, layer_of(q, k, v, SCALE, known))
        chosen = plan.chosen
        records.append(
            {
                "layer": layer,
                "role": role.value,
                "q": q,
                "keys": k[slots.long()],
                "values": v[slots.long()],
                "slots": slots,
                "seq_lens": lens,
                "set_slots": None if chosen is None else chosen.slots,
                "set_counts": None if chosen is None else chosen.ends,
                "out": out,
                "scale": SCALE,
            }
        )
    return records


@pytest.mark.parametrize("granule", [None, PAGE], ids=["alone", "prefix-groups"])
@pytest.mark.parametrize("width", [WIDTH, BUDGET, 41], ids=["beyond", "at-the-budget", "within"])
@pytest.mark.parametrize(("name", "scope", "attends"), CASES)
def test_every_layer_does_what_its_role_says(name, scope, attends, width, granule):
    rule, records = rule_of(name, scope, attends), run(name, scope, attends, width, granule)
    assert [record["role"] for record in records] == expected_roles(rule)
    for row in range(len(LENS)):
        check_row(rule, (HEADS, KV_HEADS), records, row)


@pytest.mark.parametrize(("name", "scope", "attends"), CASES)
def test_a_row_within_the_budget_attends_to_all_it_has_beside_rows_beyond(name, scope, attends):
    for record in run(name, scope, attends):
        if record["role"] in ("sparse", "own"):
            counts = record["set_counts"].view(len(LENS), -1)
            for row, length in enumerate(LENS):
                # A set of whole pages lacks what the last of them does.
                page = build(name, scope, attends).page
                most = BUDGET if page == 1 else BUDGET - -length % page
                assert set(counts[row].tolist()) == {min(length, most)}


def test_quest_keeps_to_its_own_rule():
    method = build("quest", "kv_head", "context")
    assert method.settings() == {"budget": BUDGET, "scope": "kv_head"} and method.per_kv_head
    assert [role.value for role in method.layer_roles(4)] == ["dense", "dense", "own", "own"]
    (problem,) = build_method("quest", budget=40).conflicts()
    assert "take a multiple of 16, such as 48" in problem
