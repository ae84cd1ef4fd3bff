"""One worker: `Courier` and `LeaseStore` as events on the virtual clock. Where their timing changes, this must."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.simulator import contact
from benchmarks.simulator.contact import Flight, KeyLease, Leases
from benchmarks.simulator.measure import Tape

if TYPE_CHECKING:
    from benchmarks.simulator.loop import Loop

# Two clocks are rounded against each other: a timer that fires a hair early would be set again for ever.
LATER_SECONDS = 1e-7


class Pod:
    """`number` is its place in the fleet; a killed worker's successor takes it over under another holder."""

    def __init__(self, loop: "Loop", number: int, kind: type[Leases], dice: random.Random) -> None:
        self.loop = loop
        self.number = number
        self.leases = contact.new_leases(kind, dice)
        self.leases.wake = self._wake_soon
        self.skew = dice.uniform(0.0, 1e6)
        self.pace = 1.0 + dice.uniform(-50e-6, 50e-6)
        self.at = loop.at
        self.dead = False
        self.serving = False
        self.paused_until = 0.0
        self.flying: Flight | None = None
        self.missed = False
        self.away_from = 0.0
        self.absences: list[tuple[float, float]] = []
        self.recalls = 0
        self.directs = 0
        self._charged_at = 0.0
        self._counters = contact.counters(self.leases)
        self._wake_at = float("inf")
        self._background_due = 0.0
        self._next_probe = 0.0
        self._sweep_at = 0.0
        self._sweeps = True
        self._held_until = 0.0
        self._probe_pause = contact.FIRST_PROBE_SECONDS

    def now(self) -> float:
        return self.at * self.pace + self.skew

    def _in(self, seconds: float) -> float:
        """The world's time when so many of this worker's seconds have passed."""
        return self.at + max(0.0, seconds) / self.pace + LATER_SECONDS

    def _held_up(self, at: float, what: Callable[[float, Any], None], arg: Any) -> bool:
        """Whether this worker is dead, or paused: then `what` happens afterwards."""
        if self.dead:
            return True
        if at < self.paused_until:
            self.loop.add(self.paused_until, what, arg)
            return True
        self.at = at
        return False

    # --- life

    def start(self) -> None:
        self._watch_the_fleet()
        self._fly(self.leases.probe(self.now()))
        # Workers do not sweep in step.
        self._sweep_at = self._in(self.loop.dice.random() * contact.SWEEP_SECONDS)
        self.loop.add(self._sweep_at, self.swept, None)

    def kill(self, at: float) -> None:
        self.end(at)
        self.dead = True

    def end(self, at: float) -> None:
        if self.leases.shard.away and self.serving:
            self.absences.append((self.away_from, at))

    # --- requests

    def late_request(self, at: float, arg: Any) -> None:
        """A request that came while the worker was paused."""
        if not self._held_up(at, self.late_request, arg):
            self.loop.request(at, self, arg)

    def ask(self, at: float, claim: contact.Claim, tape: Tape, number: int) -> None:
        """`LeaseStore.admit`, after a `take` that said WANTING. `number`: which of the tape's arrivals it is."""
        self.at = at

        def settle(admitted: bool) -> None:
            directs = self._counters.direct
            if admitted:
                tape.admit(self.at, self._charged_at if directs > self.directs else self.at)
            else:
                tape.refuse(number)
            self.directs = directs

        self.leases.wait(claim, settle)
        self._wake_now()

    # --- Courier._turn and LeaseStore._sweep_always

    def _wake_soon(self, shard: object) -> None:
        if not self._background_due:
            self._background_due = self.now() + contact.BACKGROUND_SECONDS
            if self.flying is None:
                self._wake(self._in(contact.BACKGROUND_SECONDS))

    def _wake_now(self) -> None:
        if self.flying is None and not self.leases.shard.away:
            self._turn()

    def _due_now(self) -> None:
        """What `LeaseStore` does after a sweep or a recall."""
        shard = self.leases.shard
        if shard.due or shard.summoned:
            self._background_due = self.now()
            self._wake_now()

    def _wake(self, at: float) -> None:
        if at < self._wake_at:
            self._wake_at = at
            self.loop.add(at, self.woken, at)

    def woken(self, at: float, due: object) -> None:
        if due == self._wake_at:
            # Whatever it was set for: from here on another may be set.
            self._wake_at = float("inf")
        if not self._held_up(at, self.woken, None) and self.flying is None:
            self._turn()

    def _turn(self) -> None:
        leases = self.leases
        now = self.now()
        if leases.shard.away:
            if now < self._next_probe:
                self._wake(self._in(self._next_probe - now))
            else:
                self._fly(leases.probe(now))
        elif leases.shard.waiting or (self._background_due and now >= self._background_due):
            self._background_due = 0.0
            flight = contact.compose(leases, now)
            if flight is not None:
                self._fly(flight)
        elif self._background_due:
            self._wake(self._in(self._background_due - now))

    def swept(self, at: float, arg: Any) -> None:
        if self._held_up(at, self.swept, None):
            return
        self._watch_the_fleet()
        leases = self.leases
        leases.sweep(self.now())
        self._due_now()
        if leases.live or leases.shard.away or self.flying is not None or at < self._held_until:
            self._sweep_at = self._in(contact.SWEEP_SECONDS)
            self.loop.add(self._sweep_at, self.swept, None)
        else:
            self._sweeps = False

    def _sweep_again(self) -> None:
        """Sweeps that would find nothing are left out: with 1,000 workers they are most of all events."""
        if not self._sweeps:
            self._sweeps = True
            missed = int((self.at - self._sweep_at) / contact.SWEEP_SECONDS)
            self._sweep_at += (missed + 1) * contact.SWEEP_SECONDS
            self.loop.add(self._sweep_at, self.swept, None)
            self._watch_the_fleet()

    def _watch_the_fleet(self) -> None:
        reachable, size = self.loop.registry(self.at, self.number)
        self.leases.recall = self._recall if reachable else None
        self.leases.fleet = max(self.leases.fleet, size)

    # --- one call

    def _fly(self, flight: Flight) -> None:
        loop = self.loop
        server = loop.server
        self.flying = flight
        self.missed = False
        self._sweep_again()
        loop.calls += 1
        arrives = self.at + server.delay()
        opens = server.open_at(arrives, self.number)
        run = server.run
        if opens == float("inf"):
            loop.add(arrives, self.failed, flight)
            return
        if server.lost():
            # The connection breaks, sooner or later; half of the time only after the message came through.
            if loop.dice.random() < 0.5:
                loop.add(opens, loop.run_late, (flight, run))
            loop.add(self.at + loop.dice.random() * contact.ANSWER_SECONDS, self.failed, flight)
        else:
            loop.add(opens, loop.serve, (self, flight, run))
            if server.doubled():
                loop.add(opens + loop.dice.expovariate(0.5), loop.run_late, (flight, run))
            if opens - self.at >= contact.ANSWER_SECONDS:
                loop.add(self._in(contact.ANSWER_SECONDS), self.failed, flight)
        now = self.now()
        last = now + contact.MOST_DEADLINES * contact.DEADLINE_SECONDS
        loop.add(
            self._in(contact.DEADLINE_SECONDS),
            self.deadline,
            (flight, now + contact.DEADLINE_SECONDS, last),
        )

    def deadline(self, at: float, arg: Any) -> None:
        flight: Flight
        flight, due, last = arg
        if self.flying is not flight or self.missed or self._held_up(at, self.deadline, arg):
            return
        now = self.now()
        lag = now - due
        if lag > contact.LAG_SECONDS and now < last:
            self.loop.add(self._in(lag), self.deadline, (flight, now + lag, last))
            return
        self.missed = True
        self._go_away()
        self.leases.abandon(flight, now)
        self.leases.decide_waiting(now)

    def answered(self, at: float, arg: Any) -> None:
        flight: Flight
        flight, answer, executed_at = arg
        if self.flying is not flight or self._held_up(at, self.answered, arg):
            return
        self.flying = None
        self._charged_at = executed_at
        self.directs = self._counters.direct
        held_ms = max((key.held_ms for key in answer.keys), default=0)
        now = self.now()
        self.leases.apply(flight, answer, now)
        if held_ms:
            self._held_until = at + held_ms / 1_000
            self.absences.append((at, self._held_until))
        if self.missed:
            self.leases.late += 1
            self._next_probe = now + contact.FIRST_PROBE_SECONDS
        elif self.leases.shard.away:
            self._probe_pause = contact.FIRST_PROBE_SECONDS
            self.leases.shard.arrive(now)
            if self.serving:
                self.absences.append((self.away_from, at))
        self.serving = True
        self._turn()

    def failed(self, at: float, arg: Any) -> None:
        flight: Flight = arg
        if self.flying is not flight or self._held_up(at, self.failed, flight):
            return
        self.flying = None
        self._go_away()
        self.leases.fail(flight, self.now())
        self.leases.decide_waiting(self.now())
        self.serving = True
        self._turn()

    def _go_away(self) -> None:
        shard = self.leases.shard
        if shard.away and self.serving:
            self._probe_pause = min(contact.LONGEST_PROBE_SECONDS, self._probe_pause * 2)
        else:
            self.leases.leave(shard, self.now())
            self.away_from = self.at
            self._probe_pause = contact.FIRST_PROBE_SECONDS
        self._next_probe = self.now() + self._probe_pause

    # --- recalls

    def _recall(self, leases: list[KeyLease]) -> None:
        self.recalls += 1
        now = self.now()
        report = any(self.leases.rolling(lease, now) for lease in leases)
        self.loop.publish(self, [lease.key for lease in leases], report)
        for seconds in contact.RECALL_STEPS_SECONDS:
            self.loop.add(self._in(seconds), self.recall_step, leases)

    def recall_step(self, at: float, leases: Any) -> None:
        if self._held_up(at, self.recall_step, leases):
            return
        self.leases.recall_step(leases)
        self._wake_now()

    def on_recall(self, at: float, arg: Any) -> None:
        if self._held_up(at, self.on_recall, arg):
            return
        keys, report = arg
        if not self._sweeps and not report:
            # It holds nothing.
            return
        for key in keys:
            self.leases.give_back(key, report=report)
        self._due_now()
