"""The border to MongoDB: what happens without it, and what becomes of its errors."""

import asyncio
import datetime as dt
import time

import pytest
from bson.errors import InvalidDocument
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DocumentTooLarge,
    DuplicateKeyError,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)

from lucid.database import connection as module
from lucid.database.connection import FAIL_FAST_SECONDS, Connection
from lucid.database.indexes import Indexes
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from tests.support import stores


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def code_of(connection: Connection, error: Exception) -> GatewayError:
    with pytest.raises(GatewayError) as caught, connection.border():
        raise error
    return caught.value


def test_the_pool_is_the_seeds() -> None:
    async def main() -> None:
        connection = Connection("mongodb://127.0.0.1:9/some_name")
        options = connection._client.options
        assert options.pool_options.max_pool_size == 100
        assert options.pool_options.min_pool_size == 10
        assert options.pool_options.max_idle_time_seconds == 45
        assert options.server_selection_timeout == 5
        assert options.write_concern.document == {"w": "majority", "j": True}
        assert connection.database.name == "some_name"
        connection.close()
        other = Connection("mongodb://127.0.0.1:9/")
        assert other.database.name == "lucid"
        other.close()

    asyncio.run(main())


def test_errors_become_ours() -> None:
    async def main() -> None:
        connection = Connection("mongodb://127.0.0.1:9/")
        duplicate = DuplicateKeyError("dup", 11_000, {"keyPattern": {"email": 1}})
        assert code_of(connection, duplicate).code is ErrorCode.CONFLICT
        assert code_of(connection, duplicate).details == {"fields": ["email"]}
        assert code_of(connection, DuplicateKeyError("dup")).details == {"fields": []}
        for error in (
            AutoReconnect("x"),
            NotPrimaryError("x"),
            WaitQueueTimeoutError("x"),
            OperationFailure("not authorised", 13),
            PyMongoError("x"),
        ):
            assert code_of(connection, error).code is ErrorCode.DEPENDENCY_AWAY
            assert code_of(connection, error).details == {"dependency": "mongodb"}
            assert code_of(connection, error).fields == (("Retry-After", "5"),)
        names = {"email": "E-Mail"}
        with pytest.raises(GatewayError) as caught, connection.border(names):
            raise duplicate
        assert caught.value.details == {"fields": ["E-Mail"]}
        duplicates = {"writeErrors": [{"code": 11_000, "keyPattern": {"_id": 1}}]}
        assert code_of(connection, BulkWriteError(duplicates)).details == {"fields": ["_id"]}
        for details in ({"writeErrors": [{"code": 14}]}, {"writeErrors": [], "writeConcernErrors": [{}]}):
            assert code_of(connection, BulkWriteError(details)).code is ErrorCode.DEPENDENCY_AWAY
        for error in (
            DocumentTooLarge("x"),
            InvalidDocument("x"),
            OverflowError("x"),
            RecursionError("x"),
            UnicodeEncodeError("utf-8", "x", 0, 1, "x"),
            OperationFailure("Overflow", 15),
            OperationFailure("BSONObjectTooLarge", 10_334),
        ):
            assert code_of(connection, error).code is ErrorCode.BAD_FIELD
        with pytest.raises(KeyError), connection.border():
            raise KeyError("ours")
        connection.close()

    asyncio.run(main())


def test_after_a_failed_selection_calls_fail_at_once_for_a_while() -> None:
    async def main() -> None:
        clock = Clock()
        connection = Connection("mongodb://127.0.0.1:9/", clock)
        code_of(connection, AutoReconnect("one broken connection"))
        with connection.border():
            pass
        code_of(connection, ServerSelectionTimeoutError("nobody"))
        clock.now += FAIL_FAST_SECONDS - 0.001
        with pytest.raises(GatewayError), connection.border():
            raise AssertionError("must not be reached")
        clock.now += 0.001
        with connection.border():
            pass
        connection.close()

    asyncio.run(main())


def test_it_is_made_without_mongodb_and_works_once_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SERVER_SELECTION_MS", 300)
    monkeypatch.setattr("lucid.database.indexes.RETRY_SECONDS", 0.05)

    async def main(child: stores.MongoChild) -> None:
        connection = Connection(child.in_database("late"))
        indexes = Indexes(connection)
        users = UserRepository(connection, indexes)
        trying = asyncio.create_task(indexes.keep_trying())
        assert not await connection.ping(0.5)
        for operation in (
            users.find_by_id("x"),
            users.upsert_by_tron_address("T", "id"),
            users.delete("x", revoke_tokens_at=dt.datetime.now(dt.UTC)),
        ):
            with pytest.raises(GatewayError) as caught:
                await operation
            assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
        before = time.monotonic()
        for _ in range(20):
            with pytest.raises(GatewayError):
                await users.find_by_id("x")
        assert time.monotonic() - before < 2.0  # 20 selections of 0.3 s would be 6 s
        assert not indexes.made

        await asyncio.to_thread(child.start)
        for _ in range(200):
            if await connection.ping():
                break
        assert await users.find_by_id("x") is None  # at once: the ping has ended the failing fast
        await asyncio.wait_for(trying, 10)
        assert indexes.made
        assert (await users.upsert_by_tron_address("T", "id")).user_id == "id"

        # A crash loses nothing that was answered.
        child.kill()
        with pytest.raises(GatewayError):
            await users.find_by_id("id")
        await asyncio.to_thread(child.start)
        for _ in range(200):
            if await connection.ping():
                break
        found = await users.find_by_tron_address("T")
        assert found is not None
        assert found.user_id == "id"
        connection.close()

    with stores.mongodb(start=False) as child:
        asyncio.run(main(child))
