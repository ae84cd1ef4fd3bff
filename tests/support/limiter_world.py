"""A small world to search for what must never happen: workers, a store and a network that may do anything.

The workers' and the store's code is the real one; time is a number of ticks, half a slot each. Leases live for a
slot and a half, a window has one slot or two, the limit is 2 to 4. A step is a letter, for a worker with its number:

    r  a request, answered from memory
    c  a request and a call that goes well        b  a report that goes well, then all that is held is used
    s  a request and a call; the message is       p  the same without a request: a report, a renewal
       on its way                                 o  the worker returns what it holds
    d  the oldest message arrives                 n  the newest arrives, before older ones
    D  as d, and it will arrive once more         l  the oldest message is lost
    a  the answer arrives (else it is lost)       g  the call is given up
    f  the newest request admitted is refused     F  the oldest is
       elsewhere, and refunded
    k  the worker is killed, another comes;       h  as k, but its oldest message is on its way
       in `safe` only while the store is away
    q  the worker tries an absent store           u  the worker is told of the fleet
    K  as k, in an absence; the successor is told of no fleet until `u`

and without a number:

    t  a tick passes                              z  an operator resets the key
    j  the store's clock steps back a tick        e  the store is emptied
    v  the store's data are saved                 x  another server begins with what was saved
    i  the dead one's message arrives
    w  the store is away, for all                 y  it is there again; each worker finds out by `q`

A worker that is paused is one that takes no step while time passes. No request waits longer than a tick.
Whatever a worker admits is checked at once, in the window that ends then.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import Answer, Bucket, Call, Message, Op, Store
from lucid.core.rules.key_lease import KeyLease
from lucid.core.rules.leases import Claim, Flight, Leases, LimitSet, Shape, Take

# Seconds of a tick are exact in binary: what falls on a slot's edge in the world does so in its floats.
TICK_MS = 125
SLOT_MS = 250
EPOCH_MS = 1_700_000_000_000
PATIENCE_TICKS = 4
"""A call is given up so long after it was sent: when its lease, if it was granted, is over for sure."""
ROLL_TICKS = 24


def copy_store(store: Store) -> Store:
    """Another store of the same kind in the same state."""
    copied = object.__new__(type(store))
    copied.__dict__.update(store.__dict__)
    copied.buckets = {key: copy_bucket(bucket) for key, bucket in store.buckets.items()}
    if store.roll is not None:
        copied.roll = replace(store.roll, here=set(store.roll.here))
    return copied


def copy_bucket(bucket: Bucket) -> Bucket:
    copied = object.__new__(type(bucket))
    copied.slots = bucket.slots
    copied.now_ms = bucket.now_ms
    copied.slot_ms = bucket.slot_ms
    copied.ring = dict(bucket.ring)
    copied.spent = bucket.spent
    copied.reset_slot = bucket.reset_slot
    copied.holders = {holder: copy(record) for holder, record in bucket.holders.items()}
    return copied


class OverError(AssertionError):
    """More than the bound in a window."""


class EagerLease(KeyLease):
    """Wants a lease at once, unless it returns: what a rate makes worth while is not the point here."""

    def plan(self, now: float, waiting: int) -> tuple[int, int]:
        return self.limit.requests, self.shape.long_ms


class EagerLeases(Leases):
    lease_type: type[KeyLease] = EagerLease


@dataclass(frozen=True)
class Size:
    """What makes a world, and what may happen in it.

    `letters` are the workers' actions, `events` those without a number; `most` bounds how often one of them may
    happen on a path, `air` how many messages of a worker are on their way at once. `lazy`: a key in the store is
    brought up to date by the next call only, as it is in Redis; else with each tick, which is the same to all who
    look and leaves fewer states.
    """

    workers: int = 1
    limit: int = 2
    slots: int = 1
    letters: str = "rspodnDagk"
    events: str = ""
    most: Mapping[str, int] = field(default_factory=dict)
    air: int = 2
    life_ticks: int = 3
    mode: str = "strict"
    lazy: bool = False
    inside: bool = True
    """In `safe`: whether a window that begins inside an absence is told from one that holds its beginning,
    though tokens leased before it may be spent there."""
    punctual: bool = True
    """No roll call lapses by its time: whoever it misses tells before."""
    told: bool = True
    """A successor is told of the fleet before it tries the store: a roll call that it begins without misses nobody."""

    anytime: bool = False
    """In `safe`: workers are killed and come while the store is there, too."""

    @property
    def window_ticks(self) -> int:
        return self.slots * SLOT_MS // TICK_MS

    def actions(self) -> list[str]:
        numbered = [f"{letter}{number}" for number in range(self.workers) for letter in self.letters]
        return [*numbered, "t", *self.events]


@dataclass(frozen=True)
class Rules:
    """The parts whose code is searched; a fault puts another in the place of one."""

    bucket: type[Bucket] = Bucket
    store: type[Store] = Store
    lease: type[KeyLease] = EagerLease
    leases: type[EagerLeases] = EagerLeases
    holder: Callable[[int, int], str] = lambda place, born: f"h{born}"
    late_answers: bool = False
    """Answers to calls that were given up are taken, and doubled ones twice."""


class Sent:
    """A message on its way. `again`: it will arrive once more. Not changed after it was made."""

    __slots__ = ("again", "call", "flight")

    def __init__(self, flight: Flight, *, again: bool = False) -> None:
        self.flight = flight
        self.call = flight.call
        self.again = again


class Worker:
    __slots__ = ("air", "answer", "claim", "flight", "holder", "lease", "leases", "skew", "spared")

    def __init__(self, leases: Leases, claim: Claim, skew: float) -> None:
        self.leases = leases
        self.holder = leases.holder
        self.claim = claim
        self.lease = claim.all[0]
        self.skew = skew
        self.flight: Flight | None = None
        self.air: list[Sent] = []
        self.answer: Answer | None = None
        self.spared = False
        """Whether a reset came after the store gave the answer that is on its way."""


class World:
    def __init__(self, size: Size, rules: Rules | None = None) -> None:
        self.size = size
        self.rules = rules or Rules()
        # Twelve ticks from the beginning of the store's first slot: no number is negative.
        self.tick = 12
        self.behind = 0
        """Ticks that the store's clock stepped back."""
        self.run = 1
        self.there = True
        """Whether the store can be reached."""
        self.store = self.rules.store(size.slots)
        # The store is no new one: what a first start holds back is over.
        first = Call("run1", "", "first", "operator", size.slots, [])
        self.store.call([], first, EPOCH_MS - 60_000)
        self.saved: Store | None = None
        self.limit = Limit("t", size.limit, 1, redis_down=size.mode)  # type: ignore[arg-type]
        self.limits = LimitSet((self.limit,))
        self.shape = Shape(size.slots, SLOT_MS, size.life_ticks * TICK_MS, size.life_ticks * TICK_MS)
        self.kind = type("Kind", (self.rules.leases,), {"lease_type": self.rules.lease})
        self.born = 0
        self.admissions: list[tuple[int, str]] = []
        """When, and by which holder, in the window that ends now; a refund takes one out."""
        self.ended: int | None = None
        """When the last absence of the store ended; None: there was none."""
        self.began: int | None = None
        self.lost: tuple[int, ...] = ()
        """When workers were killed who may have admitted what the store was not told of."""
        self.ghost: tuple[str, Sent] | None = None
        """A message of the dead, and whose it was."""
        self.left = {letter: size.most[letter] for letter in size.most}
        self.steps: dict[str, Callable[..., bool]] = {
            letter: getattr(
                self, {"D": "do_d_again", "F": "do_f_oldest", "K": "do_k_untold"}.get(letter, f"do_{letter}")
            )
            for letter in (*size.letters, "t", *size.events)
        }
        self.workers = [self._newborn(place) for place in range(size.workers)]

    def _newborn(self, place: int, *, told: bool = True) -> Worker:
        self.born += 1
        leases = self.kind(
            self.rules.holder(place, self.born),
            fleet=self.size.workers if told else 0,
            shape=lambda _: self.shape,
            slots=self.size.slots,
        )
        # Each worker's clock begins somewhere else.
        worker = Worker(leases, leases.claim(self.limits, "u", "a"), skew=1_024.0 * (place + 1))
        if "x" in self.size.events or "e" in self.size.events:
            # As `LeaseStore.start`: a worker knows the store's epoch before it serves.
            flight = leases.probe(self.now(worker), worker.lease.partition)
            flight.call.run = f"run{self.run}"
            leases.apply(flight, self.store.call([], flight.call, self.store_ms), self.now(worker))
        if not self.there:
            # As `LeaseStore.start` where nothing answers: it may know of a fleet by a setting only.
            leases.alone_from = self.now(worker)
            leases.leave(leases.shard, self.now(worker))
        return worker

    # --- time

    @property
    def store_ms(self) -> int:
        return EPOCH_MS + (self.tick - self.behind) * TICK_MS

    def now(self, worker: Worker) -> float:
        return self.tick * TICK_MS / 1_000 + worker.skew

    def possible(self, action: str) -> bool:
        """False: `step` would be for nothing. Looks only."""
        letter = action[0]
        if self.left.get(letter, 1) <= 0:
            return False
        if not action[1:]:
            return True
        worker = self.workers[int(action[1])]
        if letter in "bcops" and worker.leases.shard.away:
            return False  # only probes: `q`
        if letter in "cs":
            return worker.flight is None and not worker.lease.has and (letter == "s" or self.there)
        if letter in "bpo":
            return worker.flight is None and (letter != "b" or self.there)
        if letter in "dD":
            return bool(worker.air) and self.there
        if letter == "n":
            return len(worker.air) > 1 and self.there
        if letter == "a":
            return worker.answer is not None
        if letter == "g":
            return worker.flight is not None
        if letter == "r":
            return worker.lease.has > 0 or self.size.mode == "safe"
        if letter == "K":
            return not self.there
        if letter in "kh":
            return worker.leases.seq > 0 and (self.size.mode != "safe" or self.size.anytime or not self.there)
        if letter == "q" and self.size.told and not worker.leases.fleet:
            return False
        if letter == "u":
            return self.there and worker.leases.fleet < self.size.workers
        return True

    def step(self, action: str) -> bool:
        """False: it was not possible after all; what it changed has no effect."""
        letter = action[0]
        if not self.possible(action):
            return False
        done = self.steps[letter](self.workers[int(action[1])]) if action[1:] else self.steps[letter]()
        if done and letter in self.left:
            self.left[letter] -= 1
        return done

    def do_t(self) -> bool:
        roll = self.store.roll
        lapses_ms = roll.began_ms + (ROLL_TICKS - 1) * TICK_MS if roll is not None else 0
        if self.size.punctual and lapses_ms and self.store_ms >= lapses_ms:
            return False
        for worker in self.workers:
            if worker.flight is not None and self.tick - self._sent(worker, worker.flight) >= PATIENCE_TICKS:
                return False
        for worker in self.workers:
            if worker.flight is not None and worker.flight.groups:
                self._alone(worker, worker.leases.abandon)
        self.tick += 1
        first = self.tick - self.size.window_ticks
        self.admissions = [admission for admission in self.admissions if admission[0] > first]
        if not self.size.lazy:
            for bucket in self.store.buckets.values():
                bucket.advance(self.store_ms, SLOT_MS)
        return True

    def _sent(self, worker: Worker, flight: Flight) -> int:
        return round((flight.sent - worker.skew) * 1_000 / TICK_MS)

    def _alone(self, worker: Worker, what: Callable[[Flight, float], None]) -> None:
        """What is done to an open flight when nobody shall wait for it."""
        assert worker.flight is not None
        shard = worker.leases.shard
        away, shard.away = shard.away, True
        what(worker.flight, self.now(worker))
        shard.away = away

    # --- requests

    def admit(self, worker: Worker, admitted: bool) -> None:
        if admitted and not worker.spared:
            self.admissions.append((self.tick, worker.holder))
            if len(self.admissions) > self.bound():
                raise OverError(self.admissions)

    def bound(self) -> int:
        limit, others = self.size.limit, self.size.workers - 1
        first = self.tick - self.size.window_ticks
        if self.size.mode == "strict" or self.began is None:
            return limit
        if self.ended is not None or self.size.anytime:
            # What died untold is missed by nobody.
            share = max(1, limit // self.size.workers)
            limit += share * sum(1 for at in self.lost if at >= first)
        if first < self.began + (0 if self.size.inside else self.size.life_ticks) or (
            self.ended is not None and (self.size.anytime or not self.size.told)
        ):
            limit += self.size.limit * others // self.size.workers
        return limit

    def _ask(self, worker: Worker) -> Take:
        take = worker.claim.take(self.now(worker))
        if take is Take.WANTING:
            worker.leases.wait(worker.claim, partial(self.admit, worker))
        else:
            self.admit(worker, take is Take.ADMITTED)
        return take

    def do_r(self, worker: Worker) -> bool:
        if worker.lease.has == 0 and not (self.size.mode == "safe" and worker.lease.local(self.now(worker))):
            return False
        if worker.claim.take(self.now(worker)) is not Take.ADMITTED:
            return False
        self.admit(worker, True)
        return True

    def do_f(self, worker: Worker, *, at: int = -1) -> bool:
        own = [admission for admission in self.admissions if admission[1] == worker.holder]
        if not own:
            return False
        self.admissions.remove(own[at])
        worker.leases.refund(worker.claim, self.now(worker), own[at][0] * TICK_MS / 1_000 + worker.skew)
        return True

    def do_f_oldest(self, worker: Worker) -> bool:
        return self.do_f(worker, at=0)

    # --- calls

    def _send(self, worker: Worker, *, ask: bool = False, closing: bool = False) -> bool:
        if worker.flight is not None:
            return False
        del worker.air[: max(0, len(worker.air) + 1 - self.size.air)]
        # The cache of refusals spares calls and admits nothing: here everybody always asks.
        worker.lease.deny_until = 0.0
        if ask and (worker.lease.has or self._ask(worker) is not Take.WANTING):
            return False
        worker.leases.shard.due[worker.lease] = None
        flights = worker.leases.compose(self.now(worker), closing=closing)
        assert len(flights) == 1
        worker.flight = flights[0]
        self._post(worker, worker.flight)
        return True

    def _post(self, worker: Worker, flight: Flight) -> None:
        flight.call.run = f"run{self.run}"
        flight.call.roll_ms = ROLL_TICKS * TICK_MS
        worker.air.append(Sent(flight))

    def do_s(self, worker: Worker) -> bool:
        return self._send(worker, ask=True)

    def do_p(self, worker: Worker) -> bool:
        return self._send(worker)

    def do_o(self, worker: Worker) -> bool:
        return self._send(worker, closing=True)

    def do_c(self, worker: Worker) -> bool:
        return self.there and self.do_s(worker) and self.do_n(worker, alone=True) and self.do_a(worker)

    def do_b(self, worker: Worker) -> bool:
        if not (self.there and self.do_p(worker) and self.do_n(worker, alone=True) and self.do_a(worker)):
            return False
        while worker.lease.has and self.do_r(worker):
            pass
        return True

    def _arrive(self, worker: Worker | None, sent: Sent) -> None:
        keys = sent.flight.keys
        for key in keys:
            if key not in self.store.buckets:
                self.store.buckets[key] = self.rules.bucket(self.size.slots)
        answer = self.store.call(keys, sent.call, self.store_ms)
        if worker is None:
            return
        # A connection answers its own calls only: of an earlier one nothing is heard.
        if sent.flight is worker.flight and worker.answer is None:
            worker.answer = answer
        elif self.rules.late_answers:
            worker.lease.answered(sent.call.messages[0], answer.keys[0], sent.flight.sent, self.now(worker))

    def do_d(self, worker: Worker) -> bool:
        if not worker.air or not self.there:
            return False
        self._arrive(worker, worker.air.pop(0))
        return True

    def do_n(self, worker: Worker, *, alone: bool = False) -> bool:
        if not self.there or (len(worker.air) < 2 and not alone):
            return False
        self._arrive(worker, worker.air.pop())
        return True

    def do_d_again(self, worker: Worker) -> bool:
        if not self.there or not worker.air or worker.air[0].again:
            return False
        sent = worker.air[0]
        worker.air[0] = Sent(sent.flight, again=True)
        self._arrive(worker, sent)
        return True

    def do_l(self, worker: Worker) -> bool:
        if worker.air:
            worker.air.pop(0)
            return True
        return False

    def do_a(self, worker: Worker) -> bool:
        if worker.answer is None or worker.flight is None:
            return False
        flight, answer = worker.flight, worker.answer
        worker.flight = worker.answer = None
        worker.leases.apply(flight, answer, self.now(worker))
        worker.spared = False
        return True

    def do_g(self, worker: Worker) -> bool:
        if worker.flight is None:
            return False
        self._alone(worker, worker.leases.fail)
        worker.flight = worker.answer = None
        worker.spared = False
        return True

    def do_k(self, worker: Worker, *, told: bool = True) -> bool:
        if told and worker.leases.seq == 0:
            return False
        if worker.leases.shard.away or worker.lease.partition.owing or self.size.anytime:
            self.lost += (self.tick,)
        place = self.workers.index(worker)
        self.workers[place] = self._newborn(place, told=told)
        return True

    def do_k_untold(self, worker: Worker) -> bool:
        return not self.there and self.do_k(worker, told=False)

    def do_u(self, worker: Worker) -> bool:
        """By the control channel, which is there with the store: before or after the store is tried."""
        if not self.there or worker.leases.fleet == self.size.workers:
            return False
        worker.leases.fleet = self.size.workers
        worker.leases.alone_from = float("-inf")
        return True

    def do_h(self, worker: Worker) -> bool:
        """One message of the dead at a time: more were never needed for a fault."""
        if self.ghost is not None or not worker.air:
            return False
        self.ghost = (worker.holder, worker.air[0])
        return self.do_k(worker)

    def do_i(self) -> bool:
        if self.ghost is None or not self.there:
            return False
        sent, self.ghost = self.ghost[1], None
        self._arrive(None, sent)
        return True

    # --- operators, the store's own troubles

    def do_z(self) -> bool:
        """What was charged before counts no more, what was leased before does."""
        message = Message(Op.RESET, self.size.limit, SLOT_MS, self.shape.long_ms)
        call = Call(f"run{self.run}", "", "operator", "operator", self.size.slots, [message])
        if self.store.marker is None:
            return False
        self.store.call([worker.lease.key for worker in self.workers[:1]], call, self.store_ms)
        for worker in self.workers:
            worker.leases.reset("t", "u")
            worker.spared = worker.answer is not None
        self.admissions.clear()
        return True

    def do_j(self) -> bool:
        self.behind += 1
        return True

    def do_e(self) -> bool:
        self.store = self.rules.store(self.size.slots)
        return True

    def do_v(self) -> bool:
        if self.store.marker is None:
            return False
        self.saved = copy_store(self.store)
        return True

    def do_x(self) -> bool:
        """Connections end with the server: what was on its way is lost."""
        if self.saved is None:
            return False
        self.store, self.saved = self.saved, None
        self.run += 1
        self.ghost = None
        for worker in self.workers:
            worker.air.clear()
            worker.answer = None
        return True

    def do_w(self) -> bool:
        if not self.there:
            return False
        self.there, self.began, self.ended = False, self.tick, None
        for worker in self.workers:
            worker.leases.leave(worker.leases.shard, self.now(worker))
            if worker.flight is not None:
                worker.leases.abandon(worker.flight, self.now(worker))
        return True

    def do_y(self) -> bool:
        if self.there:
            return False
        self.there, self.ended = True, self.tick
        return True

    def do_q(self, worker: Worker) -> bool:
        shard = worker.leases.shard
        if not shard.away or not self.there or worker.flight is not None:
            return False
        flight = worker.flight = worker.leases.probe(self.now(worker), worker.lease.partition)
        self._post(worker, flight)
        self._arrive(worker, worker.air.pop())
        self.do_a(worker)
        shard.arrive(self.now(worker))
        return True
