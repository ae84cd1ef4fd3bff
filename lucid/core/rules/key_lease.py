"""One key in one worker: tokens at hand, the journal of spends, the deny cache, admissions without the store.

The rules are told in `leases`, which owns these and is the only one to use them.
"""

from collections import deque
from collections.abc import Callable

import msgspec

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import CURRENT_SLOT, SLOTS, Entry, KeyAnswer, Message, Op, Status

STRICT_RETRY_SECONDS = 1.0
"""What a caller is told while only the store could say more: the store is tried at least that often."""


RECALL_STEPS_SECONDS = (0.015, 0.05, 0.2)
"""When a request that waits for what other workers hold asks the store again: a push, their call, then ours take
some milliseconds; a worker that is busy may take longer, one that is dead never answers."""
RECALL_PAUSE_SECONDS = 0.5
"""Between two recalls of a key by one worker, in which its refusals come from memory."""


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


class Counters:
    """Plain numbers since the worker began; read them at scrape."""

    __slots__ = (
        "calls",
        "degraded",
        "direct",
        "expired",
        "granted",
        "late",
        "refused",
        "refused_from_memory",
        "returned",
        "spent",
    )

    def __init__(self) -> None:
        self.granted = 0
        self.spent = 0
        self.returned = 0
        self.expired = 0
        """Tokens that ran out of life unspent, or that the store told us to forget."""
        self.refused = 0
        """By the store."""
        self.refused_from_memory = 0
        self.calls = 0
        self.direct = 0
        self.degraded = 0
        """Decisions made without the store, either way."""
        self.late = 0


class Worker:
    """What all leases of a worker share. `Leases` is the one there is."""

    def __init__(self, fleet: int, most_live: int) -> None:
        self.counters = Counters()
        self.away = False
        self.seq = 0
        """The last seq sent, over all keys: it never comes again, also when a key was forgotten meanwhile."""
        self.fleet = fleet
        self.live: dict[KeyLease, None] = {}
        """Those that the store must still hear about."""
        self.most_live = most_live
        self.recall: Callable[[list[KeyLease]], None] | None = None
        """Asks other workers for what they hold of these keys, and calls `Leases.recall_step` with them at each of
        `RECALL_STEPS_SECONDS`; set by the owner, None where nobody can be asked."""


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
        "deadline",
        "deny_until",
        "elsewhere",
        "fields_pattern",
        "flying",
        "free",
        "free_at",
        "generation",
        "has",
        "held_until",
        "history",
        "history_sum",
        "identifier",
        "journal",
        "key",
        "limit",
        "low",
        "offset_ms",
        "opened",
        "policy",
        "recall_paused",
        "recalled",
        "recalled_at",
        "recalling",
        "renew_at",
        "reserved",
        "sent",
        "shape",
        "since",
        "slot",
        "state_pattern",
        "until",
        "worker",
        "x_pattern",
    )

    def __init__(self, worker: Worker, limit: Limit, identifier: str, shape: Shape) -> None:
        self.worker = worker
        self.identifier = identifier
        self.key = f"rate_limit:{limit.name}:{identifier}"
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
        self.free = 0
        self.free_at = 0.0
        self.deny_until = 0.0
        self.elsewhere = 0
        """What other workers held as of the store's last answer."""
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
        self.slot = CURRENT_SLOT
        self.until = 0.0
        self.journal = [(tag, CURRENT_SLOT, count, reserved) for tag, _, count, reserved in self.journal]
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
            self._note(self.slot, spent, 1)
            self.worker.counters.spent += spent
            self.admitted(now, spent)
        if now >= self.deadline:
            if self.has:
                self.worker.counters.expired += self.has
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

    def spend_aside(self, generation: int, now: float) -> bool:
        """False: the token put aside has expired meanwhile."""
        if generation != self.generation or now >= self.deadline:
            return False
        self.take_back(generation)
        if now >= self.until:
            self.roll(now)
        self.has -= 1
        return True

    def _note(self, slot: int, count: int, reserved: int) -> None:
        tag = self.sent
        if self.journal:
            last = self.journal[-1]
            if last[0] == tag and last[1] == slot and last[3] == reserved:
                self.journal[-1] = (tag, slot, last[2] + count, reserved)
                return
        self.journal.append((tag, slot, count, reserved))
        if len(self.journal) > 2 * self.shape.slots:
            self._shorten()

    def _shorten(self) -> None:
        """Bounds the journal, never to the caller's gain: of two entries made one, the later tag and slot."""
        first = self.slot - self.shape.slots if self.slot != CURRENT_SLOT else 0
        self.journal = [entry for entry in self.journal if entry[1] >= first]
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
        return self.worker.away or now < self.held_until

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
        if self.journal and self.slot != CURRENT_SLOT:
            first = int((now * 1_000 + (self.offset_ms or 0.0)) // self.shape.slot_ms) - self.shape.slots
            self.journal = [entry for entry in self.journal if entry[1] >= first]
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
        self.roll(now)
        self._forget(now)
        share = max(1, self.limit.requests // worker.fleet)
        return max(0, share - self.history_sum - self.has - self.aside)

    def spend_local(self, now: float) -> None:
        slot = CURRENT_SLOT
        if self.offset_ms is not None:
            slot = int((now * 1_000 + self.offset_ms) // self.shape.slot_ms)
        self._note(slot, 1, 0)
        self.admitted(now, 1)
        self.worker.live[self] = None

    # --- what the caller sees

    def remaining(self, now: float) -> int:
        has = self.has if now < self.deadline else 0
        if self.worker.away or now < self.held_until:
            return has + self.room(now)
        return has + self.free

    def reset_seconds(self, now: float) -> int:
        wait = self.free_at - now
        if wait <= 0:
            window = self.shape.slots * self.shape.slot_ms / 1_000
            wait = self.history[0][0] + window - now if self.history else window
        # What was spent a window ago is forgotten with the next admission, so it may still stand first.
        return int(max(0.0, wait)) + 1

    def blocked_seconds(self, now: float) -> float:
        """Until a token may be had, if nobody else spends; 0: now, as far as this worker knows."""
        if self.has > 0 and now < self.deadline:
            return 0.0
        if self.local(now):
            if self.room(now):
                return 0.0
            if self.limit.redis_down == "safe" and self.history and self.worker.fleet:
                return max(0.0, self.history[0][0] + self.shape.slots * self.shape.slot_ms / 1_000 - now)
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

    def message(self, now: float, waiting: int, closing: bool) -> Message:
        """The next message; from here on this seq counts as sent."""
        self.roll(now)
        gives_back = closing or self.recalled
        self.recalled = False
        wanted, life_ms = (0, self.shape.short_ms) if gives_back else self.plan(now, waiting)
        if not wanted and self.has:
            self.worker.counters.returned += self.has
            self.has = self.opened = 0
        self.low = -1
        self.worker.seq += 1
        message = Message(
            op=Op.SETTLE,
            limit=self.limit.requests,
            slot_ms=self.shape.slot_ms,
            long_ms=self.shape.long_ms,
            seq=self.worker.seq,
            keep=self.has + self.aside,
            want=wanted,
            life_ms=life_ms,
            short_ms=min(self.shape.short_ms, life_ms),
            oldest=self.acked,
            journal=list(self.journal),
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
        self.offset_ms = answer.now_ms - sent * 1_000
        kept = message.keep
        if answer.status != Status.DONE:
            self.worker.counters.expired += self.has
            self.has = self.opened = self.aside = kept = 0
            self.generation += 1
        self.reserved = kept + answer.granted
        life = answer.life_ms / 1_000
        if self.reserved:
            # Clocks drift apart by less than 0.1 %; 2 ms are for the store's rounding.
            self.deadline = sent + life - life / 1_000 - 0.002
            self.renew_at = sent + life * 0.75
            self.worker.live[self] = None
        self.has += answer.granted
        self.opened = self.has
        self.low = (self.has + 9) // 10 if answer.granted else -1
        self.worker.counters.granted += answer.granted
        self.free = answer.free
        self.elsewhere = answer.elsewhere
        self.free_at = now + answer.free_ms / 1_000 if answer.free_ms else 0.0
        self.deny_until = 0.0
        if answer.held_ms:
            # From the time of sending: it ends early rather than late.
            self.held_until = sent + answer.held_ms / 1_000
        elif answer.free <= 0 and not (answer.elsewhere and (self.recalling or self.may_recall(now))):
            # What others hold may come back before a slot leaves, and nobody tells: look again a slot later.
            wait_ms = min(answer.free_ms, self.shape.slot_ms) if answer.elsewhere else answer.free_ms
            self.deny_until = now + wait_ms / 1_000
        self.roll(now)
