"""Redis and the way to it: delays, what is lost or comes twice, outages, and cut-off workers."""

import copy
import random
from collections.abc import Callable

from benchmarks.simulator import contact
from benchmarks.simulator.scenarios import EMPTY, KEEP, OLD, STOP, Outage, World

EPOCH_MS = 1_700_000_000_000
SNAPSHOT_SECONDS = 1.0


class Server:
    """`store` is the real one; `run` changes with each restart, as run_id does."""

    def __init__(self, world: World, dice: random.Random, make_store: Callable[[], contact.Store]) -> None:
        self.world = world
        self._dice = dice
        self._make_store = make_store
        self.store = make_store()
        self.run = "run0"
        # Not its first start, which would be held for a while.
        self.store.marker = (self.run, "first", 0)
        self.calls = 0
        self.stepped_ms = 0.0
        self._snapshot = self.store
        self._plan = sorted(world.outages, key=lambda outage: outage.at_seconds)
        self._calm = not world.outages and not world.partitions
        self._cut = [
            (part.at_seconds, part.at_seconds + part.seconds, int(world.workers * part.share))
            for part in world.partitions
        ]

    def delay(self) -> float:
        """Seconds one way."""
        network = self.world.network
        dice = self._dice
        ms = network.least_ms + (network.most_ms - network.least_ms) * dice.random()
        if dice.random() < network.tail:
            ms += dice.expovariate(1.0 / network.tail_ms)
        return ms / 1_000

    def lost(self) -> bool:
        return self.world.network.lost > 0 and self._dice.random() < self.world.network.lost

    def doubled(self) -> bool:
        return self.world.network.doubled > 0 and self._dice.random() < self.world.network.doubled

    def outage(self, at: float) -> Outage | None:
        for outage in self._plan:
            if outage.at_seconds <= at < outage.at_seconds + outage.seconds:
                return outage
        return None

    def open_at(self, at: float, worker: int) -> float:
        """When what arrives at `at` from this worker is taken in; `inf`: its connection is refused."""
        if self._calm:
            return at
        for begin, end, cut in self._cut:
            if begin <= at < end and worker < cut:
                at = end
        outage = self.outage(at)
        if outage is None:
            return at
        return outage.at_seconds + outage.seconds if outage.kind == STOP else float("inf")

    def spans(self, worker: int) -> list[tuple[float, float]]:
        """When this worker does not reach it."""
        cut = [(begin, end) for begin, end, cut in self._cut if worker < cut]
        return cut + [(outage.at_seconds, outage.at_seconds + outage.seconds) for outage in self._plan]

    def reachable(self, at: float, worker: int) -> bool:
        return self.open_at(at, worker) == at

    def execute(self, at: float, flight: contact.Flight, run: str) -> contact.Answer:
        self.calls += 1
        return contact.execute(self.store, flight, run, self.ms(at))

    def ms(self, at: float) -> int:
        return int(EPOCH_MS + at * 1_000 - self.stepped_ms)

    # --- outages

    def snapshot(self) -> None:
        """What `old` comes back with: call it that long before the kill."""
        self._snapshot = copy.deepcopy(self.store)

    def restart(self, kind: str) -> None:
        self.run = f"{self.run}'"
        if kind == EMPTY:
            self.store = self._make_store()
        elif kind == OLD:
            self.store = self._snapshot
        else:
            assert kind == KEEP
