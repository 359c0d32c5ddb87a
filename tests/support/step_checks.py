"""Recorded decode steps against the oracles: sets, attention, and the answers that come of them."""

from typing import Any

import torch
from torch import Tensor

from sgl_lim.serving.state import GRANULE
from support.agreement import errors
from support.fleet import HEADS, LAYERS, ROLES, Fleet, LimCase
from support.float64_qwen3 import Float64Qwen3, Sets
from support.gate_oracle import explains_blocks
from support.gates import published
from support.group_oracle import check_group_sets, shared_of_long
from support.page_oracle import explains_pages
from support.server import Answer
from support.set_oracle import SetRule

Step = list[dict[str, Any]]  # one record a layer, as the probe writes it


def check_steps(case: LimCase, steps: list[Step]) -> None:
    """Every row of every layer: the set is the oracle's, the output is attention over it."""
    for step in steps:
        assert [record["role"] for record in step] == expected_roles(case.rule)
        together = case.prefix_selection == "group"
        for record in step:
            if together and record["role"] == "select":
                check_selection_of_groups(case.rule, record)
        for row in range(len(step[0]["seq_lens"])):
            check_row(case.rule, HEADS[case.kind], step, row, sets_known=together)


def check_answers(
    case: LimCase, fleet: Fleet, prompts: list[list[int]], answers: list[Answer], steps: list[Step]
) -> None:
    """The answers are those of a float64 model that decodes over the served sets, and dense decode's are far away."""
    sets = {}
    for step in steps:
        for row, length in enumerate(step[0]["seq_lens"].tolist()):
            for record in step:
                sparse = record["role"] in ("sparse", "own") or (record["role"], case.rule.attends) == ("select", "set")
                sets[record["layer"], length] = served_sets(record, row, length) if sparse else None
    model = Float64Qwen3(fleet.model(case.kind), torch.float32)
    error, _ = errors(model, prompts, answers, lambda layer, length: sets[layer, length])
    dense_error, magnitude = fleet.dense_run(case).noise_beyond
    assert error <= 2 * dense_error + torch.finfo(torch.float32).eps * magnitude
    if set(expected_roles(case.rule)) == {"dense"}:
        return
    far, _ = errors(model, prompts[-1:], answers[-1:])
    assert far > 1000 * error, "dense decode would pass as well, so the test says nothing"


def expected_roles(rule: SetRule) -> list[str]:
    """Layers' roles, as each method has them whose layers are not those of `lessismore`."""
    plans = {
        "window": ["dense", *["sparse"] * (LAYERS - 1)],
        "full": ["dense"] * LAYERS,
        "quest": ["dense"] * 2 + ["own"] * (LAYERS - 2),
        "seerattention": ["own"] * LAYERS,
    }
    return plans.get(rule.method, list(ROLES))


def check_selection_of_groups(rule: SetRule, record: dict[str, Any]) -> None:
    """The sets of all rows at a selection layer where rows that share a prefix choose together."""
    lens = record["seq_lens"].tolist()
    served = [served_set(record, row, length) for row, length in enumerate(lens)]
    exact = [
        exact_logits(record["q"][row], record["keys"][row, :length], record["scale"]) for row, length in enumerate(lens)
    ]
    shared = shared_of_long(record["slots"], lens, budget=rule.budget, granule=GRANULE)
    check_group_sets(rule, served, *(list(part) for part in zip(*exact, strict=True)), shared)


def check_row(rule: SetRule, heads: tuple[int, int], step: Step, row: int, *, sets_known: bool = False) -> None:
    """All layers of one request in one step; `sets_known`: what selection layers chose has been checked."""
    kept: Sets | None = [rule.window(int(step[0]["seq_lens"][row]))] if rule.method == "window" else None
    for record in step:
        length = int(record["seq_lens"][row])
        place = f"layer {record['layer']} ({record['role']}), context {length}"
        # One query, [H, D], and the context as the snapshot names it, [L, H_kv, D].
        q, k, v = record["q"][row], record["keys"][row, :length], record["values"][row, :length]
        assert (q.shape[0], k.shape[1]) == heads
        attended = [list(range(length))]
        if record["role"] == "select":
            kept = served_sets(record, row, length)
            assert len(kept) == (heads[1] if rule.scope == "kv_head" and record["set_slots"].dim() == 3 else 1)
            if not sets_known:
                exact, slack = (x.unflatten(0, (len(kept), -1)) for x in exact_logits(q, k, record["scale"]))
                for head, chosen in enumerate(kept):
                    assert rule.explains(chosen, exact[head], length, slack[head]), f"{place}: not the oracle's set"
            if rule.attends == "set":
                attended = kept
        elif record["role"] == "own":
            attended = kept = served_sets(record, row, length)
            for head, chosen in enumerate(kept * (heads[1] if len(kept) == 1 else 1)):
                assert explains_own(rule, record["layer"], chosen, head, q, k), f"{place}: not the best pages"
        elif record["role"] == "sparse":
            assert served_sets(record, row, length) == kept, f"{place}: the set in force is not the one chosen"
            attended = kept
        # Of each set, the query heads and the KV heads that attend to it.
        qs, outs = (x.unflatten(0, (len(attended), -1)) for x in (q, record["out"][row]))
        ks, vs = (x.unflatten(1, (len(attended), -1)) for x in (k, v))
        parts = [(qs[n], ks[positions, n], vs[positions, n]) for n, positions in enumerate(attended)]
        check_parts(parts, record["scale"], outs.flatten(0, 1), place)


def explains_own(rule: SetRule, layer: int, chosen: list[int], head: int, q: Tensor, k: Tensor) -> bool:
    """Whether a set is what a KV head of a layer chooses for itself, by queries [H, D] and keys [L, H_kv, D]."""
    if rule.method == "seerattention":
        gate = published(LAYERS, q.shape[0], k.shape[1], q.shape[1])[layer]
        return explains_blocks(gate, chosen, head, q, k, rule.budget)
    return explains_pages(chosen, q.unflatten(0, (k.shape[1], -1))[head], k[:, head], rule.budget)


def served_set(record: dict[str, Any], row: int, length: int) -> list[int]:
    """The positions behind the slots of the one set in force; asserts that they ascend without repetition."""
    (positions,) = served_sets(record, row, length)
    return positions


def served_sets(record: dict[str, Any], row: int, length: int) -> Sets:
    """The positions behind the slots of the sets in force; asserts that they ascend without repetition."""
    position = {slot: t for t, slot in enumerate(record["slots"][row, :length].tolist())}
    assert len(position) == length and 0 not in position, "two positions share a slot, or one has the reserved slot"
    slots, counts = record["set_slots"][row], record["set_counts"][row]
    per_head = slots.dim() == 2
    found = []
    for held, count in zip(slots if per_head else slots[None], counts if per_head else counts[None], strict=True):
        positions = [position[slot] for slot in held[: int(count)].tolist()]
        assert positions == sorted(set(positions))
        found.append(positions)
    return found


def exact_logits(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits float64 [H, L], and how far a float32 dot product in any order of summation may be from them."""
    keys = k.double().repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    exact = torch.einsum("hd,lhd->hl", q.double(), keys) * scale
    terms = torch.einsum("hd,lhd->hl", q.double().abs(), keys.abs()) * scale
    return exact, (q.shape[1] + 2) * torch.finfo(torch.float32).eps * terms


def check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, place: str) -> None:
    """The error against float64 is within three times that of plain float32 attention, plus a rounding band."""
    check_parts([(q, k, v)], scale, out, place)


def check_parts(parts: list[tuple[Tensor, Tensor, Tensor]], scale: float, out: Tensor, place: str) -> None:
    """The same where query heads attend to different tokens: q, k and v of each part, the output of all of them.

    Plain attention is done in two orders of the tokens: how far rounding takes it depends on the order.
    """
    exact = torch.cat([attention(q.double(), k.double(), v.double(), scale) for q, k, v in parts])
    flipped = [(q, k.flip(0), v.flip(0)) for q, k, v in parts]
    orders = (torch.cat([attention(*(x.float() for x in part), scale) for part in order]) for order in (parts, flipped))
    plain = max((order - exact).abs().max() for order in orders)
    band = 4 * torch.finfo(torch.float32).eps * max(v.abs().max() for *_, v in parts)
    error, bound = (out - exact).abs().max(), 3 * plain + band
    assert error <= bound, f"{place}: attention is off by {error:.3g}, bound {bound:.3g}"


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query, in its operands' dtype."""
    group = q.shape[0] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    weights = (keys @ q.unsqueeze(2) * scale).softmax(dim=1)
    return (weights.transpose(1, 2) @ values).squeeze(1)
