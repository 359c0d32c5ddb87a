"""Random operations on a `RadixWorld`, chosen so that prompts nest, prefixes are shared and slots run short."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.radix_world import RadixWorld, Request


class _Prompts:
    """Prompts over few words that nest: system prompt, problem, partial solution; and conversations that go on."""

    def __init__(self, generator: random.Random, world: "RadixWorld"):
        max_len = world.max_len
        self.generator, self.alphabet, self.longest = generator, world.alphabet, max_len * 3 // 4
        systems = [self.words(1, max_len // 3) for _ in range(2)]
        problems = [generator.choice(systems) + self.words(1, max_len // 4) for _ in range(3)]
        self.stems = systems + problems + [generator.choice(problems) + self.words(1, max_len // 4) for _ in range(3)]
        self.conversations: list[list[int]] = []

    def words(self, shortest: int, longest: int) -> list[int]:
        return self.generator.choices(range(self.alphabet), k=self.generator.randint(shortest, longest))

    def draw(self) -> list[int]:
        told = self.conversations and self.generator.random() < 0.3
        stem = self.generator.choice(self.conversations if told else self.stems)
        return (stem + self.words(0, 3))[: self.longest]


class _Scheduler:
    """One method an operation, named as it is; `weights` says which make sense now."""

    def __init__(self, generator: random.Random, world: "RadixWorld"):
        self.generator, self.world = generator, world
        self.prompts = _Prompts(generator, world)

    def weights(self) -> dict[str, float]:
        world = self.world
        room = world.pool.available_size() > 0
        self.started = [r for r in world.live if not r.committed]
        self.chunked = [r for r in world.live if r.committed and r.length < len(r.path)]
        # A result is processed before the second decode step; a full row decodes no more.
        self.ready = [r for r in world.running if r.early_steps == 0 and r.length < world.max_len]
        running = bool(world.running)
        return {
            "admit": 5 * room,
            "commit": 6 * bool(self.started),
            "prefill": 4 * bool(self.chunked),
            "decode": 8 * bool(self.ready),
            "fork": 2 * running * room,
            "finish": 2 * running,
            "abort": bool(world.live),
            "retract": running,
            "resume": 3 * bool(world.retracted) * room,
            "evict": 1,
            "flush": 0.2,
        }

    def some(self, requests: list["Request"], most: int = 99) -> list["Request"]:
        return self.generator.sample(requests, self.generator.randint(1, min(most, len(requests))))

    def admit(self) -> None:
        tokens = self.prompts.draw()
        for _ in range(self.generator.choice((1, 1, 2, 3))):  # several cold ones compute the same
            self.world.admit(tokens, self.generator.randint(1, 20) if self.generator.random() < 0.2 else None)

    def commit(self) -> None:
        self.world.commit(*self.some(self.started))

    def prefill(self) -> None:
        self.world.prefill(self.generator.choice(self.chunked), self.generator.randint(1, 40))

    def decode(self) -> None:
        self.world.decode(self.ready if self.generator.random() < 0.7 else self.some(self.ready))

    def fork(self) -> None:
        self.world.fork(self.generator.choice(self.world.running), self.generator.randint(1, 3))

    def finish(self) -> None:
        done = self.some(self.world.running, most=2)
        self.prompts.conversations += [r.tokens for r in done]
        self.world.finish(*done)

    def abort(self) -> None:
        self.world.abort(self.generator.choice(self.world.live))

    def retract(self) -> None:
        self.world.retract(self.generator.choice(self.world.running))

    def resume(self) -> None:
        self.world.resume(self.generator.choice(self.world.retracted))

    def evict(self) -> None:
        self.world.evict(self.generator.randint(1, self.world.num_slots // 2))

    def flush(self) -> None:
        for request in list(self.world.live):
            self.world.abort(request)
        self.world.retracted.clear()
        self.world.flush()


def random_schedule(generator: random.Random, world: "RadixWorld", steps: int | None = None) -> Iterator[str]:
    """Apply one random operation after another to a world, 20 to 60 unless told, yielding the name of each."""
    scheduler = _Scheduler(generator, world)
    for _ in range(generator.randint(20, 60) if steps is None else steps):
        weights = scheduler.weights()
        (name,) = generator.choices(list(weights), list(weights.values()))
        getattr(scheduler, name)()
        yield name
