"""The states of a small world (`limiter_world`): kept, come back to, told apart, and searched breadth first.

The code that is searched is the code that runs in the gateway: a state is the fields of its own objects. A snapshot
keeps them as they are; `key` is what two states share from which the same can follow. For that

- times are ticks from now (rounded up: they are only ever compared with a tick), slots count from the current one;
- a seq is its rank among those of its holder that still occur, as nothing is done with seqs but to compare them;
- tokens that have expired, and what was spent since the slot was opened, stand where `roll` would put them;
- what the dead left in the store is kept only as long as it may have an effect;
- workers that may change places are sorted.

Each field of each object is named below: as one that makes a state, or as one that follows from others, is counted
for show only, or makes a worker ask sooner or later (in this world anyone may ask at any time). A field that is new
is named nowhere, and `unnamed` tells: a state that is not told from another could hide a path.
"""

import time
from array import array
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from marshal import dumps
from math import ceil
from random import Random
from typing import Any

from lucid.core.rules.bucket import CURRENT_SLOT, Answer, Bucket, Call, Record
from lucid.core.rules.key_lease import KeyLease
from lucid.core.rules.leases import Flight, Leases, Waiter
from lucid.core.rules.shards import Partition, Shard
from tests.support.limiter_world import SLOT_MS, TICK_MS, OverError, Rules, Size, Worker, World, copy_store

Key = tuple[Any, ...]

LONG_AGO = -32
"""Ticks: more than a window, a lease's life and two slots. What is older is all the same."""

KEPT: dict[type, tuple[str, ...]] = {
    KeyLease: (
        "acked", "aside", "deadline", "generation", "has", "heard", "held_until", "history", "history_sum", "journal",
        "offset_low_ms", "offset_ms", "opened", "recorded_until", "refunds", "sent", "slot", "until",
    ),
    Leases: ("alone_from", "fleet", "seq"),
    Shard: ("absences", "away", "back_at", "due", "summoned", "waiting"),
    Partition: ("known", "owing", "roll", "told"),
}  # fmt: skip
"""What makes a state."""

WITHOUT_EFFECT: dict[type, tuple[str, ...]] = {
    KeyLease: (
        "__weakref__", "counted", "counters", "deny_until", "elsewhere", "fields_pattern", "flying", "free", "free_at",
        "identifier", "key", "limit", "low", "partition", "policy", "recall_paused", "recalled", "recalled_at",
        "recalling", "renew_at", "reserved", "shape", "since", "spent_there", "state_pattern",
        "worker", "x_pattern", "young_ms",
    ),
    Leases: (
        "_by_key", "_calls", "_half", "_lapsing", "_old", "_partition", "_slots", "_young", "counters_of",
        "deferred", "held_until", "holder", "late", "partition", "live", "most_live", "partition_of",
        "recall", "shape", "shard", "wake",
    ),
    Shard: ("name",),
    Partition: ("marker", "next", "open", "rolled_at", "shard"),
}  # fmt: skip
"""What never changes here, is shown only, or decides when a worker asks: here it may at any time."""


def unnamed(world: World) -> list[str]:
    """Fields of the searched objects that this module does not know of."""
    leases = world.workers[0].leases
    found: list[str] = []
    for part in (world.workers[0].lease, leases, leases.shard, world.workers[0].lease.partition):
        kind = next(kind for kind in KEPT if isinstance(part, kind))
        names = set(getattr(part, "__dict__", ()))
        names.update(name for base in type(part).__mro__ for name in getattr(base, "__slots__", ()))
        found += [f"{kind.__name__}.{name}" for name in sorted(names - {*KEPT[kind], *WITHOUT_EFFECT[kind]})]
    for kind, known in (
        (Bucket, {"holders", "now_ms", "reset_slot", "ring", "slot_ms", "slots", "spent"}),
        (
            Flight,
            {
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
            },
        ),
        (Waiter, {"aside", "claim", "direct", "gone", "settle"}),
    ):
        found += [f"{kind.__name__}.{name}" for name in sorted({*kind.__slots__} - known)]
    return found + [
        f"Store.{name}" for name in sorted({*world.store.__dict__} - {"buckets", "marker", "roll", "slots"})
    ]


# --- snapshots


Snapshot = tuple[Any, ...]


def snapshot(world: World) -> Snapshot:
    """The state of a world. It stays good whatever happens in that world afterwards."""
    workers = []
    for worker in world.workers:
        flight, lease = worker.flight, worker.lease
        partition = lease.partition
        shard = partition.shard
        inside = None
        if flight is not None:
            waiters = [*flight.takers, *(waiter for group in flight.groups.values() for waiter in group)]
            inside = (
                flight.takers,
                flight.groups,
                flight.dismissed,
                [(waiter, waiter.aside, waiter.direct) for waiter in waiters],
            )
        workers.append(
            (
                worker,
                (
                    lease.acked,
                    lease.aside,
                    lease.deadline,
                    lease.generation,
                    lease.has,
                    lease.heard,
                    lease.held_until,
                ),
                (
                    lease.offset_low_ms,
                    lease.offset_ms,
                    lease.opened,
                    lease.sent,
                    lease.slot,
                    lease.until,
                    worker.leases.seq,
                ),
                (
                    tuple(lease.journal),
                    tuple(lease.history),
                    lease.history_sum,
                    tuple(lease.refunds),
                    lease.recorded_until,
                ),
                (shard.absences, shard.away, shard.back_at, tuple(shard.due), tuple(shard.summoned)),
                (tuple(shard.waiting), worker.leases.fleet, worker.leases.alone_from),
                (partition.known, tuple(partition.owing), partition.roll, partition.told),
                (flight, inside, tuple(worker.air), worker.answer, worker.spared),
            )
        )
    return (
        workers,
        copy_store(world.store),
        world.saved,
        tuple(world.admissions),
        (world.tick, world.behind, world.run, world.there, world.ended, world.began, world.lost, world.ghost),
        tuple(world.left.values()),
    )


def restore(world: World, kept: Snapshot) -> None:
    workers, store, world.saved, admissions, plain, left = kept
    for place, (worker, numbers, times, lists, away, fleet, told, flying) in enumerate(workers):
        world.workers[place] = worker
        lease = worker.lease
        partition = lease.partition
        shard = partition.shard
        (
            lease.acked, lease.aside, lease.deadline, lease.generation, lease.has, lease.heard, lease.held_until,
        ) = numbers  # fmt: skip
        (
            lease.offset_low_ms, lease.offset_ms, lease.opened, lease.sent, lease.slot, lease.until, worker.leases.seq,
        ) = times  # fmt: skip
        journal, history, lease.history_sum, refunds, lease.recorded_until = lists
        lease.journal, lease.history, lease.refunds = list(journal), deque(history), list(refunds)
        shard.absences, shard.away, shard.back_at, due, summoned = away
        waiting, worker.leases.fleet, worker.leases.alone_from = fleet
        shard.due, shard.summoned, shard.waiting = dict.fromkeys(due), dict.fromkeys(summoned), deque(waiting)
        partition.known, owing, partition.roll, partition.told = told
        partition.owing = set(owing)
        worker.flight, inside, air, worker.answer, worker.spared = flying
        worker.air = list(air)
        if inside is not None:
            worker.flight.takers, worker.flight.groups, worker.flight.dismissed, waiters = inside
            for waiter, aside, direct in waiters:
                waiter.aside, waiter.direct = aside, direct
    world.store = copy_store(store)
    world.admissions = list(admissions)
    world.tick, world.behind, world.run, world.there, world.ended, world.began, world.lost, world.ghost = (
        plain
    )
    world.left = dict(zip(world.left, left, strict=True))


# --- keys


class _Keys:
    """Makes the key of one state."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.safe = world.size.mode == "safe"
        # A call that nobody waits for any more is refunded what it was granted directly.
        self.refunds = not set("fcs").isdisjoint(world.size.letters)
        self.store_ms = world.store_ms
        self.slot = self.store_ms // SLOT_MS
        self.first = self.slot - world.size.slots
        self.stores = [world.store] if world.saved is None else [world.store, world.saved]
        self.epochs = [store.marker[1] if store.marker is not None else "none" for store in self.stores]
        self.run = f"run{world.run}"
        self.roll_id = world.store.roll.id if world.store.roll is not None else "none"
        self.fresh = {sent.call.fresh for worker in world.workers for sent in worker.air}

    def slots(self, slot: int) -> int:
        return 99 if slot == CURRENT_SLOT else max(slot, self.first - 1) - self.slot

    def until(self, seconds: float, now: float) -> int:
        """Ticks until `seconds`; 0: it has come."""
        return max(0, ceil((seconds - now) * 1_000 / TICK_MS - 1e-6))

    def epoch(self, epoch: str) -> int:
        """An epoch is only ever compared with the store's, and with what a message on its way may plant there."""
        if epoch in self.epochs:
            return 1 + self.epochs.index(epoch)
        return 0 if not epoch else 3 if epoch in self.fresh else 4

    def roll(self, roll: str) -> int:
        return 0 if not roll else 1 if roll == self.roll_id else 2

    def entries(self, journal: Any, rank: dict[int, int]) -> Key:
        return tuple(
            [(rank[tag], self.slots(slot), count, reserved) for tag, slot, count, reserved in journal]
        )

    def call(self, call: Call, rank: dict[int, int]) -> Key:
        said: Key = (call.run == self.run, self.epoch(call.known), self.epoch(call.fresh))
        if self.safe:
            said += (call.back, call.reported, self.roll(call.roll), self.roll(call.fresh))
        for message in call.messages:
            said += (
                rank[message.seq],
                message.keep,
                message.want,
                rank[message.oldest],
                self.entries(message.journal, rank),
                len(call.groups),
            )
        return said

    def worker(self, worker: Worker) -> Key:
        world, lease = self.world, worker.lease
        now = world.now(worker)
        flight = worker.flight
        calls = [sent.call for sent in worker.air]
        if flight is not None:
            calls.append(flight.call)
        seqs = [worker.leases.seq, lease.sent, lease.acked]
        rank, records = self.ranks(worker.holder, calls, seqs, lease.journal)
        has, journal = lease.has, lease.journal
        spent = lease.opened - has
        if spent:
            last = journal[-1] if journal else None
            if last and last[0] == lease.sent and last[1] == lease.slot and last[3] == 1 and last[2] > 0:
                journal = [*journal[:-1], (last[0], last[1], last[2] + spent, 1)]
            else:
                journal = [*journal, (lease.sent, lease.slot, spent, 1)]
        if now >= lease.deadline:
            has = 0
        error = None
        if (has or self.safe or self.refunds or journal) and lease.offset_ms is not None:
            true = self.store_ms - now * 1_000
            error = (
                (lease.offset_ms - true) // TICK_MS,
                (lease.offset_low_ms - true) // TICK_MS,
            )
        flying: Key = ()
        if flight is not None:
            messages = flight.call.messages
            flying = (
                (flight.sent - now) * 1_000 // TICK_MS,
                (rank[messages[0].seq], messages[0].keep) if messages else (),
                flight.dismissed,
                len(flight.takers) + sum([len(group) for group in flight.groups.values()]),
                self.answer(worker.answer) if worker.answer is not None else (),
            )
        key: Key = (
            has,
            lease.aside,
            self.until(lease.deadline, now) if has or lease.aside else 0,
            self.until(lease.held_until, now),
            error,
            self.entries(journal, rank),
            rank[lease.sent],
            rank[worker.leases.seq],
            rank[lease.acked],
            self.epoch(lease.partition.known),
            worker.spared,
            flying,
            tuple(
                [
                    (sent.again, flight is not None and sent.call is flight.call, self.call(sent.call, rank))
                    for sent in worker.air
                ]
            ),
            records,
        )
        if self.safe:
            partition, shard = lease.partition, lease.partition.shard
            roll = world.store.roll
            key += (
                tuple([(self.until(end, now - 64.0), count) for end, count in lease.history]),
                shard.away,
                shard.absences - partition.told,
                0 if flight is None else shard.absences - flight.absences,
                bool(shard.summoned),
                self.roll(partition.roll),
                bool(partition.owing),
                roll is not None and worker.holder in roll.here,
                # Told to the store or not: after so long a return is news to nobody.
                max(LONG_AGO, round((shard.back_at - now) * 1_000 / TICK_MS)) if shard.back_at < 1e9 else 1,
                worker.leases.fleet,
                self.until(worker.leases.alone_from + world.limit.window_seconds, now)
                if worker.leases.alone_from > -1e9
                else 0,
            )
        if self.refunds:
            key += (
                tuple([at - world.tick for at, holder in world.admissions if holder == worker.holder]),
                tuple([self.slots(slot) for slot in lease.refunds]),
                self.until(lease.recorded_until, now),
            )
        return key

    def answer(self, answer: Answer) -> Key:
        said: Key = (self.epoch(answer.epoch), tuple(answer.direct), self.roll(answer.roll))
        for one in answer.keys:
            said += (one.status, one.granted, one.life_ms, one.held_ms, one.now_ms - self.store_ms)
        return said

    def ranks(
        self, holder: str, calls: list[Call], seqs: list[int], journal: Any
    ) -> tuple[dict[int, int], Key]:
        """The rank of each seq of a holder, and what the store knows of it."""
        found: list[Record | None] = []
        for store in self.stores:
            for bucket in store.buckets.values():
                record = bucket.holders.get(holder)
                found.append(record)
                if record is not None:
                    seqs.append(record.seq)
        flown: list[int] = []
        for call in calls:
            for message in call.messages:
                flown.append(message.seq)
                seqs.append(message.oldest)
                seqs += [entry[0] for entry in message.journal]
        seqs += [entry[0] for entry in journal]
        seqs += flown
        rank = {seq: number for number, seq in enumerate(sorted(set(seqs)))}
        records: list[Key] = []
        for record in found:
            if record is None:
                records.append(())
            elif record.live:
                left = (record.expires_ms - self.store_ms) // TICK_MS
                grant = record.grant if record.seq in flown else 0
                records.append((rank[record.seq], record.size, max(left, LONG_AGO), grant))
            else:
                records.append((rank[record.seq], record.size, self.slots(record.expires_ms // SLOT_MS)))
        return rank, tuple(records)

    def dead(self, holder: str) -> Key:
        ghost = self.world.ghost
        if ghost is not None and ghost[0] == holder:
            rank, records = self.ranks(holder, [ghost[1].call], [], ())
            return records, self.call(ghost[1].call, rank)
        # Nobody speaks for it any more: a reservation of nothing, or one that was converted, does nothing.
        records = self.ranks(holder, [], [], ())[1]
        records = tuple([record[1:3] if len(record) == 4 and record[1] else () for record in records])
        return records if any(records) else ()

    def bucket(self, bucket: Bucket) -> Key:
        ring = sorted([(self.slots(slot), count) for slot, count in bucket.ring.items() if count])
        reset = max(bucket.reset_slot, self.first - 1) - self.slot if self.refunds else 0
        if not self.world.size.lazy and not self.world.behind:
            return tuple(ring), reset
        return tuple(ring), reset, max((bucket.now_ms - self.store_ms) // TICK_MS, LONG_AGO)

    def marker(self, marker: tuple[str, str, int] | None) -> Key:
        if marker is None:
            return ()
        lost = max((marker[2] - self.store_ms) // TICK_MS, LONG_AGO) if marker[2] else 1
        born = (
            max((int(marker[1].rpartition("@")[2]) - self.store_ms) // TICK_MS, LONG_AGO)
            if "@" in marker[1]
            else 0
        )
        return marker[0] == self.run, lost, born

    def key(self) -> Key:
        world = self.world
        alive = [worker.holder for worker in world.workers]
        others = {
            holder for store in self.stores for bucket in store.buckets.values() for holder in bucket.holders
        }
        if world.ghost is not None:
            others.add(world.ghost[0])
        others.difference_update(alive)
        ages = sorted([at - world.tick for at, _ in world.admissions])
        key: Key = (
            world.tick % (SLOT_MS // TICK_MS),
            # Workers are alike: which is which makes no difference.
            tuple(sorted([dumps(self.worker(worker), 2) for worker in world.workers])),
            tuple(sorted([dead for dead in map(self.dead, others) if dead])) if others else (),
            tuple([self.bucket(bucket) for store in self.stores for bucket in store.buckets.values()]),
            tuple(ages),
            tuple(world.left.values()),
            tuple([self.marker(store.marker) for store in self.stores]),
        )
        if self.safe:
            roll = world.store.roll
            key += (
                () if world.began is None else max(world.began - world.tick, -world.size.window_ticks),
                () if world.ended is None else max(world.ended - world.tick, LONG_AGO),
                world.there,
                tuple([at - world.tick for at in world.lost if at >= world.tick - world.size.window_ticks]),
                ()
                if roll is None
                else ((roll.began_ms - self.store_ms) // TICK_MS, roll.fleet, len(roll.here)),
            )
        return key


def key(world: World) -> Key:
    """What two states have in common from which the same can follow."""
    return _Keys(world).key()


# --- the search


@dataclass
class Found:
    """What a search came to. `path`: the shortest one to a window over its bound, if there is one."""

    path: list[str] | None
    states: int
    steps: int
    depth: int
    exhaustive: bool
    seconds: float

    def __str__(self) -> str:
        end = "OVER: " + " ".join(self.path) if self.path else "exhaustive" if self.exhaustive else "bounded"
        return (
            f"{self.states:,} states, {self.steps:,} steps, depth {self.depth}, {self.seconds:.1f} s: {end}"
            + (f" ({len(self.path)} steps)" if self.path else "")
        )


def search(
    size: Size, rules: Rules | None = None, *, most_states: int = 1_000_000, seconds: float = 60.0
) -> Found:
    """Breadth first through all that may happen in a world of that size, from its beginning."""
    began = time.monotonic()
    world = World(size, rules)
    actions = size.actions()
    seen = {_digest(world)}
    parents, taken = array("l", [-1]), array("B", [0])
    depths = array("H", [0])
    frontier: deque[tuple[int, Snapshot]] = deque([(0, snapshot(world))])
    steps = 0

    def path_to(state: int) -> list[str]:
        path: list[str] = []
        while state:
            path.append(actions[taken[state]])
            state = parents[state]
        return path[::-1]

    def found(path: list[str] | None, *, exhaustive: bool) -> Found:
        return Found(path, len(seen), steps, depths[-1], exhaustive, time.monotonic() - began)

    while frontier:
        if len(seen) > most_states or time.monotonic() - began > seconds:
            return found(None, exhaustive=False)
        state, kept = frontier.popleft()
        clean = False
        for number, action in enumerate(actions):
            if not clean:
                restore(world, kept)
                clean = True
            if not world.possible(action):
                continue
            clean = False
            try:
                done = world.step(action)
            except OverError:
                return found([*path_to(state), action], exhaustive=False)
            steps += 1
            if not done:
                continue
            digest = _digest(world)
            if digest in seen:
                continue
            seen.add(digest)
            parents.append(state)
            taken.append(number)
            depths.append(depths[state] + 1)
            frontier.append((len(parents) - 1, snapshot(world)))
    return found(None, exhaustive=True)


def _digest(world: World) -> bytes:
    # Version 2 of marshal writes equal values alike, whatever else refers to them.
    return blake2b(dumps(key(world), 2), digest_size=12).digest()


def replay(size: Size, path: list[str], rules: Rules | None = None) -> World:
    """The world after these steps, without any snapshot. Raises OverError."""
    world = World(size, rules)
    for action in path:
        world.step(action)
    return world


# --- walks


@dataclass
class Walked:
    """What random walks came to. `path`: the shortest that was left of one over its bound, if there was one."""

    path: list[str] | None
    walks: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        end = f"OVER: {' '.join(self.path)} ({len(self.path)} steps)" if self.path else "not over"
        return f"{self.walks:,} walks, {self.steps:,} steps, {self.seconds:.1f} s: {end}"


LIKELY = {"t": 6, "r": 4, "q": 2, "p": 2, "k": 1, "K": 1}
"""How often an action is taken, against others; those that are not named: 2."""


def walks(
    size: Size, rules: Rules | None = None, *, seed: int = 1, most: int = 1_000_000, seconds: float = 5.0
) -> Walked:
    """Through one absence of the store each, and well past its end: there no search from the beginning comes.

    Many walks of some hundred steps, each with an absence somewhere in its first third. Equal seeds give equal
    walks.
    """
    began = time.monotonic()
    dice = Random(seed)
    actions = [action for action in size.actions() if action[0] not in "wy"]
    steps = walked = 0
    while walked < most and time.monotonic() - began < seconds:
        walked += 1
        world = World(size, rules)
        # Some windows of a tick each or none, so that an absence may be shorter than one.
        away = dice.randint(1, 30)
        back = away + dice.randint(1, 50)
        # An action that is likely in one walk is not in another.
        weights = [LIKELY.get(action[0], 2) * dice.choice((0.2, 1.0, 2.0)) for action in actions]
        path: list[str] = []
        try:
            for at in range(back + 80):
                action = "w" if at == away else "y" if at == back else dice.choices(actions, weights)[0]
                if world.possible(action):
                    path.append(action)
                    world.step(action)
        except OverError:
            return Walked(shortened(size, path, rules), walked, steps, time.monotonic() - began)
        finally:
            steps += len(path)
    return Walked(None, walked, steps, time.monotonic() - began)


def shortened(size: Size, path: list[str], rules: Rules | None = None) -> list[str]:
    """What is left of a path that is over when no step can be left out, nor any two."""

    def over(path: list[str]) -> bool:
        try:
            replay(size, path, rules)
        except OverError:
            return True
        return False

    together = max(1, len(path) // 2)
    while together:
        at = 0
        less = False
        while at < len(path):
            shorter = path[:at] + path[at + together :]
            if over(shorter):
                path, less = shorter, True
            else:
                at += 1
        if not less:
            together //= 2
    return path
