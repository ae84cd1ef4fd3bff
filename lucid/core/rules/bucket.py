"""The store's side of the hybrid limiter, as plain objects: what `wire/bucket.lua` does inside Redis.

A key (one limit, one identifier) has a ring of slots with what was *spent* in each, and per worker a
record `(seq, size, expires, live or converted)` of what it holds. K slots make a window, **K + 1 are
counted**, so that a spend counts from its use until a whole window after the end of its slot.

 1. Grant at most `limit - counted slots - all live reservations`, what the caller keeps included.
 2. A spend is charged to the slot that the worker names (late, never early), at most to the current one.
 3. At now >= expires a reservation is converted, at full size, into slot(expires), by whoever comes next.
 4. Message `(seq, keep, want, journal)`: a lower seq than recorded is nothing; an equal one is answered
    with the same grant and applies nothing (nor does it prolong anything); a higher one applies the
    entries with tag >= the recorded seq, keeps `keep`, then is granted to. A record below the oldest tag
    that the worker still holds proves that the store was rolled back: it is charged in full.
 5. A settle after conversion gives back `size - spent - keep`, once, to slot(expires) while that is counted.
    What the worker kept stays charged there and is no longer its own: the answer says DROPPED.
    An entry with a negative count is a refund: a request that was charged here and then refused by another
    limit. It is taken from the first charged slot at or after the one that it names, which is not after the
    one that was charged, by the same rule of tags; where all is charged because the record is missing or
    below, it is left out: its charge may be forgotten, or the message be a doubled one.
 6. to 9. are the worker's: see `leases`.
10. A direct grant is charged to the current slot at once; nothing is reserved.
11. A group of limits is charged directly as a whole or not at all.
12. A reset clears the ring and keeps live reservations.
13. When the clock steps back, the last time seen counts.

Data loss: the marker names the server's run and an epoch. Another run, or a marker that is missing
although the caller knew one, means that spends may be forgotten: then nothing is granted for a window, a
lease's life and a slot. A marker that is missing to a caller that knew none may be a first start, or a loss of
which this newcomer cannot know: then nothing is granted for the message's `young_ms`, in which others would tell.

Roll call: after an outage every worker may have admitted up to its `share` of each key, and the store cannot
know. Until all have told, or `roll_ms` have passed, it reserves that much for each that is missing.

R1. A call that is the first after its worker's absence (`back`) begins one, with nobody here, unless one is
    on that its worker did not know of when it went away.
R2. A worker is here once it says, by the roll call's id, that it has `reported` all. A call that was sent
    before the outage and ran late knows another id, or none, and proves nothing.
R3. Of the largest fleet that any caller named, the caller and who is here are not missing; while none named
    one, somebody is. When all are here
    the roll call ends.

Both sides must stay equal: `tests/rules/test_bucket.py` and `tests/wire/test_bucket_script.py` run one
contract suite on this and on the script, and compare them on generated conversations.
"""

import enum

import msgspec

SLOTS = 120
"""K. 0.5 s a slot for a window of a minute: at 20 times the limit 99.2 % is admitted (K / (K + 1))."""

CURRENT_SLOT = 2**50
"""A slot later than any: charged to the current one. For spends of a worker that knows no store's time."""


class Op(enum.IntEnum):
    SETTLE = 0
    LOOK = 1
    RESET = 2


class Status(enum.IntEnum):
    DONE = 0
    STALE = 1
    """The seq was recorded before: nothing was applied."""
    DROPPED = 2
    """Applied, but what the worker kept is not its own any more: it must forget those tokens."""


Entry = tuple[int, int, int, int]
"""`(tag, slot, count, reserved)`: `reserved` 0 for spends without a lease, made while the store was away.

A count below 0 is a refund, `reserved` 0. Its slot must not be after the one that was charged, since a later
slot would free what others spent there and are still to be counted for. 0 only has the store record its worker.
"""


class Message(msgspec.Struct, array_like=True):
    """What a worker says about one key."""

    op: int
    limit: int
    slot_ms: int
    long_ms: int
    """The longest life that any lease of this key may have."""
    seq: int = 0
    keep: int = 0
    want: int = 0
    """Tokens that the worker would like to hold in all; 0: no lease."""
    life_ms: int = 0
    short_ms: int = 0
    """The life that is given instead when less than a quarter of the limit is free."""
    oldest: int = 0
    """The oldest tag whose entries the worker still holds."""
    journal: list[Entry] = []
    need: int = 0
    """So many are granted first, up to all that is free: requests wait for them. `want` >= `keep` + `need`."""
    share: int = 0
    """What each worker may admit on its own while the store is away; 0: nothing is reserved for the missing."""
    young_ms: int = 0
    """So long nothing is granted after what may have been a first start."""


class Group(msgspec.Struct, array_like=True):
    """`count` waiting requests, each to be charged to all of `members` (indexes of messages) or to none."""

    count: int
    members: list[int]


class Call(msgspec.Struct, array_like=True):
    """One call: the messages are for the keys that travel beside it, in the same order."""

    run: str
    """The server's run_id as read when the connection was made; empty: unknown."""
    known: str
    """The epoch that the worker knows; empty: none."""
    fresh: str
    """The epoch to plant if one is due: different in each call."""
    holder: str
    slots: int
    messages: list[Message]
    groups: list[Group] = []
    fleet: int = 0
    """The largest number of workers that this one ever knew; 0: none told."""
    back: bool = False
    """The first call after the worker's absence."""
    reported: bool = False
    """Everything that this worker admitted on its own is told, or in this call."""
    roll: str = ""
    """The roll call that the worker knows; empty: none."""
    roll_ms: int = 3_000
    """The longest that a roll call may last."""


class KeyAnswer(msgspec.Struct, array_like=True):
    status: int
    granted: int
    life_ms: int
    """What is left of the lease's life, of the tokens kept too."""
    free: int
    """Left after this call's grants."""
    free_ms: int
    """Until more becomes free for sure, if nobody else spends; 0: nothing is spent, held or awaited."""
    elsewhere: int
    """Held live by others, and reserved for workers that a roll call misses."""
    held_ms: int
    """For so long nothing is granted: data were lost."""
    now_ms: int
    """The key's time: the store's, or the last one seen if that was later."""
    spent: int
    holders: int
    """Live reservations above 0, the caller's own included."""


class Answer(msgspec.Struct, array_like=True):
    epoch: str
    direct: list[int]
    """Per group, how many of its requests were charged."""
    keys: list[KeyAnswer]
    roll: str = ""
    """The roll call that is on, while it misses the caller; empty: none."""


class Record(msgspec.Struct):
    seq: int
    size: int
    expires_ms: int
    grant: int
    live: bool


class RollCall(msgspec.Struct):
    id: str
    began_ms: int
    fleet: int
    here: set[str]


class Bucket:
    """One key. Its times are the store's, in milliseconds; it never sees a worker's clock."""

    __slots__ = ("holders", "now_ms", "reset_slot", "ring", "slot_ms", "slots", "spent")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.now_ms = 0
        self.slot_ms = 0
        self.ring: dict[int, int] = {}
        self.spent = 0
        self.reset_slot = -1
        """In which the ring was last cleared: charges of then and before are not refunded."""
        self.holders: dict[str, Record] = {}

    @property
    def slot(self) -> int:
        return self.now_ms // self.slot_ms

    def advance(self, now_ms: int, slot_ms: int) -> None:
        """Moves to `now_ms`: slots that left are forgotten, what expired is converted (rules 3 and 13)."""
        self.now_ms = max(self.now_ms, now_ms)
        if slot_ms != self.slot_ms:
            # The window was configured anew: slot numbers mean something else, so all counts as spent now.
            renewed = self.slot_ms > 0
            self.slot_ms = slot_ms
            self.ring = {self.slot: self.spent} if self.spent else {}
            self.reset_slot = self.slot if renewed else -1
            for record in self.holders.values():
                if not record.live:
                    record.size = 0
        first = self.slot - self.slots
        for slot in [slot for slot in self.ring if slot < first]:
            self.spent -= self.ring.pop(slot)
        for holder, record in list(self.holders.items()):
            expired = record.expires_ms // slot_ms
            if record.live and self.now_ms >= record.expires_ms:
                record.live = False
                self.charge(expired, record.size)
            if not record.live and (expired < first or record.size == 0):
                del self.holders[holder]

    def charge(self, slot: int, count: int) -> None:
        slot = min(slot, self.slot)
        if count > 0 and slot >= self.slot - self.slots:
            self.ring[slot] = self.ring.get(slot, 0) + count
            self.spent += count

    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        """Rules 2, 4 and 5. The status, and how many of the tokens kept are still the worker's."""
        record = self.holders.get(holder)
        if record is not None and message.seq <= record.seq:
            return Status.STALE, 0
        keep = message.keep
        trusted = record if record is not None and record.seq >= message.oldest else None
        if record is not None and trusted is None and record.live:
            self.charge(self.slot, record.size)
        reported = 0
        for tag, slot, count, reserved in message.journal:
            if trusted is None:
                self.charge(slot, count)
            elif tag < trusted.seq:
                continue
            elif count < 0:
                self._refund(slot, -count)
            elif reserved and not trusted.live:
                reported += count
            else:
                self.charge(slot, count)
        if trusted is None:
            keep = 0
        elif not trusted.live:
            self._give_back(trusted.expires_ms // self.slot_ms, trusted.size - reported - keep)
            keep = 0
        if record is not None or message.journal:
            # Kept even when empty: it is what makes a doubled message harmless.
            self.holders[holder] = Record(message.seq, keep, self.now_ms + message.life_ms, 0, True)
        return (Status.DROPPED if message.keep > keep else Status.DONE), keep

    def _give_back(self, slot: int, count: int) -> None:
        count = min(count, self.ring.get(slot, 0))
        if count > 0:
            self.spent -= count
            self.ring[slot] -= count
            if not self.ring[slot]:
                del self.ring[slot]

    def _refund(self, slot: int, count: int) -> None:
        if slot < self.slot - self.slots or slot <= self.reset_slot:
            return  # What was charged may have left, or been cleared.
        for each in range(slot, self.slot + 1):
            taken = min(count, self.ring.get(each, 0))
            self._give_back(each, taken)
            count -= taken

    def reserved(self) -> int:
        return sum(record.size for record in self.holders.values() if record.live)

    def lease(self, message: Message, holder: str, kept: int, free: int) -> tuple[int, int]:
        """Rule 1 and the sizes: `(granted, life_ms)`.

        What requests wait for comes first; beyond it at most half of what is free or an even share of it.
        """
        others = sum(1 for name, held in self.holders.items() if held.live and held.size and name != holder)
        life_ms = message.life_ms if free * 4 >= message.limit else message.short_ms
        fair = min(free // 2, free // (others + 1))
        granted = max(0, min(message.want - kept, max(message.need, fair), free))
        record = self.holders.get(holder)
        if record is None and granted:
            record = self.holders[holder] = Record(message.seq, 0, 0, 0, True)
        if record is not None:
            record.size += granted
            record.grant = granted
            record.expires_ms = self.now_ms + life_ms
        return granted, life_ms

    def reset(self) -> None:
        """Rule 12. What is converted was in the ring: nothing of it may be given back afterwards."""
        self.ring.clear()
        self.spent = 0
        self.reset_slot = self.slot
        for holder in [holder for holder, record in self.holders.items() if not record.live]:
            del self.holders[holder]

    def free_ms(self, limit: int) -> int:
        """Until so much of what is counted has left the ring that a token is free, or what expires first will have."""
        if self.ring:
            oldest = min(self.ring)
            excess = self.spent + self.reserved() - limit
            for slot in sorted(self.ring) if excess > 0 else ():
                oldest = slot
                excess -= self.ring[slot]
                if excess < 0:
                    break
        else:
            ends = [record.expires_ms for record in self.holders.values() if record.live and record.size]
            if not ends:
                return 0
            oldest = min(ends) // self.slot_ms
        return (oldest + self.slots + 1) * self.slot_ms - self.now_ms


class Store:
    """All keys and the marker. `call` is one run of the script."""

    def __init__(self, slots: int = SLOTS) -> None:
        self.slots = slots
        self.buckets: dict[str, Bucket] = {}
        self.marker: tuple[str, str, int] | None = None
        """`(run, epoch, lost at)`; lost at 0: nothing was lost."""
        self.roll: RollCall | None = None

    def _judge_marker(self, call: Call, now_ms: int) -> tuple[str, int]:
        """The epoch and when data were lost. The epoch of what may be a first start says when that was."""
        if self.marker is None:
            self.roll = None
            lost = bool(call.known)
            self.marker = (call.run, call.fresh if lost else f"{call.fresh}@{now_ms}", now_ms * lost)
        run, epoch, lost_ms = self.marker
        if call.run and run != call.run:
            self.marker = (call.run, call.fresh, now_ms)
        elif call.known and call.known != epoch and not lost_ms:
            # A newcomer, who could not know, planted the marker before one that knew the older came by.
            self.marker = (run, epoch, now_ms)
        return self.marker[1], self.marker[2]

    def _call_roll(self, call: Call, now_ms: int) -> tuple[int, int, str]:
        """R1 to R3: how many are missing, for how long at most, and the roll call that misses the caller."""
        roll = self.roll
        if roll is not None and now_ms - roll.began_ms >= call.roll_ms:
            roll = None
        if call.back and (roll is None or roll.id == call.roll):
            roll = RollCall(call.fresh, now_ms, 0, set())
        self.roll = roll
        if roll is None:
            return 0, 0, ""
        roll.fleet = max(roll.fleet, call.fleet)
        if call.reported and call.roll == roll.id:
            roll.here.add(call.holder)
            if len(roll.here) >= roll.fleet > 0:
                self.roll = None
                return 0, 0, ""
        missing = max(0, roll.fleet - len(roll.here | {call.holder})) if roll.fleet else 1
        return missing, roll.began_ms + call.roll_ms - now_ms, "" if call.holder in roll.here else roll.id

    def call(self, keys: list[str], call: Call, now_ms: int) -> Answer:
        epoch, lost_ms = self._judge_marker(call, now_ms)
        born_ms = int(epoch.rpartition("@")[2]) if "@" in epoch else 0
        missing, roll_left_ms, roll = self._call_roll(call, now_ms)
        buckets: list[Bucket] = []
        statuses: list[tuple[Status, int]] = []
        free: list[int] = []
        held: list[int] = []
        may: list[bool] = []
        for key, message in zip(keys, call.messages, strict=True):
            bucket = self.buckets.get(key) or Bucket(call.slots)
            if message.op == Op.SETTLE:
                self.buckets[key] = bucket
            bucket.advance(now_ms, message.slot_ms)
            status = (Status.DONE, 0)
            if message.op == Op.RESET:
                bucket.reset()
            elif message.op == Op.SETTLE:
                status = bucket.settle(message, call.holder)
            hold_ms = (call.slots + 2) * message.slot_ms + message.long_ms
            held_ms = lost_ms + hold_ms - bucket.now_ms if lost_ms else 0
            held_ms = max(0, held_ms, born_ms + message.young_ms - bucket.now_ms)
            buckets.append(bucket)
            statuses.append(status)
            held.append(held_ms)
            may.append(message.op == Op.SETTLE and status[0] is not Status.STALE and not held_ms)
            free.append(max(0, message.limit - bucket.spent - bucket.reserved() - message.share * missing))
        direct: list[int] = []
        for group in call.groups:
            count = min(group.count, *(free[index] if may[index] else 0 for index in group.members))
            for index in group.members:
                buckets[index].charge(buckets[index].slot, count)
                free[index] -= count
            direct.append(count)
        answers: list[KeyAnswer] = []
        for index, (bucket, message) in enumerate(zip(buckets, call.messages, strict=True)):
            status_, kept = statuses[index]
            granted = life_ms = 0
            record = bucket.holders.get(call.holder)
            if status_ is Status.STALE:
                if record is not None and record.live and record.seq == message.seq:
                    granted, life_ms = record.grant, record.expires_ms - bucket.now_ms
            elif message.op == Op.SETTLE:
                # Nothing is granted while held, but what is kept lives on.
                granted, life_ms = bucket.lease(message, call.holder, kept, free[index] if may[index] else 0)
                free[index] -= granted
            awaited = message.share * missing
            live = {name: held_.size for name, held_ in bucket.holders.items() if held_.live and held_.size}
            answers.append(
                KeyAnswer(
                    status=status_.value,
                    granted=granted,
                    life_ms=life_ms,
                    free=0 if held[index] else free[index],
                    free_ms=bucket.free_ms(message.limit) or (roll_left_ms if awaited else 0),
                    elsewhere=awaited + sum(size for name, size in live.items() if name != call.holder),
                    held_ms=held[index],
                    now_ms=bucket.now_ms,
                    spent=bucket.spent,
                    holders=len(live),
                )
            )
        return Answer(epoch, direct, answers, roll)
