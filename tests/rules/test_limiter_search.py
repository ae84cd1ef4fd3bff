"""Never over: walks through a small world of real workers and a real store, on a network of any temper.

That the search would find a fault is proven by planting each of those that leaving out a rule makes.
"""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.rules.bucket import Answer, Bucket, Call, KeyAnswer, Message, Store
from tests.support.limiter_world import SHAPE, EagerLease, OverError, World

Make = Callable[[int], World]

LETTERS = "rcsdnlDagko"
WEIGHTS = dict(zip(LETTERS, (6.0, 4.0, 2.0, 3.0, 1.0, 1.0, 1.0, 3.0, 1.2, 0.3, 0.7), strict=True))


def actions(workers: int) -> dict[str, float]:
    table = {f"{letter}{number}": WEIGHTS[letter] for number in range(workers) for letter in LETTERS}
    return {**table, "t": 5.0 * workers, "u": 2.0 * workers}


def walk(make: Make, workers: int, walks: int, steps: int = 60, seed: int = 1) -> str | None:
    """The steps that led over the limit, or None after so many walks."""
    dice = random.Random(seed)
    table = actions(workers)
    names, weights = list(table), list(table.values())
    for _ in range(walks):
        world = make(workers)
        path = dice.choices(names, weights, k=steps)
        try:
            for action in path:
                world.step(action)
        except OverError:
            return " ".join(path)
    return None


@pytest.mark.parametrize("workers, walks", [(1, 2_500), (2, 2_500), (3, 1_000)])
def test_no_walk_leads_over_the_limit(workers: int, walks: int) -> None:
    assert walk(World, workers, walks, seed=workers) is None


@settings(max_examples=400, deadline=None)
@given(
    path=st.lists(st.sampled_from(sorted(actions(2)) + ["t", "u", "c0", "c1", "r0", "r1"] * 3), max_size=60)
)
def test_no_path_leads_over_the_limit(path: list[str]) -> None:
    world = World(2)
    for action in path:
        world.step(action)


def test_a_walk_admits_something() -> None:
    world = World(1)
    for action in ["c0", "r0", "c0", "r0", "t", "c0", "o0", "d0", "a0"]:
        world.step(action)
    assert len(world.admissions) >= 3


# --- planted faults


class CountsKSlots(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        super().advance(now_ms, slot_ms)
        for slot in [slot for slot in self.ring if slot <= self.slot - self.slots]:
            self.spent -= self.ring.pop(slot)


class ConvertsIntoTheGrantsSlot(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        self.now_ms, self.slot_ms = max(self.now_ms, now_ms), slot_ms
        for record in self.holders.values():
            if record.live and self.now_ms >= record.expires_ms:
                record.live = False
                self.charge((record.expires_ms - SHAPE.long_ms) // slot_ms, record.size)
        super().advance(now_ms, slot_ms)


class ForgetsWhatExpired(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        for holder, record in list(self.holders.items()):
            if record.live and now_ms >= record.expires_ms:
                del self.holders[holder]
        super().advance(now_ms, slot_ms)


class DebitsAtTheGrant(Bucket):
    def lease(self, message: Message, holder: str, kept: int, free: int) -> tuple[int, int]:
        granted, life_ms = super().lease(message, holder, kept, free)
        self.charge(self.slot, granted)
        if granted:
            self.holders[holder].size = 0
        return granted, life_ms

    def settle(self, message: Message, holder: str) -> tuple[object, int]:  # type: ignore[override]
        message.journal = []
        message.keep = 0
        return super().settle(message, holder)


class ADoubleRearms(Bucket):
    def settle(self, message: Message, holder: str) -> tuple[object, int]:  # type: ignore[override]
        record = self.holders.get(holder)
        if record is not None and record.seq == message.seq:
            record.expires_ms = self.now_ms + message.life_ms
        return super().settle(message, holder)


class TakesOlderMessages(Bucket):
    def settle(self, message: Message, holder: str) -> tuple[object, int]:  # type: ignore[override]
        record = self.holders.get(holder)
        if record is not None and message.seq < record.seq:
            record.seq = message.seq - 1
        return super().settle(message, holder)


class GivesAllBack(Bucket):
    def _give_back(self, slot: int, count: int) -> None:
        super()._give_back(slot, 99)


class GrantsWhatOthersHold(Bucket):
    def reserved(self) -> int:
        return 0


class ChargesEarly(Bucket):
    def charge(self, slot: int, count: int) -> None:
        super().charge(slot - 1 if slot < self.slot else slot, count)


class DeadlineFromTheArrival(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        if self.reserved:
            self.deadline = now + answer.life_ms / 1_000 - 0.002
        self.roll(now)


class MapsEarly(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        self.offset_ms = answer.now_ms - now * 1_000
        self.roll(now)


class ReturnsAfterSending(EagerLease):
    def message(self, now: float, waiting: int, closing: bool) -> Message:
        self.roll(now)
        has = self.has
        message = super().message(now, waiting, closing)
        if closing:
            self.has = self.opened = has
        return message


class ForgetsSpendsMeanwhile(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        self.journal = []


class ForgetsSpendsAtSending(EagerLease):
    def message(self, now: float, waiting: int, closing: bool) -> Message:
        message = super().message(now, waiting, closing)
        self.journal = []
        return message


def with_buckets(kind: type[Bucket]) -> Make:
    class Faulty(Store):
        def call(self, keys: list[str], call: Call, now_ms: int) -> Answer:
            for key in keys:
                if key not in self.buckets:
                    self.buckets[key] = kind(call.slots)
            return super().call(keys, call, now_ms)

    return lambda workers: World(workers, store=lambda: Faulty(SHAPE.slots))


FAULTS: list[tuple[str, Make, int]] = [
    *(
        (kind.__name__, with_buckets(kind), workers)
        for kind, workers in (
            (CountsKSlots, 1),
            (ConvertsIntoTheGrantsSlot, 1),
            (ForgetsWhatExpired, 1),
            (DebitsAtTheGrant, 1),
            (GivesAllBack, 1),
            (GrantsWhatOthersHold, 1),
            (ChargesEarly, 1),
        )
    ),
    *(
        (kind.__name__, lambda workers, kind=kind: World(workers, lease_type=kind), 1)
        for kind in (
            DeadlineFromTheArrival,
            MapsEarly,
            ReturnsAfterSending,
            ForgetsSpendsMeanwhile,
            ForgetsSpendsAtSending,
        )
    ),
    ("AnIdComesAgain", lambda workers: World(workers, holder=lambda _: "same"), 1),
]


@pytest.mark.parametrize("make, workers", [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_the_search_finds_a_planted_fault(make: Make, workers: int) -> None:
    assert walk(make, workers, walks=5_000) is not None


# Found by longer walks: too rare to look for each time.
RARE: list[tuple[type[Bucket], str]] = [
    (ADoubleRearms, "c1 s1 D1 t t t g1 t d1 t t r1 t c0 c1 t c1 c0 r1"),
    (TakesOlderMessages, "c1 t t o1 t t g1 t c1 t c0 r1 D1 c0 c0"),
]


@pytest.mark.parametrize("kind, path", RARE, ids=[kind.__name__ for kind, _ in RARE])
def test_a_rare_planted_fault_is_over_on_a_known_path(kind: type[Bucket], path: str) -> None:
    def go(world: World) -> None:
        for action in path.split():
            world.step(action)

    go(World(2))
    with pytest.raises(OverError):
        go(with_buckets(kind)(2))
