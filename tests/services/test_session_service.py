"""Sessions on a real database: who may see and move them, each pair of states, and what happens at once."""

import asyncio
import datetime as dt
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, get_args

import msgspec
import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.security.roles import TIERS
from lucid.core.validation import SessionStatus
from lucid.database.connection import Connection
from lucid.database.documents import OutboxEntry, SessionDocument
from lucid.database.session_repository import SessionRepository
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller
from lucid.services.session_service import ENDS, MOVES, ORIGINS, SessionPage, SessionService
from tests.support.stores import MongoChild, free_port

EPOCH = 1_893_456_000.25
START = dt.datetime.fromtimestamp(EPOCH, dt.UTC)
CALLER = Caller("192.0.2.7", "request-1")
STATUSES: tuple[str, ...] = get_args(SessionStatus)
LEGAL = {
    ("INITIALIZING", "ACTIVE"),
    ("INITIALIZING", "FAILED"),
    ("INITIALIZING", "TERMINATED"),
    ("ACTIVE", "COMPLETED"),
    ("ACTIVE", "FAILED"),
    ("ACTIVE", "TERMINATED"),
}
"""The contract's words, as they stand there."""

_numbers = itertools.count()


def of(user_id: str, role: Role = Role.USER, via: Any = "token") -> Principal:
    return Principal(role, TIERS[role], user_id, user_id, via=via)


ALICE, BOB, ADMIN = of("alice"), of("bob"), of("root", Role.ADMIN)


class Woken:
    """An outbox that notes what it was woken for, and whether that was committed by then."""

    def __init__(self) -> None:
        self.sessions: list[str] = []

    def wake(self, session_id: str) -> None:
        self.sessions.append(session_id)


class World:
    def __init__(self, connection: Connection) -> None:
        self.now = EPOCH
        self.repository = SessionRepository(connection, lambda: dt.datetime.fromtimestamp(self.now, dt.UTC))
        self.outbox = Woken()
        self.service = SessionService(self.repository, self.outbox, lambda: self.now)

    async def stored(self, session_id: str) -> SessionDocument:
        found = await self.repository.find_by_id(session_id)
        assert found is not None
        return found

    async def put(self, status: str, session_id: str = "", user_id: str = "alice") -> str:
        """A session in this state, with nothing to tell."""
        name = session_id or f"outside-{next(_numbers)}"
        ended = START if status in ("COMPLETED", "FAILED", "TERMINATED") else None
        document = SessionDocument(name, user_id, status, {"kept": True}, START, START, ended)
        await self.repository.create(document)
        return name


@asynccontextmanager
async def world(uri: str) -> AsyncIterator[World]:
    connection = Connection(uri)
    try:
        yield World(connection)
    finally:
        connection.close()


Test = Callable[[World], Awaitable[None]]


@pytest.fixture
def run(mongo: MongoChild) -> Callable[[Test], None]:
    def runner(test: Test) -> None:
        async def main() -> None:
            async with world(mongo.in_database(f"sessions_{next(_numbers)}")) as w:
                await test(w)

        asyncio.run(main())

    return runner


async def refused(call: Awaitable[object], code: ErrorCode) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await call
    assert caught.value.code is code
    return caught.value


def test_the_table_is_the_contracts() -> None:
    assert set(MOVES) == set(ORIGINS) == set(STATUSES)
    assert {(origin, to) for origin, following in MOVES.items() for to in following} == LEGAL
    assert {(origin, to) for to, origins in ORIGINS.items() for origin in origins} == LEGAL
    assert {"COMPLETED", "FAILED", "TERMINATED"} == ENDS


@pytest.mark.parametrize("to", STATUSES)
@pytest.mark.parametrize("origin", STATUSES)
def test_each_pair_of_states(run: Callable[[Test], None], origin: str, to: str) -> None:
    async def test(w: World) -> None:
        name = await w.put(origin)
        before = await w.stored(name)
        w.now += 60.0
        for metadata in (None, {"new": 1}):
            if (origin, to) not in LEGAL:
                error = await refused(
                    w.service.update(name, to, metadata, ALICE, CALLER), ErrorCode.ILLEGAL_MOVE
                )
                assert error.details == {"from": origin, "to": to}
                assert await w.stored(name) == before
                assert w.outbox.sessions == []
                continue
            name = await w.put(origin)
            view = await w.service.update(name, to, metadata, ALICE, CALLER)
            after = await w.stored(name)
            assert (view.status, after.status) == (to, to)
            assert view.metadata == after.metadata == (metadata or {"kept": True})
            assert (view.created_at, view.updated_at) == ("2030-01-01T00:00:00Z", "2030-01-01T00:01:00Z")
            assert view.ended_at == (view.updated_at if to not in ("INITIALIZING", "ACTIVE") else None)
            told = [(entry.kind, entry.at) for entry in after.outbox]
            if to == "TERMINATED":
                assert told == [("terminate", after.updated_at)]
                assert after.outbox_due_at == after.updated_at
                assert w.outbox.sessions[-1] == name
            else:
                assert (told, after.outbox_due_at, w.outbox.sessions) == ([], None, [])

    run(test)


@pytest.mark.parametrize("origin", STATUSES)
def test_deletion_from_each_state(run: Callable[[Test], None], origin: str) -> None:
    async def test(w: World) -> None:
        name = await w.put(origin)
        before = await w.stored(name)
        if origin in ("COMPLETED", "FAILED"):
            error = await refused(w.service.terminate(name, ALICE, CALLER), ErrorCode.ILLEGAL_MOVE)
            assert error.details == {"from": origin, "to": "TERMINATED"}
            assert await w.stored(name) == before
            return
        for _ in range(2):
            w.now += 60.0
            await w.service.terminate(name, ALICE, CALLER)
        after = await w.stored(name)
        assert after.status == "TERMINATED"
        if origin == "TERMINATED":
            assert (after, w.outbox.sessions) == (before, [])
        else:
            # The second time has changed nothing and is told to nobody.
            assert (len(after.outbox), w.outbox.sessions) == (1, [name])
            assert after.ended_at == after.updated_at == START + dt.timedelta(minutes=1)

    run(test)


def test_a_session_is_made_with_what_is_to_be_told(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        view = await w.service.create({"screen": [1, {"a": None}]}, ALICE)
        stored = await w.stored(view.session_id)
        assert msgspec.to_builtins(view) == {
            "session_id": stored.session_id,
            "user_id": "alice",
            "status": "INITIALIZING",
            "metadata": {"screen": [1, {"a": None}]},
            "created_at": "2030-01-01T00:00:00Z",
            "updated_at": "2030-01-01T00:00:00Z",
            "ended_at": None,
        }
        assert len(view.session_id) == 36
        assert [(entry.kind, entry.at) for entry in stored.outbox] == [("create", START)]
        assert stored.outbox_due_at == START
        assert w.outbox.sessions == [view.session_id]
        assert await w.service.get(view.session_id, ALICE) == view
        await refused(w.service.create({"$where": 1}, ALICE), ErrorCode.BAD_FIELD)
        await refused(w.service.create({"n": 2**64}, ALICE), ErrorCode.BAD_FIELD)
        assert (await w.repository.list_sessions(0, 10))[1] == len(w.outbox.sessions) == 1

    run(test)


def test_metadata_is_replaced_whole_and_in_every_state(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        for status in STATUSES:
            name = await w.put(status)
            w.now += 1.0
            view = await w.service.update(name, None, {"b": {"c": 1}}, ALICE, CALLER)
            assert (view.metadata, view.status) == ({"b": {"c": 1}}, status)
            assert (await w.service.update(name, None, {}, ALICE, CALLER)).metadata == {}
            after = await w.stored(name)
            assert (after.metadata, after.outbox) == ({}, ())
            assert after.updated_at > START
        name = await w.put("ACTIVE")
        error = await refused(w.service.update(name, None, None, ALICE, CALLER), ErrorCode.BAD_FIELD)
        assert error.details["field"] == "body"
        error = await refused(
            w.service.update(name, "COMPLETED", {"$x": 1}, ALICE, CALLER), ErrorCode.BAD_FIELD
        )
        assert error.details["field"].startswith("metadata")
        assert (await w.stored(name)).status == "ACTIVE"

    run(test)


def test_a_session_is_its_owners_and_the_admins(
    run: Callable[[Test], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(w: World) -> None:
        s = w.service
        name = (await s.create({}, ALICE)).session_id
        before = await w.stored(name)
        for other in (BOB, of("bob", Role.NODE_OPERATOR), of("bob", via="api_key")):
            for call in (
                s.get(name, other),
                s.update(name, "ACTIVE", None, other, CALLER),
                s.update(name, "INITIALIZING", None, other, CALLER),
                s.update(name, None, {"a": 1}, other, CALLER),
                s.terminate(name, other, CALLER),
            ):
                assert str(await refused(call, ErrorCode.NOT_FOUND)) == "No such session"
        assert await w.stored(name) == before
        with caplog.at_level(logging.INFO, "lucid.audit"):
            assert (
                await s.update(name, "ACTIVE", None, of("alice", via="api_key"), CALLER)
            ).status == "ACTIVE"
            own = (await s.create({}, ADMIN)).session_id
            await s.update(own, "ACTIVE", None, ADMIN, CALLER)
            await s.terminate(own, ADMIN, CALLER)
            await s.get(name, ADMIN)
            assert caplog.records == []
            root = of("root", Role.SUPER_ADMIN)
            assert (await s.update(name, None, {"secret": "s"}, root, CALLER)).user_id == "alice"
            await s.terminate(name, ADMIN, CALLER)
            await s.terminate(name, ADMIN, CALLER)
            await refused(s.update(name, "FAILED", None, ADMIN, CALLER), ErrorCode.ILLEGAL_MOVE)
        told = [record.audit for record in caplog.records]  # type: ignore[attr-defined]
        assert [(each["event"], each["role"], each["status"]) for each in told] == [
            ("session_update", "super_admin", "ACTIVE"),
            ("session_termination", "admin", "TERMINATED"),
        ]
        assert {(each["user_id"], each["owner"], each["session_id"]) for each in told} == {
            ("root", "alice", name)
        }
        assert "secret" not in repr(told)

    run(test)


def test_ids_from_outside_are_looked_up_and_nonsense_is_not(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        for good in ("abcd_-09", "A" * 64):
            await w.put("ACTIVE", good)
            assert (await w.service.get(good, ALICE)).session_id == good
        asked: list[str] = []
        look_up = w.repository.find_by_id

        async def find_by_id(session_id: str) -> SessionDocument | None:
            asked.append(session_id)
            return await look_up(session_id)

        w.repository.find_by_id = find_by_id  # type: ignore[method-assign]
        bad = [
            "",
            "short-7",
            "A" * 65,
            "with a space",
            "a/b/c/d/e/f",
            "abcdefg\n",
            "äöüäöüäöü",
            "$ne-----.",
            "../../../..",
        ]
        for name in bad:
            for call in (
                w.service.get(name, ADMIN),
                w.service.update(name, "ACTIVE", None, ADMIN, CALLER),
                w.service.update(name, None, {}, ADMIN, CALLER),
                w.service.terminate(name, ADMIN, CALLER),
            ):
                await refused(call, ErrorCode.NOT_FOUND)
        assert asked == []
        await refused(w.service.get("unknown-1", ADMIN), ErrorCode.NOT_FOUND)
        assert asked == ["unknown-1"]

    run(test)


def test_lists(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        made = []
        for number in range(5):
            w.now += 1.0
            made.append((await w.service.create({"n": number}, ALICE)).session_id)
        theirs = (await w.service.create({}, BOB)).session_id
        await w.service.update(made[1], "ACTIVE", None, ALICE, CALLER)
        listing = w.service.list_sessions

        def ids(page: SessionPage) -> tuple[list[str], int]:
            return [item.session_id for item in page.items], page.total

        newest = made[::-1]
        assert ids(await listing(1, 2, None, None, ALICE)) == (newest[:2], 5)
        assert ids(await listing(3, 2, None, None, ALICE)) == (newest[4:], 5)
        assert ids(await listing(4, 2, None, "alice", ALICE)) == ([], 5)
        page = await listing(2, 3, "INITIALIZING", None, ALICE)
        assert (ids(page), page.page, page.limit) == (([newest[4]], 4), 2, 3)
        assert ids(await listing(1, 20, "ACTIVE", None, ALICE)) == ([made[1]], 1)
        assert ids(await listing(1, 20, "ACTIVE", None, BOB)) == ([], 0)
        for asker in (ALICE, of("alice", Role.NODE_OPERATOR), of("alice", via="api_key")):
            await refused(listing(1, 20, None, "bob", asker), ErrorCode.ROLE_TOO_LOW)
        assert ids(await listing(1, 20, None, None, ADMIN))[1] == 6
        assert ids(await listing(1, 20, None, "bob", ADMIN)) == ([theirs], 1)
        assert ids(await listing(1, 20, "ACTIVE", "alice", ADMIN)) == ([made[1]], 1)
        assert ids(await listing(1, 20, None, "root", ADMIN)) == ([], 0)
        assert ids(await listing(1, 20, None, "nobody", ADMIN)) == ([], 0)

    run(test)


def test_of_two_moves_at_once_one_wins(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        won: set[str] = set()
        for round_ in range(40):
            name = await w.put("ACTIVE")
            by_deletion = round_ % 4 < 2
            calls: list[Awaitable[object]] = [
                w.service.update(name, "COMPLETED", {"by": "owner"}, ALICE, CALLER),
                w.service.terminate(name, ADMIN, CALLER)
                if by_deletion
                else w.service.update(name, "TERMINATED", {"by": "admin"}, ADMIN, CALLER),
            ]
            if round_ % 2:
                calls.reverse()
            results = await asyncio.gather(*calls, return_exceptions=True)
            failed = [result for result in results if isinstance(result, BaseException)]
            assert len(failed) == 1
            after = await w.stored(name)
            assert isinstance(failed[0], GatewayError)
            assert failed[0].code is ErrorCode.ILLEGAL_MOVE
            assert failed[0].details["from"] == after.status != failed[0].details["to"]
            assert [entry.kind for entry in after.outbox] == ["terminate"] * (after.status == "TERMINATED")
            admins = {"kept": True} if by_deletion else {"by": "admin"}
            assert after.metadata == ({"by": "owner"} if after.status == "COMPLETED" else admins)
            won.add(after.status)
        # Both orders have come about, else this shows nothing.
        assert won == {"COMPLETED", "TERMINATED"}

    run(test)


def test_twenty_deletions_at_once_tell_it_once(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        name = await w.put("INITIALIZING")
        await asyncio.gather(*(w.service.terminate(name, ALICE, CALLER) for _ in range(20)))
        assert len((await w.stored(name)).outbox) == 1
        assert w.outbox.sessions == [name]

    run(test)


class Overtaken(SessionRepository):
    """Before the first attempt at a move is made, somebody else has begun; before it is read, activated it."""

    overtaken = False

    async def update_status(self, session_id: str, status: str, **given: Any) -> SessionDocument | None:
        moved = await super().update_status(session_id, status, **given)
        if moved is None and not self.overtaken:
            self.overtaken = True
            await super().update_status(
                session_id, "ACTIVE", allowed_from=frozenset({"INITIALIZING"}), ended=False, entry=None
            )
        return moved


def test_a_move_that_has_become_legal_in_between_is_made(mongo: MongoChild) -> None:
    """Else the answer would be that a session cannot go from ACTIVE to COMPLETED."""

    async def main() -> None:
        async with world(mongo.in_database(f"sessions_{next(_numbers)}")) as w:
            name = await w.put("INITIALIZING")
            w.repository.__class__ = Overtaken
            assert (await w.service.update(name, "COMPLETED", None, ALICE, CALLER)).status == "COMPLETED"

    asyncio.run(main())


def test_without_mongodb_nothing_is_told() -> None:
    async def main() -> None:
        async with world(f"mongodb://127.0.0.1:{free_port()}/x?serverSelectionTimeoutMS=1") as w:
            calls: tuple[Callable[[], Awaitable[object]], ...] = (
                lambda: w.service.create({}, ALICE),
                lambda: w.service.get("abcdefgh", ALICE),
                lambda: w.service.list_sessions(1, 20, None, None, ADMIN),
                lambda: w.service.update("abcdefgh", "TERMINATED", None, ALICE, CALLER),
                lambda: w.service.update("abcdefgh", None, {}, ALICE, CALLER),
                lambda: w.service.terminate("abcdefgh", ALICE, CALLER),
            )
            for call in calls:
                await refused(call(), ErrorCode.DEPENDENCY_AWAY)
            assert w.outbox.sessions == []

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("lucid.database.connection.SERVER_SELECTION_MS", 20)
        asyncio.run(main())


def test_what_is_to_be_told_is_committed_when_it_is_woken(run: Callable[[Test], None]) -> None:
    async def test(w: World) -> None:
        seen: list[Awaitable[SessionDocument]] = []
        w.outbox.wake = lambda session_id: seen.append(w.stored(session_id))  # type: ignore[method-assign]
        name = (await w.service.create({}, ALICE)).session_id
        await w.service.terminate(name, ALICE, CALLER)
        kinds = [[entry.kind for entry in (await each).outbox] for each in seen]
        assert kinds == [["create", "terminate"], ["create", "terminate"]]
        entries: list[OutboxEntry] = list((await w.stored(name)).outbox)
        assert len({entry.entry_id for entry in entries}) == 2

    run(test)
