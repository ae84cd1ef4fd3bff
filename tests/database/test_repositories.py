"""The repositories on a real server: each test has a database of its own."""

import asyncio
import datetime as dt
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from pymongo.errors import AutoReconnect, DuplicateKeyError, PyMongoError

from lucid.core.security import api_keys, nonces
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.documents import ApiKeyDocument, HardwareWallet, UserDocument, milliseconds
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from tests.support.stores import MongoChild

NOW = dt.datetime(2030, 1, 2, 3, 4, 5, 678_000, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


class Database:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.now = NOW
        self.indexes = Indexes(connection)
        self.users = UserRepository(connection, self.indexes, lambda: self.now)
        self.refresh_tokens = RefreshTokenRepository(connection)
        self.api_keys = ApiKeyRepository(connection, self.indexes)


_numbers = itertools.count()


@asynccontextmanager
async def database(mongo: MongoChild, name: str = "") -> AsyncIterator[Database]:
    connection = Connection(mongo.in_database(name or f"test_{next(_numbers)}"))
    try:
        yield Database(connection)
    finally:
        connection.close()


def run(mongo: MongoChild, test: Callable[[Database], Awaitable[None]]) -> None:
    async def main() -> None:
        async with database(mongo) as db:
            await test(db)

    asyncio.run(main())


def user(**changes: object) -> UserDocument:
    made = UserDocument(
        user_id=nonces.new_id(), live=True, role="user", created_at=NOW, updated_at=NOW, tron_address="T1"
    )
    return msgspec.structs.replace(made, **changes)


async def conflict(awaitable: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await awaitable
    assert caught.value.code is ErrorCode.CONFLICT
    return caught.value


# ---- users


def test_a_user_is_found_by_id_email_and_address(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        stored = await db.users.create(user(email="a@example.org"))
        assert stored.created_at == NOW
        assert await db.users.find_by_id(stored.user_id) == stored
        assert await db.users.find_by_email("a@example.org") == stored
        assert await db.users.find_by_tron_address("T1") == stored
        assert await db.users.find_by_id("x") is None
        assert await db.users.find_by_email("x") is None
        assert await db.users.find_by_tron_address("x") is None

    run(mongo, test)


def test_address_and_email_are_unique_among_live_users_who_have_one(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await db.users.create(user(tron_address="T1", email="a"))
        error = await conflict(db.users.create(user(tron_address="T1", email="b")))
        assert error.details == {"fields": ["tron_address"]}
        error = await conflict(db.users.create(user(tron_address="T2", email="a")))
        assert error.details == {"fields": ["email"]}
        for _ in range(3):  # any number without one of them, or without both
            await db.users.create(user(tron_address=None, email=None))
        other = await db.users.create(user(tron_address=None, email="b"))
        await conflict(db.users.create(user(user_id=other.user_id, tron_address=None)))
        await conflict(db.users.update(other.user_id, {"tron_address": "T1"}))
        assert (await db.users.find_by_id(other.user_id)) == other

    run(mongo, test)


def test_deleted_users_are_gone_and_their_address_is_free(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        old = await db.users.create(user(email="a"))
        assert await db.users.delete(old.user_id)
        assert not await db.users.delete(old.user_id)
        assert not await db.users.delete("x")
        assert await db.users.find_by_id(old.user_id) is None
        assert await db.users.find_by_tron_address("T1") is None
        assert await db.users.update(old.user_id, {"role": "admin"}) is None
        new = await db.users.create(user(email="a"))
        assert await db.users.find_by_email("a") == new
        row = await db.connection.database["users"].find_one({"_id": old.user_id})
        assert row is not None
        assert row["deleted_at"] == NOW
        assert row["tron_address"] == "T1"  # kept for the record
        assert await db.users.list_users(0, 10) == ([new], 1)

    run(mongo, test)


def test_update_sets_and_removes(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        old = await db.users.create(user(email="a"))
        db.now = NOW + DAY
        new = await db.users.update(old.user_id, {"role": "node_operator", "email": None})
        assert new == msgspec.structs.replace(old, role="node_operator", email=None, updated_at=NOW + DAY)
        assert await db.users.find_by_id(old.user_id) == new
        assert await db.users.update("x", {"role": "admin"}) is None

    run(mongo, test)


def test_pages(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        made = [await db.users.create(user(tron_address=f"T{i}", created_at=NOW + i * DAY)) for i in range(5)]
        newest_first = made[::-1]
        assert await db.users.list_users(0, 2) == (newest_first[:2], 5)
        assert await db.users.list_users(4, 2) == (newest_first[4:], 5)
        assert await db.users.list_users(5, 2) == ([], 5)

    run(mongo, test)


def test_an_upsert_makes_the_user_once_and_records_the_login(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        first = await db.users.upsert_by_tron_address("T1", "id-1")
        # MongoDB makes two users of two upserts at once unless the unique index is there before.
        assert db.indexes.made
        assert first == UserDocument(
            user_id="id-1",
            live=True,
            role="user",
            created_at=NOW,
            updated_at=NOW,
            tron_address="T1",
            last_login_at=NOW,
        )
        db.now = NOW + DAY
        await db.users.update("id-1", {"role": "admin"})
        device = HardwareWallet("ledger", "nano-1")
        second = await db.users.upsert_by_tron_address("T1", "id-2", device)
        assert second == msgspec.structs.replace(
            first, role="admin", updated_at=db.now, last_login_at=db.now, hardware_wallet=device
        )
        third = await db.users.upsert_by_tron_address("T1", "id-3")
        assert third.hardware_wallet == device
        assert (await db.users.upsert_by_tron_address("T2", "id-4")).user_id == "id-4"

    run(mongo, test)


def test_after_deletion_the_address_makes_a_new_user(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await db.users.upsert_by_tron_address("T1", "id-1")
        await db.users.update("id-1", {"role": "admin"})
        await db.users.delete("id-1")
        new = await db.users.upsert_by_tron_address("T1", "id-2")
        assert (new.user_id, new.role) == ("id-2", "user")

    run(mongo, test)


def test_fifty_first_upserts_from_five_workers_make_one_user(mongo: MongoChild) -> None:
    async def main() -> None:
        name = "race_of_upserts"
        async with (
            database(mongo, name) as a,
            database(mongo, name) as b,
            database(mongo, name) as c,
            database(mongo, name) as d,
            database(mongo, name) as e,
        ):
            for round_ in range(4):  # the first of them without indexes: they are made by whoever comes
                address = f"T{round_}"
                workers = [a, b, c, d, e] * 10
                found = await asyncio.gather(
                    *(w.users.upsert_by_tron_address(address, nonces.new_id()) for w in workers)
                )
                assert len({user.user_id for user in found}) == 1
            assert (await a.users.list_users(0, 100))[1] == 4

    asyncio.run(main())


class Losing:
    """A collection as MongoDB shows it to the losers of a race of upserts, which SecantusDB never does."""

    def __init__(self, losses: int, error: PyMongoError) -> None:
        self.losses = losses
        self.error = error
        self.calls = 0

    async def find_one_and_update(self, query: dict[str, object], *_: object, **__: object) -> object:
        self.calls += 1
        if self.calls <= self.losses:
            raise self.error
        row = {"_id": "winner", "live": True, "role": "user", "created_at": NOW, "updated_at": NOW}
        return {**row, **query}


def test_a_lost_race_is_repeated_and_no_other_error_is(
    mongo: MongoChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    duplicate = DuplicateKeyError("dup", 11_000, {"keyPattern": {"tron_address": 1}})

    async def test(db: Database) -> None:
        async def upsert(users: Losing) -> UserDocument:
            monkeypatch.setattr(db.users, "_users", users)
            return await db.users.upsert_by_tron_address("T1", "mine")

        assert (await upsert(Losing(4, duplicate))).user_id == "winner"
        await conflict(upsert(Losing(5, duplicate)))
        broken = Losing(1, AutoReconnect("x"))
        with pytest.raises(GatewayError) as caught:
            await upsert(broken)
        assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
        assert broken.calls == 1

    run(mongo, test)


def test_a_stored_document_of_a_later_release_is_read(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await db.users.create(user(user_id="u"))
        await db.connection.database["users"].update_one({"_id": "u"}, {"$set": {"new_field": {"a": 1}}})
        found = await db.users.find_by_id("u")
        assert found is not None
        assert found.user_id == "u"

    run(mongo, test)


# ---- refresh tokens


async def family(db: Database, name: str = "f", user_id: str = "u", token: bytes = b"1" * 32) -> None:
    await db.refresh_tokens.start_family(name, user_id, token, NOW, NOW + 7 * DAY)


def test_a_family_is_found_by_every_token_it_ever_had(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        first, second, third = (bytes([i]) * 32 for i in (1, 2, 3))
        await family(db, token=first)
        found = await db.refresh_tokens.find_family(first, NOW)
        assert found is not None
        assert (found.family, found.user_id, found.current) == ("f", "u", first)
        assert found.expires_at == NOW + 7 * DAY
        assert await db.refresh_tokens.rotate(found, first, second, NOW + DAY)
        assert await db.refresh_tokens.rotate(found, second, third, NOW + 2 * DAY)
        for token in (first, second, third):
            now = await db.refresh_tokens.find_family(token, NOW + 3 * DAY)
            assert now is not None
            assert (now.current, now.expires_at, now.revoked_at) == (third, NOW + 7 * DAY, None)
        assert not await db.refresh_tokens.rotate(found, first, b"x" * 32, NOW)
        assert await db.refresh_tokens.find_family(b"y" * 32, NOW) is None
        # Neither a family's name nor its row can be taken for a token.
        assert await db.refresh_tokens.find_family(b"f", NOW) is None

    run(mongo, test)


def test_a_family_ends_at_its_first_expiry(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await family(db)
        found = await db.refresh_tokens.find_family(b"1" * 32, NOW + 7 * DAY - dt.timedelta(milliseconds=1))
        assert found is not None
        assert await db.refresh_tokens.find_family(b"1" * 32, NOW + 7 * DAY) is None
        assert not await db.refresh_tokens.rotate(found, b"1" * 32, b"2" * 32, NOW + 7 * DAY)

    run(mongo, test)


def test_a_revoked_family_cannot_be_advanced(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await family(db)
        found = await db.refresh_tokens.find_family(b"1" * 32, NOW)
        assert found is not None
        assert await db.refresh_tokens.revoke_family("f", NOW)
        assert not await db.refresh_tokens.revoke_family("f", NOW)
        assert not await db.refresh_tokens.revoke_family("x", NOW)
        assert not await db.refresh_tokens.rotate(found, b"1" * 32, b"2" * 32, NOW)
        again = await db.refresh_tokens.find_family(b"1" * 32, NOW)
        assert again is not None
        assert again.revoked_at == NOW

    run(mongo, test)


def test_all_families_of_one_user(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        for i, owner in enumerate(["u", "u", "u", "v"]):
            await family(db, f"f{i}", owner, bytes([i]) * 32)
        await db.refresh_tokens.revoke_family("f0", NOW)
        assert await db.refresh_tokens.revoke_user("u", NOW) == 2
        assert await db.refresh_tokens.revoke_user("u", NOW) == 0
        other = await db.refresh_tokens.find_family(bytes([3]) * 32, NOW)
        assert other is not None
        assert other.revoked_at is None

    run(mongo, test)


def test_of_twenty_rotations_of_one_token_one_wins(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await family(db)
        found = await db.refresh_tokens.find_family(b"1" * 32, NOW)
        assert found is not None
        fresh = [uuid.uuid4().bytes * 2 for _ in range(20)]
        won = await asyncio.gather(
            *(db.refresh_tokens.rotate(found, b"1" * 32, token, NOW) for token in fresh)
        )
        assert sum(won) == 1
        now = await db.refresh_tokens.find_family(b"1" * 32, NOW)
        assert now is not None
        assert now.current == fresh[won.index(True)]

    run(mongo, test)


def test_tokens_are_in_no_row_and_rows_are_given_an_end(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await db.indexes.ensure()
        token = nonces.refresh_token()
        await family(db, token=api_keys.digest(token))
        rows = await db.connection.database["refresh_tokens"].find({}).to_list(10)
        assert len(rows) == 2
        assert all(row["expires_at"] == NOW + 7 * DAY for row in rows)
        assert token not in repr(rows)
        indexes = await db.connection.database["refresh_tokens"].index_information()
        assert indexes["expiry"]["expireAfterSeconds"] == 0

    run(mongo, test)


# ---- API keys


def test_api_keys_by_digest(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        key = api_keys.new_api_key()
        stored = ApiKeyDocument(
            key_id="k", digest=api_keys.digest(key), user_id="u", name="n", role="user", created_at=NOW
        )
        await db.api_keys.create(stored)
        assert await db.api_keys.find_by_digest(api_keys.digest(key), NOW + 1_000 * DAY) == stored
        assert await db.api_keys.find_by_digest(bytes(32), NOW) is None
        await conflict(db.api_keys.create(msgspec.structs.replace(stored, key_id="other")))
        await conflict(db.api_keys.create(msgspec.structs.replace(stored, digest=bytes(32))))

    run(mongo, test)


def test_an_api_key_expires(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        stored = ApiKeyDocument(
            key_id="k",
            digest=bytes(32),
            user_id="u",
            name="n",
            role="user",
            created_at=NOW,
            expires_at=NOW + DAY,
        )
        await db.api_keys.create(stored)
        before = NOW + DAY - dt.timedelta(milliseconds=1)
        assert await db.api_keys.find_by_digest(bytes(32), before) == stored
        assert await db.api_keys.find_by_digest(bytes(32), NOW + DAY) is None

    run(mongo, test)


def test_milliseconds() -> None:
    assert milliseconds(NOW.replace(microsecond=123_999)) == NOW.replace(microsecond=123_000)
