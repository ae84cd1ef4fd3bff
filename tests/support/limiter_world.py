"""A small world to search for what must never happen: workers, a store and a network that may do anything.

The workers' and the store's code is the real one; time is a number. Windows are 2 slots of 100 ms, leases
live 150 ms, the limit is 4. A step is one of the actions below, each a worker's number and a letter:

    r request, answered from memory if a token is at hand     c request and a call that goes well
    s request or report: the message stays in the air         d the oldest message arrives, its answer waits
    n the newest message arrives, before older ones           D as d, and the message will arrive again
    l the oldest message is lost                              a the answer arrives
    g the call is given up                                    k the worker is killed, another takes its place
    o the worker returns what it holds                        t, u (for all) 50 ms, 10 ms pass

No request waits for an answer longer than a tick. Whatever a worker admits is checked at once: in the window
that ends now, never more than the limit.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import Answer, Call, Store
from lucid.core.rules.key_lease import KeyLease
from lucid.core.rules.leases import Claim, Flight, Leases, LimitSet, Shape, Take

LIMIT = Limit("t", 4, 1, redis_down="strict")
SHAPE = Shape(slots=2, slot_ms=100, short_ms=150, long_ms=150)
WINDOW_MS = 200
EPOCH_MS = 1_700_000_000_000
TICKS_MS = {"t": 50, "u": 10}

decode_call = msgspec.msgpack.Decoder(Call).decode
encode = msgspec.msgpack.encode


class OverError(AssertionError):
    """More than the limit in a window."""


class EagerLease(KeyLease):
    """Wants a lease at once: what a rate makes worth while is not the point here."""

    def plan(self, now: float, waiting: int) -> tuple[int, int]:
        return self.limit.requests, self.shape.long_ms


class EagerLeases(Leases):
    lease_type: type[KeyLease] = EagerLease


@dataclass
class Worker:
    leases: Leases
    claim: Claim
    skew: float
    flight: Flight | None = None
    air: deque[tuple[list[str], bytes, bool]] = field(default_factory=deque)
    answers: deque[tuple[Flight | None, Answer]] = field(default_factory=deque)


class World:
    def __init__(
        self,
        workers: int,
        *,
        store: Callable[[], Store] = lambda: Store(SHAPE.slots),
        lease_type: type[KeyLease] = EagerLease,
        leases_type: type[EagerLeases] = EagerLeases,
        holder: Callable[[int], str] = lambda number: f"h{number}",
    ) -> None:
        self.ms = 30
        self.store = store()
        self.limits = LimitSet((LIMIT,))
        self.lease_type = lease_type
        self.leases_type = leases_type
        self.holder = holder
        self.born = 0
        self.admissions: list[int] = []
        self.workers = [self.newborn() for _ in range(workers)]

    def newborn(self) -> Worker:
        self.born += 1
        kind = type("Kind", (self.leases_type,), {"lease_type": self.lease_type})
        leases = kind(self.holder(self.born), shape=lambda _: SHAPE, slots=SHAPE.slots)
        # Each worker's clock begins somewhere else.
        return Worker(leases, leases.claim(self.limits, "u", "a"), skew=1_000.0 * self.born)

    def now(self, worker: Worker) -> float:
        return self.ms / 1_000 + worker.skew

    def admit(self, admitted: bool) -> None:
        if admitted:
            self.admissions.append(self.ms)
            if sum(1 for at in self.admissions if at > self.ms - WINDOW_MS) > LIMIT.requests:
                raise OverError(self.admissions)

    def step(self, action: str) -> bool:
        """False: the action was not possible and changed nothing."""
        if action in TICKS_MS:
            self.ms += TICKS_MS[action]
            for worker in self.workers:
                if worker.flight is not None:
                    worker.leases.away = True
                    worker.leases.abandon(worker.flight, self.now(worker))
                    worker.leases.away = False
            return True
        worker = self.workers[int(action[1])]
        return bool(getattr(self, "do_" + {"D": "double"}.get(action[0], action[0]))(worker))

    def request(self, worker: Worker) -> bool:
        """Whether it must be asked for."""
        take = worker.claim.take(self.now(worker))
        if take is Take.WANTING:
            worker.leases.wait(worker.claim, self.admit)
        else:
            self.admit(take is Take.ADMITTED)
        return take is Take.WANTING

    def do_r(self, worker: Worker) -> bool:
        lease = worker.claim.all[0]
        if lease.has == 0:
            return False
        if self.request(worker):
            worker.leases.waiting.clear()
        return True

    def compose(self, worker: Worker) -> bool:
        if worker.flight is not None:
            return False
        now = self.now(worker)
        lease = worker.claim.all[0]
        if lease.has == 0:
            self.request(worker)
        else:
            worker.leases.due[lease] = None
        worker.flight = worker.leases.compose(now)
        return worker.flight is not None

    def do_s(self, worker: Worker) -> bool:
        if not self.compose(worker):
            return False
        assert worker.flight is not None
        worker.air.append((worker.flight.keys, encode(worker.flight.call), True))
        return True

    def do_o(self, worker: Worker) -> bool:
        if worker.flight is not None:
            return False
        worker.flight = worker.leases.compose(self.now(worker), closing=True)
        if worker.flight is None:
            return False
        worker.air.append((worker.flight.keys, encode(worker.flight.call), True))
        return True

    def do_c(self, worker: Worker) -> bool:
        return self.do_s(worker) and self.do_n(worker) and self.do_a(worker)

    def do_l(self, worker: Worker) -> bool:
        if worker.air:
            worker.air.popleft()
            return True
        return False

    def do_n(self, worker: Worker) -> bool:
        worker.air.rotate(1)
        return self.do_d(worker)

    def do_d(self, worker: Worker, *, again: bool = False) -> bool:
        if not worker.air:
            return False
        keys, data, first = worker.air.popleft()
        answer = self.store.call(keys, decode_call(data), EPOCH_MS + self.ms)
        if again and first:
            worker.air.append((keys, data, False))
        # A connection answers its own calls only: of an earlier one nothing is heard.
        if worker.flight is not None and data == encode(worker.flight.call) and (first or not worker.answers):
            worker.answers.append((worker.flight, answer))
        return True

    def do_double(self, worker: Worker) -> bool:
        return self.do_d(worker, again=True)

    def do_a(self, worker: Worker) -> bool:
        if not worker.answers:
            return False
        flight, answer = worker.answers.popleft()
        if flight is None or flight is not worker.flight:
            return False
        worker.leases.apply(flight, answer, self.now(worker))
        worker.flight = None
        return True

    def do_g(self, worker: Worker) -> bool:
        if worker.flight is None:
            return False
        worker.leases.away = True
        worker.leases.fail(worker.flight, self.now(worker))
        worker.leases.away = False
        worker.flight = None
        worker.answers.clear()
        return True

    def do_k(self, worker: Worker) -> bool:
        fresh = self.newborn()
        worker.leases, worker.claim, worker.skew = fresh.leases, fresh.claim, fresh.skew
        worker.flight = None
        worker.answers.clear()
        return True
