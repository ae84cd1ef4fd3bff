"""What only a real server shows of the repositories: races, crashes, and rows of somebody else's hand.

What each operation means is in test_contract.py. Each test has a database of its own.
"""

import asyncio
import datetime as dt
import functools
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from pymongo.errors import AutoReconnect, DuplicateKeyError, PyMongoError
from pymongo.results import UpdateResult

from lucid.core.security import api_keys, nonces
from lucid.database import connection as connection_module
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.documents import ApiKeyDocument, OutboxEntry, SessionDocument, UserDocument, milliseconds
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.session_repository import SessionRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from tests.support import stores
from tests.support.stores import MongoChild

NOW = dt.datetime(2030, 1, 2, 3, 4, 5, 678_000, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
LEASE = dt.timedelta(seconds=30)
LIVE = frozenset({"INITIALIZING", "ACTIVE"})


class Database:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.now = NOW
        self.indexes = Indexes(connection)
        self.users = UserRepository(connection, self.indexes, lambda: self.now)
        self.refresh_tokens = RefreshTokenRepository(connection)
        self.api_keys = ApiKeyRepository(connection, self.indexes)
        self.sessions = SessionRepository(connection, lambda: self.now)


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


def user(**changes: Any) -> UserDocument:
    made = UserDocument(user_id=nonces.new_id(), live=True, role="user", created_at=NOW, updated_at=NOW)
    return msgspec.structs.replace(made, **changes)


async def conflict(awaitable: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await awaitable
    assert caught.value.code is ErrorCode.CONFLICT
    return caught.value


# ---- users


def test_of_two_hundred_registrations_of_one_email_one_wins(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        spellings = itertools.cycle(["ann@example.org", "Ann@Example.org", "ANN@EXAMPLE.ORG"])
        made = await asyncio.gather(
            *(db.users.create(user(email=next(spellings))) for _ in range(200)), return_exceptions=True
        )
        won = [each for each in made if isinstance(each, UserDocument)]
        lost = [each for each in made if isinstance(each, GatewayError)]
        assert (len(won), len(lost)) == (1, 199)
        assert all(each.code is ErrorCode.CONFLICT for each in lost)
        assert all(each.details == {"fields": ["email"]} for each in lost)
        assert await db.users.list_users(0, 10) == (won, 1)

    run(mongo, test)


def test_of_twenty_changes_that_expect_the_same_one_wins(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        made = await db.users.create(user(password="old"))
        changed = await asyncio.gather(
            *(
                db.users.update(
                    made.user_id,
                    {"password": f"new-{i}"},
                    expected={"password": "old"},
                    revoke_tokens_at=NOW + i * DAY,
                )
                for i in range(20)
            )
        )
        won = [each for each in changed if each is not None]
        assert len(won) == 1
        assert await db.users.find_by_id(made.user_id) == won[0]

    run(mongo, test)


def test_fifty_logins_of_one_user_of_the_cluster_make_one(mongo: MongoChild) -> None:
    async def main() -> None:
        name = "race_of_cluster_logins"
        async with database(mongo, name) as a, database(mongo, name) as b:
            for round_ in range(4):
                found = await asyncio.gather(
                    *(w.users.upsert_from_cluster(f"c{round_}", f"T{round_}", "user") for w in [a, b] * 25)
                )
                assert len({each.user_id for each in found}) == 1
            assert (await a.users.list_users(0, 100))[1] == 4

    asyncio.run(main())


def test_a_password_is_shown_nowhere() -> None:
    shown = repr(user(password="pbkdf2$secret", email="a@b"))
    assert "secret" not in shown
    assert "password=***" in shown
    assert "email='a@b'" in shown
    assert "secret" not in repr([user(password="secret")])


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


def test_twenty_ends_of_a_login_without_a_row_leave_one(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        for name in ("m1", "m2", "m3"):
            ended = await asyncio.gather(
                *(
                    db.refresh_tokens.revoke_family(name, NOW, user_id="u", expires_at=NOW + DAY)
                    for _ in range(20)
                )
            )
            assert sum(ended) == 1
        assert len((await db.refresh_tokens.revoked_since(NOW)).families) == 3

    run(mongo, test)


def test_of_fifty_words_about_one_user_the_latest_stays(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        for name in ("u1", "u2", "u3"):
            moments = [NOW + i * DAY for i in range(50)]
            moments = moments[::2] + moments[1::2]
            await asyncio.gather(
                *(db.refresh_tokens.revoke_user(name, at, tokens_until=at + DAY) for at in moments)
            )
        users = (await db.refresh_tokens.revoked_since(NOW)).users
        assert sorted(users) == [(name, NOW + 49 * DAY) for name in ("u1", "u2", "u3")]
        row = await db.connection.database["refresh_tokens"].find_one({"_id": "user:u1"})
        assert row is not None
        assert row["expires_at"] == NOW + 50 * DAY

    run(mongo, test)


class Failing:
    """A collection whose writes fail: `find_one_and_update` each time it is called as the next of `answers` says."""

    def __init__(self, *answers: PyMongoError | None) -> None:
        self.answers = list(answers)

    async def update_many(self, *_: object, **__: object) -> object:
        return UpdateResult({"nModified": 0}, acknowledged=True)

    async def update_one(self, *_: object, **__: object) -> object:
        return UpdateResult({"nModified": 0}, acknowledged=True)

    async def insert_one(self, *_: object, **__: object) -> object:
        raise self.answers.pop(0) or AssertionError

    async def find_one_and_update(self, *_: object, **__: object) -> object:
        answer = self.answers.pop(0)
        if answer is None:
            return None if self.answers else {"_id": "user:u"}
        raise answer


def test_word_is_left_until_it_is_written(mongo: MongoChild, monkeypatch: pytest.MonkeyPatch) -> None:
    duplicate = DuplicateKeyError("dup", 11_000, {"keyPattern": {"_id": 1}})

    async def test(db: Database) -> None:
        async def revoke(rows: Failing) -> None:
            monkeypatch.setattr(db.refresh_tokens, "_rows", rows)
            await db.refresh_tokens.revoke_user("u", NOW, tokens_until=NOW + DAY)

        rows = Failing(duplicate, None, duplicate, None)
        await revoke(rows)
        assert not rows.answers
        # An answer that it is kept is never given where it is not.
        for answers in ([duplicate] * 5, [None] * 6, [AutoReconnect("x"), None]):
            with pytest.raises(GatewayError) as caught:
                await revoke(Failing(*answers))
            assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
        monkeypatch.setattr(db.refresh_tokens, "_rows", Failing(AutoReconnect("x")))
        with pytest.raises(GatewayError) as caught:
            await db.refresh_tokens.revoke_family("f", NOW, user_id="u", expires_at=NOW)
        assert caught.value.code is ErrorCode.DEPENDENCY_AWAY

    run(mongo, test)


def test_a_family_named_like_a_users_word_harms_neither(mongo: MongoChild) -> None:
    """The names of families come from tokens, of other issuers too."""

    async def test(db: Database) -> None:
        await db.refresh_tokens.revoke_user("u", NOW, tokens_until=NOW + DAY)
        assert not await db.refresh_tokens.revoke_family("user:u", NOW, user_id="u", expires_at=NOW + DAY)
        assert (await db.refresh_tokens.revoked_since(NOW)).users == [("u", NOW)]

    run(mongo, test)


# ---- sessions


def session(name: str, **changes: Any) -> SessionDocument:
    made = SessionDocument(
        session_id=name,
        user_id="u",
        status="ACTIVE",
        metadata={},
        created_at=NOW,
        updated_at=NOW,
    )
    return msgspec.structs.replace(made, **changes)


def entry(name: str) -> OutboxEntry:
    return OutboxEntry(name, "terminate", NOW)


def test_of_twenty_moves_at_once_one_is_made(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        for round_ in range(5):
            name = f"s{round_}"
            await db.sessions.create(session(name))
            targets = ["COMPLETED", "FAILED", "TERMINATED", "COMPLETED"] * 5
            moved = await asyncio.gather(
                *(
                    db.sessions.update_status(
                        name, status, allowed_from=LIVE, ended=True, entry=entry(f"{i}-{status}")
                    )
                    for i, status in enumerate(targets)
                )
            )
            won = [each for each in moved if each is not None]
            assert len(won) == 1
            assert len(won[0].outbox) == 1
            assert won[0].outbox[0].entry_id.endswith(won[0].status)
            assert await db.sessions.find_by_id(name) == won[0]

    run(mongo, test)


def test_eight_workers_claim_each_due_session_once(mongo: MongoChild) -> None:
    async def main() -> None:
        name = "race_of_claims"
        async with database(mongo, name) as a, database(mongo, name) as b:
            await a.indexes.ensure()
            for i in range(40):
                due = NOW + dt.timedelta(milliseconds=i % 7)
                await a.sessions.create(session(f"s{i}", outbox=(entry("e"),), outbox_due_at=due))
            claimed: Counter[str] = Counter()

            async def work(db: Database) -> None:
                while (taken := await db.sessions.take_due(NOW + LEASE, LEASE)) is not None:
                    claimed[taken.session_id] += 1

            await asyncio.gather(*(work(db) for db in [a, b] * 4))
            assert claimed == Counter(f"s{i}" for i in range(40))
            # One session that everybody wants.
            for i in range(10):
                wanted = [db.sessions.claim(f"s{i}", NOW + 3 * LEASE, LEASE) for db in [a, b] * 4]
                assert sum(each is not None for each in await asyncio.gather(*wanted)) == 1

    asyncio.run(main())


def test_what_joins_the_outbox_while_another_entry_is_struck_out_stays_due(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        for i in range(30):
            name = f"s{i}"
            await db.sessions.create(session(name, outbox=(entry("first"),), outbox_due_at=NOW))
            await db.sessions.claim(name, NOW, LEASE)
            told, _, again = await asyncio.gather(
                db.sessions.delivered(name, "first"),
                db.sessions.delete(name, allowed_from=LIVE, entry=entry("second")),
                db.sessions.delivered(name, "first"),
            )
            found = await db.sessions.find_by_id(name)
            assert found is not None
            assert [each.entry_id for each in found.outbox] == ["second"]
            # Either it joined an empty outbox, which any worker may take at once, or whoever told the first sees it.
            seen = any(each is not None and each.outbox for each in (told, again))
            assert found.outbox_due_at == NOW or (seen and found.outbox_due_at == NOW + LEASE)
            assert seen or await db.sessions.claim(name, NOW, LEASE) is not None

    run(mongo, test)


# ---- crashes


def test_what_was_answered_is_there_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "SERVER_SELECTION_MS", 300)

    async def main(child: MongoChild) -> None:
        async with database(child, "crash") as db:
            await db.indexes.ensure()
            answered: dict[str, UserDocument | SessionDocument | ApiKeyDocument] = {}
            enough = asyncio.Event()

            async def write(worker: int) -> ErrorCode:
                for i in itertools.count():
                    name = f"{worker}-{i}"
                    try:
                        answered[f"u{name}"] = await db.users.create(
                            user(user_id=f"u{name}", email=f"{name}@b")
                        )
                        await db.sessions.create(session(f"s{name}"))
                        moved = await db.sessions.delete(f"s{name}", allowed_from=LIVE, entry=entry("e"))
                        assert moved is not None
                        answered[f"s{name}"] = moved
                        key = ApiKeyDocument(
                            key_id=f"k{name}",
                            digest=name.encode().ljust(32),
                            user_id="u",
                            name="n",
                            role="user",
                            created_at=NOW,
                        )
                        await db.api_keys.create(key)
                        answered[f"k{name}"] = key
                    except GatewayError as error:
                        return error.code
                    if len(answered) > 200:
                        enough.set()
                raise AssertionError

            writers = [asyncio.create_task(write(worker)) for worker in range(12)]
            await asyncio.wait_for(enough.wait(), 20)
            child.kill()
            assert set(await asyncio.gather(*writers)) == {ErrorCode.DEPENDENCY_AWAY}

            await asyncio.to_thread(child.start)
            for _ in range(200):
                if await db.connection.ping():
                    break
            for name, document in answered.items():
                if isinstance(document, UserDocument):
                    assert await db.users.find_by_id(name) == document
                    assert await db.users.find_by_email(document.email or "") == document
                elif isinstance(document, SessionDocument):
                    assert await db.sessions.find_by_id(name) == document
                else:
                    assert await db.api_keys.find_by_digest(document.digest) == document
            taken = next(each for each in answered.values() if isinstance(each, UserDocument))
            await conflict(db.users.create(user(email=taken.email)))  # the unique index is there too

    with stores.mongodb() as child:
        asyncio.run(main(child))


# ---- wrong data


@pytest.mark.parametrize(
    "metadata",
    [
        {"number": 2**70},
        {"text": "\ud800"},
        {"nul\0": 1},
        functools.reduce(lambda inner, _: {"a": inner}, range(100_000), {}),
    ],
    ids=["number", "surrogate", "nul", "deep"],
)
def test_what_cannot_be_stored_is_the_callers_fault(mongo: MongoChild, metadata: dict[str, Any]) -> None:
    async def test(db: Database) -> None:
        await db.sessions.create(session("s"))
        for operation in (
            db.sessions.create(session("other", metadata=metadata)),
            db.sessions.update("s", metadata=metadata),
            db.sessions.update_status(
                "s", "FAILED", allowed_from=LIVE, metadata=metadata, ended=True, entry=None
            ),
        ):
            with pytest.raises(GatewayError) as caught:
                await operation
            assert caught.value.code is ErrorCode.BAD_FIELD
        assert await db.sessions.find_by_id("s") == session("s")
        assert await db.sessions.find_by_id("other") is None

    run(mongo, test)


def test_a_row_of_somebody_elses_hand_is_an_internal_error(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        rows = db.connection.database
        await rows["users"].insert_one({"_id": "u", "live": True, "role": 7})
        with pytest.raises(msgspec.ValidationError):
            await db.users.find_by_id("u")
        await rows["api_keys"].insert_one({"_id": "k", "digest": bytes(32)})
        with pytest.raises(msgspec.ValidationError):
            await db.api_keys.find_by_digest(bytes(32))

    run(mongo, test)


def test_a_broken_row_does_not_keep_revocations_from_being_learned(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        rows = db.connection.database
        made = await db.users.create(user(tokens_revoked_at=NOW))
        await rows["users"].insert_one({"_id": "broken", "tokens_revoked_at": "yesterday"})
        assert await db.users.revoked_since(NOW) == [(made.user_id, NOW)]
        await db.refresh_tokens.revoke_family("f", NOW, user_id="u", expires_at=NOW + DAY)
        await rows["refresh_tokens"].insert_many(
            [
                {"_id": "b1", "revoked_at": NOW},
                {"_id": "b2", "kind": "family", "revoked_at": NOW, "expires_at": 1},
                {"_id": "b3", "kind": "family", "revoked_at": True, "expires_at": NOW},
            ]
        )
        revoked = await db.refresh_tokens.revoked_since(NOW)
        assert (revoked.families, revoked.users) == ([("f", NOW, NOW + DAY)], [])

    run(mongo, test)


def test_a_broken_session_does_not_stand_before_the_others(mongo: MongoChild) -> None:
    async def test(db: Database) -> None:
        await db.connection.database["sessions"].insert_one(
            {"_id": "broken", "outbox": [{"kind": "?"}], "outbox_due_at": NOW - DAY}
        )
        await db.sessions.create(session("s", outbox=(entry("e"),), outbox_due_at=NOW))
        with pytest.raises(msgspec.ValidationError):
            await db.sessions.take_due(NOW, LEASE)
        taken = await db.sessions.take_due(NOW, LEASE)
        assert taken is not None
        assert taken.session_id == "s"

    run(mongo, test)


def test_milliseconds() -> None:
    assert milliseconds(NOW.replace(microsecond=123_999)) == NOW.replace(microsecond=123_000)
