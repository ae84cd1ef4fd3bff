"""Whose a credential is, over real stores: tokens, their state, API keys."""

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from lucid.core.exchange import LookUp, Principal, Role
from lucid.core.security import api_keys, nonces
from lucid.database.documents import ApiKeyDocument
from lucid.errors import ErrorCode, GatewayError
from lucid.services import credentials
from lucid.services.credentials import TokenReport
from lucid.services.look_ups import MOST_AT_ONCE, MOST_WAITING
from lucid.services.revocations import Revocation
from tests.support.outcomes import outcome
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet
from tests.support.workers import CALLER, Fleet, Worker, database_name, fleet_of

Test = Callable[[Fleet, Worker, Worker], Awaitable[None]]
Run = Callable[[Test], None]


@pytest.fixture
def run(mongo: MongoChild, redis_server: RedisChild) -> Run:
    def runner(test: Test) -> None:
        async def main() -> None:
            uri = mongo.in_database(database_name())
            async with fleet_of(2, uri, redis_server.uri) as (fleet, (a, b)):
                await test(fleet, a, b)

        asyncio.run(main())

    return runner


def test_verify_and_status(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        principal = a.judge(pair.access_token)
        assert await b.credentials.verify(pair.access_token) == TokenReport(
            active=True,
            sub=pair.user.user_id,
            role="user",
            sid=principal.family,
            jti=principal.token_id,
            iat=int(fleet.now),
            exp=int(fleet.now) + 900,
            iss="lucid",
            aud="lucid",
            typ="access",
        )
        status = a.credentials.status(principal)
        assert (status.user_id, status.role, status.credential) == (pair.user.user_id, "user", "token")
        assert (status.issued_at, status.expires_at) == ("2030-01-01T00:00:00Z", "2030-01-01T00:15:00Z")
        await a.auth.logout(principal, False, CALLER)
        assert msgspec.to_builtins(await b.credentials.verify(pair.access_token)) == {"active": False}
        assert await b.credentials.verify("x") == TokenReport(active=False)
        for_ever = Principal(Role.ADMIN, "admin", "u", "u", via="api_key")
        assert a.credentials.status(for_ever).expires_at is None

    run(test)


def test_api_keys_act_as_their_owner_within_both_roles(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        owner = await a.login(Wallet.generate())
        admin = await a.login(Wallet.generate())
        await a.users.update(admin.user.user_id, {"role": "admin"})
        now = dt.datetime.fromtimestamp(fleet.now, dt.UTC)

        async def key(user_id: str, role: str, expires_at: dt.datetime | None = None) -> bytes:
            digest = api_keys.digest(api_keys.new_api_key())
            await a.api_keys.create(
                ApiKeyDocument(nonces.new_id(), digest, user_id, "n", role, now, expires_at)
            )
            return digest

        async def look_up(digest: bytes) -> Principal | ErrorCode:
            return await b.credentials.look_up(LookUp(digest))

        plain = await look_up(await key(owner.user.user_id, "user"))
        assert isinstance(plain, Principal)
        assert (plain.identifier, plain.user_id, plain.role) == (*[owner.user.user_id] * 2, Role.USER)
        assert (plain.via, plain.tier, plain.expires_at, plain.family) == (
            "api_key",
            "authenticated",
            0.0,
            "",
        )
        too_much = await look_up(await key(owner.user.user_id, "super_admin"))
        assert isinstance(too_much, Principal)
        assert (too_much.role, too_much.tier) == (Role.USER, "authenticated")
        less = await look_up(await key(admin.user.user_id, "node_operator"))
        assert isinstance(less, Principal)
        assert (less.role, less.tier) == (Role.NODE_OPERATOR, "authenticated")
        full_digest = await key(admin.user.user_id, "admin", now + dt.timedelta(hours=1))
        full = await look_up(full_digest)
        assert isinstance(full, Principal)
        assert (full.role, full.tier, full.expires_at) == (Role.ADMIN, "admin", fleet.now + 3_600)

        bad = ErrorCode.BAD_CREDENTIAL
        assert await look_up(bytes(32)) is bad
        assert await look_up(await key(owner.user.user_id, "root")) is bad
        assert await look_up(await key("nobody", "user")) is bad
        fleet.now += 3_600
        assert await look_up(full_digest) is ErrorCode.CREDENTIAL_EXPIRED
        orphan = await key(owner.user.user_id, "user")
        await a.users.delete(owner.user.user_id, revoke_tokens_at=now)
        assert await look_up(orphan) is bad

    run(test)


def test_a_flood_of_api_keys_keeps_few_connections_busy(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        find, busy, most, calls = a.api_keys.find_by_digest, 0, 0, 0

        async def counted(digest: bytes) -> ApiKeyDocument | None:
            nonlocal busy, most, calls
            busy, calls = busy + 1, calls + 1
            most = max(most, busy)
            try:
                return await find(digest)
            finally:
                busy -= 1

        a.api_keys.find_by_digest = counted  # type: ignore[method-assign]
        same = await asyncio.gather(*(a.credentials.look_up(LookUp(bytes(32))) for _ in range(500)))
        assert (set(same), calls) == ({ErrorCode.BAD_CREDENTIAL}, 1)
        outcomes = Counter(
            await asyncio.gather(
                *(outcome(a.credentials.look_up(LookUp(b"%032d" % n, asker=f"{n}"))) for n in range(500))
            )
        )
        assert outcomes == {
            ErrorCode.BAD_CREDENTIAL: MOST_AT_ONCE + MOST_WAITING,
            ErrorCode.DEPENDENCY_AWAY: 500 - MOST_AT_ONCE - MOST_WAITING,
        }
        assert most == MOST_AT_ONCE
        assert await a.credentials.look_up(LookUp(b"%032d" % 499)) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_the_last_use_of_keys_is_written_now_and_then(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        owner = await a.login(Wallet.generate())
        digests = [api_keys.digest(api_keys.new_api_key()) for _ in range(3)]
        for number, digest in enumerate(digests):
            key = ApiKeyDocument(f"k{number}", digest, owner.user.user_id, "n", "user", a._utc_now())
            await a.api_keys.create(key)
        touch, calls = a.api_keys.touch, []

        async def counted(uses: dict[str, dt.datetime]) -> None:
            calls.append(dict(uses))
            await touch(uses)

        async def away(_: Any) -> None:
            raise GatewayError(ErrorCode.DEPENDENCY_AWAY)

        async def last_used() -> list[float | None]:
            keys = [await a.api_keys.find_by_digest(digest) for digest in digests]
            return [None if key.last_used_at is None else key.last_used_at.timestamp() for key in keys]

        a.api_keys.touch = counted  # type: ignore[method-assign]
        await a.credentials.flush_key_uses()
        assert calls == []
        await a.credentials.look_up(LookUp(digests[0]))
        await a.credentials.look_up(LookUp(bytes(32)))
        first = fleet.now
        fleet.now += 10
        await a.credentials.look_up(LookUp(digests[0]))
        await a.credentials.look_up(LookUp(digests[1]))
        assert await last_used() == [None] * 3
        # What cannot be written waits, and does not push a later use aside.
        a.api_keys.touch = away  # type: ignore[method-assign]
        await a.credentials.flush_key_uses()
        fleet.now += 10
        await a.credentials.look_up(LookUp(digests[0]))
        a.api_keys.touch = counted  # type: ignore[method-assign]
        await a.credentials.flush_key_uses()
        assert await last_used() == [first + 20, first + 10, None]
        assert [set(call) for call in calls] == [{"k0", "k1"}]
        await a.credentials.flush_key_uses()
        assert len(calls) == 1

        for number in range(7):
            a.credentials._note_key_use(f"x{number}", a._utc_now())
        await a.credentials.flush_key_uses()
        assert list(calls[1]) == [f"x{number}" for number in range(2, 7)]  # the oldest went

    monkeypatch.setattr(credentials, "MOST_KEY_USES", 5)
    run(test)
    assert "the last use of 2 API keys is not written down yet" in caplog.text


def test_a_token_under_a_new_key_is_verified_with_the_keys_of_now(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        asked, known = [], False

        async def fetch_keys() -> bool:
            nonlocal known
            asked.append(1)
            known = True
            return True

        verify = b.memory._verify
        b.memory._verify = lambda token: verify(token) if known else None
        assert await b.credentials.verify(pair.access_token) == TokenReport(
            active=False
        )  # nobody can be asked
        fleet.now += 6  # a refusal is remembered for five seconds
        b.credentials._fetch_keys = fetch_keys
        reports = await asyncio.gather(*(b.credentials.verify(pair.access_token) for _ in range(20)))
        assert {report.active for report in reports} == {True}
        assert {report.sub for report in reports} == {pair.user.user_id}
        assert len(asked) == 1

    run(test)


def test_who_asks_after_a_key_was_withdrawn_does_not_share_the_look_up_from_before_it(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        owner = await a.login(Wallet.generate())
        secret = api_keys.new_api_key()
        digest = api_keys.digest(secret)
        now = a._utc_now()
        await a.api_keys.create(ApiKeyDocument("k", digest, owner.user.user_id, "n", "user", now))
        find, seen, go_on = b.api_keys.find_by_digest, asyncio.Event(), asyncio.Event()

        async def slow(digest: bytes) -> ApiKeyDocument | None:
            found = await find(digest)
            seen.set()
            await go_on.wait()
            return found

        b.api_keys.find_by_digest = slow  # type: ignore[method-assign]
        assert len(b.keys) == 0, "as it is when a worker starts"
        before = asyncio.create_task(b.credentials.look_up(LookUp(digest)))
        await seen.wait()
        await a.api_keys.revoke(owner.user.user_id, "k", now)
        await a.revocations.revoke(Revocation(key=digest.hex(), until=fleet.now + 60))
        after = asyncio.create_task(b.credentials.look_up(LookUp(digest)))
        await asyncio.sleep(0)
        go_on.set()
        assert isinstance(await before, Principal)
        assert await after is ErrorCode.BAD_CREDENTIAL

    run(test)
