"""A worker's limiter against a real Valkey."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import redis
import uvloop
from redis.asyncio.connection import AbstractConnection

from lucid.core.exchange import Limit
from lucid.core.rules import key_lease, leases
from lucid.core.rules.claims import LimitSet, Take
from lucid.core.wire import redis_link
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.lease_store import LeaseStore, StoreAwayError
from lucid.core.wire.redis_link import AWAY_ERRORS, RedisLink, end_tasks, new_holder
from tests.support.stores import RedisChild

# --- the lease store

WINDOW = 2
LIMIT = Limit("t", 50, WINDOW, "strict")


def worst_window(times: list[float], seconds: float) -> int:
    """The most that any window of that length holds."""
    times = sorted(times)
    worst = first = 0
    for last, at in enumerate(times):
        while times[first] <= at - seconds:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


Event = tuple[float, Callable[[], Any]]


class Fleet:
    """Workers in one loop, each with clients of its own, and what they admitted."""

    def __init__(self, uri: str, limit: Limit = LIMIT) -> None:
        self.uri = uri
        self.limit = limit
        self.limits = LimitSet((limit,))
        self.stores: list[LeaseStore] = []
        self.links: list[RedisLink] = []
        self.admitted: list[float] = []
        self.asked = 0

    async def hire(self, count: int = 1, **options: Any) -> LeaseStore:
        for _ in range(count):
            link = RedisLink(self.uri)
            store = LeaseStore(link, new_holder(), **{"fleet_told": count, **options})
            await store.start()
            self.links.append(link)
            self.stores.append(store)
        return self.stores[-1]

    async def kill(self, number: int) -> None:
        """As SIGKILL would: nothing is returned."""
        store = self.stores.pop(number)
        tasks = [courier._task for courier in store._couriers.values() if courier._task is not None]
        await end_tasks([*store._tasks, *tasks])

    async def ask(self, store: LeaseStore, identifier: str = "u") -> bool:
        self.asked += 1
        claim = store.leases.claim(self.limits, identifier, "")
        now = time.monotonic()
        take = claim.take(now)
        if take is Take.WANTING:
            admitted = await store.admit(claim)
            now = time.monotonic()
        else:
            admitted = take is Take.ADMITTED
        if admitted:
            self.admitted.append(now)
        return admitted

    async def hammer(self, rate: float, seconds: float, *events: Event) -> None:
        """Requests at an even pace, over all workers in turn; each event once, at its seconds."""
        start = time.monotonic()
        asked = 0
        todo = sorted(events, key=lambda event: event[0])
        tasks: set[asyncio.Task[bool]] = set()
        while (passed := time.monotonic() - start) < seconds:
            if todo and passed >= todo[0][0]:
                done = todo.pop(0)[1]()
                if asyncio.iscoroutine(done):
                    await done
            while asked < passed * rate:
                task = asyncio.create_task(self.ask(self.stores[asked % len(self.stores)]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                asked += 1
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    def count(self, name: str) -> int:
        return sum(getattr(store.counters, name) for store in self.stores)

    async def close(self) -> None:
        for store in self.stores:
            await store.stop()
        for link in self.links:
            await link.close()


@contextlib.asynccontextmanager
async def fleet(uri: str, limit: Limit = LIMIT) -> AsyncIterator[Fleet]:
    made = Fleet(uri, limit)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test on the loop of a gateway; the tests without it run on asyncio's own."""

    def run_on(coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(coroutine, 30))

    return run_on


Run = Callable[[Coroutine[Any, Any, None]], None]


def test_four_workers_hammering_one_key_never_admit_more_than_the_limit(run: Run, server: RedisChild) -> None:
    async def go() -> bool:
        async with fleet(server.uri) as workers:
            await workers.hire(4)
            await workers.hammer(500, 4.5)
            if workers.count("degraded"):
                return False  # The machine kept Redis waiting: what holds then, other tests say.
            assert worst_window(workers.admitted, WINDOW) == LIMIT.requests
            # Windows of 121 slots: the third has just begun.
            assert len(workers.admitted) >= 0.97 * 3 * LIMIT.requests
            assert workers.count("calls") <= 0.1 * workers.asked
            return True

    async def until_undisturbed() -> None:
        for _ in range(3):
            if await go():
                return
        raise AssertionError("Redis did not answer in time in any of three runs")

    run(until_undisturbed())


def test_killed_workers_take_their_tokens_with_them(run: Run, server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri) as workers:
            await workers.hire(4)

            async def replace() -> None:
                await workers.kill(0)
                await workers.hire()

            await workers.hammer(500, 4.5, *((0.02 + 0.3 * number, replace) for number in range(14)))
            assert worst_window(workers.admitted, WINDOW) <= LIMIT.requests
            assert len(workers.admitted) >= 1.5 * LIMIT.requests

    run(go())


def test_a_redis_that_stops_for_a_while_in_strict_mode(run: Run, server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri) as workers:
            await workers.hire(4)
            try:
                await workers.hammer(
                    500,
                    6.0,
                    (1.95, lambda: os.kill(server.pid, signal.SIGSTOP)),
                    (3.2, lambda: os.kill(server.pid, signal.SIGCONT)),
                )
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert worst_window(workers.admitted, WINDOW) <= LIMIT.requests
            assert workers.count("degraded") > 0
            assert all(not store.away for store in workers.stores)
            assert len(workers.admitted) >= 2 * LIMIT.requests

    run(go())


def test_a_stopped_redis_costs_no_request_more_than_the_deadline(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 1_000, 60, "open")) as workers:
            store = await workers.hire()
            assert await workers.ask(store)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                start = time.monotonic()
                assert await workers.ask(store)
                assert 0.02 < time.monotonic() - start < 0.25
                assert store.away
                start = time.monotonic()
                for _ in range(200):
                    assert await workers.ask(store)
                assert time.monotonic() - start < 0.1
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await until(lambda: not store.away)
            assert (store.counters.late, store.counters.degraded) == (1, 201)
            # What was admitted without the store is told afterwards.
            await until_spent(store, workers.limit, 202 + 1)

    asyncio.run(go())


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def until_spent(store: LeaseStore, limit: Limit, spent: int) -> None:
    end = time.monotonic() + 5.0
    while (await store.look(limit, "u")).spent != spent:
        assert time.monotonic() < end, await store.look(limit, "u")
        await asyncio.sleep(0.01)


def test_a_lagging_loop_is_not_taken_for_a_sick_redis(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri) as workers:
            store = await workers.hire()
            asked = asyncio.create_task(workers.ask(store))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 (the lag itself)
            assert await asked
            assert (store.away, store.counters.late) == (False, 0)

    asyncio.run(go())


def test_requests_at_once_travel_together(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 50, 60)) as workers:
            store = await workers.hire()
            before = store.counters.calls
            answers = await asyncio.gather(*(workers.ask(store, f"u{number % 40}") for number in range(120)))
            assert sum(answers) == 120
            assert store.counters.calls - before <= 2

    asyncio.run(go())


def test_a_caller_who_left_settles_nothing(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri) as workers:
            store = await workers.hire()
            os.kill(server.pid, signal.SIGSTOP)
            try:
                asked = asyncio.create_task(workers.ask(store))
                await asyncio.sleep(0.01)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await until(lambda: not store.away)
            assert await workers.ask(store)

    asyncio.run(go())


def test_who_came_while_a_call_was_under_way_does_not_wait_for_redis_to_come_back(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 50, 60)) as workers:
            store = await workers.hire()
            under_way, broken = asyncio.Event(), asyncio.Event()

            async def evaluate(*_: object) -> Any:
                under_way.set()
                await broken.wait()
                raise redis.ConnectionError("reset by peer")

            (courier,) = store._couriers.values()
            courier._exchange = evaluate  # type: ignore[method-assign]
            first = asyncio.create_task(workers.ask(store, "a"))
            await under_way.wait()
            later = [asyncio.create_task(workers.ask(store, "b")) for _ in range(3)]
            await asyncio.sleep(0)
            broken.set()
            done, waiting = await asyncio.wait([first, *later], timeout=2.0)
            assert (len(done), len(waiting)) == (4, 0)
            assert store.away
            assert [task.result() for task in done] == [True] * 4, "the local share of an outage"

    asyncio.run(go())


def test_a_lost_connection_is_one_whatever_the_transport_says() -> None:
    """uvloop raises RuntimeError for a transport that was reset in the middle."""

    class Reset(AbstractConnection):
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            raise RuntimeError(
                "unable to perform operation on <TCPTransport closed=True>; the handler is closed"
            )

    class Sending(redis_link._Bounded, Reset):
        def repr_pieces(self) -> list[Any]:
            return []

        async def _connect(self) -> None: ...
        def _host_error(self) -> str:
            return ""

    with pytest.raises(AWAY_ERRORS):
        asyncio.run(Sending().send_packed_command(b""))


def test_stopping_returns_what_is_held(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 1_000, 60, "strict")) as workers:
            store = await workers.hire()
            await asyncio.gather(*(workers.ask(store) for _ in range(20)))
            assert await workers.ask(store)
            looked = await store.look(workers.limit, "u")
            assert (looked.spent, looked.elsewhere) == (20, 0)
            assert looked.holders == 1
            await store.stop()
            looked = await store.look(workers.limit, "u")
            assert (looked.spent, looked.holders, looked.free) == (21, 0, 979)
            assert not await workers.ask(store)
            store.leases.shard.away = False
            with pytest.raises(RuntimeError, match="start"):
                await workers.ask(store)

    asyncio.run(go())


def test_stopping_settles_who_waits(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 1_000, 60, "strict")) as workers:
            store = await workers.hire()
            asked = [asyncio.create_task(workers.ask(store)) for _ in range(20)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert store.leases.shard.waiting or store.counters.calls
            await store.stop()
            answers = await asyncio.wait_for(asyncio.gather(*asked), 1.0)
            assert (await store.look(workers.limit, "u")).spent >= sum(answers)
            assert (await store.look(workers.limit, "u")).holders == 0

    asyncio.run(go())


def test_renewals_go_on_in_the_background(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 100_000, 60, "strict")) as workers:
            store = await workers.hire()
            await workers.hammer(400, 1.5)
            assert len(workers.admitted) == workers.asked
            assert store.counters.direct < 40
            assert store.counters.calls < 40

    asyncio.run(go())


def test_a_reset_reaches_every_worker_within_a_second(server: RedisChild) -> None:
    async def go() -> None:
        limit = Limit("t", 5, 60)
        links = [RedisLink(server.uri) for _ in range(2)]
        channels = [ControlChannel(link, new_holder()) for link in links]
        stores = [
            LeaseStore(link, channel.holder, channel, fleet_told=1)
            for link, channel in zip(links, channels, strict=True)
        ]
        for part in (*channels, *stores):
            await part.start()
        await until(lambda: all(channel.connected for channel in channels))
        claims = [store.leases.claim(LimitSet((limit,)), "u", "") for store in stores]
        assert [await stores[0].admit(claims[0]) for _ in range(6)] == [True] * 5 + [False]
        assert not await stores[1].admit(claims[1])
        assert claims[1].take(time.monotonic()) is Take.DENIED
        await stores[0].reset(limit, "u")
        assert await stores[0].admit(claims[0])
        await until(lambda: claims[1].take(time.monotonic()) is Take.WANTING, 1.0)
        assert await stores[1].admit(claims[1])
        await until(lambda: stores[1].leases.fleet == 2, 3.0)
        for part in (*stores, *channels, *links):
            await (part.close() if isinstance(part, RedisLink) else part.stop())

    asyncio.run(go())


def test_everything_flushed_is_noticed_and_held_back(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri) as workers:
            await workers.hire(2)
            flush = redis.Redis(port=server.port)
            await workers.hammer(500, 5.0, (1.0, flush.flushall), (1.5, flush.script_flush))
            assert worst_window(workers.admitted, WINDOW) <= LIMIT.requests
            assert workers.count("degraded") > 0
            assert len(workers.admitted) > LIMIT.requests
            flush.close()

    asyncio.run(go())


def test_a_restart_is_noticed_also_when_the_data_came_back(server: RedisChild) -> None:
    async def go() -> None:
        async with fleet(server.uri, Limit("t", 50, 60, "strict")) as workers:
            store = await workers.hire()
            assert await workers.ask(store)
            server.kill()
            server.start()  # in this thread: the child dies with the thread that started it
            with contextlib.suppress(StoreAwayError):
                await store.look(workers.limit, "u")
            for _ in range(3):
                assert not await workers.ask(store)
                await asyncio.sleep(0.15)
            await until(lambda: not store.away)
            looked = await store.look(workers.limit, "u")
            assert (looked.spent, looked.free) == (1, 0)
            assert 60_000 < looked.held_ms <= 71_000

    asyncio.run(go())


def test_a_worker_starts_without_redis_and_finds_it_later(
    server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nine of the ten workers that it was told of never report: their shares are held back for that long.
    monkeypatch.setattr(leases, "ROLL_CALL_SECONDS", 0.4)
    # And as this one knows no better, the store may have lost something.
    monkeypatch.setattr(key_lease, "YOUNG_MS", 300)
    with redis.Redis(port=server.port) as client:
        client.flushall()

    async def go() -> None:
        server.stop()
        try:
            async with fleet(server.uri, Limit("t", 50, 60, "safe")) as workers:
                store = await workers.hire(fleet_told=10)
                assert store.away
                assert [await workers.ask(store) for _ in range(7)] == [True] * 5 + [False] * 2
                with pytest.raises(StoreAwayError):
                    await store.look(workers.limit, "u")
                server.start()  # in this thread: the child dies with the thread that started it
                await until(lambda: not store.away)
                assert not await workers.ask(store)
                await asyncio.sleep(0.6)
                assert await workers.ask(store)
                await until_spent(store, workers.limit, 6)
        finally:
            if not server.answers():
                server.start()

    asyncio.run(go())


@pytest.mark.parametrize(
    "uri, fault",
    [
        ("http://a", "must begin with"),
        ("redis+sentinel://a,b", "needs hosts and a master"),
        ("redis+sentinel://a:x/m", "must be a number"),
        ("redis+sentinel://a/m/zero", "needs hosts and a master"),
    ],
)
def test_a_uri_that_is_not_understood_says_so(uri: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        RedisLink(uri)


def test_sentinels_are_asked_for_the_master() -> None:
    link = RedisLink("redis+sentinel://u:p%40@a,[::1]:7/main/2")
    pool = link.commands.connection_pool
    assert (pool.service_name, pool.connection_kwargs["db"]) == ("main", 2)
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("u", "p@")
    hosts = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
    assert [(h["host"], h["port"]) for h in hosts] == [("a", 26379), ("::1", 7)]
