"""The circuit breaker of one backend in one worker.

The rules, which everything below only carries out:

CLOSED      Every call passes. `failure_threshold` failures in a row open the breaker; so does a share of
            `failure_rate` among at least `minimum_calls` calls of the last `rate_window_seconds`, because a
            backend that fails nine calls of ten may never fail five in a row.
OPEN        Every call is refused until the open time is over; then the breaker is HALF_OPEN. The open time
            is `recovery_timeout`, doubled with each round of trials that failed, up to
            `maximum_recovery_timeout`. Up to 10 % is added, never taken off, so that workers which opened
            together do not probe together.
HALF_OPEN   Trials in flight and trials that succeeded are never more than `success_threshold` together;
            other calls are refused. That many successes close, one failure opens again. A neutral end gives
            the place back. A trial that has not ended `trial_timeout` after it began is a failure.

A call is `try_acquire`, then the request with all its retries, then `settle`, where the fate of the answer is
decided on its head. The permit between the two is settled exactly once: a second `settle` does nothing, so a
`finally` may always settle as NEUTRAL (the caller left, the call never began, the gateway itself refused). If
the body of an answer settled as SUCCESS breaks off later, `body_broke` says so, once.

Each transition, reset and override begins a new generation with empty counters. A permit belongs to the
generation that gave it; what it reports into another one is counted in `late_results` and changes nothing
else. That is why slow failures of calls begun before the opening do not move it, and why an old success
cannot close a half-open breaker.

Time is the caller's: `now` is in seconds of one monotonic clock. The breaker moves only when called, but
dates what became due in between to the moment at which it was due. So its state follows from the calls and
their outcomes alone, never from how often somebody looked.

The operator's override: forced OPEN refuses everything, forced CLOSED lets everything pass and still counts
outcomes. Back in AUTO, a breaker forced CLOSED starts afresh; one forced OPEN starts HALF_OPEN, since nobody
has seen the backend work meanwhile.

Not thread-safe and not in need of it: no method awaits, so each is one step of its event loop.

Sources: sony/gobreaker for the generation and for acquiring and settling in two steps; Netflix Hystrix for
the numbers of the rolling window (50 % of at least 20 calls in 10 s, kept in ten slots).
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

FAILURE_STATUSES: Final = frozenset({502, 503, 504})
"""Statuses of an answer that are failures of the backend by default. 500 is not among them: it comes from
a backend that works, and one caller's request may provoke it at will."""

OPEN_TIME_JITTER: Final = 0.1
OPEN_TIME_GROWTH: Final = 2.0
RATE_WINDOW_SLOTS: Final = 10
LEAST_RETRY_AFTER_SECONDS: Final = 1.0
"""What a refused caller is told while trials are under way: they may end at any moment, and Retry-After
counts in whole seconds (RFC 9110, 10.2.3)."""


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(enum.Enum):
    """How a call ended: NEUTRAL says nothing about the backend."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


class BreakerMode(enum.Enum):
    """The operator's override: AUTO means that there is none."""

    AUTO = "auto"
    OPEN = "open"
    CLOSED = "closed"


class Reason(enum.Enum):
    """Why a generation ended."""

    CONSECUTIVE_FAILURES = "consecutive_failures"
    FAILURE_RATE = "failure_rate"
    RECOVERY_TIMEOUT = "recovery_timeout"
    TRIALS_SUCCEEDED = "trials_succeeded"
    TRIAL_FAILED = "trial_failed"
    TRIAL_TIMED_OUT = "trial_timed_out"
    OVERRIDE = "override"
    RESET = "reset"


class Transition(msgspec.Struct, frozen=True):
    """What listeners hear.

    `old` and `new` are equal where only the override changed or a reset emptied the counters. `generation`
    is the one that began; `at` is when the change was due, in seconds of the breaker's clock.
    """

    name: str
    old: BreakerState
    new: BreakerState
    reason: Reason
    mode: BreakerMode
    generation: int
    at: float


class BreakerSnapshot(msgspec.Struct, frozen=True):
    """One breaker as it stands: what a worker sends to the fleet's view and to the metrics.

    `calls`, `failures` and `failure_rate` are those of the rolling window. `opened_seconds_ago` is None while
    CLOSED, `half_open_in_seconds` unless an open time is running. From `refused` on, all counts are since
    construction.
    """

    name: str
    state: BreakerState
    mode: BreakerMode
    generation: int
    consecutive_failures: int
    calls: int
    failures: int
    failure_rate: float
    opened_seconds_ago: float | None
    half_open_in_seconds: float | None
    trials_in_flight: int
    trials_succeeded: int
    refused: int
    opened: int
    late_results: int
    broken_bodies: int
    listener_errors: int


class BreakerFleet(msgspec.Struct, frozen=True):
    """The breakers of one backend in all workers together: workers by state and by override, and sums."""

    workers: int
    closed: int
    open: int
    half_open: int
    forced_open: int
    forced_closed: int
    calls: int
    failures: int
    failure_rate: float
    refused: int
    opened: int
    late_results: int


class _Generation:
    """Compared by identity, so that a permit of a breaker replaced under a running request is late, too."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


_CLOSED: Final = BreakerState.CLOSED
_OPEN: Final = BreakerState.OPEN
_HALF_OPEN: Final = BreakerState.HALF_OPEN
_SUCCESS: Final = Outcome.SUCCESS
_AUTO: Final = BreakerMode.AUTO

# What Permit._slot holds besides the slot of the rate window in which the call was settled as a success.
_UNSETTLED: Final = -1
_SPENT: Final = -2


# A msgspec struct has __slots__ and is made in C, in a third of the time of a plain class with an __init__.
# It refers to its generation only, which refers to nothing: no cycle, so the collector need not track it.
class Permit(msgspec.Struct, eq=False, gc=False):
    """Leave to make one call. Made by `CircuitBreaker.try_acquire`; afterwards it must be settled there."""

    _generation: _Generation
    _slot: int = _UNSETTLED

    @property
    def generation(self) -> int:
        return self._generation.number

    @property
    def settled(self) -> bool:
        return self._slot != _UNSETTLED


def no_jitter() -> float:
    return 0.0


class CircuitBreaker:
    """Decides whether a call to a backend may be made, from how the calls before it ended.

    All times are in seconds. `failure_rate` is a share in (0, 1], or None for a breaker that only counts
    failures in a row. `trial_timeout` guards against a trial that is never settled: set it above the time
    that connecting and waiting for the head of an answer may take. `maximum_recovery_timeout` is how late
    the end of a long outage may be noticed (jitter apart); where it is less than `recovery_timeout`, that
    one counts. `jitter` is called once per opening and returns a number in [0, 1].

    Raises ValueError, naming the parameter, for a number out of its range.
    """

    def __init__(
        self,
        name: str,
        *,
        failure_threshold: int = 5,
        recovery_timeout: float = 30.0,
        success_threshold: int = 2,
        failure_rate: float | None = 0.5,
        minimum_calls: int = 20,
        rate_window_seconds: float = 10.0,
        trial_timeout: float = 40.0,
        maximum_recovery_timeout: float = 120.0,
        jitter: Callable[[], float] = no_jitter,
    ) -> None:
        for parameter, count in (
            ("failure_threshold", failure_threshold),
            ("success_threshold", success_threshold),
            ("minimum_calls", minimum_calls),
        ):
            if count < 1:
                raise ValueError(f"{parameter} must be 1 or more, not {count}")
        for parameter, seconds in (
            ("recovery_timeout", recovery_timeout),
            ("rate_window_seconds", rate_window_seconds),
            ("trial_timeout", trial_timeout),
            ("maximum_recovery_timeout", maximum_recovery_timeout),
        ):
            if not 0.0 < seconds < math.inf:
                raise ValueError(f"{parameter} must be a positive number of seconds, not {seconds}")
        if failure_rate is not None and not 0.0 < failure_rate <= 1.0:
            raise ValueError(f"failure_rate must be more than 0 and at most 1, not {failure_rate}")
        self.name = name
        self._failure_threshold = failure_threshold
        self._recovery_timeout = recovery_timeout
        self._success_threshold = success_threshold
        self._failure_rate = failure_rate
        self._minimum_calls = minimum_calls
        self._slot_seconds = rate_window_seconds / RATE_WINDOW_SLOTS
        self._trial_timeout = trial_timeout
        self._maximum_recovery_timeout = maximum_recovery_timeout
        self._jitter = jitter

        self._mode = _AUTO
        self._state: BreakerState = _CLOSED
        self._generation = _Generation(0)
        # None unless CLOSED, so that the hot path compares once.
        self._closed_generation: _Generation | None = self._generation
        self._streak = 0
        # The latest open time before its jitter; 0 once CLOSED or forced OPEN, so that growth starts anew.
        self._open_seconds = 0.0
        self._opened_at = 0.0
        self._half_open_at = math.inf
        self._trials: dict[Permit, float] = {}  # in flight, with their deadlines
        self._succeeded = 0

        # Calls of the current slot have a counter of their own, written to the ring when the slot ends:
        # what the hot path adds to is an attribute, not an item of a list.
        self._slot = 0
        self._slot_ends = self._slot_seconds
        self._slot_calls = 0
        self._window_calls = [0] * RATE_WINDOW_SLOTS
        self._window_failures = [0] * RATE_WINDOW_SLOTS

        self._refused = 0
        self._opened = 0
        self._late_results = 0
        self._broken_bodies = 0
        self._listeners: list[Callable[[Transition], None]] = []
        self._transitions: deque[Transition] = deque()
        self._telling = False
        self._listener_errors = 0

    @property
    def mode(self) -> BreakerMode:
        return self._mode

    @property
    def generation(self) -> int:
        return self._generation.number

    def try_acquire(self, now: float) -> Permit | None:
        """Leave for one call, to be closed with `settle`; or None: refuse the call, and say `retry_after`."""
        generation = self._closed_generation
        if generation is not None:
            return Permit(generation)
        self.tick(now)
        if self._state is _CLOSED:  # a listener's doing
            return Permit(self._generation)
        if self._state is _OPEN or len(self._trials) + self._succeeded >= self._success_threshold:
            self._refused += 1
            return None
        trial = Permit(self._generation)
        self._trials[trial] = now + self._trial_timeout
        return trial

    def settle(self, permit: Permit, outcome: Outcome, now: float) -> None:
        """Say how the call of this permit ended. Only the first time counts."""
        if permit._slot != _UNSETTLED:
            return
        if outcome is _SUCCESS and permit._generation is self._closed_generation:
            if now >= self._slot_ends:
                self._next_slot(now)
            permit._slot = self._slot
            self._slot_calls += 1
            self._streak = 0
            return
        permit._slot = _SPENT
        if not self._is_current(permit, now):
            return
        if outcome is Outcome.NEUTRAL:
            self._trials.pop(permit, None)
        elif outcome is Outcome.FAILURE:
            if self._state is _HALF_OPEN:
                self._open(Reason.TRIAL_FAILED, now)
            else:
                if now >= self._slot_ends:
                    self._next_slot(now)
                self._slot_calls += 1
                self._count_failure(self._slot, now)
        else:
            del self._trials[permit]
            permit._slot = self._slot
            self._succeeded += 1
            if self._succeeded == self._success_threshold:
                self._begin(_CLOSED, Reason.TRIALS_SUCCEEDED, now)

    def body_broke(self, permit: Permit, now: float) -> None:
        """Say that the body of this call's answer broke off on the backend's side after its head.

        Turns the call's success into a failure, once; a permit that is not settled yet is settled as one. A
        body whose head is older than the rate window is only counted in `broken_bodies`: when one of
        several endpoints restarts, streams opened an hour ago end in one instant and say nothing about the
        calls of now.
        """
        slot = permit._slot
        if slot == _UNSETTLED:
            self.settle(permit, Outcome.FAILURE, now)
            return
        if slot == _SPENT:
            return
        permit._slot = _SPENT
        self._broken_bodies += 1
        if not self._is_current(permit, now):
            return
        if self._state is _HALF_OPEN:
            self._open(Reason.TRIAL_FAILED, now)
            return
        if now >= self._slot_ends:
            self._next_slot(now)
        if self._slot - slot < RATE_WINDOW_SLOTS:
            self._count_failure(slot, now)

    def retry_after(self, now: float) -> float:
        """Seconds, more than 0, after which a call refused at `now` may be tried again."""
        if self._mode is BreakerMode.OPEN:
            return self._recovery_timeout
        if self._state is _OPEN and now < self._half_open_at:
            return self._half_open_at - now
        return LEAST_RETRY_AFTER_SECONDS

    def tick(self, now: float) -> None:
        """Carry out what time alone has made due. The other methods do so themselves."""
        while True:
            if self._state is _OPEN and now >= self._half_open_at:
                self._begin(_HALF_OPEN, Reason.RECOVERY_TIMEOUT, self._half_open_at)
            elif self._trials and now >= (deadline := min(self._trials.values())):
                self._open(Reason.TRIAL_TIMED_OUT, deadline)
            else:
                return

    def override(self, mode: BreakerMode, now: float) -> None:
        """Set the operator's override. The mode that is already set changes nothing."""
        self.tick(now)
        if mode is self._mode:
            return
        was_forced_open = self._mode is BreakerMode.OPEN
        self._mode = mode
        if mode is BreakerMode.OPEN:
            self._open(Reason.OVERRIDE, now)
        elif mode is _AUTO and was_forced_open:
            self._begin(_HALF_OPEN, Reason.OVERRIDE, now)
        else:
            self._begin(_CLOSED, Reason.OVERRIDE, now)

    def reset(self, now: float) -> None:
        """Forget what was observed: CLOSED with empty counters. An override stays; forced OPEN stays open."""
        self.tick(now)
        self._begin(_OPEN if self._mode is BreakerMode.OPEN else _CLOSED, Reason.RESET, now)

    def snapshot(self, now: float) -> BreakerSnapshot:
        self.tick(now)
        if now >= self._slot_ends:
            self._next_slot(now)
        calls, failures = self._window_totals()
        is_timed = self._state is _OPEN and self._half_open_at < math.inf
        return BreakerSnapshot(
            name=self.name,
            state=self._state,
            mode=self._mode,
            generation=self._generation.number,
            consecutive_failures=self._streak,
            calls=calls,
            failures=failures,
            failure_rate=failures / calls if calls else 0.0,
            opened_seconds_ago=None if self._state is _CLOSED else now - self._opened_at,
            half_open_in_seconds=self._half_open_at - now if is_timed else None,
            trials_in_flight=len(self._trials),
            trials_succeeded=self._succeeded,
            refused=self._refused,
            opened=self._opened,
            late_results=self._late_results,
            broken_bodies=self._broken_bodies,
            listener_errors=self._listener_errors,
        )

    def subscribe(self, listener: Callable[[Transition], None]) -> None:
        """Call `listener` after each change, in order, within the method that made it: it must not block.

        It may call the breaker. What it raises is counted in `listener_errors` and goes no further.
        """
        self._listeners.append(listener)

    def _is_current(self, permit: Permit, now: float) -> bool:
        # A trial's deadline that has passed comes before an answer that arrives now.
        self.tick(now)
        if permit._generation is self._generation:
            return True
        self._late_results += 1
        return False

    def _count_failure(self, slot: int, now: float) -> None:
        self._window_failures[slot % RATE_WINDOW_SLOTS] += 1
        self._streak += 1
        if self._mode is not _AUTO:
            return
        if self._streak >= self._failure_threshold:
            self._open(Reason.CONSECUTIVE_FAILURES, now)
        elif self._failure_rate is not None:
            # Only here: a success cannot raise the rate, and opening on one would be hard to explain.
            calls, failures = self._window_totals()
            if calls >= self._minimum_calls and failures / calls >= self._failure_rate:
                self._open(Reason.FAILURE_RATE, now)

    def _window_totals(self) -> tuple[int, int]:
        return sum(self._window_calls) + self._slot_calls, sum(self._window_failures)

    def _next_slot(self, now: float) -> None:
        self._window_calls[self._slot % RATE_WINDOW_SLOTS] += self._slot_calls
        self._slot_calls = 0
        steps = int((now - self._slot_ends) / self._slot_seconds) + 1
        for slot in range(self._slot + 1, self._slot + 1 + min(steps, RATE_WINDOW_SLOTS)):
            self._window_calls[slot % RATE_WINDOW_SLOTS] = 0
            self._window_failures[slot % RATE_WINDOW_SLOTS] = 0
        self._slot += steps
        self._slot_ends += steps * self._slot_seconds

    def _open(self, reason: Reason, at: float) -> None:
        if self._mode is BreakerMode.OPEN:
            self._open_seconds = 0.0
            self._half_open_at = math.inf
        else:
            grown = min(self._open_seconds * OPEN_TIME_GROWTH, self._maximum_recovery_timeout)
            self._open_seconds = max(self._recovery_timeout, grown)
            share = min(max(0.0, self._jitter()), 1.0)
            self._half_open_at = at + self._open_seconds * (1.0 + OPEN_TIME_JITTER * share)
        self._opened_at = at
        self._opened += 1
        self._begin(_OPEN, reason, at)

    def _begin(self, state: BreakerState, reason: Reason, at: float) -> None:
        old = self._state
        self._state = state
        self._generation = _Generation(self._generation.number + 1)
        self._closed_generation = None
        if state is _CLOSED:
            self._closed_generation = self._generation
            self._open_seconds = 0.0
        self._streak = 0
        self._trials.clear()
        self._succeeded = 0
        self._slot_calls = 0
        self._window_calls = [0] * RATE_WINDOW_SLOTS
        self._window_failures = [0] * RATE_WINDOW_SLOTS
        self._tell(Transition(self.name, old, state, reason, self._mode, self._generation.number, at))

    def _tell(self, transition: Transition) -> None:
        # Through a queue: where a listener itself causes a change, nobody may hear of that one first.
        self._transitions.append(transition)
        if self._telling:
            return
        self._telling = True
        try:
            while self._transitions:
                transition = self._transitions.popleft()
                for listener in tuple(self._listeners):
                    try:
                        listener(transition)
                    except Exception:  # noqa: BLE001 - a listener's fault is no call's fault
                        self._listener_errors += 1
        finally:
            self._telling = False


def summarize(snapshots: Iterable[BreakerSnapshot]) -> BreakerFleet:
    """The fleet's view of one backend, from the latest snapshot of each worker."""
    of_all = list(snapshots)
    calls = sum(one.calls for one in of_all)
    failures = sum(one.failures for one in of_all)
    return BreakerFleet(
        workers=len(of_all),
        closed=sum(one.state is _CLOSED for one in of_all),
        open=sum(one.state is _OPEN for one in of_all),
        half_open=sum(one.state is _HALF_OPEN for one in of_all),
        forced_open=sum(one.mode is BreakerMode.OPEN for one in of_all),
        forced_closed=sum(one.mode is BreakerMode.CLOSED for one in of_all),
        calls=calls,
        failures=failures,
        failure_rate=failures / calls if calls else 0.0,
        refused=sum(one.refused for one in of_all),
        opened=sum(one.opened for one in of_all),
        late_results=sum(one.late_results for one in of_all),
    )
