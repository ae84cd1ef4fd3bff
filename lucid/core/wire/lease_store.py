"""The worker's connection between its leases and Redis: batches, a deadline, and a breaker around the store.

There is one call in flight per worker. Whatever becomes urgent meanwhile travels together in the next one,
so that a busy worker makes fewer calls rather than more, and no key can be in two calls.

*Deadline and breaker.* A request waits at most `deadline_seconds` for the call that carries it, net of the
event loop's own lag (a late timer says nothing about Redis). After a miss the store counts as away: decisions
are made at memory speed by each limit's rule (`safe`, `strict`, `open`), and one probe at a time goes out
until one is answered in time. The missed call itself stays open until its answer comes or its connection
fails; a late answer's leases are used.

*Data loss.* The script refuses to grant for a window, a lease's life and a slot when the server's run or the
marker changed (`rules/bucket.py`); each key in question is then decided here, as if the store were away,
while spends go on being reported. `strict` is exact through all of it. Not done yet: the store does not
reserve `limit / N` for workers that have not reported since an outage, so in `safe` the window that holds the
end of an outage may reach `limit + limit (N - 1) / N`; `N` never shrinks in a worker's life; and spends that
only a dead worker knew are gone with it.
"""

import asyncio
import contextlib
import importlib.resources
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import Answer, Call, KeyAnswer, Message, Op
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, KeyLease
from lucid.core.rules.leases import (
    Claim,
    Counters,
    Flight,
    Leases,
    Shape,
    Standing,
    Take,
)
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.redis_link import AWAY_ERRORS, RedisLink, end_tasks

MARKER_KEY = "lucid:limiter"

BACKGROUND_SECONDS = 0.02
"""Renewals and reports gather that long before they go out on their own."""

SWEEP_SECONDS = 0.1

FIRST_PROBE_SECONDS = 0.1
LONGEST_PROBE_SECONDS = 1.0

STOP_SECONDS = 1.0
"""How long `stop` tries to return what is held; the rest expires by itself."""

LAG_SECONDS = 0.002
"""A timer that fires so late says that the loop was busy; uvloop's timers are exact to 1 ms."""

MOST_DEADLINES = 10
"""Within so many deadlines a call has missed, however busy the loop is."""

FAILURES: tuple[type[Exception], ...] = (*AWAY_ERRORS, msgspec.MsgspecError)

_log = logging.getLogger("lucid.limiter")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


class StoreAwayError(Exception):
    """Redis did not do what an operator asked."""


def read_script() -> str:
    return (importlib.resources.files("lucid.core.wire") / "bucket.lua").read_text(encoding="ascii")


class LeaseStore:
    """Owns this worker's `leases` and settles what they cannot. `start` it in the worker, `stop` it last.

    `fleet_told`: how many workers to assume before the registry was ever read, 0: admit nothing alone until
    then (in `safe`). `clock` is that of the `now` which `Claim.take` gets.
    """

    def __init__(
        self,
        link: RedisLink,
        holder: str,
        control: ControlChannel | None = None,
        *,
        fleet_told: int,
        deadline_seconds: float = 0.025,
        clock: Callable[[], float] = time.monotonic,
        shape: Callable[[Limit], Shape] = Shape.of,
        script: str | None = None,
    ) -> None:
        self.leases = Leases(holder, fleet=fleet_told, shape=shape)
        self.leases.wake = self._wake_background
        self.leases.away = True
        self.away_since: float = clock()
        self._link = link
        self._control = control
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._script = script if script is not None else read_script()
        self._digest = ""
        self._awake = asyncio.Event()
        self._background_due = 0.0
        self._next_sweep = 0.0
        self._next_probe = 0.0
        self._probe_pause_seconds = FIRST_PROBE_SECONDS
        self._task: asyncio.Task[None] | None = None
        self._pushing: set[asyncio.Task[bool]] = set()
        if control is not None:
            control.subscribe("limit_reset", self._on_reset, self._on_gap)
            control.subscribe("lease_recall", self._on_recall)

    @property
    def counters(self) -> Counters:
        return self.leases.counters

    @property
    def away(self) -> bool:
        """Whether Redis is not asked at present; `away_since` (by the clock) says since when."""
        return self.leases.away

    # --- requests

    async def admit(self, claim: Claim) -> bool:
        """Settles one request whose `take` said WANTING. True: admitted and charged to all its limits."""
        verdict = claim.take(self._clock())
        if verdict is not Take.WANTING:
            return verdict is Take.ADMITTED
        if self._task is None:
            raise RuntimeError("LeaseStore.start was not called")
        settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def settle(admitted: bool) -> None:
            if not settled.done():
                settled.set_result(admitted)

        waiter = self.leases.wait(claim, settle)
        self._awake.set()
        try:
            return await settled
        finally:
            waiter.gone = True

    def peek(self, claim: Claim) -> tuple[Standing, ...]:
        """Where the caller stands, from memory."""
        return claim.standings(self._clock())

    # --- operators

    async def look(self, limit: Limit, identifier: str) -> KeyAnswer:
        """The key as the store has it, for all workers. Raises StoreAwayError."""
        return await self._ask(limit, identifier, Op.LOOK)

    async def reset(self, limit: Limit, identifier: str) -> None:
        """Clears what was spent, keeps live reservations, and tells every worker. Raises StoreAwayError."""
        await self._ask(limit, identifier, Op.RESET)
        self.leases.reset(limit.name, identifier)
        if self._control is not None:
            await self._control.publish("limit_reset", {"limit": limit.name, "identifier": identifier})

    async def _ask(self, limit: Limit, identifier: str, op: Op) -> KeyAnswer:
        shape = self.leases.shape(limit)
        message = Message(op=op, limit=limit.requests, slot_ms=shape.slot_ms, long_ms=shape.long_ms)
        try:
            answer = await self._evaluate(
                [f"rate_limit:{limit.name}:{identifier}"], self.leases.call([message], [])
            )
        except FAILURES as error:
            raise StoreAwayError(str(error)) from error
        return answer.keys[0]

    def _recall(self, leases: list[KeyLease]) -> None:
        """Pushed to all workers; those that hold nothing of these keys do nothing."""
        loop = asyncio.get_running_loop()
        if self._control is not None:
            body = {"holder": self.leases.holder, "keys": [lease.key for lease in leases]}
            pushing = loop.create_task(
                self._control.publish("lease_recall", body), name="lucid limiter recall"
            )
            self._pushing.add(pushing)
            pushing.add_done_callback(self._pushing.discard)
        for seconds in RECALL_STEPS_SECONDS:
            loop.call_later(seconds, self._recall_step, leases)

    def _recall_step(self, leases: list[KeyLease]) -> None:
        self.leases.recall_step(leases)
        self._awake.set()

    def _on_recall(self, body: Mapping[str, Any]) -> None:
        if body.get("holder") == self.leases.holder:
            return
        for key in body.get("keys", ()):
            self.leases.give_back(str(key))
        # Somebody waits for it: the call is not to be gathered with others for long.
        self._background_due = self._clock()
        self._awake.set()

    def _on_reset(self, body: Mapping[str, Any]) -> None:
        self.leases.reset(str(body.get("limit", "")), str(body.get("identifier", "")))

    async def _on_gap(self) -> None:
        self.leases.forget_refusals()

    # --- life

    async def start(self) -> None:
        """Tries Redis once, with patience; whether it answers or not, the worker may serve afterwards."""
        if self._task is not None:
            return
        flight = self.leases.probe(self._clock())
        try:
            self.leases.apply(flight, await self._evaluate([], flight.call), self._clock())
            self.leases.away = False
        except FAILURES as error:
            self._go_away(error, first=True)
        self._task = asyncio.create_task(self._run(), name="lucid limiter")

    async def stop(self) -> None:
        """Returns what is held, out of memory first. What comes later is decided without the store."""
        if self._task is None:
            return
        await end_tasks([self._task])
        self._task = None
        if not self.leases.away:
            with contextlib.suppress(TimeoutError, *FAILURES):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._return_all()
        self.leases.away = True
        self.leases.decide_waiting(self._clock())

    async def _return_all(self) -> None:
        while True:
            now = self._clock()
            self.leases.sweep(now)
            flight = self.leases.compose(now, closing=True)
            if flight is None:
                return
            self.leases.apply(flight, await self._evaluate(flight.keys, flight.call), self._clock())

    def _wake_background(self) -> None:
        if not self._background_due:
            self._background_due = self._clock() + BACKGROUND_SECONDS
            self._awake.set()

    async def _run(self) -> None:
        failing = False
        while True:
            try:
                await (self._turn_away() if self.leases.away else self._turn())
                failing = False
            except Exception:  # noqa: BLE001 (told once)
                # A fault of ours must not end the limiter: it is told once, and requests are decided alone.
                if not failing:
                    _log.exception("the limiter's task failed and goes on")
                failing = True
                self._go_away("a fault in the limiter")
                self.leases.decide_waiting(self._clock())
                await asyncio.sleep(LONGEST_PROBE_SECONDS)

    async def _turn(self) -> None:
        leases = self.leases
        now = self._clock()
        if not leases.waiting and not (self._background_due and now >= self._background_due):
            until = self._background_due or (self._next_sweep if leases.live else now + 1.0)
            self._awake.clear()
            timer = asyncio.get_running_loop().call_later(max(0.0, until - now), self._awake.set)
            try:
                await self._awake.wait()
            finally:
                timer.cancel()
            now = self._clock()
        swept = now >= self._next_sweep
        if swept:
            self._sweep(now)
        if leases.waiting or swept or now >= self._background_due:
            self._background_due = 0.0
            flight = leases.compose(now)
            if flight is not None:
                await self._fly(flight)

    async def _turn_away(self) -> None:
        await asyncio.sleep(max(0.0, self._next_probe - self._clock()))
        now = self._clock()
        self._sweep(now)
        await self._fly(self.leases.probe(now))

    def _sweep(self, now: float) -> None:
        self._next_sweep = now + SWEEP_SECONDS
        if self._control is not None:
            self.leases.fleet = max(self.leases.fleet, self._control.fleet_size)
        self.leases.sweep(now)

    async def _fly(self, flight: Flight) -> None:
        watch = _Watch(self, flight, self._deadline_seconds, self._clock)
        try:
            answer = await self._evaluate(flight.keys, flight.call)
        except FAILURES as error:
            self._go_away(error)
            self.leases.fail(flight, self._clock())
            # Who came while the call was on its way would wait until Redis is back.
            self.leases.decide_waiting(self._clock())
            return
        except BaseException:
            # Stopping: who waited is queued again, and `stop` settles the queue.
            self.leases.fail(flight, self._clock())
            raise
        finally:
            watch.cancel()
        reachable = self._control is not None and self._control.connected
        self.leases.recall = self._recall if reachable else None
        self.leases.apply(flight, answer, self._clock())
        if watch.missed:
            self.counters.late += 1
            self._next_probe = self._clock() + FIRST_PROBE_SECONDS
        else:
            self._come_back()

    def missed(self, flight: Flight) -> None:
        """The deadline passed: from here on nobody waits for Redis."""
        self._go_away("it did not answer in time")
        self.leases.abandon(flight, self._clock())

    async def _evaluate(self, keys: list[str], call: Call) -> Answer:
        async with self._link.connection() as (connection, run_id):
            call.run = run_id
            data = _encode(call)
            if not self._digest:
                self._digest = await self._load(connection)
            await connection.send_command("EVALSHA", self._digest, len(keys) + 1, MARKER_KEY, *keys, data)
            try:
                raw = await connection.read_response()
            except NoScriptError:
                self._digest = await self._load(connection)
                await connection.send_command("EVALSHA", self._digest, len(keys) + 1, MARKER_KEY, *keys, data)
                raw = await connection.read_response()
        return _decode(raw)

    async def _load(self, connection: AbstractConnection) -> str:
        await connection.send_command("SCRIPT", "LOAD", self._script)
        return bytes(await connection.read_response()).decode("ascii")

    def _come_back(self) -> None:
        self._probe_pause_seconds = FIRST_PROBE_SECONDS
        if self.leases.away:
            self.leases.away = False
            _log.info("limiter: Redis answers, after %.1f s", self._clock() - self.away_since)

    def _go_away(self, reason: object, *, first: bool = False) -> None:
        now = self._clock()
        if first or not self.leases.away:
            self.leases.away = True
            self.away_since = now
            self._probe_pause_seconds = FIRST_PROBE_SECONDS
            _log.warning("limiter: Redis is away (%s); limits are kept by each worker alone", reason)
        else:
            self._probe_pause_seconds = min(LONGEST_PROBE_SECONDS, self._probe_pause_seconds * 2)
        self._next_probe = now + self._probe_pause_seconds


class _Watch:
    """The deadline of one flight, net of the loop's lag: a timer that fires late gives that time again."""

    def __init__(self, store: LeaseStore, flight: Flight, seconds: float, clock: Callable[[], float]) -> None:
        self.missed = False
        self._store = store
        self._flight = flight
        self._clock = clock
        self._last = clock() + MOST_DEADLINES * seconds
        self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        self._due = self._clock() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._fire)

    def _fire(self) -> None:
        now = self._clock()
        lag = now - self._due
        if lag > LAG_SECONDS and now < self._last:
            self._arm(lag)
        else:
            self.missed = True
            self._store.missed(self._flight)

    def cancel(self) -> None:
        self._timer.cancel()
