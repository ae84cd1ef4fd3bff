"""What a worker learns from MongoDB while Redis is silent, and what it says when both are."""

import asyncio
import datetime as dt
import logging
from collections.abc import Awaitable, Callable

import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys, nonces
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.documents import ApiKeyDocument, UserDocument
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode
from lucid.services.revocation_watch import (
    CONNECTED_POLL_SECONDS,
    POLL_SECONDS,
    SILENT_SECONDS,
    RevocationWatch,
)
from lucid.services.revocations import Revocations
from lucid.settings import TokenSettings
from tests.support.stores import MongoChild, mongodb
from tests.support.workers import database_name

EPOCH = 1_893_456_000.5
SETTINGS = TokenSettings(secret_key="k" * 32)
DAY = dt.timedelta(days=1)


class Watched:
    """One worker: its memory, the stores, and two clocks that the test moves."""

    def __init__(self, uri: str) -> None:
        self.now = EPOCH
        self.silent = 0.0
        self.connection = Connection(uri, lambda: self.now)
        indexes = Indexes(self.connection)
        self.users = UserRepository(self.connection, indexes, self.moment)
        self.refresh_tokens = RefreshTokenRepository(self.connection)
        self.api_keys = ApiKeyRepository(self.connection, indexes)
        self.issuer = TokenIssuer(SETTINGS)
        self.keys = KeyMemory()
        self.polls = 0
        self.restart()

    def restart(self) -> None:
        """A new worker over the same stores."""
        self.memory = TokenMemory(TokenVerifier(SETTINGS, self.wall).verify, self.wall, 100)
        self.watch = RevocationWatch(
            revocations=Revocations(None, self.memory, self._publish, self.wall, self.keys),
            refresh_tokens=self.refresh_tokens,
            users=self.users,
            api_keys=self.api_keys,
            silent_seconds=lambda: self.silent,
            token_seconds=905.0,
            wall_clock=self.wall,
            monotonic=self.wall,
        )
        poll = self.watch.poll

        async def counted() -> None:
            self.polls += 1
            await poll()

        self.watch.poll = counted  # type: ignore[method-assign]

    def wall(self) -> float:
        return self.now

    def moment(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.now, dt.UTC)

    async def _publish(self, body: object) -> None:
        raise AssertionError("a watch tells nobody")

    def token(self, user_id: str = "u", family: str = "f", minutes: int | None = None) -> str:
        return self.issuer.issue(
            user_id=user_id, role=Role.USER, family=family, now=self.now, minutes=minutes
        ).token

    def good(self, token: str) -> bool:
        verdict = self.memory.principal(token, self.now)
        assert isinstance(verdict, Principal) or verdict is ErrorCode.BAD_CREDENTIAL
        return isinstance(verdict, Principal)


Test = Callable[[Watched], Awaitable[None]]


def run(uri: str, test: Test) -> None:
    async def main() -> None:
        watched = Watched(uri)
        try:
            await test(watched)
        finally:
            watched.connection.close()

    asyncio.run(main())


def test_every_kind_of_revocation_is_found(mongo: MongoChild) -> None:
    async def test(w: Watched) -> None:
        digests = [nonces.refresh_token().encode() for _ in range(2)]
        for family, digest in zip(("f1", "f2"), digests, strict=True):
            await w.refresh_tokens.start_family(family, "u", digest, w.moment(), w.moment() + DAY)
        user = UserDocument("changed", live=True, role="user", created_at=w.moment(), updated_at=w.moment())
        await w.users.create(user)
        await w.users.create(UserDocument("gone", True, "user", w.moment(), w.moment()))
        key = ApiKeyDocument("k", api_keys.digest("k"), "u", "name", "user", w.moment())
        await w.api_keys.create(key)
        await w.watch.look()
        tokens = {
            "logged out": w.token("u", "f1"),
            "minted, logged out": w.token("x", "minted"),
            "changed": w.token("changed", "f3"),
            "gone": w.token("gone", "f4"),
            "all logins": w.token("everywhere", "f5"),
            "untouched": w.token("u", "f2"),
        }
        found = Principal(Role.USER, "authenticated", "u", user_id="u", via="api_key")
        w.keys.put(key.digest, found, w.now)
        assert all(map(w.good, tokens.values()))

        w.now += 1.0
        await w.refresh_tokens.revoke_family("f1", w.moment())
        until = w.moment() + dt.timedelta(minutes=15)
        await w.refresh_tokens.revoke_family("minted", w.moment(), user_id="x", expires_at=until)
        await w.users.update("changed", {"role": "admin"}, revoke_tokens_at=w.moment())
        await w.users.delete("gone", revoke_tokens_at=w.moment())
        await w.refresh_tokens.revoke_user("everywhere", w.moment(), tokens_until=w.moment() + 400 * DAY)
        await w.api_keys.revoke("u", "k", w.moment())
        w.silent = SILENT_SECONDS + 0.01
        await w.watch.look()
        assert [name for name, token in tokens.items() if w.good(token)] == ["untouched"]
        assert w.keys.get(key.digest, w.now) is None
        # What is issued afterwards is good: of a changed user, in the knowledge of the change.
        w.now += 1.0
        assert w.good(w.token("changed"))
        assert w.good(w.token("everywhere"))

        w.restart()
        assert all(map(w.good, tokens.values())), "a new worker knows nothing"
        await w.watch.look()
        assert [name for name, token in tokens.items() if w.good(token)] == ["untouched"]

    run(mongo.in_database(database_name()), test)


def test_a_token_minted_for_a_year_stays_dead_for_new_workers(mongo: MongoChild) -> None:
    async def test(w: Watched) -> None:
        token = w.token("x", "minted", minutes=300 * 24 * 60)
        until = w.moment() + 300 * DAY
        await w.refresh_tokens.revoke_family("minted", w.moment(), user_id="x", expires_at=until)
        w.now += 200 * 86_400
        w.restart()
        await w.watch.look()
        assert not w.good(token)

    run(mongo.in_database(database_name()), test)


def test_how_often_it_asks(mongo: MongoChild) -> None:
    async def test(w: Watched) -> None:
        async def polls(seconds: float, silent: bool) -> int:
            before, end = w.polls, w.now + seconds
            while w.now < end:
                w.silent = SILENT_SECONDS + 1 if silent else 0.1
                await w.watch.look()
                w.now += 0.1
            return w.polls - before

        assert await polls(2 * CONNECTED_POLL_SECONDS - 1, silent=False) == 2
        # Somebody has revoked whom Redis does not reach: then it is time at once.
        await w.refresh_tokens.count_untold()
        assert await polls(POLL_SECONDS + 0.2, silent=False) == 1
        assert await polls(3 * POLL_SECONDS, silent=False) <= 1
        # Each 0.1 s is looked whether it is time, so a question may be that late.
        assert await polls(8 * (POLL_SECONDS + 0.1), silent=True) in (8, 9)
        w.now += 0.01
        assert await polls(1.0, silent=False) <= 1

    run(mongo.in_database(database_name()), test)


def test_a_silence_is_answered_at_once(mongo: MongoChild) -> None:
    """Not when the next question was due: what it is late by, others' tokens live on."""

    async def test(w: Watched) -> None:
        await w.watch.look()
        w.now += 1.0
        w.silent = SILENT_SECONDS
        await w.watch.look()
        assert w.polls == 1
        w.silent = SILENT_SECONDS + 0.001
        await w.watch.look()
        assert w.polls == 2

    run(mongo.in_database(database_name()), test)


def test_cut_off_from_both_it_accepts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lucid.services.revocation_watch")

    async def test(w: Watched) -> None:
        token = w.token("u", "f")
        await w.watch.look()
        assert not w.watch.blind
        w.silent = SILENT_SECONDS + 1
        child.kill()
        for _ in range(3):
            w.now += 3.0
            await w.watch.look()
        assert w.watch.blind
        assert w.good(token)
        assert [r.levelname for r in caplog.records if "tells of revocations" in r.message] == ["ERROR"]
        w.silent = 0.0
        w.now += 0.1
        await w.watch.look()
        assert not w.watch.blind, "Redis alone is enough"
        w.silent = SILENT_SECONDS + 1
        w.now += 3.0
        await w.watch.look()
        assert w.watch.blind
        child.start()
        deadline = w.now + 60.0
        while w.watch.blind:
            assert w.now < deadline
            w.now += 3.0
            await w.watch.look()
        assert [r.message for r in caplog.records if "known again" in r.message]

    with mongodb() as child:
        run(child.in_database("watched"), test)
