"""A worker's calls to one shard of the store: batches, a deadline, and a breaker around Redis.

A courier has one batch under way: of one server a single call, of a cluster's master one for each hash slot, sent
as a pipeline. Whatever becomes urgent meanwhile travels together in the next one, so that a busy worker makes fewer
calls rather than more, and no key can be in two calls.

*Deadline and breaker.* A request waits at most `deadline_seconds` for the call that carries it, net of the
event loop's own lag (a late timer says nothing about Redis). After a miss the shard counts as away: decisions
are made at memory speed by each limit's rule (`safe`, `strict`, `open`), and one probe at a time goes out
until one is answered in time. The missed call itself stays open until its answer comes or its connection
fails; a late answer's leases are used.
"""

import asyncio
import importlib.resources
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    MovedError,
    NoScriptError,
    ResponseError,
    TryAgainError,
)

from lucid.core.rules.bucket import Answer, Call
from lucid.core.rules.leases import Flight, Leases
from lucid.core.rules.shards import Partition, Shard
from lucid.core.wire.redis_link import AWAY_ERRORS, RedisLink, end_tasks

BACKGROUND_SECONDS = 0.02
"""Renewals and reports gather that long before they go out on their own."""

FIRST_PROBE_SECONDS = 0.1
LONGEST_PROBE_SECONDS = 1.0
FLAP_SECONDS = 5.0
"""Who was back for less is no healthier than before."""

UNSETTLED_SECONDS = 0.1
"""So long keys are decided alone whose hash slot is between two servers."""

LAG_SECONDS = 0.002
"""A timer that fires so late says that the loop was busy; uvloop's timers are exact to 1 ms."""

MOST_DEADLINES = 10
"""Within so many deadlines a call has missed, however busy the loop is."""

FAILURES: tuple[type[Exception], ...] = (*AWAY_ERRORS, msgspec.MsgspecError)

_log = logging.getLogger("lucid.limiter")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


def read_script() -> str:
    return (importlib.resources.files("lucid.core.wire") / "bucket.lua").read_text(encoding="ascii")


class Courier:
    """Owns the calls of `leases` to one `shard`. `start` it in the worker, `stop` it last.

    `probed` names a partition to probe the shard with; `moved` is awaited when the server says that it does not
    answer for a key any more, `left` called when it does not answer at all.
    """

    def __init__(
        self,
        leases: Leases,
        shard: Shard,
        link: RedisLink,
        *,
        script: str,
        deadline_seconds: float,
        clock: Callable[[], float],
        probed: Callable[[Shard], Partition | None],
        moved: Callable[[], Awaitable[None]],
        left: Callable[[], None],
    ) -> None:
        self.shard = shard
        self.away_since = clock()
        self._leases = leases
        self._link = link
        self._script = script
        self._digest = ""
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._probed = probed
        self._moved = moved
        self._left = left
        self._awake = asyncio.Event()
        self._background_due = 0.0
        self._next_probe = 0.0
        self._held_told = 0.0
        self._probe_pause_seconds = FIRST_PROBE_SECONDS
        self._task: asyncio.Task[None] | None = None

    # --- life

    async def start(self) -> None:
        """Tries the server once, with patience; whether it answers or not, the worker may serve afterwards."""
        if self._task is not None:
            return
        now = self._clock()
        partition = self._probed(self.shard)
        if partition is not None:
            flight = self._leases.probe(now, partition)
            try:
                self._leases.apply(
                    flight, await self.ask(flight.partition, flight.keys, flight.call), self._clock()
                )
                self.shard.arrive(self._clock())
            except FAILURES as error:
                self._go_away(error, first=True)
                self._leases.fail(flight, self._clock())
                self._leases.decide_waiting(self._clock(), self.shard)
        self._task = asyncio.create_task(self._run(), name=f"lucid limiter {self.shard.name}".rstrip())

    async def stop(self) -> None:
        """Ends the calls. What waits is left in the shard's queue."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None

    async def return_all(self) -> None:
        """Returns what is held, after `stop`. Raises one of `FAILURES`."""
        while flights := self._leases.compose(self._clock(), self.shard, closing=True):
            pending = list(flights)
            try:
                while pending:
                    answer = await self.ask(pending[0].partition, pending[0].keys, pending[0].call)
                    self._leases.apply(pending[0], answer, self._clock())
                    pending.pop(0)
            finally:
                for flight in pending:
                    self._leases.fail(flight, self._clock())

    def wake(self) -> None:
        """Somebody waits."""
        self._awake.set()

    def wake_soon(self) -> None:
        """Something is due that nobody waits for; more may gather."""
        if not self._background_due:
            self._background_due = self._clock() + BACKGROUND_SECONDS
        self._awake.set()

    def wake_now(self) -> None:
        """Something is due that another worker waits for."""
        self._background_due = self._clock()
        self._awake.set()

    # --- turns

    async def _run(self) -> None:
        failing = False
        while True:
            try:
                await (self._turn_away() if self.shard.away else self._turn())
                failing = False
            except Exception:  # noqa: BLE001 (told once)
                # A fault of ours must not end the limiter: it is told once, and requests are decided alone.
                if not failing:
                    _log.exception("the limiter's task failed and goes on")
                failing = True
                self._go_away("a fault in the limiter")
                self._leases.decide_waiting(self._clock(), self.shard)
                await asyncio.sleep(LONGEST_PROBE_SECONDS)

    async def _turn(self) -> None:
        if not self.shard.waiting:
            await self._rest()
        now = self._clock()
        if self.shard.waiting or (self._background_due and now >= self._background_due):
            self._background_due = 0.0
            flights = self._leases.compose(now, self.shard)
            if flights:
                await self._fly(flights)
            if self.shard.due or self.shard.summoned:
                # More than one call holds.
                self.wake_now()

    async def _rest(self) -> None:
        """Until somebody waits, or what is due has gathered."""
        self._awake.clear()
        if not self._background_due:
            await self._awake.wait()
            return
        pause = self._background_due - self._clock()
        if pause > 0:
            timer = asyncio.get_running_loop().call_later(pause, self._awake.set)
            try:
                await self._awake.wait()
            finally:
                timer.cancel()

    async def _turn_away(self) -> None:
        await asyncio.sleep(max(0.0, self._next_probe - self._clock()))
        partition = self._probed(self.shard)
        if partition is None:
            await asyncio.sleep(LONGEST_PROBE_SECONDS)
        else:
            await self._fly([self._leases.probe(self._clock(), partition)])

    async def _fly(self, flights: Sequence[Flight]) -> None:
        leases = self._leases
        pending = dict.fromkeys(flights)
        watch = _Watch(lambda: self._missed(list(pending)), self._deadline_seconds, self._clock)
        try:
            await self._exchange(pending)
        except FAILURES as error:
            self._go_away(error)
        finally:
            watch.cancel()
            # What was not answered is given up; when stopping, who waited is queued again, and `stop` settles that.
            now = self._clock()
            for flight in pending:
                leases.fail(flight, now)
        if pending:
            # Who came while the call was on its way would wait until Redis is back.
            leases.decide_waiting(now, self.shard)
        elif watch.missed:
            leases.late += 1
            self._next_probe = now + FIRST_PROBE_SECONDS
        elif self.shard.away:
            self._come_back(now)

    async def _exchange(self, pending: dict[Flight, None]) -> None:
        """Sends all and takes each answer as it comes, out of `pending`. Raises one of `FAILURES`."""
        moved: list[Flight] = []
        fault: Exception | None = None
        async with self._link.connection(self.shard.name or None) as (connection, run_id):
            todo = list(pending)
            while todo:
                await self._send(
                    connection, run_id, [(flight.partition, flight.keys, flight.call) for flight in todo]
                )
                unknown: list[Flight] = []
                for flight in todo:
                    try:
                        answer = _decode(await connection.read_response())
                    except NoScriptError:
                        unknown.append(flight)
                    except MovedError as error:
                        self._link.redirected(error, self.shard.name)
                        moved.append(flight)
                    except (AskError, TryAgainError):
                        self._leave_alone(flight)
                        pending.pop(flight)
                    except (ResponseError, msgspec.MsgspecError) as error:
                        # The other answers are read first: the connection is used again.
                        fault = error
                    else:
                        self._leases.apply(flight, answer, self._clock())
                        pending.pop(flight)
                        self._tell_held()
                if unknown:
                    self._digest = ""
                todo = unknown
        if fault is not None:
            raise fault
        if moved:
            # Nothing was done: who waited is sent where the keys are now.
            await self._moved()
            for flight in moved:
                pending.pop(flight)
                self._leases.fail(flight, self._clock())

    def _leave_alone(self, flight: Flight) -> None:
        """The slot is between two servers: for a moment its keys are as if both were away."""
        now = self._clock()
        flight.partition.told -= 1
        for lease in flight.leases:
            lease.held_until = max(lease.held_until, now + UNSETTLED_SECONDS)
            lease.clip(now)
        self._leases.fail(flight, now)

    async def ask(self, partition: Partition, keys: list[str], call: Call) -> Answer:
        """One call's answer, without a deadline of its own. Raises one of `FAILURES`."""
        async with self._link.connection(self.shard.name or None) as (connection, run_id):
            try:
                await self._send(connection, run_id, [(partition, keys, call)])
                return _decode(await connection.read_response())
            except NoScriptError:
                self._digest = ""
                await self._send(connection, run_id, [(partition, keys, call)])
                return _decode(await connection.read_response())

    async def _send(
        self, connection: AbstractConnection, run_id: str, calls: list[tuple[Partition, list[str], Call]]
    ) -> None:
        if not self._digest:
            await connection.send_command("SCRIPT", "LOAD", self._script)
            self._digest = bytes(await connection.read_response()).decode("ascii")
        commands: list[list[str | int | bytes]] = []
        for partition, keys, call in calls:
            call.run = run_id
            every = [*partition.heads, *keys]
            commands.append(["EVALSHA", self._digest, len(every), *every, _encode(call)])
        await connection.send_packed_command(connection.pack_commands(commands))

    # --- the breaker

    def _missed(self, flights: list[Flight]) -> None:
        """The deadline passed: from here on nobody waits for this server."""
        self._go_away("it did not answer in time")
        now = self._clock()
        for flight in flights:
            self._leases.abandon(flight, now)

    def _tell_held(self) -> None:
        held_until = self._leases.held_until
        if held_until > self._held_told + 1.0:
            self._held_told = held_until
            _log.warning(
                "limiter: %s lost data, or may have; limits are held back for %.0f s and kept by each worker alone",
                self._name,
                held_until - self._clock(),
            )

    def _come_back(self, now: float) -> None:
        self.shard.arrive(now)
        _log.info("limiter: %s answers, after %.1f s", self._name, now - self.away_since)

    def _go_away(self, reason: object, *, first: bool = False) -> None:
        now = self._clock()
        if first or not self.shard.away:
            # Of one that comes and goes the pauses grow all the same.
            flaps = now - self.shard.back_at < FLAP_SECONDS
            self._probe_pause_seconds = (
                min(LONGEST_PROBE_SECONDS, self._probe_pause_seconds * 2) if flaps else FIRST_PROBE_SECONDS
            )
            self._leases.leave(self.shard, now)
            self._left()
            self.away_since = now
            _log.warning(
                "limiter: %s is away (%s); its limits are kept by each worker alone", self._name, reason
            )
        else:
            self._probe_pause_seconds = min(LONGEST_PROBE_SECONDS, self._probe_pause_seconds * 2)
        self._next_probe = now + self._probe_pause_seconds

    @property
    def _name(self) -> str:
        return f"Redis {self.shard.name}".rstrip()


class _Watch:
    """The deadline of a batch, net of the loop's lag: a timer that fires late gives that time again."""

    def __init__(self, tell: Callable[[], None], seconds: float, clock: Callable[[], float]) -> None:
        self.missed = False
        self._tell = tell
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
            self._tell()

    def cancel(self) -> None:
        self._timer.cancel()
