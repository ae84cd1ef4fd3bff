"""Telling session management, over real sockets and a real database; the clock of claims, waits and the breaker is a
number.
"""

import asyncio
import datetime as dt
import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal, cast

import httpx
import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.rules.breaker import CircuitBreaker
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.transport import PoolTransport
from lucid.database.connection import Connection
from lucid.database.documents import OutboxEntry, SessionDocument
from lucid.database.session_repository import SessionRepository
from lucid.errors import away
from lucid.services import session_outbox
from lucid.services.callers import Caller
from lucid.services.session_outbox import SessionOutbox, is_done, is_refused, wait_seconds
from lucid.services.session_service import SessionService
from tests.support.fake_repositories import FakeSessionRepository
from tests.support.servers import Backend, HangupError, Received, Reply
from tests.support.stores import MongoChild, free_port

EPOCH = 1_893_456_000.25
ALICE = Principal(Role.USER, "authenticated", "alice", "alice", via="token")
MALLORY = Principal(Role.USER, "authenticated", "mallory", "mallory", via="token")
ADMIN = Principal(Role.ADMIN, "admin", "root", "root", via="token")
CALLER = Caller("192.0.2.7", "request-1")
LEASE = dt.timedelta(seconds=30)

_numbers = itertools.count()


class Clock:
    """Seconds since the epoch, for all workers; `jitter` is the dice of all."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.jitter = 0.0

    def __call__(self) -> float:
        return self.now

    def moment(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.now, dt.UTC)


class Worker:
    """One worker's part of it, put together as in the app."""

    def __init__(self, clock: Clock, mongodb: str, port: int, poll_seconds: float) -> None:
        self.clock = clock
        self.connection = Connection(mongodb)
        self.sessions = SessionRepository(self.connection, clock.moment)
        self.poll_seconds = poll_seconds
        pool = Pool(scheme="http", host="127.0.0.1", port=port, max_connections=16, monotonic=time.monotonic)
        self.balancer = Balancer("sessions", [pool], time.monotonic)
        self.breaker = CircuitBreaker("sessions", jitter=lambda: 0.0)
        self.client = httpx.AsyncClient(
            transport=PoolTransport(self.balancer, self.breaker, clock), base_url="http://sessions"
        )
        self.put_together()

    def put_together(self) -> None:
        self.outbox = SessionOutbox(
            self.sessions,
            self.client,
            self.clock,
            jitter=lambda: self.clock.jitter,
            poll_seconds=self.poll_seconds,
        )
        self.service = SessionService(self.sessions, self.outbox, self.clock)

    def hold_in_memory(self) -> None:
        """For many rows: the embedded database looks at each of them for each claim."""
        self.sessions = cast(SessionRepository, FakeSessionRepository(self.clock.moment))
        self.put_together()

    async def create(self, metadata: dict[str, Any] | None = None, owner: Principal = ALICE) -> str:
        return (await self.service.create(metadata or {}, owner)).session_id

    async def create_unheard(self, owner: Principal = ALICE) -> str:
        """As if the worker had died between commit and wake."""
        stopped, self.outbox._stopped = self.outbox._stopped, True
        try:
            return await self.create(owner=owner)
        finally:
            self.outbox._stopped = stopped

    async def terminate(self, session_id: str) -> None:
        await self.service.terminate(session_id, ALICE, CALLER)

    async def told(self) -> None:
        """Until what was woken has ended."""
        while self.outbox._tasks:
            await asyncio.wait(set(self.outbox._tasks))

    async def stored(self, session_id: str) -> SessionDocument:
        found = await self.sessions.find_by_id(session_id)
        assert found is not None
        return found

    async def waiting(self) -> list[str]:
        """The sessions that still have something to tell."""
        found, _ = await self.sessions.list_sessions(0, 1_000)
        assert all(bool(session.outbox) == (session.outbox_due_at is not None) for session in found)
        return [session.session_id for session in found if session.outbox]

    async def due_in(self, session_id: str) -> float:
        due = (await self.stored(session_id)).outbox_due_at
        assert due is not None
        return due.timestamp() - self.clock.now

    async def close(self) -> None:
        await self.outbox.stop()
        await self.client.aclose()
        self.balancer.close()
        self.connection.close()


class World:
    def __init__(self, clock: Clock, workers: list[Worker]) -> None:
        self.clock = clock
        self.workers = workers
        self.a = workers[0]


Test = Callable[[World], Awaitable[None]]


@asynccontextmanager
async def world(mongo: MongoChild, port: int, workers: int, poll_seconds: float) -> AsyncIterator[World]:
    name = mongo.in_database(f"outbox_{next(_numbers)}")
    clock = Clock()
    made = [Worker(clock, name, port, poll_seconds) for _ in range(workers)]
    try:
        yield World(clock, made)
    finally:
        for worker in made:
            await worker.close()


def run(mongo: MongoChild, port: int, test: Test, *, workers: int = 1, poll_seconds: float = 2.0) -> None:
    async def main() -> None:
        async with asyncio.timeout(30.0), world(mongo, port, workers, poll_seconds) as w:
            await test(w)

    asyncio.run(main())


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """For `run`, which other tasks and threads take part in; bounded by the test's own timeout."""
    while not await condition():
        await asyncio.sleep(0.005)


def lines(backend: Backend) -> list[str]:
    return [f"{received.method} {received.target}" for received in backend.received]


def created(backend: Backend) -> list[str]:
    """The ids in the POSTs, in their order."""
    return [json.loads(each.body)["session_id"] for each in backend.received if each.method == "POST"]


def statuses(*given: int) -> Callable[[Received], Reply]:
    """Answers with these one after the other, with the last one for ever."""
    left = list(given)
    return lambda _: Reply(status=left.pop(0) if len(left) > 1 else left[0])


@contextmanager
def gate(backend: Backend) -> Iterator[threading.Event]:
    """The cluster takes requests and answers none until the event is set."""
    event = threading.Event()

    def respond(_: Received) -> Reply:
        event.wait(20.0)
        return Reply(201)

    backend.respond = respond
    try:
        yield event
    finally:
        event.set()


# ---- what is told


def test_both_are_told_in_the_documented_form(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        name = await w.a.create({"screen": {"x": [1, None]}})
        entry = (await w.a.stored(name)).outbox
        await w.a.told()
        await w.a.service.terminate(name, ADMIN, CALLER)
        last = (await w.a.stored(name)).outbox
        await w.a.told()
        assert await w.a.waiting() == []
        post, delete = backend.received
        assert (post.method, post.target) == ("POST", "/api/v1/sessions")
        assert json.loads(post.body) == {
            "session_id": name,
            "user_id": "alice",
            "status": "INITIALIZING",
            "metadata": {"screen": {"x": [1, None]}},
            "created_at": "2030-01-01T00:00:00Z",
        }
        assert post.field("content-type") == "application/json"
        assert (delete.method, delete.target, delete.body) == ("DELETE", f"/api/v1/sessions/{name}", b"")
        for received, entries in ((post, entry), (delete, last)):
            # The owner's name, also where an admin has terminated it.
            assert received.field("x-user-id") == "alice"
            assert received.field("idempotency-key") == received.field("x-request-id") == entries[0].entry_id
        assert post.field("x-request-id") != delete.field("x-request-id")
        # One connection has served both.
        assert backend.connections == 1

    run(mongo, backend.port, test)


ANSWERS = [200, 201, 204, 301, 400, 401, 403, 404, 405, 408, 409, 410, 422, 425, 429, 500, 501, 502, 503, 504]
DONE: dict[str, set[int]] = {
    "create": {200, 201, 204, 409},
    "terminate": {200, 201, 204, 404, 409, 410},
}


@pytest.mark.parametrize("kind", ["create", "terminate"])
def test_which_answers_are_the_end_of_it(
    mongo: MongoChild,
    backend: Backend,
    kind: Literal["create", "terminate"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(w: World) -> None:
        for status in ANSWERS:
            caplog.clear()
            backend.respond = statuses(status)
            backend.received.clear()
            name = f"answered-{kind}-{status}"
            moment = w.clock.moment()
            entries = (OutboxEntry(f"e{status}", kind, moment),)
            await w.a.sessions.create(
                SessionDocument(
                    name, "alice", "ACTIVE", {}, moment, moment, outbox=entries, outbox_due_at=moment
                )
            )
            await w.a.outbox.drain()
            assert len(backend.received) == 1
            done = status in DONE[kind]
            assert is_done(kind, status) == done
            assert (await w.a.waiting() == [name]) != done, status
            warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            if done:
                assert warned == []
                continue
            assert len(warned) == 1 and str(status) in warned[0]
            # The first wait of all; how long it may become is below.
            assert await w.a.due_in(name) == pytest.approx(1.0, abs=0.002)
            backend.respond = statuses(204)
            w.clock.now += 0.99
            await w.a.outbox.drain()
            assert len(backend.received) == 1
            w.clock.now += 0.02
            await w.a.outbox.drain()
            assert len(backend.received) == 2
            assert await w.a.waiting() == []

    run(mongo, backend.port, test)


def test_a_refusal_is_one_line_for_each_attempt(
    mongo: MongoChild, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(422)
        name = await w.a.create()
        await w.a.told()
        for _ in range(3):
            w.clock.now += await w.a.due_in(name) + 0.01
            await w.a.outbox.drain()
        text = f"session management answered 422 to the create of session {name}, which is kept"
        assert [record.getMessage() for record in caplog.records] == [text] * 4

    run(mongo, backend.port, test)


def test_what_is_refused_for_a_day_is_an_error_in_the_log_and_kept(
    mongo: MongoChild, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(422)
        name = await w.a.create()
        await w.a.told()
        for age_hours, level in ((22.9, "WARNING"), (23.99, "WARNING"), (25.0, "ERROR"), (100.5, "ERROR")):
            caplog.clear()
            w.clock.now = EPOCH + age_hours * 3_600.0
            await w.a.outbox.drain()
            await w.a.outbox.drain()
            (said,) = caplog.records
            assert said.levelname == level, age_hours
            assert ("which it has not taken for" in said.getMessage()) == (level == "ERROR")
        assert said.getMessage() == (
            f"session management answered 422 to the create of session {name}, "
            "which it has not taken for 100 hours; it is kept"
        )
        # A cluster that fails for a day is no fault of the session.
        caplog.clear()
        backend.respond = statuses(500)
        w.clock.now += 3_600.1
        await w.a.outbox.drain()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        # Nothing is given up, however old.
        backend.respond = statuses(201)
        w.clock.now += 365.0 * 86_400.0
        await w.a.outbox.drain()
        assert await w.a.waiting() == []

    run(mongo, backend.port, test)


@pytest.mark.parametrize(
    ("status", "longest"),
    [(301, 60), (400, 3600), (401, 3600), (408, 60), (422, 3600), (425, 60), (429, 60), (500, 60), (503, 60)],
)
def test_the_longest_wait_is_an_hour_for_what_is_refused_and_else_a_minute(
    mongo: MongoChild, backend: Backend, status: int, longest: int
) -> None:
    async def test(w: World) -> None:
        assert is_refused(status) == (longest == 3600)
        backend.respond = statuses(status)
        name = await w.a.create()
        await w.a.told()
        for age_seconds in (7.0, 40.0, 1_000.0, 1e6):
            w.clock.now = EPOCH + age_seconds
            await w.a.outbox.drain()
            assert await w.a.due_in(name) == pytest.approx(min(age_seconds, longest), abs=0.002)
        w.clock.now += longest + 0.01
        w.clock.jitter = 1.0
        await w.a.outbox.drain()
        assert await w.a.due_in(name) == pytest.approx(0.75 * longest, abs=0.002)

    run(mongo, backend.port, test)


def test_the_wait_grows_with_the_age() -> None:
    age, waits = 0.0, []
    for _ in range(9):
        waits.append(wait_seconds(age, 0.0))
        age += waits[-1]
    assert waits == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    age, waits = 0.0, []
    for _ in range(15):
        waits.append(wait_seconds(age, 0.0, 3_600.0))
        age += waits[-1]
    assert waits == [1.0, *(2.0**i for i in range(12)), 3_600.0, 3_600.0]
    assert wait_seconds(1e9, 1.0) == 45.0
    assert wait_seconds(1e9, 0.5) == 52.5
    # Clocks may differ: an entry of the future is a young one.
    assert wait_seconds(-100.0, 0.0) == wait_seconds(0.0, 1.0) == 1.0


def test_a_cluster_that_is_away_is_asked_less_and_less(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(500)
        name = await w.a.create()
        await w.a.told()
        waits = []
        for count in range(2, 10):
            waits.append(await w.a.due_in(name))
            w.clock.now += waits[-1] - 0.01
            await w.a.outbox.drain()
            assert len(backend.received) == count - 1
            w.clock.now += 0.02
            await w.a.outbox.drain()
            assert len(backend.received) == count
        assert [round(wait) for wait in waits] == [1, 1, 2, 4, 8, 16, 33, 60]
        w.clock.jitter = 1.0
        w.clock.now += 60.1
        await w.a.outbox.drain()
        assert round(await w.a.due_in(name)) == 45

    run(mongo, backend.port, test)


# ---- the cluster is away


def test_a_slow_cluster_delays_no_caller(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        with gate(backend) as opened:
            name = await w.a.create()
            view = await w.a.service.get(name, ALICE)
            assert view.status == "INITIALIZING"
            assert await w.a.waiting() == [name]
            opened.set()
            await w.a.told()
        assert await w.a.waiting() == []
        assert lines(backend) == ["POST /api/v1/sessions"]

    run(mongo, backend.port, test)


def test_nothing_is_lost_while_the_cluster_is_killed_and_comes_back(
    mongo: MongoChild, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        caplog.set_level(logging.INFO, session_outbox.__name__)
        before = await w.a.create()
        await w.a.told()
        backend.kill()
        names = [await w.a.create() for _ in range(12)]
        for name in names[:6]:
            await w.a.terminate(name)
        await w.a.told()
        for _ in range(20):
            await w.a.outbox.drain()
            w.clock.now += 2.0
        await w.a.terminate(before)
        assert sorted(await w.a.waiting()) == sorted([before, *names])
        backend.start()
        back = w.clock.now
        while await w.a.waiting():
            await w.a.outbox.drain()
            w.clock.now += 2.0
        # The breaker's longest time so far, then the longest wait.
        assert w.clock.now - back < 60.0 + 60.0 + 4.0
        # Each once: what never got through was never taken.
        assert Counter(created(backend)) == Counter([before, *names])
        for name in names[:6]:
            delete = lines(backend).index(f"DELETE /api/v1/sessions/{name}")
            posts = [i for i, each in enumerate(backend.received) if name.encode() in each.body]
            assert posts[0] < delete
        assert sum(line.startswith("DELETE") for line in lines(backend)) == 7
        said = [record.getMessage() for record in caplog.records if record.name == session_outbox.__name__]
        assert len(said) == 2, said
        assert said[0].startswith("session management cannot be told of sessions: ")
        assert said[1] == "session management can be told of sessions again"

    run(mongo, backend.port, test)


def test_an_open_breaker_is_not_hammered_at(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(503)
        names = [await w.a.create_unheard() for _ in range(12)]
        claims = count_claims(w.a)
        for _ in range(20):
            await w.a.outbox.drain()
        # One session a round; the fifth failure opens the breaker, and nothing is sent any more.
        assert len(backend.received) == 5
        assert len(claims) == 20
        for _ in range(10):
            await w.a.create()
        await w.a.told()
        assert len(claims) == 20
        assert len(backend.received) == 5
        # The breaker tries again by its own clock; the first success lets all the others go.
        backend.respond = statuses(201)
        w.clock.now += 31.0
        await w.a.outbox.drain()
        await w.a.outbox.drain()
        w.clock.now += 60.0
        await w.a.outbox.drain()
        assert await w.a.waiting() == []
        assert set(names) <= set(created(backend))
        assert len(set(created(backend))) == 22

    run(mongo, backend.port, test)


def count_claims(worker: Worker) -> list[str]:
    claims: list[str] = []
    repository = worker.sessions
    take_due, claim = repository.take_due, repository.claim

    async def counted_take(now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        claims.append("")
        return await take_due(now, lease)

    async def counted_claim(session_id: str, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        claims.append(session_id)
        return await claim(session_id, now, lease)

    repository.take_due = counted_take  # type: ignore[method-assign]
    repository.claim = counted_claim  # type: ignore[method-assign]
    return claims


@pytest.mark.parametrize(("status", "most"), [(500, 8), (429, 8), (400, 200), (401, 200)])
def test_a_cluster_that_takes_nothing_ends_each_round(
    mongo: MongoChild, backend: Backend, status: int, most: int
) -> None:
    async def test(w: World) -> None:
        w.a.hold_in_memory()
        backend.respond = statuses(status)
        for _ in range(most + 30):
            await w.a.create_unheard()
        await w.a.outbox.drain()
        # So many end a round, and seven more may be under way at that moment.
        assert most <= len(backend.received) <= most + 7
        assert w.a.outbox._is_spent()
        assert not w.a.outbox._away

    run(mongo, backend.port, test)


def test_six_hundred_refused_sessions_hold_up_the_others_for_seconds(
    mongo: MongoChild, backend: Backend
) -> None:
    """One user's sessions, which the cluster will never take, and those of another that an outage has left."""

    async def test(w: World) -> None:
        async def seconds_until_told(names: list[str]) -> float:
            begun = w.clock.now
            while not set(names) <= set(created(backend)):
                assert w.clock.now - begun < 100.0
                w.clock.now += 2.0
                before = len(backend.received)
                await w.a.outbox.drain()
                assert len(backend.received) - before <= 200 + 7 + len(names)
            return w.clock.now - begun

        w.a.hold_in_memory()
        backend.kill()
        for _ in range(600):
            await w.a.create_unheard(MALLORY)
        w.clock.now += 1.0
        honest = [await w.a.create_unheard() for _ in range(5)]
        await w.a.outbox.drain()
        assert backend.received == []
        backend.respond = lambda received: Reply(422 if received.field("x-user-id") == "mallory" else 201)
        backend.start()
        # Three rounds for the six hundred, which are due first, and the fourth for these.
        assert await seconds_until_told(honest) <= 8.0
        # While they are young they come again soon, and new ones get through all the same.
        assert await seconds_until_told([await w.a.create_unheard() for _ in range(5)]) <= 8.0
        # Who is woken waits for nobody.
        woken = await w.a.create()
        await w.a.told()
        assert woken in created(backend)
        # All due at once again, each before the new ones: the worst that can be.
        w.clock.now += 2.0 * 86_400.0
        assert await seconds_until_told([await w.a.create_unheard() for _ in range(5)]) <= 8.0
        # From now on all of them are six hundred requests in an hour.
        w.clock.now += 2.0
        await w.a.outbox.drain()
        before = len(backend.received)
        assert await seconds_until_told([await w.a.create_unheard()]) == 2.0
        assert len(backend.received) - before == 1
        found, _ = await w.a.sessions.list_sessions(0, 1_000)
        kept = [session for session in found if session.outbox]
        assert len(kept) == 600 and {session.user_id for session in kept} == {"mallory"}

    run(mongo, backend.port, test)


def test_rounds_are_fair_and_take_each_row_once(
    mongo: MongoChild, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, in small, over the real database, by two workers."""
    monkeypatch.setattr(session_outbox, "MOST_REFUSALS", 10)

    async def test(w: World) -> None:
        refused = [await w.a.create_unheard(MALLORY) for _ in range(40)]
        w.clock.now += 0.1
        honest = [await w.a.create_unheard() for _ in range(5)]
        backend.respond = lambda received: Reply(422 if received.field("x-user-id") == "mallory" else 201)
        # Each tells its ten and the at most seven that were under way; no row comes twice before all came once.
        await asyncio.gather(*(worker.outbox.drain() for worker in w.workers))
        assert 20 <= len(backend.received) <= 34
        assert max(Counter(created(backend)).values()) == 1
        w.clock.now += 0.1
        await asyncio.gather(*(worker.outbox.drain() for worker in w.workers))
        assert Counter(created(backend)) == Counter([*refused, *honest])
        assert sorted(await w.a.waiting()) == sorted(refused)

    run(mongo, backend.port, test, workers=2)


def test_refusals_of_the_woken_do_not_use_up_a_round(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(422)
        await w.a.outbox.drain()
        for _ in range(12):
            await w.a.create(owner=MALLORY)
            await w.a.told()
        assert len(backend.received) == 12
        assert w.a.outbox._refusals_left == 200
        assert w.a.outbox._failures_left == 8

    run(mongo, backend.port, test)


def hangup(_: Received) -> Reply:
    raise HangupError


@pytest.mark.parametrize("fault", ["hangs up", "garbage", "no answer", "body breaks off", "endless body"])
def test_other_ways_to_be_broken(
    mongo: MongoChild, backend: Backend, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has long been answered; it is told once the cluster is well, or at once if the head was good."""
    monkeypatch.setattr(session_outbox, "TELL_SECONDS", 0.3)
    monkeypatch.setattr(session_outbox, "_ANSWER_SECONDS", 0.05)
    seen: list[str] = []
    broken = True

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next(
                    (line for line in head.split("\r\n") if line.startswith("Content-Length")), ": 0"
                )
                await reader.readexactly(int(length.partition(": ")[2]))
                seen.append(head.partition(" ")[0])
                if not broken:
                    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                elif fault == "hangs up":
                    return
                elif fault == "garbage":
                    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n\0\xff\r\n\r\n")
                elif fault == "body breaks off":
                    writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\nhalf")
                    return
                elif fault == "endless body":
                    writer.write(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def test(w: World) -> None:
        nonlocal broken
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            async with world(mongo, port, 1, 2.0) as broken_world:
                one = broken_world.a
                name = await one.create()
                await one.told()
                at_once = fault in ("body breaks off", "endless body")
                assert await one.waiting() == ([] if at_once else [name])
                await one.terminate(name)
                await one.told()
                broken = False
                # Once for what it has been put off by, once for what its failure has held up.
                for _ in range(2):
                    broken_world.clock.now += 1.1
                    await one.outbox.drain()
                assert await one.waiting() == []
                assert seen[0] == "POST"
                assert seen[-1] == "DELETE"
                assert seen == sorted(seen, reverse=True)
        finally:
            server.close()

    run(mongo, backend.port, test)


# ---- workers


def test_a_worker_that_died_before_it_told_is_stood_in_for(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        a, b = w.workers
        name = await a.create_unheard()
        assert backend.received == []
        task = asyncio.create_task(b.outbox.run())
        await until(lambda: nothing_waits(a))
        task.cancel()
        assert created(backend) == [name]

    run(mongo, backend.port, test, workers=2, poll_seconds=0.01)


async def nothing_waits(worker: Worker) -> bool:
    return await worker.waiting() == []


def test_the_claim_of_a_worker_that_died_while_it_told_expires(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        a, b = w.workers
        name = await a.create_unheard()
        assert await a.sessions.take_due(w.clock.moment(), LEASE) is not None
        w.clock.now += 29.9
        await b.outbox.drain()
        b.outbox.wake(name)
        await b.told()
        assert backend.received == []
        w.clock.now += 0.2
        await b.outbox.drain()
        assert created(backend) == [name]

    run(mongo, backend.port, test, workers=2)


def test_four_workers_tell_each_thing_once_and_in_its_order(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(201)
        names = [await w.a.create_unheard() for _ in range(24)]
        for name in names[:12]:
            w.a.outbox._stopped = True
            await w.a.terminate(name)
            w.a.outbox._stopped = False
        loops = [asyncio.create_task(worker.outbox.run()) for worker in w.workers]
        for name in names:  # and all are woken for all of them besides
            for worker in w.workers:
                worker.outbox.wake(name)
            await asyncio.sleep(0)
        await until(lambda: nothing_waits(w.a))
        for loop in loops:
            loop.cancel()
        told = lines(backend)
        assert Counter(created(backend)) == Counter(names)
        assert Counter(line for line in told if line.startswith("DELETE")) == Counter(
            f"DELETE /api/v1/sessions/{name}" for name in names[:12]
        )
        for name in names[:12]:
            post = next(i for i, each in enumerate(backend.received) if name.encode() in each.body)
            assert post < told.index(f"DELETE /api/v1/sessions/{name}")

    run(mongo, backend.port, test, workers=4, poll_seconds=0.01)


def test_what_ends_while_it_is_announced_is_told_behind_it(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        with gate(backend) as opened:
            name = await w.a.create()
            await until(lambda: reached(backend, 1))
            w.a.outbox._stopped = True  # nobody is woken for the end
            await w.a.terminate(name)
            opened.set()
            await w.a.told()
        assert await w.a.waiting() == []
        assert lines(backend) == ["POST /api/v1/sessions", f"DELETE /api/v1/sessions/{name}"]

    run(mongo, backend.port, test)


# ---- bounds and ends


def test_a_flood_of_new_sessions_starts_eight_tasks_and_the_loop_does_the_rest(
    mongo: MongoChild, backend: Backend
) -> None:
    async def test(w: World) -> None:
        with gate(backend) as opened:
            # A poll that would come too late: it is the flood that calls the loop.
            loop = asyncio.create_task(w.a.outbox.run())
            names = []
            for _ in range(40):
                names.append(await w.a.create())
                assert len(w.a.outbox._tasks) <= 8
            assert len(w.a.outbox._tasks) == 8
            opened.set()
            await until(lambda: nothing_waits(w.a))
            loop.cancel()
        assert Counter(created(backend)) == Counter(names)

    run(mongo, backend.port, test, poll_seconds=1_000.0)


def test_stopping_is_bounded_and_loses_nothing(
    mongo: MongoChild, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_outbox, "STOP_SECONDS", 0.05)

    async def test(w: World) -> None:
        a, b = w.workers
        with gate(backend) as opened:
            name = await a.create()
            loop = asyncio.create_task(a.outbox.run())
            await until(lambda: reached(backend, 1))
            loop.cancel()
            await a.outbox.stop()  # whatever hangs there
            assert not a.outbox._tasks
            a.outbox.wake(name)
            assert not a.outbox._tasks
            opened.set()
        assert await a.waiting() == [name]
        w.clock.now += 31.0
        await b.outbox.drain()
        assert await a.waiting() == []

    run(mongo, backend.port, test, workers=2)


def test_stopping_lets_what_is_quick_come_to_its_end(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        name = await w.a.create()
        await w.a.outbox.stop()
        assert created(backend) == [name]
        assert await w.a.waiting() == []

    run(mongo, backend.port, test)


def test_a_session_that_cannot_be_told_holds_up_no_other(
    mongo: MongoChild, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        moment = w.clock.moment()
        entries = (OutboxEntry("e", "create", moment),)
        await w.a.sessions.create(
            SessionDocument(
                "poisoned", "\N{SNOWMAN}", "ACTIVE", {}, moment, moment, outbox=entries, outbox_due_at=moment
            )
        )
        w.clock.now += 1.0
        name = await w.a.create_unheard()
        await w.a.outbox.drain()
        assert created(backend) == [name]
        assert await w.a.waiting() == ["poisoned"]
        assert await w.a.due_in("poisoned") == pytest.approx(30.0, abs=0.002)  # its claim expires
        assert [record.getMessage() for record in caplog.records] == ["session poisoned cannot be told of"]
        w.clock.now += 30.1
        w.a.outbox.wake("poisoned")
        await w.a.told()
        assert await w.a.waiting() == ["poisoned"]

    run(mongo, backend.port, test)


def test_mongodb_away_is_no_reason_to_end(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lucid.database.connection.SERVER_SELECTION_MS", 20)

    async def main() -> None:
        worker = Worker(Clock(), f"mongodb://127.0.0.1:{free_port()}/x", backend.port, 0.001)
        try:
            worker.outbox.wake("abcdefgh")
            await worker.told()
            loop = asyncio.create_task(worker.outbox.run())
            await asyncio.wait([loop], timeout=0.1)
            assert not loop.done()
            loop.cancel()
            assert not worker.outbox._away
        finally:
            await worker.close()

    asyncio.run(main())
    assert backend.received == []


def test_mongodb_going_away_after_the_answer_means_that_it_is_told_again(
    mongo: MongoChild, backend: Backend
) -> None:
    async def test(w: World) -> None:
        delivered = w.a.sessions.delivered

        async def lost(session_id: str, entry_id: str) -> SessionDocument | None:
            raise away("mongodb")

        w.a.sessions.delivered = lost  # type: ignore[method-assign]
        name = await w.a.create_unheard()
        await w.a.outbox.drain()
        w.a.outbox.wake(name)
        await w.a.told()
        assert created(backend) == [name]
        w.a.sessions.delivered = delivered  # type: ignore[method-assign]
        w.clock.now += 31.0
        await w.a.outbox.drain()
        assert created(backend) == [name, name]
        assert len({received.field("idempotency-key") for received in backend.received}) == 1
        assert await w.a.waiting() == []

    run(mongo, backend.port, test)


def test_a_fault_of_ours_is_logged_and_ends_a_round(
    mongo: MongoChild, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        calls = 0

        async def broken(*_: object) -> SessionDocument | None:
            nonlocal calls
            calls += 1
            raise ValueError("a row of somebody else's hand")

        claim, take_due = w.a.sessions.claim, w.a.sessions.take_due
        w.a.sessions.claim = w.a.sessions.take_due = broken  # type: ignore[method-assign,assignment]
        name = await w.a.create()
        await w.a.told()
        assert [record.getMessage() for record in caplog.records] == ["session ? cannot be told of"]
        await w.a.outbox.drain()
        assert 9 <= calls <= 17
        w.a.sessions.claim, w.a.sessions.take_due = claim, take_due  # type: ignore[method-assign]
        await w.a.outbox.drain()
        assert created(backend) == [name]

    run(mongo, backend.port, test)


@pytest.mark.parametrize(("status", "count"), [(500, 20), (400, 210)])
def test_after_too_many_failures_or_refusals_nothing_shortens_the_pause(
    mongo: MongoChild, backend: Backend, status: int, count: int
) -> None:
    async def test(w: World) -> None:
        w.a.hold_in_memory()
        backend.respond = statuses(status)
        for _ in range(count):
            await w.a.create_unheard()
        begun, ended = [], []
        drain = w.a.outbox.drain

        async def counted() -> None:
            begun.append(w.clock.now)
            await drain()
            ended.append(w.clock.now)

        async def one_round() -> bool:
            return bool(ended)

        w.a.outbox.drain = counted  # type: ignore[method-assign]
        loop = asyncio.create_task(w.a.outbox.run())
        await until(one_round)
        for _ in range(20):
            w.a.outbox._more.set()
            await asyncio.sleep(0)
        assert len(begun) == 1
        loop.cancel()

    run(mongo, backend.port, test, poll_seconds=1_000.0)


def test_a_cluster_that_goes_away_ends_the_round(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        for _ in range(30):
            await w.a.create_unheard()
        claims = count_claims(w.a)
        backend.respond = statuses(201, 201, 503)
        await w.a.outbox.drain()
        # Two went well; each of the eight that tell side by side may have met the failure.
        assert len(claims) <= 2 + 8
        assert len(await w.a.waiting()) == 28

    run(mongo, backend.port, test)


async def reached(backend: Backend, count: int) -> bool:
    return len(backend.received) >= count


def test_a_long_answer_is_not_read(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = lambda _: Reply(201, body=b"x" * 1_000_000)
        for _ in range(2):
            await w.a.create()
            await w.a.told()
        assert await w.a.waiting() == []
        assert backend.connections == 2

    run(mongo, backend.port, test)


def test_an_end_that_another_worker_learns_of_meanwhile(mongo: MongoChild, backend: Backend) -> None:
    """It leaves it to the one that is telling, which goes on to it at once: nobody waits for the claim to expire."""

    async def test(w: World) -> None:
        a, b = w.workers
        with gate(backend) as opened:
            name = await a.create()
            await until(lambda: reached(backend, 1))
            await b.terminate(name)
            await b.told()
            await b.outbox.drain()
            opened.set()
            await a.told()
        assert await a.waiting() == []
        assert lines(backend) == ["POST /api/v1/sessions", f"DELETE /api/v1/sessions/{name}"]

    run(mongo, backend.port, test, workers=2)


def test_an_end_at_any_moment_waits_for_no_claim(mongo: MongoChild, backend: Backend) -> None:
    """Before the first entry is struck out its teller goes on to the second; after that it is due, and woken for."""

    async def test(w: World) -> None:
        a, b = w.workers
        by_b: list[str] = []
        delivered = b.sessions.delivered

        async def counted(session_id: str, entry_id: str) -> SessionDocument | None:
            by_b.append(session_id)
            return await delivered(session_id, entry_id)

        b.sessions.delivered = counted  # type: ignore[method-assign]
        for count in range(50):
            name = await a.create()
            # Ever more steps of the loop: before, while and after it is told and struck out.
            for _ in range(count * count // 2):
                await asyncio.sleep(0)
            if count == 49:
                await a.told()
            await b.terminate(name)
            await a.told()
            await b.told()
            assert await a.waiting() == [], count
            assert lines(backend)[-2:] == ["POST /api/v1/sessions", f"DELETE /api/v1/sessions/{name}"]
        assert len(backend.received) == 100
        assert 0 < len(by_b) < 50  # both ways have been gone

    run(mongo, backend.port, test, workers=2)


def test_an_end_joins_the_wait_of_what_was_put_off(mongo: MongoChild, backend: Backend) -> None:
    async def test(w: World) -> None:
        backend.respond = statuses(422)
        name = await w.a.create()
        await w.a.told()
        w.clock.now += 100.0
        await w.a.outbox.drain()
        await w.a.terminate(name)
        await w.a.told()
        await w.a.outbox.drain()
        assert len(backend.received) == 2
        assert await w.a.due_in(name) == pytest.approx(100.0, abs=0.002)
        backend.respond = statuses(201)
        w.clock.now += 100.1
        await w.a.outbox.drain()
        assert [line.partition(" ")[0] for line in lines(backend)] == ["POST", "POST", "POST", "DELETE"]
        assert await w.a.waiting() == []

    run(mongo, backend.port, test)


def test_the_time_of_a_claim_covers_what_it_is_used_for() -> None:
    assert session_outbox.TELL_SECONDS < session_outbox.LEASE_SECONDS - 5.0
    # Both requests of a session, each with an answer as late as may be.
    timeout = session_outbox._TIMEOUT
    assert timeout.read is not None
    assert 2 * (timeout.read + session_outbox._ANSWER_SECONDS) <= session_outbox.TELL_SECONDS
