"""The worker's side of the hybrid limiter: tokens at hand, several limits in one step, calls to the store.

All of it is synchronous and gets `now` (seconds of `time.monotonic`, always the same clock). A decision
with tokens at hand is `Claim.take`; whoever owns the connection to the store (`wire/lease_store.py`) calls
`Leases.compose`, sends what it gives, and closes it with exactly one of `apply` and `fail`.

The worker's half of the rules that make it never over (1 to 5 and 10 to 13 are in `bucket`):

 6. A call whose fate is unknown is given up for good: the next message has the next seq.
 7. Deadline of a lease = time of sending + life that the answer names - slack for drift. Tokens are spent
    only before it; check and decrement are one synchronous step.
 8. The holder's id is random and per process (whoever builds the store's side draws it).
 9. What is returned leaves memory before the message is made.
11. Several limits: one token from each lease in one step, or none.

A spend is journaled with the last seq sent and the slot of its use, in the store's time as of the call that
was answered last: an answer's time minus the time of *sending* maps late, never early.
"""

import enum
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import SLOTS, Answer, Call, Group, Message
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, Counters, KeyLease, Shape, Worker

__all__ = ["Claim", "Counters", "Flight", "Leases", "LimitSet", "Shape", "Standing", "Take", "Waiter"]

MOST_KEYS_PER_CALL = 128
"""Some 10 µs of the store's time each."""


class Take(enum.Enum):
    ADMITTED = enum.auto()
    DENIED = enum.auto()
    WANTING = enum.auto()
    """No token at hand: the store must be asked (`LeaseStore.admit`)."""


# Members of an enum cost a look-up by its metaclass each time, a third of the hot path.
_ADMITTED, _DENIED, _WANTING = Take.ADMITTED, Take.DENIED, Take.WANTING


class Standing(msgspec.Struct, frozen=True):
    """Where a caller stands with one limit. `remaining` holds if nobody else spends."""

    limit: Limit
    remaining: int
    reset_seconds: int


class LimitSet:
    """Limits that are judged together. Made once per route table; equal only to itself."""

    __slots__ = ("by_address", "by_user", "limits")

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        if any(limit.requests < 1 or limit.window_seconds < 1 for limit in limits):
            raise ValueError("a limit and its window must be at least 1; leave out a limit that is off")
        self.limits = limits
        self.by_user = any(limit.per == "user" for limit in limits)
        self.by_address = any(limit.per == "address" for limit in limits)


class Waiter:
    """One request that waits for the store. `settle` is called once, with whether it is admitted."""

    __slots__ = ("aside", "claim", "direct", "gone", "settle")

    def __init__(self, claim: "Claim", settle: Callable[[bool], None]) -> None:
        self.claim = claim
        self.settle = settle
        self.aside: list[tuple[KeyLease, int]] = []
        self.direct: list[KeyLease] = []
        self.gone = False
        """Set it when nobody waits any more."""

    def release(self) -> None:
        for lease, generation in self.aside:
            lease.take_back(generation)
        self.aside = []


class Claim:
    """One caller's leases for one `LimitSet`. Get it from `Leases.claim`; it may be kept for one exchange."""

    __slots__ = ("_leases", "_one", "_pattern", "_policies", "all", "limits")

    def __init__(self, leases: "Leases", limits: LimitSet, every: tuple[KeyLease, ...]) -> None:
        self._leases = leases
        self.limits = limits
        self.all = every
        self._one = every[0] if len(every) == 1 else None
        self._pattern = b""
        self._policies = tuple(lease.policy for lease in every)

    def take(self, now: float) -> Take:
        """One token from each lease, or none. WANTING: await `LeaseStore.admit`, which settles it."""
        lease = self._one
        if lease is not None:
            has = lease.has
            if has > 0 and now < lease.until:
                lease.has = has - 1
                if has <= lease.low:
                    self._leases.nudge(lease, now)
                return _ADMITTED
            return self._take_slowly(now)
        for lease in self.all:
            if lease.has <= 0 or now >= lease.until:
                return self._take_slowly(now)
        for lease in self.all:
            lease.has -= 1
            if lease.has < lease.low:
                self._leases.nudge(lease, now)
        return _ADMITTED

    def _take_slowly(self, now: float) -> Take:
        wanting = False
        alone: list[KeyLease] = []
        counters = self._leases.counters
        for lease in self.all:
            if lease.ready(now):
                continue
            if lease.local(now):
                if not lease.room(now):
                    counters.degraded += 1
                    return _DENIED
                alone.append(lease)
            elif now < lease.deny_until:
                counters.refused_from_memory += 1
                return _DENIED
            else:
                wanting = True
        if wanting:
            return _WANTING
        for lease in self.all:
            if lease in alone:
                lease.spend_local(now)
            else:
                lease.has -= 1
        if alone:
            counters.degraded += 1
        return _ADMITTED

    def fields(self, now: float) -> bytes:
        """The answer's fields, spelt as in draft-ietf-httpapi-ratelimit-headers-11; b"" without limits."""
        lease = self._one
        if lease is not None:
            remaining = lease.remaining(now)
            reset = lease.reset_seconds(now)
            return lease.fields_pattern % (remaining, reset, remaining, reset)
        if not self.all:
            return b""
        numbers: list[int] = []
        tightest = self.all[0]
        least = least_reset = -1
        stale = self._pattern == b""
        for lease, policy in zip(self.all, self._policies, strict=True):
            remaining = lease.remaining(now)
            reset = lease.reset_seconds(now)
            numbers += (remaining, reset)
            if least < 0 or remaining < least:
                tightest, least, least_reset = lease, remaining, reset
            stale = stale or lease.policy is not policy
        if stale:
            self._policies = tuple(lease.policy for lease in self.all)
            states = b", ".join(lease.state_pattern for lease in self.all)
            self._pattern = b"RateLimit-Policy: %b\r\nRateLimit: %b\r\n" % (
                b", ".join(policy.replace(b"%", b"%%") for policy in self._policies),
                states,
            )
        return self._pattern % tuple(numbers) + tightest.x_pattern % (least, least_reset)

    def standings(self, now: float) -> tuple[Standing, ...]:
        return tuple(
            Standing(lease.limit, lease.remaining(now), lease.reset_seconds(now)) for lease in self.all
        )

    def retry_after(self, now: float) -> float:
        """Seconds after which a refused caller has quota again, if nobody else spends; not rounded."""
        return max((lease.blocked_seconds(now) for lease in self.all), default=0.0)

    def tightest(self, now: float) -> Limit:
        """The limit that a 429 names: the one that blocks longest, or else with the least remaining.

        Raises ValueError on a claim without limits: nothing can refuse there.
        """
        return max(self.all, key=lambda lease: (lease.blocked_seconds(now), -lease.remaining(now))).limit


class Flight:
    """One call to the store under way. Close it with `Leases.apply` or `Leases.fail`, exactly once."""

    __slots__ = ("call", "groups", "leases", "sent")

    def __init__(self, sent: float, leases: list[KeyLease], call: Call) -> None:
        self.sent = sent
        self.leases = leases
        self.call = call
        self.groups: list[list[Waiter]] = []

    @property
    def keys(self) -> list[str]:
        return [lease.key for lease in self.leases]


class Leases(Worker):
    """All leases of this worker. At most one flight at a time.

    `away`: the store is not asked, every decision is made here. `fleet`: the largest number of workers ever
    known, 0: never told (then `safe` admits nothing alone). Claims are kept in two generations of at most
    `most_claims / 2` each, some 2.4 KB a claim; a lease that the store must still hear about outlives its claim.
    """

    lease_type: type[KeyLease] = KeyLease

    def __init__(
        self,
        holder: str,
        *,
        fleet: int = 0,
        most_claims: int = 16_384,
        shape: Callable[[Limit], Shape] = Shape.of,
        slots: int = SLOTS,
    ) -> None:
        super().__init__(fleet, most_claims)
        self.holder = holder
        self.known = ""
        """The store's epoch."""
        self.due: dict[KeyLease, None] = {}
        self.waiting: deque[Waiter] = deque()
        self.wake: Callable[[], None] = lambda: None
        """Called when something became due in the background; set by the owner."""
        self.deferred: list[Waiter] = []
        self.shape = shape
        self._slots = slots
        self._calls = 0
        self._half = max(1, most_claims // 2)
        self._young: dict[tuple[LimitSet, str, str], Claim] = {}
        self._old: dict[tuple[LimitSet, str, str], Claim] = {}
        self._by_key: weakref.WeakValueDictionary[str, KeyLease] = weakref.WeakValueDictionary()

    def claim(self, limits: LimitSet, user: str, address: str) -> Claim:
        """The claim of this caller; `user` and `address` count only for the limits that are kept by them."""
        key = (limits, user if limits.by_user else "", address if limits.by_address else "")
        claim = self._young.get(key)
        return claim if claim is not None else self._claim_slowly(key)

    def _claim_slowly(self, key: tuple[LimitSet, str, str]) -> Claim:
        claim = self._old.pop(key, None)
        if claim is None:
            limits, user, address = key
            claim = Claim(
                self,
                limits,
                tuple(self.lease(limit, user if limit.per == "user" else address) for limit in limits.limits),
            )
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[key] = claim
        return claim

    def lease(self, limit: Limit, identifier: str) -> KeyLease:
        lease = self._by_key.get(f"rate_limit:{limit.name}:{identifier}")
        if lease is None:
            lease = self.lease_type(self, limit, identifier, self.shape(limit))
            self._by_key[lease.key] = lease
        elif lease.limit != limit:
            lease.become(limit, self.shape(limit))
        return lease

    def nudge(self, lease: KeyLease, now: float) -> None:
        """The lease runs low. Where nothing is free anyway, asking would only cost a call."""
        lease.low = -1
        if now >= lease.deny_until and not lease.flying:
            self.due[lease] = None
            self.wake()

    def reset(self, name: str, identifier: str) -> None:
        """An operator cleared this key's ring: forget refusals and the own window, keep the lease."""
        lease = self._by_key.get(f"rate_limit:{name}:{identifier}")
        if lease is not None:
            lease.deny_until = lease.free_at = 0.0
            lease.history.clear()
            lease.history_sum = 0

    def forget_refusals(self) -> None:
        """Resets may have been missed: every refusal is asked for again."""
        for lease in list(self._by_key.values()):
            lease.deny_until = 0.0

    def wait(self, claim: Claim, settle: Callable[[bool], None]) -> Waiter:
        waiter = Waiter(claim, settle)
        self.waiting.append(waiter)
        return waiter

    def sweep(self, now: float) -> None:
        """Makes due what nears its end or was spent without a lease. Call it some ten times a second."""
        for lease in list(self.live):
            if lease.flying:
                continue
            lease.roll(now)
            if self.away:
                if not lease.has and not lease.still_tells(now):
                    del self.live[lease]
            elif lease.reserved:
                if now >= lease.renew_at:
                    self.due[lease] = None
            elif lease.journal:
                self.due[lease] = None
            else:
                del self.live[lease]

    # --- one call

    def probe(self, now: float) -> Flight:
        """A call that says nothing: whether the store answers, and whether it is still the same."""
        return self._flight(now, [], [], [])

    def _flight(
        self, now: float, leases: list[KeyLease], messages: list[Message], groups: list[Group]
    ) -> Flight:
        self.counters.calls += 1
        return Flight(now, leases, self.call(messages, groups))

    def call(self, messages: list[Message], groups: list[Group]) -> Call:
        """A call of this worker. Its `run` is for the sender to fill, once the connection is chosen."""
        self._calls += 1
        return Call(
            run="",
            known=self.known,
            fresh=f"{self.holder}.{self._calls}",
            holder=self.holder,
            slots=self._slots,
            messages=messages,
            groups=groups,
        )

    def compose(self, now: float, *, closing: bool = False) -> Flight | None:
        """The next call, or None if there is nothing to say. Settles those whose token came meanwhile.

        `closing`: everything held is returned.
        """
        chosen: dict[KeyLease, int] = {}
        needs: dict[tuple[int, ...], list[Waiter]] = {}
        while self.waiting and len(chosen) < MOST_KEYS_PER_CALL:
            waiter = self.waiting.popleft()
            if waiter.gone:
                continue
            verdict = waiter.claim.take(now)
            if verdict is not Take.WANTING:
                waiter.settle(verdict is Take.ADMITTED)
                continue
            if any(lease.recall_paused for lease in waiter.claim.all):
                self.deferred.append(waiter)
                continue
            for lease in waiter.claim.all:
                if lease.ready(now):
                    waiter.aside.append(lease.put_aside())
                elif not lease.local(now):
                    waiter.direct.append(lease)
            members = tuple(chosen.setdefault(lease, len(chosen)) for lease in waiter.direct)
            needs.setdefault(members, []).append(waiter)
        if closing:
            self.due.update((lease, None) for lease in self.live if lease.reserved or lease.journal)
        for lease in list(self.due):
            if len(chosen) >= MOST_KEYS_PER_CALL:
                break
            del self.due[lease]
            chosen.setdefault(lease, len(chosen))
        if not chosen:
            return None
        demand = [0] * len(chosen)
        for members, waiters in needs.items():
            for index in members:
                demand[index] += len(waiters)
        flight = self._flight(
            now,
            list(chosen),
            [lease.message(now, demand[index], closing) for lease, index in chosen.items()],
            [Group(len(waiters), list(members)) for members, waiters in needs.items()],
        )
        flight.groups = list(needs.values())
        return flight

    def apply(self, flight: Flight, answer: Answer, now: float) -> None:
        """Takes the answer, also a late one: tokens are dated by the time of sending."""
        self.known = answer.epoch
        for lease, message, key_answer in zip(flight.leases, flight.call.messages, answer.keys, strict=True):
            lease.answered(message, key_answer, flight.sent, now)
        asked: dict[KeyLease, None] = {}
        for waiters, count in zip(flight.groups, answer.direct, strict=True):
            for at, waiter in enumerate(waiters):
                if at < count:
                    waiter.settle(self._granted(waiter, now))
                elif any(lease.local(now) for lease in waiter.direct):
                    self._decide_alone(waiter, now)
                else:
                    waiter.release()
                    if self._defer(waiter, asked, now):
                        continue
                    self.counters.refused += 1
                    waiter.settle(False)
        if asked and self.recall is not None:
            self.recall(list(asked))

    def _defer(self, waiter: Waiter, asked: dict[KeyLease, None], now: float) -> bool:
        """Whether the waiter waits for what others hold unspent, so that nobody is refused below the limit.

        At most one recall per key and `RECALL_PAUSE_SECONDS`: a caller over its limit is refused from memory.
        """
        blocking = [lease for lease in waiter.direct if lease.free <= 0]
        if self.recall is None or not blocking or not all(lease.elsewhere for lease in blocking):
            return False
        for lease in blocking:
            if lease.may_recall(now):
                lease.recalled_at = now
                lease.recalling = len(RECALL_STEPS_SECONDS)
                lease.deny_until = 0.0
                asked[lease] = None
        if not all(lease.recalling for lease in blocking):
            return False
        for lease in blocking:
            lease.recall_paused = True
        waiter.direct = []
        self.deferred.append(waiter)
        return True

    def recall_step(self, leases: Iterable[KeyLease]) -> None:
        """Others have had some time with these keys: who waits for them asks the store again."""
        for lease in leases:
            lease.recalling = max(0, lease.recalling - 1)
            lease.recall_paused = False
        self._requeue()

    def _requeue(self) -> None:
        self.waiting.extend(self.deferred)
        self.deferred.clear()

    def give_back(self, key: str) -> None:
        """Another worker has need of what this one holds of `key`: returned with the next call."""
        lease = self._by_key.get(key)
        if lease is not None and lease.reserved:
            lease.recalled = True
            self.due[lease] = None
            self.wake()

    def _granted(self, waiter: Waiter, now: float) -> bool:
        self.counters.direct += len(waiter.direct)
        for lease in waiter.direct:
            lease.admitted(now, 1)
        admitted = True
        taken = dict(waiter.aside)
        for lease in waiter.claim.all:
            if lease in taken:
                admitted = lease.spend_aside(taken[lease], now) and admitted
            elif lease not in waiter.direct:
                if lease.room(now):
                    lease.spend_local(now)
                else:
                    admitted = False
        waiter.aside = []
        return admitted

    def _decide_alone(self, waiter: Waiter, now: float) -> None:
        waiter.release()
        verdict = waiter.claim.take(now)
        if verdict is Take.WANTING:
            # Another limit of the claim is not decided alone: ask once more, for that one.
            waiter.direct = []
            self.waiting.append(waiter)
            self.wake()
        else:
            waiter.settle(verdict is Take.ADMITTED)

    def abandon(self, flight: Flight, now: float) -> None:
        """Nobody waits for the answer any more (set `away` first): who waited is decided here.

        The flight stays open: its late answer may still be applied.
        """
        for waiters in flight.groups:
            for waiter in waiters:
                self._decide_alone(waiter, now)
            waiters.clear()
        self.decide_waiting(now)

    def decide_waiting(self, now: float) -> None:
        """Settles the queue without the store; set `away` first."""
        self._requeue()
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.gone:
                self._decide_alone(waiter, now)

    def fail(self, flight: Flight, now: float) -> None:
        """The call is given up for good (rule 6). Set `away` first if nobody shall wait for the next one."""
        for lease, message in zip(flight.leases, flight.call.messages, strict=True):
            lease.given_up(message)
        for waiters in flight.groups:
            for waiter in waiters:
                self._decide_alone(waiter, now)
