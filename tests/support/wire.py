"""Both ends of the wire in memory: callers' connections, backends' connections, and a clock that is a number.

Everything between the two ends is the real thing: Forwarding, Upstream, Pool, Gateway, Policy, the rules,
the leases. The transports are fakes that behave as asyncio's do: `connection_lost` comes later, never inside
a call; a full buffer pauses the protocol inside `write`; nothing is delivered while reading is paused.
"""

import asyncio
import datetime as dt
import functools
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from lucid.core.exchange import Exchange, Limit, LookUp, Principal, Role
from lucid.core.gateway import Gateway
from lucid.core.policy import Policy
from lucid.core.rules.addresses import TrustedProxies
from lucid.core.rules.breaker import CircuitBreaker, Outcome, Permit
from lucid.core.rules.bucket import Store
from lucid.core.rules.claims import Claim
from lucid.core.rules.cors import Cors
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.leases import Leases
from lucid.core.rules.routes import Route, RouteTable
from lucid.core.rules.tokens import TokenMemory
from lucid.core.wire.connection import Stage, Wire
from lucid.core.wire.forwarding import Forwarding
from lucid.core.wire.pool import Balancer, Pool
from lucid.errors import ErrorCode
from tests.support.transcript import Transcript

BEGINNING = 1_000.0
PEER = "203.0.113.7"
ALICE = Principal(Role.USER, "authenticated", "alice", "alice", "fam", "jti", 0.0, 1e9, "token")
ROOT = Principal(Role.ADMIN, "admin", "root", "root", "fam2", "jti2", 0.0, 1e9, "token")
CREDENTIALS: Mapping[str, Principal | ErrorCode] = {
    "alice": ALICE,
    "root": ROOT,
    "expired": ErrorCode.CREDENTIAL_EXPIRED,
}
ROUTES = (
    Route("/open/**", "core", Role.PUBLIC),
    Route("/user/**", "core"),
    Route("/admin/**", "core", Role.ADMIN, methods=frozenset({"GET"})),
    Route("/tiny/**", "core", Role.PUBLIC, max_body=10),
    Route("/own", "", Role.PUBLIC, max_body=65_536),
    Route("/health", "", Role.PUBLIC, counted=False),
)
TABLE = RouteTable.build(ROUTES)


class _Jumping(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Instead of waiting, time goes on."""

    loop: "SteppedLoop"

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("everybody waits and nothing will ever happen")
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a number and whose connections are made by `dial`."""

    def __init__(self) -> None:
        self.now = BEGINNING
        self.dial: Callable[[Any, str, int], Any] | None = None
        selector = _Jumping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    async def create_connection(  # type: ignore[override]
        self, factory: Callable[[], Any], host: str, port: int, **options: Any
    ) -> tuple[Any, Any]:
        assert self.dial is not None
        return await self.dial(factory, host, port)  # type: ignore[no-any-return]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in a loop of its own, in stepped time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=SteppedLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


class FakeTransport(asyncio.Transport):
    """A connection, seen from both ends: the protocol's (asyncio's methods) and the test's (the others)."""

    def __init__(self, world: "World", log: "Transcript", peer: str, number: int) -> None:
        super().__init__({"peername": (peer, 50_000)})
        self.log = log
        self.number = number
        self.protocol: Any = None
        self.reading = True
        self.stalled = False
        """The other end takes nothing: what is written stays in the buffer."""
        self.buffered = 0
        self.closing = False
        self.lost = False
        self._high = 65_536
        self._pending = bytearray()
        self._protocol_paused = False
        self._ended = False
        self._arrived: deque[bytes | None] = deque()
        self._world = world

    # --- the protocol's end

    def write(self, data: Any) -> None:
        assert not self._ended, "a write behind write_eof"
        if self.closing:
            if not self.lost:
                self._world.faults.append(
                    f"a write of {len(data)} bytes to a connection that is being closed"
                )
            return
        self._pending += data
        self.buffered = len(self._pending)
        self._flush()
        if self.buffered > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self.protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or 65_536

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._ended:
            self._ended = True
            self.log.note("eof")

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.log.note("closed")
            if not self._pending:
                self._lose(None)

    def abort(self) -> None:
        if not self.closing:
            self.log.note("aborted")
        self.closing = True
        self._pending.clear()
        self._lose(None)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        if not self.reading:
            self.reading = True
            self._world.later(self._hand_over)

    # --- the test's end

    def deliver(self, data: bytes) -> None:
        """Bytes from the other end; they wait in the kernel while reading is paused."""
        self._arrived.append(data)
        self._hand_over()

    def deliver_eof(self) -> None:
        self._arrived.append(None)
        self._hand_over()

    def reset(self) -> None:
        if not self.lost:
            self.closing = True
            self._lose(ConnectionResetError())

    def take(self, size: int | None = None) -> None:
        """The other end, so far stalled, reads `size` bytes; None: all, and whatever follows."""
        self.stalled = self.stalled and size is not None
        self._flush(size)
        if self.buffered <= self._high // 4 and self._protocol_paused:
            self._protocol_paused = False
            self.protocol.resume_writing()
        if self.closing and not self._pending:
            self._lose(None)

    def _flush(self, size: int | None = None) -> None:
        if self.stalled and size is None:
            return
        data = bytes(self._pending[: size if size is not None else len(self._pending)])
        del self._pending[: len(data)]
        self.buffered = len(self._pending)
        if data:
            self.log.feed(data, self.number)

    def _hand_over(self) -> None:
        while self.reading and not self.closing and self._arrived:
            data = self._arrived.popleft()
            if data is not None:
                self.protocol.data_received(data)
            elif not self.protocol.eof_received():
                self.close()

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self._world.later(lambda: self.protocol.connection_lost(error))


class SpyBreaker(CircuitBreaker):
    """Counts how often each permit was settled, and with what."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.given: list[Permit] = []
        self.outcomes: list[tuple[Permit, Outcome]] = []

    def try_acquire(self, now: float) -> Permit | None:
        permit = super().try_acquire(now)
        if permit is not None:
            self.given.append(permit)
        return permit

    def settle(self, permit: Permit, outcome: Outcome, now: float) -> None:
        self.outcomes.append((permit, outcome))
        super().settle(permit, outcome, now)


class Door(Forwarding):
    """Forwarding without Sanic. The control plane echoes the body, or keeps the exchange until `answer`."""

    def __init__(self, wire: Wire) -> None:
        self._set_up(wire)
        self.keeps = False
        self._own: tuple[Exchange, bytes] | None = None

    def _answer_here(self, x: Exchange, body: bytes) -> None:
        self._stage = Stage.CONTROL
        self.deadline = self._gateway.monotonic() + 30.0
        self._own = x, body
        if not self.keeps:
            self.answer()

    def answer(self) -> None:
        assert self._own is not None
        (x, body), self._own = self._own, None
        x.status = 200
        added = "".join(f"{name}: {value}\r\n" for name, value in self._gateway.added_fields(x))
        close = "Connection: close\r\n" if self._must_close() else ""
        self._keep_alive = not close
        self._out.write(
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{added}{close}\r\n".encode() + body
        )
        self._end(x)

    def _expire_answer(self, x: Exchange) -> None:
        raise AssertionError("nobody waits that long here")


class Caller:
    """A connection from downstream."""

    def __init__(self, world: "World", peer: str) -> None:
        self.world = world
        self.log = Transcript(lambda: [x.head.method if x.head else "" for x in world.opened])
        self.transport = FakeTransport(world, self.log, peer, 1)
        self.door = self.transport.protocol = Door(world.wire)
        self.door.connection_made(self.transport)

    async def send(self, data: bytes) -> None:
        self.transport.deliver(data)
        await self.world.settle()

    async def half_close(self) -> None:
        self.transport.deliver_eof()
        await self.world.settle()

    async def leave(self) -> None:
        self.transport.reset()
        await self.world.settle()


class World:
    """One worker's gateway with one backend, `core`, in the loop of `in_loop`."""

    def __init__(
        self,
        *,
        routes: Iterable[Route] = ROUTES,
        tiers: Iterable[Limit] = (),
        cors: Cors | None = None,
        proxies: TrustedProxies | None = None,
        max_connections: int = 4,
        endpoints: int = 1,
        breaker: Mapping[str, Any] | None = None,
        refuses: Exception | None = None,
    ) -> None:
        """`refuses` is what dialling raises."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SteppedLoop)
        self.loop = loop
        self.faults: list[str] = []
        self.opened: list[Exchange] = []
        self.recorded: list[Exchange] = []
        self.looked_up: list[bytes] = []
        self.keys: dict[bytes, Principal | ErrorCode | Exception] = {}
        self.breaker = SpyBreaker("core", **(breaker or {}))
        self.leases = Leases("worker", fleet=1)
        self.store = Store()
        self.store.marker = ("", "served", 0)
        self.backend = Transcript(None)
        self.upstreams: list[FakeTransport] = []
        self.dialled: list[tuple[str, int]] = []
        self.refuses = refuses
        self.hangs: asyncio.Event | None = None
        """Dialling waits until it is set."""
        self._todo: deque[Callable[[], None]] = deque()
        loop.dial = self._dial
        cors = cors or Cors()
        keys = KeyMemory()
        tokens = TokenMemory(lambda token: CREDENTIALS.get(token, ErrorCode.BAD_CREDENTIAL), lambda: 0.0, 100)
        self.policy = Policy(
            routes=TABLE if routes is ROUTES else RouteTable.build(routes),
            tiers=tiers,
            tokens=tokens,
            keys=keys,
            leases=self.leases,
            breakers={"core": self.breaker},
            cors=cors,
            proxies=proxies or TrustedProxies(),
            jitter=lambda: 0.0,
        )
        self.gateway = Gateway(
            self.policy,
            cors=cors,
            keys=keys,
            tokens=tokens,
            admit=self._admit,
            look_up=self._look_up,
            recorder=self,
            monotonic=loop.time,
            utc_now=lambda: dt.datetime(2026, 1, 10, 19, 8, tzinfo=dt.UTC),
            random_bytes=random.Random(7).randbytes,
        )
        genuine = self.gateway.open

        def open_and_note(*args: Any) -> Exchange:
            x = genuine(*args)
            self.opened.append(x)
            return x

        self.gateway.open = open_and_note  # type: ignore[method-assign]
        self.pools = [
            Pool(
                scheme="http",
                host="core" if n == 0 else f"core{n}",
                port=8084,
                max_connections=max_connections,
                monotonic=loop.time,
            )
            for n in range(endpoints)
        ]
        self.pool = self.pools[0]
        self.wire = Wire(self.gateway, {"core": Balancer("core", self.pools, loop.time)}, scheme="http")

    # --- what the gateway is given

    def record(self, x: Exchange, now: float) -> None:
        self.recorded.append(x)

    async def _admit(self, claim: Claim) -> bool:
        """One call to a store in memory: the real leases, the real bucket."""
        settled: asyncio.Future[bool] = self.loop.create_future()
        self.leases.wait(claim, settled.set_result)
        for flight in self.leases.compose(self.loop.now):
            answer = self.store.call(flight.keys, flight.call, int(self.loop.now * 1_000))
            self.leases.apply(flight, answer, self.loop.now)
        return await settled

    async def _look_up(self, need: LookUp) -> Principal | ErrorCode:
        self.looked_up.append(need.digest)
        answer = self.keys.get(need.digest, ErrorCode.BAD_CREDENTIAL)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _dial(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        self.dialled.append((host, port))
        if self.hangs is not None:
            await self.hangs.wait()
        if self.refuses is not None:
            raise self.refuses
        protocol = factory()
        transport = FakeTransport(self, self.backend, host, len(self.upstreams) + 1)
        transport.protocol = protocol
        self.upstreams.append(transport)
        protocol.connection_made(transport)
        return transport, protocol

    # --- what happens

    def later(self, call: Callable[[], None]) -> None:
        self._todo.append(call)

    async def settle(self) -> None:
        """Let everything happen that needs no more time and no more bytes."""
        for _ in range(16):
            while self._todo:
                self._todo.popleft()()
            if not any(door._need for door in self.wire.connections):
                return
            await asyncio.sleep(0)

    async def breathe(self) -> None:
        """Let tasks that no caller waits for go on."""
        for _ in range(16):
            await asyncio.sleep(0)

    async def settle_pipelines(self) -> None:
        """As `settle`, until no connection has a turn to come for the rest of its pipeline."""
        for _ in range(1_000):
            await self.settle()
            if not any(door._pump_due for door in self.wire.connections):
                return
            await asyncio.sleep(0)
        raise AssertionError("a pipeline does not end")

    async def settle_and_breathe(self) -> None:
        await self.settle()
        await self.breathe()

    async def advance(self, seconds: float) -> None:
        """Time goes on in the steps of the sweep."""
        end = self.loop.now + seconds
        while self.loop.now < end:
            self.loop.now = min(end, self.loop.now + 0.5)
            self.wire.sweep(self.loop.now)
            await self.settle()

    async def warm(self, count: int = 1, pool: Pool | None = None) -> None:
        """Idle connections, as if earlier requests had left them."""
        pool = pool or self.pool
        made = [await pool.acquire(connect_seconds=2.0, wait_seconds=2.0) for _ in range(count)]
        for upstream in made:
            pool.give_back(upstream)

    @property
    def outcomes(self) -> list[str]:
        return [outcome.value for _, outcome in self.breaker.outcomes]

    def check(self) -> None:
        """What must hold at the end of every conversation."""
        assert not self.faults, self.faults
        records = sorted(id(x) for x in self.recorded)
        assert records == sorted(id(x) for x in self.opened), "one record per exchange"
        assert all(x.finished and x.status for x in self.recorded), "every record has a status"
        settled = [id(permit) for permit, _ in self.breaker.outcomes]
        assert sorted(settled) == sorted(id(permit) for permit in self.breaker.given), "each permit once"
        for pool in self.pools:
            assert (pool.in_flight, pool.open) == (0, pool.idle), "no connection is left in use"
        for door in self.wire.connections:
            assert door.exchange is None
            assert door._need is None
            assert door._upstream is None
