"""Do both implementations make the gate's keys and scores as an account from the paper does, in float64?"""

import random

import pytest
import torch

from lim_kernels import choose_pages, expand_pages, gate_keys, score_blocks
from lim_kernels.block_gates import Gate, GatedBlocks, Rotation
from support.gate_oracle import (
    GateRule,
    PublishedGate,
    angles,
    draw_gate,
    explains_blocks,
    gate_key,
    gate_scores,
    rope,
)

PUBLISHED = {
    # Qwen3-4B and 8B: 32 query heads, 8 KV heads of 128 elements; the gates of both are as large.
    "qwen3-8b": (GateRule(heads=32, kv_heads=8, dim=128, width=128, block=64), torch.bfloat16),
    "qwen3-14b": (GateRule(heads=40, kv_heads=8, dim=128, width=128, block=64), torch.bfloat16),
}
OTHERS = {
    "small": (GateRule(heads=8, kv_heads=2, dim=64, width=64, block=16), torch.float32),
    "one-head-fp16": (GateRule(heads=5, kv_heads=1, dim=80, width=64, block=32, pools=("avg",)), torch.float16),
    "no-norm": (GateRule(heads=4, kv_heads=4, dim=64, width=128, block=16, pools=("max", "min"), norm=False), None),
    "no-rope": (GateRule(heads=6, kv_heads=3, dim=32, width=16, block=16, pools=("max", "avg"), rotate=False), None),
    "interleaved-half": (GateRule(heads=4, kv_heads=2, dim=64, width=64, block=16, turned=32, interleaved=True), None),
    "yarn": (GateRule(heads=4, kv_heads=2, dim=64, width=64, block=16, mscale=1.25), None),
}
SHAPES = PUBLISHED | OTHERS
LENGTHS = [200, 64, 131, 1, 77]
FEW = [131, 64, 1]
"""Of shapes that take long in Triton's interpreter."""


class World:
    """Requests whose tokens lie in blocks of one pool, out of order, with keys before their rotation by request."""

    def __init__(
        self, rule: GateRule, dtype: torch.dtype | None, device: str, seed: int = 0, lengths: list[int] | None = None
    ) -> None:
        self.rule, self.dtype, self.device = rule, dtype or torch.float32, device
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths or (FEW if rule.heads >= 32 else LENGTHS)
        self.published = draw_gate(rule, generator, self.dtype)
        pages = [-(-length // rule.block) for length in self.lengths]
        order = (torch.randperm(sum(pages), generator=generator) + 1).split(pages)
        width = max(self.lengths) + 5
        self.slots = torch.full((len(self.lengths), -(-width // 16) * 16), -(1 << 20), dtype=torch.int32)
        self.bare, self.q_bare = [], []
        cache = torch.full(((sum(pages) + 1) * rule.block, rule.kv_heads, rule.dim), float("nan"), dtype=self.dtype)
        for row, length in enumerate(self.lengths):
            own = (order[row].unsqueeze(1) * rule.block + torch.arange(rule.block)).flatten()[:length]
            self.slots[row, :length] = own.int()
            # Drawn as served: rotated in float64, stored in the model's dtype, and taken back from what is stored.
            keys = torch.randn(length, rule.kv_heads, rule.dim, generator=generator)
            cache[own] = rope(keys.double(), rule, torch.arange(length)).to(self.dtype)
        self.cache = cache.to(device)
        q = torch.randn(len(self.lengths), rule.heads, rule.dim, generator=generator).double()
        positions = torch.tensor(self.lengths) - 1
        self.q = torch.stack([rope(one[None], rule, at[None])[0] for one, at in zip(q, positions, strict=True)])
        self.q = self.q.to(self.dtype).to(device)
        self.slots = self.slots.to(device)[:, :width]
        self.lens = torch.tensor(self.lengths, device=device)
        blocks = len(cache) // rule.block
        self.blocks = GatedBlocks(
            gate=self.published.as_operand(device, positions=1024),
            keys=torch.full((blocks, rule.kv_heads, rule.width), float("nan"), dtype=self.dtype, device=device),
            block=rule.block,
            rotation=Rotation(angles(rule.turned_dims, 1024, rule.mscale).to(device), rule.interleaved),
        )

    def write(self, row: int, first: int, last: int, implementation: str, index=torch.int64, **how) -> None:
        """Positions first … last - 1 of a row are written."""
        written = self.slots[row, first:last].to(index)
        positions = torch.arange(first, last, device=self.device, dtype=index)
        gate_keys(self.blocks, self.cache, written, positions, implementation=implementation, **how)

    def write_all(self, implementation: str) -> None:
        for row, length in enumerate(self.lengths):
            self.write(row, 0, length, implementation)

    def complete_all(self, implementation: str) -> None:
        """The last slot of each complete block is written, after all others were stored."""
        size = self.rule.block
        for row, length in enumerate(self.lengths):
            for last in range(size, length + 1, size):
                self.write(row, last - 1, last, implementation)

    def key_of(self, row: int, block: int, stored=None) -> torch.Tensor:
        """float64 [H_kv, d]: what the paper makes of the keys that are stored."""
        size = self.rule.block
        places = torch.arange(block * size, (block + 1) * size)
        stored = self.cache if stored is None else stored
        keys = stored[self.slots[row].long()[places.to(self.device)]].double().cpu()
        return gate_key(self.published, rope(keys, self.rule, places, back=True), block * size)


def close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the result to its dtype, and of sums in float32."""
    size = exact.abs().max()
    bound = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert ((actual.double().cpu() - exact).abs() <= bound * size).all()


@pytest.mark.parametrize(
    ("name", "index"), [("small", torch.int32), *((name, torch.int64) for name in SHAPES)], ids=str
)
def test_a_complete_block_s_key_is_the_paper_s(implementation, device, name, index):
    world = World(*SHAPES[name], device)
    draw = random.Random(4)
    for row, length in enumerate(world.lengths):
        first = 0
        while first < length:
            # Chunks end anywhere; a decoding row has one token.
            last = min(length, first + draw.choice([1, 15, 16, 17, 64, 100]))
            world.write(row, first, last, implementation, index)
            first = last
    size = world.rule.block
    complete = {
        int(world.slots[row, b * size]) // size: (row, b)
        for row, n in enumerate(world.lengths)
        for b in range(n // size)
    }
    for page in range(len(world.blocks.keys)):
        if page not in complete:
            assert world.blocks.keys[page].isnan().all(), "the key of a block that is not complete"
            continue
        close(world.blocks.keys[page], world.key_of(*complete[page]), world.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_the_paper_s(implementation, device, name):
    world = World(*SHAPES[name], device, seed=2)
    world.write_all(implementation)
    scores = score_blocks(world.q, world.blocks, world.slots, world.lens, implementation=implementation)
    size = world.rule.block
    assert scores.shape == (len(world.lengths), world.rule.kv_heads, -(-world.slots.shape[1] // size))
    assert scores.dtype == torch.float32
    for row, length in enumerate(world.lengths):
        before = (length - 1) // size
        if before == 0:
            continue
        pages = world.slots[row, : before * size : size].long() // size
        bare = rope(world.q[row].double().cpu()[None], world.rule, torch.tensor([length - 1]), back=True)[0]
        exact = gate_scores(world.published, bare, world.blocks.keys[pages].double().cpu(), length - 1)
        # Products of projected queries that are rounded to the weights' dtype.
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[world.dtype]
        terms = exact.abs().max() + world.rule.width**0.5 * (1 if world.rule.norm else exact.abs().max())
        assert ((scores[row, :, :before].double().cpu() - exact).abs() <= bound * terms).all()


@pytest.mark.parametrize(
    ("name", "budget"), [("qwen3-8b", 256), ("qwen3-14b", 128), ("small", 64), ("interleaved-half", 64), ("yarn", 64)]
)
def test_sets_are_the_paper_s(implementation, device, name, budget):
    """Sets of random gates, as sets: what scores alike up to rounding may be chosen either way."""
    rule, dtype = SHAPES[name]
    lengths = [rule.block * 9 + 11, rule.block * 6, budget, budget + 1]
    world, how = World(rule, dtype, device, 5, lengths), {"implementation": implementation}
    world.complete_all(implementation)
    scores = score_blocks(world.q, world.blocks, world.slots, world.lens, score_beyond=budget, **how)
    chosen = choose_pages(scores, world.lens, page=rule.block, most=budget // rule.block, **how)
    sets, counts = expand_pages(*chosen, world.slots, world.lens, page=rule.block, **how)
    rounding = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[world.dtype]
    for row, length in enumerate(lengths):
        slots = world.slots[row, :length].long()
        position = {slot: place for place, slot in enumerate(slots.tolist())}
        q, keys = world.q[row].cpu(), world.cache[slots].cpu()
        for head in range(rule.kv_heads):
            served = [position[slot] for slot in sets[row, head, : int(counts[row, head])].tolist()]
            assert explains_blocks(world.published, served, head, q, keys, budget, rounding)


def test_quantised_keys_are_scaled(implementation, device):
    world = World(*SHAPES["small"], device)
    world.cache = (world.cache.nan_to_num() / 0.5).to(torch.float8_e4m3fn)
    world.write(0, 0, world.lengths[0], implementation, k_scale=0.5)
    stored = world.cache.float() * 0.5
    page = int(world.slots[0, 16]) // 16
    close(world.blocks.keys[page], world.key_of(0, 1, stored), torch.float32)


def test_rows_within_the_limit_are_not_scored(device, triton_runs):
    world = World(*SHAPES["small"], device)
    world.write_all("triton")
    scores = score_blocks(world.q, world.blocks, world.slots, world.lens, score_beyond=131, implementation="triton")
    assert scores[0, :, :12].isfinite().all() and all(scores[row].isnan().all() for row in range(1, len(world.lengths)))


def test_padding_writes_no_key(implementation, device):
    world = World(*SHAPES["small"], device)
    zeros = torch.zeros(5, dtype=torch.int64, device=device)
    gate_keys(world.blocks, world.cache, zeros, zeros, implementation=implementation)
    gate_keys(world.blocks, world.cache, zeros[:0], zeros[:0], implementation=implementation)
    assert world.blocks.keys.isnan().all()


def blocks_of(**change) -> GatedBlocks:
    gate = {
        "query": torch.ones(2, 2 * 8, 16),
        "key": torch.ones(2, 3 * 8, 16),
        "query_norm": None,
        "key_norm": torch.ones(16),
        "pools": ("max", "min", "avg"),
        "rotation": None,
    }
    blocks = {"keys": torch.ones(4, 2, 16), "block": 16, "rotation": Rotation(torch.ones(32, 8))}
    gate |= {name: value for name, value in change.items() if name in gate and name != "rotation"}
    gate |= {"rotation": change["gate_rotation"]} if "gate_rotation" in change else {}
    blocks |= {name: value for name, value in change.items() if name in blocks}
    return GatedBlocks(gate=Gate(**gate), **blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pools": ("mean",)}, "pools among max, min, avg"),
        ({"query": torch.ones(3, 16, 16)}, r"weights \[H_kv, G \* D, d\]"),
        ({"query": torch.ones(2, 16, 24), "key": torch.ones(2, 24, 24)}, "power of two of 16 or more"),
        ({"keys": torch.ones(4, 1, 16)}, r"\[blocks, 2, 16\]"),
        ({"block": 24}, "power of two of tokens"),
        ({"key_norm": torch.ones(8)}, r"norms \[16\]"),
        ({"rotation": Rotation(torch.ones(32, 8).double())}, "table float32"),
        ({"gate_rotation": Rotation(torch.ones(32, 8))}, "rotation of halves of 16"),
    ],
)
def test_bad_gates_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        gate_keys(blocks_of(**change), torch.ones(64, 2, 8), torch.tensor([15]), torch.tensor([15]))


def test_bad_operands_are_named():
    where = torch.tensor([15]), torch.tensor([15])
    with pytest.raises(ValueError, match=r"k_cache floating \[num_slots, 2, 8\]"):
        gate_keys(blocks_of(), torch.ones(64, 1, 8), *where)
    with pytest.raises(ValueError, match=r"positions int32 or int64 \[1\]"):
        gate_keys(blocks_of(), torch.ones(64, 2, 8), where[0], torch.tensor([15, 16]))
    slots, lens = torch.ones(2, 9, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q floating \[B, 4, 8\]"):
        score_blocks(torch.ones(2, 2, 8), blocks_of(), slots, lens)
    with pytest.raises(ValueError, match=r"slots int32 \[2, L\]"):
        score_blocks(torch.ones(2, 4, 8), blocks_of(), slots.long(), lens)


def test_the_published_gate_s_names_are_those_of_the_oracle():
    rule = SHAPES["small"][0]
    assert isinstance(draw_gate(rule, torch.Generator(), torch.float32), PublishedGate)
