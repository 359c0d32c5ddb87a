"""The decode-step benchmark's worker without SGLang: what it draws, and how it times."""

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import decode_step_worker
from benchmarks.decode_step_worker import Bench, Clock, NoRoom, Outcome
from benchmarks.forest import Forest
from sgl_lim.serving.page_store import PageStore
from support.writing_world import World


class Slots:
    """SGLang's allocator as far as `Bench.start` sees it: one token a page."""

    page_size = 1

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        self.free_pages = torch.arange(1, self.size + 1)

    def available_size(self) -> int:
        return len(self.free_pages)

    def alloc(self, count: int) -> torch.Tensor:
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return taken


class Event:
    """A timed event of a device that takes `STEP_MS` for every step enqueued."""

    STEP_MS = 3.0
    enqueued = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.after = Event.enqueued

    def elapsed_time(self, end: "Event") -> float:
        return self.STEP_MS * (end.after - self.after)


def bench(pool: int = 100, shuffle_slots: bool = True, device: Any = torch.cpu) -> Bench:
    """A bench whose model is missing."""

    def init_new(**given: Any) -> SimpleNamespace:
        return SimpleNamespace(**given, prepare_for_extend=lambda: None)

    ranges: list[tuple[int, int]] = []
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(clear=lambda: None, available_size=lambda: 4),
        token_to_kv_pool_allocator=Slots(pool),
        model_config=SimpleNamespace(context_len=60, vocab_size=1000),
        device="cpu",
    )
    one_batch = SimpleNamespace(
        ScheduleBatch=SimpleNamespace(init_new=init_new),
        TreeCacheNamespace=SimpleNamespace,
        SpeculativeAlgorithm=SimpleNamespace(NONE=None),
        SamplingParams=SimpleNamespace,
        Req=lambda **given: SimpleNamespace(**given, set_extend_range=lambda *range: ranges.append(range)),
    )
    made = Bench(runner, one_batch, device, shuffle_slots=shuffle_slots)
    made.ranges = ranges  # type: ignore[attr-defined]
    return made


def drawn(made: Bench) -> "tuple[list[int], list[array[int]]]":
    """First decode tokens and prompts of a case."""
    tokens, batch = made.start(Forest.parse("3x20"), 2)
    return tokens.tolist(), [request.origin_input_ids for request in batch.reqs]


def test_tokens_depend_neither_on_the_pool_nor_on_where_slots_lie() -> None:
    expected = drawn(bench(shuffle_slots=False))
    assert expected == drawn(bench(pool=100)) == drawn(bench(pool=977))
    assert len({tuple(prompt) for prompt in expected[1]}) == 3 and all(len(prompt) == 20 for prompt in expected[1])


def test_shuffled_slots_are_all_of_the_pool_and_the_same_each_time() -> None:
    made, orders = bench(), []
    for _ in range(2):
        made.start(Forest.parse("3x20"), 2)
        orders.append(made.runner.token_to_kv_pool_allocator.free_pages.tolist())
    assert orders[0] == orders[1] != sorted(orders[0]) == list(range(1, 101))


@pytest.mark.parametrize(
    ("case", "said"),
    [("3x59", "context"), ("1x30/2x29", "context"), ("5x2", "pool"), ("3x32", "pool"), ("2x20/2x14", "pool")],
)
def test_a_case_without_room_says_what_it_exceeds(case: str, said: str) -> None:
    with pytest.raises(NoRoom, match=said):
        bench().start(Forest.parse(case), 2)


def test_requests_of_a_forest_hold_the_slots_of_their_prefixes() -> None:
    made = bench()
    _, batch = made.start(Forest.parse("1x9/2x6/2x3"), 2)
    prompts = [request.origin_input_ids.tolist() for request in batch.reqs]
    cached = [request.prefix_indices.tolist() for request in batch.reqs]
    assert {len(prompt) for prompt in prompts} == {18} and {len(held) for held in cached} == {15}
    for held in (cached, prompts):
        assert held[0][:15] == held[1][:15] != held[2][:15] == held[3][:15]
        assert held[0][:9] == held[2][:9]
    # 9 + 2 x 6 slots: none is held twice.
    assert len({slot for held in cached for slot in held}) == 21
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert made.ranges == [(15, 18)] * 4  # type: ignore[attr-defined]


def test_prefixes_that_are_no_whole_pages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "page_size", 4)
    with pytest.raises(ValueError, match="whole pages"):
        bench().start(Forest.parse("1x6/2x3"), 2)


def test_pipelined_steps_are_enqueued_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Event, "enqueued", 0)
    made = bench(device=SimpleNamespace(Event=Event, synchronize=lambda: order.append("wait")))

    def step(tokens: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        order.append("step")
        Event.enqueued += 1
        return tokens, tokens

    monkeypatch.setattr(made, "step", step)
    assert made.time_pipelined(Forest.parse("2x8"), warmup=2, steps=3) == [3.0] * 3
    assert order == ["wait", *["step"] * 5, "wait"]
    order.clear()
    assert len(made.time_alone(Forest.parse("2x8"), warmup=2, steps=3)) == 3
    assert order == ["wait", "step", "wait"] * 5


def test_a_device_without_timed_events_is_timed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 1.75])
    monkeypatch.setattr(decode_step_worker.time, "perf_counter", lambda: next(moments))
    clock = Clock(torch.cpu)
    assert clock.intervals([clock.mark() for _ in range(3)]) == [500.0, 250.0]


def test_a_case_whose_second_timing_fails_has_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_pipelined(case: Forest, warmup: int, steps: int) -> list[float]:
        if str(case) == "1x2":
            raise NoRoom("pool")
        return [2.0]

    model = SimpleNamespace(time_alone=lambda case, warmup, steps: [3.0], time_pipelined=time_pipelined)
    model.runner = SimpleNamespace(device="cpu")
    monkeypatch.setattr(Bench, "load", lambda argv, shuffle_slots, rank, ranks: model)
    job = {"argv": [], "shuffle_slots": False, "warmup": 1, "steps": 1, "cases": ["1x2", "3x4"], "profile": None}
    path = tmp_path / "outcome.pt"
    whole = {**job, "rank": 0, "ranks": 1, "checked": [], "sparse": "", "outcome": str(path)}
    assert decode_step_worker.work(whole)
    found = Outcome(**torch.load(path))
    assert (found.times, found.pipelined, found.errors) == ({"3x4": [3.0]}, {"3x4": [2.0]}, {"1x2": "pool"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_noise_fills_every_slot(dtype: torch.dtype) -> None:
    buffer = torch.zeros(100, 2, 8, dtype=dtype)
    decode_step_worker.fill_with_noise(buffer, chunk=33)
    values = buffer.float()
    assert (values.abs().amax(dim=(1, 2)) > 0).all() and 0.8 < float(values.std()) < 1.2


def test_pages_of_noise_are_known() -> None:
    """Else all pages score alike, and what is timed is how ties are broken."""
    world = World(16, lambda pool: PageStore(pool, [1, 2], torch.float32), method="quest")
    runner = SimpleNamespace(
        attn_backend=world.backend, token_to_kv_pool=world.pool, model_config=SimpleNamespace(context_len=128)
    )
    world.pool.get_key_buffer(2).normal_()
    decode_step_worker.learn_noise(runner, chunk=100)
    keys, bounds = world.pool.get_key_buffer(2), world.backend.lim.pages.of_layer(2)
    for page in range(len(keys) // 16):
        assert torch.equal(bounds.highs[page], keys[16 * page : 16 * page + 16].amax(0))
    decode_step_worker.learn_noise(SimpleNamespace(attn_backend=object()))
