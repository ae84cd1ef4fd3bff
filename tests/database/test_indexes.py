"""Indexes on a real server: made once, kept in step by any number of workers, and nobody else's touched."""

import asyncio
import datetime as dt
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from pymongo.errors import OperationFailure

from lucid.database.connection import Connection
from lucid.database.indexes import INDEXES, RETIRED, Index, Indexes
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from tests.support.stores import MongoChild

NOW = dt.datetime(2030, 1, 2, tzinfo=dt.UTC)
_numbers = itertools.count()


def database_name() -> str:
    return f"indexes_{next(_numbers)}"


@asynccontextmanager
async def connected(mongo: MongoChild, name: str) -> AsyncIterator[Connection]:
    connection = Connection(mongo.in_database(name))
    try:
        yield connection
    finally:
        connection.close()


def run(mongo: MongoChild, test: Callable[[Connection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with connected(mongo, database_name()) as connection:
            await test(connection)

    asyncio.run(main())


async def standing(connection: Connection, collection: str) -> dict[str, Any]:
    listed = await connection.database[collection].list_indexes().to_list(None)
    return {each["name"]: each for each in listed if each["name"] != "_id_"}


async def assert_in_step(connection: Connection, besides: frozenset[str] = frozenset()) -> None:
    for collection in {index.collection for index in INDEXES}:
        there = await standing(connection, collection)
        wanted = {index.name: index for index in INDEXES if index.collection == collection}
        assert there.keys() - besides == wanted.keys()
        assert all(index.is_like(there[name]) for name, index in wanted.items())


def old_user(name: str, **fields: Any) -> dict[str, Any]:
    return {"_id": name, "live": True, "role": "user", "created_at": NOW, "updated_at": NOW, **fields}


def test_the_table_is_sound() -> None:
    assert len({(index.collection, index.name) for index in INDEXES}) == len(INDEXES)
    assert not {(index.collection, index.name) for index in INDEXES} & set(RETIRED)
    # Two with the same keys, MongoDB refuses.
    assert len({(index.collection, index.keys) for index in INDEXES}) == len(INDEXES)


def test_they_are_made_once_and_looked_at_without_harm(mongo: MongoChild) -> None:
    async def test(connection: Connection) -> None:
        first, second = Indexes(connection), Indexes(connection)
        assert not first.made
        await asyncio.gather(*(first.ensure() for _ in range(20)))
        assert first.made
        await assert_in_step(connection)
        assert await second._pass()  # nothing to do
        await second.keep_trying()  # ends at once
        assert second.made
        await assert_in_step(connection)

    run(mongo, test)


async def spoil(connection: Connection) -> None:
    """As an earlier release, and somebody besides us, may have left it."""
    users, keys, sessions = (connection.database[name] for name in ("users", "api_keys", "sessions"))
    live_email = {"live": True, "email": {"$exists": True}}
    await users.create_index(
        [("email", 1)], name="live_email", unique=True, partialFilterExpression=live_email
    )
    await keys.create_index([("user_id", 1)], name="of_user")
    await users.create_index([("tron_address", 1)], name="live_tron_address")  # not unique
    await users.create_index([("created_at", 1)], name="newest_first")  # other keys
    await users.create_index([("tokens_revoked_at", 1)], name="tokens_revoked", sparse=True)
    await keys.create_index([("revoked_at", 1)], name="revoked", expireAfterSeconds=60)  # another time
    await sessions.create_index([("outbox_due_at", 1)], name="outbox_due")  # not partial
    await users.create_index([("nickname", 1)], name="theirs", sparse=True)


def test_what_differs_is_made_anew_what_is_retired_goes_and_what_is_not_ours_stays(mongo: MongoChild) -> None:
    async def test(connection: Connection) -> None:
        await spoil(connection)
        theirs = (await standing(connection, "users"))["theirs"]
        await Indexes(connection).ensure()
        await assert_in_step(connection, besides=frozenset({"theirs"}))
        assert (await standing(connection, "users"))["theirs"] == theirs

    run(mongo, test)


def test_eight_workers_at_once(mongo: MongoChild) -> None:
    async def main() -> None:
        for _ in range(3):
            name = database_name()
            async with AsyncExitStack() as stack:
                connections = [await stack.enter_async_context(connected(mongo, name)) for _ in range(4)]
                await spoil(connections[0])
                workers = [Indexes(connection) for connection in connections * 2]
                await asyncio.gather(*(worker.ensure() for worker in workers))
                assert all(worker.made for worker in workers)
                await assert_in_step(connections[0], besides=frozenset({"theirs"}))

    asyncio.run(main())


def test_emails_of_an_earlier_release_get_their_key(mongo: MongoChild) -> None:
    async def test(connection: Connection) -> None:
        rows = connection.database["users"]
        await rows.insert_many(
            [
                old_user("a", email="Ärger@Example.org"),
                old_user("b"),
                old_user("c", email="c@b", email_key="c@b"),
                old_user("d", live=False, email="ÄRGER@example.org"),
            ]
        )
        await asyncio.gather(Indexes(connection).ensure(), Indexes(connection).ensure())
        users = UserRepository(connection, Indexes(connection))
        found = await users.find_by_email("ärger@example.ORG")
        assert found is not None
        assert (found.user_id, found.email, found.email_key) == (
            "a",
            "Ärger@Example.org",
            "ärger@example.org",
        )
        keys = {row["_id"]: row.get("email_key") async for row in rows.find()}
        assert keys == {"a": "ärger@example.org", "b": None, "c": "c@b", "d": "ärger@example.org"}

    run(mongo, test)


@pytest.mark.parametrize(("index_stands", "with_keys"), [(False, False), (False, True), (True, False)])
def test_duplicates_stay_an_error_that_says_so(
    mongo: MongoChild, caplog: pytest.LogCaptureFixture, index_stands: bool, with_keys: bool
) -> None:
    async def test(connection: Connection) -> None:
        if index_stands:
            await Indexes(connection).ensure()
        key = {"email_key": "ann@b"} if with_keys else {}
        rows = connection.database["users"]
        await rows.insert_many([old_user("a", email="Ann@b", **key), old_user("b", email="ANN@b", **key)])
        indexes = Indexes(connection)
        for _ in range(2):
            caplog.clear()
            with pytest.raises(GatewayError) as caught:
                await indexes.ensure()
            assert caught.value.code is ErrorCode.CONFLICT
            assert not indexes.made
            said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
            assert len(said) == 1
            assert "users.live_email_key cannot be unique" in said[0]
            assert "ann@b" not in caplog.text.lower()  # whose it is is not the log's business
        await rows.update_one({"_id": "b"}, {"$unset": {"email": "", "email_key": ""}})
        await indexes.ensure()
        await assert_in_step(connection)

    run(mongo, test)


def test_the_same_index_under_somebody_elses_name_will_do(mongo: MongoChild) -> None:
    async def test(connection: Connection) -> None:
        digest = next(index for index in INDEXES if (index.collection, index.name) == ("api_keys", "digest"))
        options = digest.options() | {"name": "theirs"}
        await connection.database["api_keys"].create_index(list(digest.keys), **options)
        await Indexes(connection).ensure()
        assert set(await standing(connection, "api_keys")) == {"theirs"} | {
            index.name for index in INDEXES if index.collection == "api_keys" and index is not digest
        }

    run(mongo, test)


def test_one_of_theirs_that_is_in_the_way_is_reported_and_stays(
    mongo: MongoChild, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(connection: Connection) -> None:
        rows = connection.database["refresh_tokens"]
        await rows.create_index([("expires_at", 1)], name="theirs")
        make = type(rows).create_index

        async def as_mongodb_does(self: Any, keys: Any, **options: Any) -> Any:
            # Of two indexes with the same keys that differ in their time alone; SecantusDB takes both.
            if options["name"] == "expiry" and self.name == "refresh_tokens":
                raise OperationFailure("already exists with a different name: theirs", 85)
            return await make(self, keys, **options)

        monkeypatch.setattr(type(rows), "create_index", as_mongodb_does)
        indexes = Indexes(connection)
        await indexes.ensure()
        assert indexes.made
        there = await standing(connection, "refresh_tokens")
        assert set(there) == {"theirs", "of_user", "revoked", "lasting"}
        assert "refresh_tokens.expiry cannot be made" in caplog.text

    run(mongo, test)


def test_what_a_rival_made_in_between_is_looked_at_again(
    mongo: MongoChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(connection: Connection) -> None:
        rows = type(connection.database["users"])
        make = rows.create_index
        refused: list[str] = []

        async def beaten(self: Any, keys: Any, **options: Any) -> Any:
            made = await make(self, keys, **options)  # by the rival
            if options["name"] not in refused:
                refused.append(options["name"])
                raise OperationFailure("already exists with different options", 86)
            return made

        monkeypatch.setattr(rows, "create_index", beaten)
        indexes = Indexes(connection)
        await indexes.ensure()
        assert len(refused) == len({index.name for index in INDEXES})
        await assert_in_step(connection)

    run(mongo, test)


def test_an_index_that_the_server_refuses_is_an_error(
    mongo: MongoChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(connection: Connection) -> None:
        async def refuse(*_: Any, **__: Any) -> Any:
            raise OperationFailure("not authorised", 13)

        await connection.database["users"].create_index([("email", 1)], name="live_email")
        rows = type(connection.database["users"])
        for name in ("create_index", "drop_index"):
            with monkeypatch.context() as patched:
                patched.setattr(rows, name, refuse)
                indexes = Indexes(connection)
                with pytest.raises(GatewayError) as caught:
                    await indexes.ensure()
                assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
                assert not indexes.made

    run(mongo, test)


def test_a_rival_who_undoes_it_each_time_is_an_error(
    mongo: MongoChild, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lucid.database.indexes._PASS_SECONDS", 0.0)

    async def test(connection: Connection) -> None:
        one = Index("sessions", "due", (("outbox_due_at", 1),))
        indexes = Indexes(connection, (one,), (("sessions", "due"),))  # wanted and retired
        with pytest.raises(GatewayError) as caught:
            await indexes.ensure()
        assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
        assert not indexes.made
        assert "do not stay" in caplog.text

    run(mongo, test)
