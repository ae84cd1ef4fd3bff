"""The worker's side of the hybrid limiter: tokens at hand, several limits in one step, calls to the store.

All of it is synchronous and gets `now` (seconds of `time.monotonic`, always the same clock). A decision
with tokens at hand is `Claim.take`; whoever owns the connection to a shard of the store (`wire/lease_courier.py`)
calls `Leases.compose`, sends what it gives, and closes each flight with exactly one of `apply` and `fail`.

The worker's half of the rules that make it never over (1 to 5 and 10 to 13 are in `bucket`):

 6. A call whose fate is unknown is given up for good: the next message has the next seq.
 7. Deadline of a lease = time of sending + life that the answer names - slack for drift. Tokens are spent
    only before it; check and decrement are one synchronous step.
 8. The holder's id is random and per process (whoever builds the store's side draws it).
 9. What is returned leaves memory before the message is made.
11. Several limits: one token from each lease in one step, or none. Those whose keys travel in one call are charged
    there as a whole; of others a token each is leased first, one partition after the other.

A spend is journaled with the last seq sent and the slot of its use, in the store's time as of the call that
was answered last: an answer's time minus the time of *sending* maps late, never early.

After an absence of the store each call says so, and the store holds a share of every key back for each worker that
has not told what it admitted on its own (the roll call, see `bucket`).
"""

import weakref
from collections.abc import Callable, Iterable

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import SLOTS, Answer, Call, Group, Message
from lucid.core.rules.claims import Claim, LimitSet, Standing, Take
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, Counters, KeyLease, Shape, Worker, key_of
from lucid.core.rules.shards import Partition, Shard

__all__ = ["Claim", "Counters", "Flight", "Leases", "LimitSet", "Shape", "Standing", "Take", "Waiter"]

MARKER = "lucid:limiter"
MOST_KEYS_PER_CALL = 128
"""Some 10 µs of the store's time each."""

LAPSING_AT_ONCE = 2_000
"""Leases looked at per sweep while the store is away: some 8 ms."""

ROLL_CALL_SECONDS = 3.0
"""So long the store waits for a worker's word: a probe comes each second at least, then the reports."""


class Waiter:
    """One request that waits for the store. `settle` is called once, with whether it is admitted."""

    __slots__ = ("aside", "claim", "direct", "gone", "settle")

    def __init__(self, claim: Claim, settle: Callable[[bool], None]) -> None:
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
        self.direct = []


class Flight:
    """One call under way. Close it with `Leases.apply` or `Leases.fail`, exactly once."""

    __slots__ = (
        "absences",
        "call",
        "dismissed",
        "groups",
        "leases",
        "needs",
        "partition",
        "places",
        "sent",
        "takers",
        "waiting",
    )

    def __init__(self, partition: Partition, sent: float) -> None:
        self.partition = partition
        self.sent = sent
        self.absences = partition.shard.absences
        self.leases: list[KeyLease] = []
        self.places: dict[KeyLease, int] = {}
        self.waiting: list[int] = []
        """How many requests wait for each key, by place."""
        self.needs: list[int] = []
        """How many of them want a token as a lease, as their other limits live elsewhere."""
        self.groups: dict[tuple[int, ...], list[Waiter]] = {}
        self.takers: list[Waiter] = []
        self.call: Call
        self.dismissed = False
        """Whether nobody waits for it any more: what it is granted directly is given back."""
        partition.open += 1

    @property
    def keys(self) -> list[str]:
        return [lease.key for lease in self.leases]

    def place(self, lease: KeyLease) -> int:
        """The lease's place in the call; it gets one if it has none."""
        place = self.places.setdefault(lease, len(self.leases))
        if place == len(self.leases):
            self.leases.append(lease)
            self.waiting.append(0)
            self.needs.append(0)
        return place

    def dismiss(self) -> list[Waiter]:
        """Who waits for it, and does not any more."""
        waiters = [*self.takers, *(waiter for group in self.groups.values() for waiter in group)]
        self.dismissed = True
        self.takers = []
        self.groups = {members: [] for members in self.groups}
        return waiters


class Leases(Worker):
    """All leases of this worker. Per shard one `compose` at a time: the next after all its flights were closed.

    `fleet`: the largest number of workers known, 0: never told (then `safe` admits nothing alone). Claims are kept
    in two generations of at most `most_claims / 2` each, some 2.4 KB a claim; a lease that the store must still hear
    about outlives its claim. `partition_of` says where a key lives; without it all live in one.
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
        partition_of: Callable[[str], Partition] | None = None,
    ) -> None:
        super().__init__(fleet, most_claims)
        self.holder = holder
        self.shard = Shard()
        self.partition = Partition(MARKER, self.shard)
        """The only shard and the only partition where `partition_of` is not given."""
        self.partition_of = partition_of or (lambda key: self.partition)
        self.deferred: list[Waiter] = []
        self.shape = shape
        self.late = 0
        self.held_until = 0.0
        """Until then the store grants nothing for some of the keys, as it lost data or may have."""
        self._lapsing: list[KeyLease] = []
        self._slots = slots
        self._calls = 0
        self._half = max(1, most_claims // 2)
        self._young: dict[tuple[LimitSet, str, str], Claim] = {}
        self._old: dict[tuple[LimitSet, str, str], Claim] = {}
        self._by_key: weakref.WeakValueDictionary[str, KeyLease] = weakref.WeakValueDictionary()

    @property
    def counters(self) -> Counters:
        """Of all limits together."""
        total = Counters()
        for counters in self.counters_of.values():
            total.add(counters)
        total.calls, total.late = self._calls, self.late
        return total

    # --- claims

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
                limits,
                tuple(self.lease(limit, user if limit.per == "user" else address) for limit in limits.limits),
            )
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[key] = claim
        return claim

    def lease(self, limit: Limit, identifier: str) -> KeyLease:
        key = key_of(limit.name, identifier)
        lease = self._by_key.get(key)
        if lease is None:
            lease = self.lease_type(self, limit, identifier, self.shape(limit), self.partition_of(key))
            self._by_key[key] = lease
        elif lease.limit != limit:
            lease.become(limit, self.shape(limit))
        return lease

    def reset(self, name: str, identifier: str) -> None:
        """An operator cleared this key's ring: forget refusals and the own window, keep the lease."""
        lease = self._by_key.get(key_of(name, identifier))
        if lease is not None:
            lease.deny_until = lease.free_at = 0.0
            lease.history.clear()
            lease.history_sum = 0

    def forget_refusals(self) -> None:
        """Resets may have been missed: every refusal is asked for again."""
        for lease in list(self._by_key.values()):
            lease.deny_until = 0.0

    def refund(self, claim: Claim, now: float, since: float) -> None:
        """A request that began at `since` and was charged to all of `claim` is refused by another limit after all.

        What is refused counts nothing. Call it once for a request, and only for one that was admitted.
        """
        for lease in claim.all:
            lease.refund(now, since)

    # --- requests that wait

    def wait(self, claim: Claim, settle: Callable[[bool], None]) -> Waiter:
        """Queues a request whose `take` said WANTING; have `compose` called for `shard_of(waiter)` soon."""
        waiter = Waiter(claim, settle)
        self._queue(waiter)
        return waiter

    def shard_of(self, waiter: Waiter) -> Shard:
        """The shard that is asked first, of a key of which no token is at hand."""
        every = waiter.claim.all
        answering = [lease for lease in every if not lease.partition.shard.away]
        first = next((lease for lease in answering if lease.has <= 0), (answering or every)[0])
        return first.partition.shard

    def _queue(self, waiter: Waiter) -> Shard:
        shard = self.shard_of(waiter)
        shard.waiting.append(waiter)
        return shard

    def sweep(self, now: float) -> None:
        """Makes due what nears its end or was spent without a lease. Call it some ten times a second."""
        for lease in list(self.live):
            partition = lease.partition
            told = not lease.refunds and lease not in partition.owing
            # Most need nothing: their spends stay in the slot of their use until the next one opens another.
            resting = lease.reserved and now < lease.renew_at and told
            if resting or lease.flying or partition.shard.away:
                continue
            lease.roll(now)
            if not told or (now >= lease.renew_at if lease.reserved else lease.journal):
                partition.shard.due[lease] = None
            elif not lease.reserved:
                self._forget(lease)
        self._lapse(now)

    def _lapse(self, now: float) -> None:
        """Forgets what counts nowhere any more of the shards that are away: some at a time, so that nobody waits."""
        if not self._lapsing:
            self._lapsing = [lease for lease in self.live if lease.partition.shard.away]
        for lease in self._lapsing[-LAPSING_AT_ONCE:]:
            if lease in self.live and lease.partition.shard.away and not lease.flying:
                lease.roll(now)
                if not lease.has and not lease.still_tells(now):
                    self._forget(lease)
        del self._lapsing[-LAPSING_AT_ONCE:]

    def _forget(self, lease: KeyLease) -> None:
        del self.live[lease]
        lease.partition.owing.discard(lease)

    # --- one call

    def probe(self, now: float, partition: Partition | None = None) -> Flight:
        """A call that says nothing: whether the store answers, and whether it is still the same."""
        return self._seal(Flight(partition or self.partition, now), now, closing=False)

    def _seal(self, flight: Flight, now: float, *, closing: bool) -> Flight:
        partition = flight.partition
        counted = zip(flight.leases, flight.waiting, flight.needs, strict=True)
        flight.call = self.call(
            partition,
            [lease.message(now, waiting, need, closing) for lease, waiting, need in counted],
            [Group(len(waiters), list(members)) for members, waiters in flight.groups.items()],
        )
        flight.call.fleet = self.fleet
        flight.call.reported = partition.owing <= flight.places.keys()
        # Long after a return nobody would wait for this worker's word any more.
        recent = now - partition.shard.back_at < ROLL_CALL_SECONDS
        flight.call.back = partition.told != flight.absences and recent
        if flight.call.back:
            partition.rolled_at = now
        return flight

    def call(self, partition: Partition, messages: list[Message], groups: list[Group]) -> Call:
        """A call of this worker. Its `run` is for the sender to fill, once the connection is chosen."""
        self._calls += 1
        return Call(
            run="",
            known=partition.known,
            fresh=f"{self.holder}.{self._calls}",
            holder=self.holder,
            slots=self._slots,
            messages=messages,
            groups=groups,
            roll=partition.roll,
            roll_ms=int(ROLL_CALL_SECONDS * 1_000),
        )

    def compose(self, now: float, shard: Shard | None = None, *, closing: bool = False) -> list[Flight]:
        """The next calls to a shard, one for each partition; none: there is nothing to say.

        Settles those whose token came meanwhile. `closing`: everything held is returned.
        """
        shard = shard or self.shard
        flights: dict[Partition, Flight] = {}
        keys = 0
        while shard.waiting and keys < MOST_KEYS_PER_CALL:
            waiter = shard.waiting.popleft()
            if not waiter.gone:
                keys += self._board(waiter, shard, flights, now)
        if closing and not shard.due:
            shard.due.update(
                (lease, None)
                for lease in self.live
                if lease.partition.shard is shard and (lease.reserved or lease.journal)
            )
        for lease in list(shard.due):
            if keys >= MOST_KEYS_PER_CALL:
                break
            del shard.due[lease]
            if lease.partition.shard is not shard:
                lease.partition.shard.due[lease] = None
            else:
                flight = self._flight(lease.partition, flights, now)
                before = len(flight.leases)
                flight.place(lease)
                keys += len(flight.leases) - before
        for partition in list(shard.summoned)[:MOST_KEYS_PER_CALL]:
            del shard.summoned[partition]
            if partition.shard is shard:
                self._flight(partition, flights, now)
        return [self._seal(flight, now, closing=closing) for flight in flights.values()]

    def _flight(self, partition: Partition, flights: dict[Partition, Flight], now: float) -> Flight:
        flight = flights.get(partition)
        if flight is None:
            flight = flights[partition] = Flight(partition, now)
        return flight

    def _board(self, waiter: Waiter, shard: Shard, flights: dict[Partition, Flight], now: float) -> int:
        """Finds the waiter's place in a call of this shard; how many keys that adds."""
        verdict = waiter.claim.take(now)
        if verdict is not Take.WANTING:
            waiter.settle(verdict is Take.ADMITTED)
            return 0
        every = waiter.claim.all
        if any(lease.recall_paused for lease in every):
            self.deferred.append(waiter)
            return 0
        wanted = [lease for lease in every if not lease.ready(now) and not lease.local(now)]
        here = next((lease.partition for lease in wanted if lease.partition.shard is shard), None)
        if here is None:
            wanted[0].partition.shard.waiting.append(waiter)
            self.wake(wanted[0].partition.shard)
            return 0
        flight = self._flight(here, flights, now)
        before = len(flight.leases)
        waiter.aside = [lease.put_aside() for lease in every if lease.ready(now)]
        asked = [lease for lease in wanted if lease.partition is here]
        places = tuple(flight.place(lease) for lease in asked)
        for place in places:
            flight.waiting[place] += 1
        if len(asked) == len(wanted):
            waiter.direct = asked
            flight.groups.setdefault(places, []).append(waiter)
        else:
            for place in places:
                flight.needs[place] += 1
            flight.takers.append(waiter)
        return len(flight.leases) - before

    # --- its end

    def leave(self, shard: Shard, now: float) -> None:
        """The server does not answer: from here on its keys are decided by this worker alone."""
        shard.leave()
        for lease in self.live:
            if lease.has and lease.partition.shard is shard:
                lease.clip(now)

    def _close(self, flight: Flight) -> None:
        partition = flight.partition
        partition.open -= 1
        if partition.next is not None and not partition.open:
            old = partition.shard
            partition.move(partition.next)
            self.refile(old)

    def refile(self, shard: Shard) -> None:
        """Partitions have moved away from this shard: what waits or is due there goes where its keys are now."""
        moved = [lease for lease in shard.due if lease.partition.shard is not shard]
        for lease in moved:
            del shard.due[lease]
            lease.partition.shard.due[lease] = None
        called = [partition for partition in shard.summoned if partition.shard is not shard]
        for partition in called:
            del shard.summoned[partition]
            partition.shard.summoned[partition] = None
        waiting = list(shard.waiting)
        shard.waiting.clear()
        woken = {lease.partition.shard for lease in moved} | {partition.shard for partition in called}
        for other in woken | {self._queue(waiter) for waiter in waiting}:
            self.wake(other)

    def apply(self, flight: Flight, answer: Answer, now: float) -> None:
        """Takes the answer, also a late one: tokens are dated by the time of sending."""
        partition = flight.partition
        partition.known = answer.epoch
        partition.told = flight.absences
        if answer.roll:
            # The store waits for this worker's word; it counts once this worker has heard of it.
            partition.roll = answer.roll
            partition.rolled_at = now
            partition.shard.summoned[partition] = None
            self.wake(partition.shard)
        for lease, message, key_answer in zip(flight.leases, flight.call.messages, answer.keys, strict=True):
            lease.answered(message, key_answer, flight.sent, now)
            self.held_until = max(self.held_until, lease.held_until)
        asked: dict[KeyLease, None] = {}
        for (members, waiters), count in zip(flight.groups.items(), answer.direct, strict=True):
            if flight.dismissed:
                # Who waited was decided without it.
                for lease in [flight.leases[place] for place in members] * count:
                    lease.refund(now, flight.sent)
            for at, waiter in enumerate(waiters):
                if at < count:
                    if self._granted(waiter, flight.sent, now):
                        waiter.settle(True)
                    else:
                        self._decide_alone(waiter, now)
                elif any(lease.local(now) for lease in waiter.direct):
                    self._decide_alone(waiter, now)
                elif not self._defer(waiter, asked, now):
                    self._refuse(waiter)
        for waiter in flight.takers:
            waiter.direct = [lease for lease in waiter.claim.all if lease in flight.places and not lease.has]
            if not waiter.direct or any(lease.local(now) for lease in waiter.direct):
                self._decide_alone(waiter, now)
            elif not self._defer(waiter, asked, now):
                self._refuse(waiter)
        if asked and self.recall is not None:
            self.recall(list(asked))
        self._close(flight)

    def _refuse(self, waiter: Waiter) -> None:
        blocking = next((lease for lease in waiter.direct if lease.free <= 0), waiter.direct[0])
        blocking.counters.refused += 1
        waiter.release()
        waiter.settle(False)

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
        waiter.release()
        self.deferred.append(waiter)
        return True

    def recall_step(self, leases: Iterable[KeyLease]) -> None:
        """Others have had some time with these keys: who waits for them asks the store again."""
        for lease in leases:
            lease.recalling = max(0, lease.recalling - 1)
            lease.recall_paused = False
        self._requeue()

    def _requeue(self) -> None:
        deferred, self.deferred = self.deferred, []
        for waiter in deferred:
            self._queue(waiter)

    def rolling(self, lease: KeyLease, now: float) -> bool:
        """Whether what is missing from a key may be held back for workers that have not reported yet."""
        return now - lease.partition.rolled_at < ROLL_CALL_SECONDS

    def give_back(self, key: str, *, report: bool = False) -> None:
        """Another worker has need of what this one holds of `key`: returned with the next call.

        `report`: or of this worker's word that it has nothing to tell, which holds a share of the key back.
        """
        lease = self._by_key.get(key)
        if lease is not None and lease.reserved:
            lease.recalled = True
            lease.partition.shard.due[lease] = None
            self.wake(lease.partition.shard)
        elif report:
            partition = lease.partition if lease is not None else self.partition_of(key)
            partition.shard.summoned[partition] = None
            self.wake(partition.shard)

    def _granted(self, waiter: Waiter, sent: float, now: float) -> bool:
        """The store charged the request to the keys that it was asked for, in a call sent at `sent`: now the others."""
        direct, aside = waiter.direct, waiter.aside
        for lease in direct:
            lease.counters.direct += 1
            lease.admitted(now, 1)
        settled = {*direct, *(lease for lease, _ in aside)}
        alone = [lease for lease in waiter.claim.all if lease not in settled]
        if not all(lease.keeps(generation, now) for lease, generation in aside) or not all(
            lease.room(now) for lease in alone
        ):
            for lease in direct:
                lease.refund(now, sent)
            waiter.release()
            return False
        for lease, _ in aside:
            lease.spend_aside(now)
        for lease in alone:
            lease.spend_local(now)
        waiter.aside = []
        return True

    def _decide_alone(self, waiter: Waiter, now: float) -> None:
        waiter.release()
        if waiter.gone:
            return
        verdict = waiter.claim.take(now)
        if verdict is Take.WANTING:
            # Another limit of the claim is not decided alone: ask once more, for that one.
            self.wake(self._queue(waiter))
        else:
            waiter.settle(verdict is Take.ADMITTED)

    def abandon(self, flight: Flight, now: float) -> None:
        """Nobody waits for the answer any more (set the shard `away` first): who waited is decided here.

        The flight stays open: its late answer may still be applied.
        """
        for waiter in flight.dismiss():
            self._decide_alone(waiter, now)
        self.decide_waiting(now, flight.partition.shard)

    def decide_waiting(self, now: float, shard: Shard | None = None) -> None:
        """Settles the queue of a shard without the store; set it `away` first."""
        shard = shard or self.shard
        self._requeue()
        waiting = list(shard.waiting)
        shard.waiting.clear()
        for waiter in waiting:
            self._decide_alone(waiter, now)

    def fail(self, flight: Flight, now: float) -> None:
        """The call is given up for good (rule 6). Set the shard `away` first if nobody shall wait for the next one."""
        for lease, message in zip(flight.leases, flight.call.messages, strict=True):
            lease.given_up(message)
        for waiter in flight.dismiss():
            self._decide_alone(waiter, now)
        self._close(flight)
