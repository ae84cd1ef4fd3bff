"""The pool of connections to one endpoint, and the choice among the endpoints of a backend.

The pool decides synchronously and is driven from callbacks; only dialling and waiting for a place await. It is
the design card's "httpx proxy pool": the data plane drives it directly, and services reach the same connections
through `transport.PoolTransport`.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Container, Sequence

from lucid.core.rules.framing import Answer, Memo
from lucid.core.wire.upstream import Failure, FailureKind, Upstream

IDLE_SECONDS = 50.0
"""Shorter than what most servers keep (nginx 75 s, Node behind most proxies 60 s), so that we close first."""
WRITE_BUFFER_BYTES = 65_536
AVOIDED_SECONDS = 2.0


class Pool:
    """Connections to one endpoint: at most `max_connections`, the last used is lent first."""

    def __init__(
        self,
        *,
        scheme: str,
        host: str,
        port: int,
        max_connections: int,
        monotonic: Callable[[], float],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` is for https endpoints; its names are checked against `host`."""
        self._host = host
        self._port = port
        self._tls = tls if scheme == "https" else None
        self._max_connections = max_connections
        self._monotonic = monotonic
        self._idle: list[Upstream] = []
        self._waiting: deque[asyncio.Future[Upstream | None]] = deque()
        self._memo: Memo[Answer] = Memo()
        self._all: set[Upstream] = set()
        self._dials: set[asyncio.Task[Upstream]] = set()
        self._dialing = 0
        self._closed = False
        self.avoid_until = 0.0
        """While it could not be dialled lately, other endpoints are chosen first."""
        bracketed = f"[{host}]" if ":" in host else host
        default = 443 if scheme == "https" else 80
        self.authority = bracketed if port == default else f"{bracketed}:{port}"
        self.label = f"{bracketed}:{port}"

    @property
    def open(self) -> int:
        """Connections that exist or are being dialled."""
        return len(self._all) + self._dialing

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def in_flight(self) -> int:
        return self.open - len(self._idle) + len(self._waiting)

    def take(self) -> Upstream | None:
        """An idle connection, or None: `acquire` one."""
        idle = self._idle
        while idle:
            upstream = idle.pop()
            if upstream.usable:
                return upstream
        return None

    async def acquire(self, *, connect_seconds: float, wait_seconds: float) -> Upstream:
        """A connection, dialled if there is a place, else waited for. 0 seconds: without bound.

        Raises:
            Failure: REFUSED, UNKNOWN_HOST, TLS, CONNECT_TIMEOUT; OVERLOAD when no place came free in time.
        """
        # One bound for the whole wait: whoever is overtaken does not begin again.
        deadline = self._monotonic() + wait_seconds if wait_seconds else None
        while True:
            upstream = self.take()
            if upstream is not None:
                return upstream
            if self.open < self._max_connections:
                return await self._dial(connect_seconds)
            upstream = await self._wait(None if deadline is None else deadline - self._monotonic())
            if upstream is not None and upstream.usable:
                return upstream

    async def _wait(self, seconds: float | None) -> Upstream | None:
        """The next connection that comes back; None: a place came free instead."""
        waiter: asyncio.Future[Upstream | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        # Not `wait_for`: 3.11's swallows a cancellation that comes with the result, 3.12's loses the result.
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except TimeoutError:
            self._salvage(waiter)
            raise Failure(FailureKind.OVERLOAD, f"{self._max_connections} connections are in use") from None
        except asyncio.CancelledError:
            self._salvage(waiter)
            raise

    def _salvage(self, waiter: "asyncio.Future[Upstream | None]") -> None:
        """What came in the moment in which its waiter gave up goes to the next one."""
        if not waiter.done() or waiter.cancelled():
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            return
        upstream = waiter.result()
        if upstream is not None and upstream.usable:
            self._came_idle(upstream)
        else:
            self._place_came_free()

    async def _dial(self, seconds: float) -> Upstream:
        """Dial in a task of its own: when the caller leaves meanwhile, the connection is kept for the next one."""
        self._dialing += 1
        task = asyncio.get_running_loop().create_task(self._connect(seconds))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)
        try:
            upstream = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._keep)
            raise
        if not upstream.usable:
            # It was lost between the end of that task and this line.
            raise Failure(FailureKind.REFUSED, f"{self.label} closed the connection at once")
        return upstream

    def _keep(self, task: "asyncio.Task[Upstream]") -> None:
        if not task.cancelled() and task.exception() is None:
            self.give_back(task.result())

    async def _connect(self, seconds: float) -> Upstream:
        made: list[Upstream] = []

        def factory() -> Upstream:
            made.append(Upstream(self.label, self._memo, self._came_idle, self._lost))
            return made[-1]

        try:
            async with asyncio.timeout(seconds or None):
                transport, upstream = await asyncio.get_running_loop().create_connection(
                    factory,
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
            if self._closed:
                raise Failure(FailureKind.REFUSED, f"{self.label}: the pool is closed")
            if not upstream.usable:
                raise Failure(FailureKind.REFUSED, f"{self.label} closed the connection at once")
        except BaseException as error:  # noqa: BLE001  a cancellation too: the place is given back in any case
            self._dialing -= 1
            for upstream in made:
                upstream.abort()
            self.avoid_until = self._monotonic() + AVOIDED_SECONDS
            self._place_came_free()
            raise self._failure(error) from None
        self._dialing -= 1
        self.avoid_until = 0.0
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._all.add(upstream)
        return upstream

    def _failure(self, error: BaseException) -> BaseException:
        """The pool's own exception for what went wrong while dialling; what is no such thing stays."""
        match error:
            case TimeoutError():
                return Failure(FailureKind.CONNECT_TIMEOUT, f"{self.label} did not accept in time")
            case socket.gaierror() | UnicodeError():
                return Failure(FailureKind.UNKNOWN_HOST, f"{self.label} has no address")
            case ssl.SSLError():
                return Failure(FailureKind.TLS, f"{self.label}: {error.reason or 'TLS failed'}")
            case OSError():
                return Failure(FailureKind.REFUSED, f"{self.label}: {error.strerror or 'refused'}")
        return error

    def _came_idle(self, upstream: Upstream) -> None:
        if self._closed:
            upstream.abort()
            return
        upstream.idle_since = self._monotonic()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(upstream)
                return
        self._idle.append(upstream)

    def give_back(self, upstream: Upstream) -> None:
        """Return a connection that was taken and not used."""
        if upstream.usable:
            self._came_idle(upstream)

    def _lost(self, upstream: Upstream) -> None:
        self._all.discard(upstream)
        try:
            self._idle.remove(upstream)
        except ValueError:
            pass
        self._place_came_free()

    def _place_came_free(self) -> None:
        while self._waiting and self.open < self._max_connections:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long. Called every second or so."""
        while self._idle and (now - self._idle[0].idle_since > IDLE_SECONDS or not self._idle[0].usable):
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Close idle connections now and lent ones as they come back."""
        self._closed = True
        for upstream in self._idle:
            upstream.abort()
        self._idle.clear()


class Balancer:
    """The endpoints of one backend: the one with the fewest requests in flight is next; ties rotate.

    An endpoint that could not be dialled has the fewest in flight of all, so it is avoided for a while.
    """

    def __init__(self, name: str, pools: Sequence[Pool], monotonic: Callable[[], float]) -> None:
        self.name = name
        self.pools = tuple(pools)
        self._monotonic = monotonic
        self._next = 0

    def choose(self) -> Pool:
        pools = self.pools
        return pools[0] if len(pools) == 1 else self._best(pools)

    def choose_another(self, tried: Container[Pool]) -> Pool | None:
        """One that was not tried yet; None: all were."""
        left = [pool for pool in self.pools if pool not in tried]
        return self._best(left) if left else None

    def _best(self, pools: Sequence[Pool]) -> Pool:
        now = self._monotonic()
        self._next += 1
        start = self._next % len(pools)
        order = (*pools[start:], *pools[:start])
        return min(order, key=lambda pool: (now < pool.avoid_until, pool.in_flight))

    def sweep(self, now: float) -> None:
        for pool in self.pools:
            pool.sweep(now)

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
