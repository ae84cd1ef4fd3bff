"""One key in one worker: tokens at hand, the journal of spends, the deny cache, admissions without the store.

The rules are told in `leases`, which owns these and is the only one to use them.
"""

from collections import deque
from collections.abc import Callable

import msgspec

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import CURRENT_SLOT, SLOTS, Entry, KeyAnswer, Message, Op, Status
from lucid.core.rules.shards import Partition, Shard

MOST_REFUNDS = 64
"""Of one key that wait to be told."""

YOUNG_MS = 2_000
"""In `safe`, after what may have been a first start of the store: who knows better calls within that time. In `strict`
it counts as a loss."""

LOOK_MS = 1_000
"""So long a key is refused from memory at the most while what others hold of it may come back."""
FRESH_SECONDS = 1.0
"""So long the store's last word on what is free is shown to a caller whom other workers serve too."""

STRICT_RETRY_SECONDS = 1.0
"""What a caller is told while only the store could say more: the store is tried at least that often."""


RECALL_STEPS_SECONDS = (0.015, 0.05, 0.2)
"""When a request that waits for what other workers hold asks the store again: a push, their call, then ours take
some milliseconds; a worker that is busy may take longer, one that is dead never answers."""
RECALL_PAUSE_SECONDS = 0.5
"""Between two recalls of a key by one worker, in which its refusals come from memory."""


def key_of(name: str, identifier: str) -> str:
    """The key in the store of one limit on one identifier."""
    return f"rate_limit:{name}:{identifier}"


class Shape(msgspec.Struct, frozen=True):
    """What follows from a window. For 60 s: slots of 0.5 s, leases of 2 to 10 s."""

    slots: int
    slot_ms: int
    short_ms: int
    long_ms: int

    @classmethod
    def of(cls, limit: Limit) -> "Shape":
        window_ms = limit.window_seconds * 1_000
        return cls(SLOTS, -(-window_ms // SLOTS), min(2_000, window_ms // 30), min(10_000, window_ms // 6))


class Counters(msgspec.Struct):
    """Plain numbers since the worker began, of one limit or of all; read them at scrape."""

    granted: int = 0
    spent: int = 0
    """Out of leases; what was granted directly is not among them."""
    returned: int = 0
    expired: int = 0
    """Tokens that ran out of life unspent, or that the store told us to forget."""
    direct: int = 0
    refused: int = 0
    """By the store."""
    refused_from_memory: int = 0
    degraded: int = 0
    """Decisions made without the store, either way."""
    refunded: int = 0
    """Given back because another limit, charged later, refused the request."""
    calls: int = 0
    """Of one limit: messages about its keys, many of which share a call. Of all: calls."""
    late: int = 0
    """Answers that came after the deadline; they are used all the same. Of all only."""

    def add(self, other: "Counters") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Worker:
    """What all leases of a worker share. `Leases` is the one there is."""

    def __init__(self, fleet: int, most_live: int) -> None:
        self.counters_of: dict[str, Counters] = {}
        """By limit."""
        self.seq = 0
        """The last seq sent, over all keys: it never comes again, also when a key was forgotten meanwhile."""
        self.fleet = fleet
        self.alone_from = float("-inf")
        """When this worker came, if it has only been told of a fleet: whose place it took may have had its share."""
        self.live: dict[KeyLease, None] = {}
        """Those that the store must still hear about."""
        self.most_live = most_live
        self.recall: Callable[[list[KeyLease]], None] | None = None
        """Asks other workers for what they hold of these keys, and calls `Leases.recall_step` with them at each of
        `RECALL_STEPS_SECONDS`; set by the owner, None where nobody can be asked."""
        self.wake: Callable[[Shard], None] = lambda shard: None
        """Called when something became due in the background; set by the owner."""


class KeyLease:
    """One key in this worker: the tokens at hand and what the store must be told.

    `until` ends what the hot path may do without thinking: the lease's deadline or the journal's slot,
    whichever comes first. Spends since the slot was opened are `opened - has`.
    """

    __slots__ = (
        "__weakref__",
        "acked",
        "aside",
        "counted",
        "counters",
        "deadline",
        "deny_until",
        "elsewhere",
        "fields_pattern",
        "flying",
        "free",
        "free_at",
        "generation",
        "has",
        "heard",
        "held_until",
        "history",
        "history_sum",
        "identifier",
        "journal",
        "key",
        "limit",
        "low",
        "offset_low_ms",
        "offset_ms",
        "opened",
        "partition",
        "policy",
        "recall_paused",
        "recalled",
        "recalled_at",
        "recalling",
        "recorded_until",
        "refunds",
        "renew_at",
        "reserved",
        "sent",
        "shape",
        "since",
        "slot",
        "spent_there",
        "state_pattern",
        "until",
        "worker",
        "x_pattern",
        "young_ms",
    )

    def __init__(
        self, worker: Worker, limit: Limit, identifier: str, shape: Shape, partition: Partition
    ) -> None:
        self.worker = worker
        self.partition = partition
        self.counters = worker.counters_of.setdefault(limit.name, Counters())
        self.identifier = identifier
        self.key = key_of(limit.name, identifier)
        self.journal: list[Entry] = []
        self.become(limit, shape)
        self.has = 0
        self.low = -1
        self.opened = 0
        self.deadline = 0.0
        self.renew_at = 0.0
        self.reserved = 0
        """What the store holds for us as of its last answer."""
        self.aside = 0
        """Tokens put aside for requests that wait for another limit's."""
        self.generation = 0
        """Moves when tokens are forgotten: what was put aside before is then worth nothing."""
        self.sent = worker.seq
        self.acked = 0
        self.flying = False
        self.offset_ms: float | None = None
        """The store's time minus ours, at most so much too large: maps a time late, never early."""
        self.offset_low_ms = 0.0
        """The same, but too small by at most as much: maps a time early, never late."""
        self.heard = 0.0
        self.refunds: list[int] = []
        """Slots of what is to be given back."""
        self.recorded_until = 0.0
        """Until then the store has this worker on record for this key."""
        self.free = 0
        self.free_at = 0.0
        self.deny_until = 0.0
        self.elsewhere = 0
        """What other workers held as of the store's last answer."""
        self.spent_there = 0
        """What all workers had spent as of then."""
        self.recalled = False
        """Another worker has need of what is held here: the next message returns it."""
        self.recalled_at = float("-inf")
        """When this worker asked others for theirs."""
        self.recalling = 0
        """Steps of that recall to come; above 0 nobody is refused by this key."""
        self.recall_paused = False
        """Whether who waits for it waits for the next step."""
        self.held_until = 0.0
        self.history: deque[tuple[float, int]] = deque()
        """`(end of slot, admissions)` by this worker's own clock: what `safe` counts by."""
        self.history_sum = 0
        self.counted = 0
        self.since = 0.0

    def become(self, limit: Limit, shape: Shape) -> None:
        """Takes a new size under the same name. Tokens at hand stay good; slots are numbered anew."""
        self.limit = limit
        self.shape = shape
        hold_ms = (shape.slots + 2) * shape.slot_ms + shape.long_ms
        self.young_ms = {"strict": hold_ms, "safe": YOUNG_MS, "open": 0}[limit.redis_down]
        self.slot = CURRENT_SLOT
        self.until = 0.0
        self.refunds = []
        self.journal = [
            (tag, CURRENT_SLOT, count, reserved) for tag, _, count, reserved in self.journal if count > 0
        ]
        quoted = limit.name.replace("\\", "\\\\").replace('"', '\\"').encode()
        self.policy = b'"%b";q=%d;w=%d' % (quoted, limit.requests, limit.window_seconds)
        self.state_pattern = b'"%b";r=%%d;t=%%d' % quoted.replace(b"%", b"%%")
        self.x_pattern = (
            b"X-RateLimit-Limit: %d\r\nX-RateLimit-Remaining: %%d\r\nX-RateLimit-Reset: %%d\r\n"
            % limit.requests
        )
        self.fields_pattern = b"RateLimit-Policy: %b\r\nRateLimit: %b\r\n%b" % (
            self.policy.replace(b"%", b"%%"),
            self.state_pattern,
            self.x_pattern,
        )

    # --- tokens at hand

    def roll(self, now: float) -> None:
        """Journals the spends since the slot was opened, forgets what expired, opens the slot of `now`."""
        spent = self.opened - self.has
        if spent:
            self._note(now, self.slot, spent, 1)
            self.counters.spent += spent
            self.admitted(now, spent)
        if now >= self.deadline:
            if self.has:
                self.counters.expired += self.has
                self.has = 0
            self.generation += 1
            self.aside = 0
        self.opened = self.has
        slot_ms = self.shape.slot_ms
        if self.offset_ms is None:
            self.slot, self.until = CURRENT_SLOT, self.deadline
        else:
            self.slot = int((now * 1_000 + self.offset_ms) // slot_ms)
            self.until = min(self.deadline, ((self.slot + 1) * slot_ms - self.offset_ms) / 1_000)

    def ready(self, now: float) -> bool:
        """Whether a token is at hand; call `spend` or `put_aside` in the same step."""
        if self.has > 0 and now >= self.until:
            self.roll(now)
        return self.has > 0 and now < self.until

    def nudge(self, now: float) -> None:
        """The lease runs low. Where nothing is free anyway, asking would only cost a call."""
        self.low = -1
        if now >= self.deny_until and not self.flying:
            shard = self.partition.shard
            shard.due[self] = None
            self.worker.wake(shard)

    def put_aside(self) -> tuple["KeyLease", int]:
        self.has -= 1
        self.opened -= 1
        self.aside += 1
        return self, self.generation

    def take_back(self, generation: int) -> None:
        if generation == self.generation:
            self.aside -= 1
            self.has += 1
            self.opened += 1

    def keeps(self, generation: int, now: float) -> bool:
        """Whether the token put aside then is still good."""
        return generation == self.generation and now < self.deadline

    def spend_aside(self, now: float) -> None:
        """Spends a token put aside, which `keeps`."""
        self.take_back(self.generation)
        if now >= self.until:
            self.roll(now)
        self.has -= 1

    def _note(self, now: float, slot: int, count: int, reserved: int) -> None:
        tag = self.sent
        if self.journal:
            last = self.journal[-1]
            if last[0] == tag and last[1] == slot and last[3] == reserved and (last[2] > 0) == (count > 0):
                self.journal[-1] = (tag, slot, last[2] + count, reserved)
                return
        self.journal.append((tag, slot, count, reserved))
        if len(self.journal) > 2 * self.shape.slots:
            self._shorten(now)

    def _earliest_slot(self, now: float, at: float) -> int:
        """No later than the store's slot at `at`: what must not be mapped late, as all spends are."""
        # Clocks drift apart by less than 0.1 %: 1 ms for each second since the store told its time.
        slack_ms = now - self.heard + 1
        return int((at * 1_000 + self.offset_low_ms - slack_ms) // self.shape.slot_ms)

    def _counts(self, entry: Entry, now: float) -> bool:
        """Whether what was journaled may still count in some window."""
        return self.offset_ms is None or entry[1] >= self._earliest_slot(now, now) - self.shape.slots

    def _shorten(self, now: float) -> None:
        """Bounds the journal, never to the caller's gain: of two entries made one, the later tag and slot."""
        # Of a refund no entry is made with others: in a later slot it would be to the caller's gain.
        self.journal = [entry for entry in self.journal if entry[2] > 0 and self._counts(entry, now)]
        while len(self.journal) > 2 * self.shape.slots:
            one, two = self.journal[:2]
            both = (max(one[0], two[0]), max(one[1], two[1]), one[2] + two[2], min(one[3], two[3]))
            self.journal[:2] = [both]

    def may_recall(self, now: float) -> bool:
        """Whether others hold what is not free, and can be asked for it. Until then nobody is refused."""
        return (
            self.elsewhere > 0
            and self.worker.recall is not None
            and now - self.recalled_at >= RECALL_PAUSE_SECONDS
        )

    # --- without the store

    def local(self, now: float) -> bool:
        """Whether this key is decided here alone: the store is away, or holds back after a loss of data."""
        return self.partition.shard.away or now < self.held_until

    def admitted(self, now: float, count: int) -> None:
        self.counted += count
        slot_seconds = self.shape.slot_ms / 1_000
        end = (now // slot_seconds + 1) * slot_seconds
        if self.history and self.history[-1][0] >= end:
            end, before = self.history.pop()
            self.history.append((end, before + count))
        else:
            self.history.append((end, count))
        self.history_sum += count
        self._forget(now)

    def _forget(self, now: float) -> None:
        window = self.shape.slots * self.shape.slot_ms / 1_000
        while self.history and self.history[0][0] + window <= now:
            self.history_sum -= self.history.popleft()[1]

    def still_tells(self, now: float) -> bool:
        """Whether anything journaled still counts in some window."""
        if self.journal:
            self.journal = [entry for entry in self.journal if self._counts(entry, now)]
        self._forget(now)
        return bool(self.history)

    def room(self, now: float) -> int:
        """How many this worker may admit on its own at `now` (on top of tokens at hand)."""
        if self.limit.redis_down == "strict":
            return 0
        if self.limit.redis_down == "open":
            return self.limit.requests
        worker = self.worker
        if not worker.fleet or (len(worker.live) >= worker.most_live and self not in worker.live):
            return 0
        if now < worker.alone_from + self.limit.window_seconds:
            return 0
        self.roll(now)
        self._forget(now)
        return max(0, self.share() - self.history_sum - self.has - self.aside)

    def clip(self, now: float) -> None:
        """On its own a worker admits its share and no more, out of a lease too: in `safe` others count on that."""
        self.roll(now)
        self._forget(now)
        share = self.share()
        surplus = self.has + self.aside + self.history_sum - share
        if not share or surplus <= 0:
            return
        self.counters.returned += min(surplus, self.has + self.aside)
        self.has = self.opened = max(0, self.has - surplus)
        if self.aside + self.history_sum > share:
            # Who waits with a token put aside is decided anew.
            self.generation += 1
            self.aside = 0

    def share(self) -> int:
        """What each worker of the fleet may admit on its own in a window; 0 unless that is bounded and above 0."""
        if self.limit.redis_down != "safe" or not self.worker.fleet:
            return 0
        return max(1, self.limit.requests // self.worker.fleet)

    def spend_local(self, now: float) -> None:
        slot = CURRENT_SLOT
        if self.offset_ms is not None:
            slot = int((now * 1_000 + self.offset_ms) // self.shape.slot_ms)
        self._note(now, slot, 1, 0)
        self.admitted(now, 1)
        self.worker.live[self] = None
        self.partition.owing.add(self)

    def refund(self, now: float, since: float) -> None:
        """Gives back what a request that began at `since` was charged here, as it was refused elsewhere.

        It names the earliest slot that may have been charged. Where the store's time is not known, or too many wait
        already, nothing is given back.
        """
        if self.offset_ms is None or len(self.refunds) >= MOST_REFUNDS:
            return
        self.refunds.append(self._earliest_slot(now, since))
        self.counters.refunded += 1
        self.worker.live[self] = None

    def _tell_refunds(self, now: float) -> None:
        """A refund is only told to a store that has this worker on record: only then it is applied once."""
        if now < self.recorded_until:
            for slot in self.refunds:
                self._note(now, slot, -1, 0)
            self.refunds = []
        elif not self.journal:
            self._note(now, self.slot, 0, 0)

    # --- what the caller sees

    def remaining(self, now: float) -> int:
        has = self.has if now < self.deadline else 0
        if self.local(now):
            return min(self.limit.requests, has + self.room(now))
        others = self.elsewhere > 0 or self.spent_there > self.history_sum
        if others and now - self.heard > FRESH_SECONDS:
            return has
        return has + self.free

    def reset_seconds(self, now: float) -> int:
        wait = max(self.free_at, self.held_until) - now
        if wait <= 0:
            wait = self._own_wait(now, self.limit.requests) or self.shape.slots * self.shape.slot_ms / 1_000
        # What was spent a window ago is forgotten with the next admission, so it may still stand first.
        return int(max(0.0, wait)) + 1

    def _own_wait(self, now: float, most: int) -> float:
        """Until fewer than `most` own admissions are in a window, and the first has left; 0: there is none."""
        window = self.shape.slots * self.shape.slot_ms / 1_000
        excess = max(1, self.history_sum - most + 1)
        for end, count in self.history:
            excess -= count
            if excess <= 0:
                return max(0.0, end + window - now)
        return 0.0

    def blocked_seconds(self, now: float) -> float:
        """Until a token may be had, if nobody else spends; 0: now, as far as this worker knows."""
        if self.has > 0 and now < self.deadline:
            return 0.0
        if self.local(now):
            if self.room(now):
                return 0.0
            if self.history and self.share():
                # The store, should it be back by then, may count what others had.
                return max(self._own_wait(now, self.share()), self.free_at - now)
            return max(STRICT_RETRY_SECONDS, self.held_until - now)
        return max(0.0, self.free_at - now) if self.free <= 0 else 0.0

    # --- the store's answers

    def plan(self, now: float, waiting: int) -> tuple[int, int]:
        """`(tokens wanted, life_ms)` from this worker's own rate; `(0, …)`: no lease is worth its report.

        A lease from 4 tokens a life on, lives of 16 tokens' time (design: sizes, found by simulation). Fewer
        than 4 seen do not make a rate.
        """
        short, long = self.shape.short_ms, self.shape.long_ms
        elapsed_ms = (now - self.since) * 1_000
        if elapsed_ms > 2 * long:
            self.counted, elapsed_ms = 0, float(short)
        elif elapsed_ms > long:
            self.counted, elapsed_ms = self.counted // 2, elapsed_ms / 2
        self.since = now - elapsed_ms / 1_000
        seen = self.counted + waiting
        rate_per_ms = seen / max(elapsed_ms, short)
        life_ms = int(min(max(16 / rate_per_ms, short), long)) if seen else short
        wanted = min(int(rate_per_ms * life_ms), self.limit.requests)
        return (wanted if seen >= 4 and wanted >= 4 else 0), life_ms

    def given_up(self, message: Message) -> None:
        """The call's fate is unknown: the store may hold what was asked for until the next message."""
        self.flying = False
        if message.want or message.keep or message.journal:
            self.reserved = message.keep + message.want
            self.renew_at = 0.0
            self.worker.live[self] = None

    def message(self, now: float, waiting: int, need: int, closing: bool) -> Message:
        """The next message; from here on this seq counts as sent. `need`: tokens that requests wait for."""
        self.roll(now)
        if self.refunds:
            self._tell_refunds(now)
        gives_back = closing or self.recalled
        self.recalled = False
        wanted, life_ms = (0, self.shape.short_ms) if gives_back else self.plan(now, waiting)
        if not wanted and self.has:
            self.counters.returned += self.has
            self.has = self.opened = 0
        self.low = -1
        self.worker.seq += 1
        self.counters.calls += 1
        keep = self.has + self.aside
        message = Message(
            op=Op.SETTLE,
            limit=self.limit.requests,
            slot_ms=self.shape.slot_ms,
            long_ms=self.shape.long_ms,
            seq=self.worker.seq,
            keep=keep,
            want=max(wanted, keep + need) if need else wanted,
            life_ms=life_ms,
            # Short lives near the limit are for callers of other workers, who are better off with a recall.
            short_ms=life_ms if self.worker.recall is not None else min(self.shape.short_ms, life_ms),
            oldest=self.acked,
            journal=list(self.journal),
            need=need,
            # Who does not know the fleet does not know either what the others may have had: all of it.
            share=self.share() or (self.limit.requests if self.limit.redis_down == "safe" else 0),
            young_ms=self.young_ms,
        )
        self.sent = message.seq
        self.flying = True
        return message

    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        """Takes the answer to the last message sent. `sent` is the time just before it was sent first."""
        self.flying = False
        self.roll(now)
        self.journal = [entry for entry in self.journal if entry[0] >= message.seq]
        self.acked = message.seq
        if not any(entry[3] == 0 for entry in self.journal):
            self.partition.owing.discard(self)
        self.offset_ms = answer.now_ms - sent * 1_000
        self.offset_low_ms = answer.now_ms - now * 1_000
        self.heard = now
        kept = message.keep
        if answer.status != Status.DONE:
            self.counters.expired += self.has
            self.has = self.opened = self.aside = kept = 0
            self.generation += 1
        self.reserved = kept + answer.granted
        life = answer.life_ms / 1_000
        # Clocks drift apart by less than 0.1 %; 2 ms are for the store's rounding.
        ends = sent + life - life / 1_000 - 0.002
        if message.journal or answer.granted or now < self.recorded_until:
            self.recorded_until = ends
        if self.reserved:
            self.deadline = ends
            self.renew_at = sent + life * 0.75
            self.worker.live[self] = None
        self.has += answer.granted
        self.opened = self.has
        self.low = (self.has + 9) // 10 if answer.granted else -1
        self.counters.granted += answer.granted
        self.free = answer.free
        self.elsewhere = answer.elsewhere
        self.spent_there = answer.spent
        self.free_at = now + answer.free_ms / 1_000 if answer.free_ms else 0.0
        self.deny_until = 0.0
        if answer.held_ms:
            # From the time of sending: it ends early rather than late.
            self.held_until = sent + answer.held_ms / 1_000
        elif answer.free <= 0 and not (answer.elsewhere and (self.recalling or self.may_recall(now))):
            # What others hold may come back before a slot leaves, and nobody tells: look again a slot later.
            wait_ms = min(answer.free_ms, self.shape.slot_ms, LOOK_MS) if answer.elsewhere else answer.free_ms
            self.deny_until = now + wait_ms / 1_000
        if self.local(now):
            self.clip(now)
        self.roll(now)
