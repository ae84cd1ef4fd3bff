"""Logins whose tokens the authentication cluster issues: a real one over HTTP, two workers, real stores."""

import asyncio
import itertools
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lucid.core.exchange import LookUp, Principal, Role
from lucid.core.gateway import LEARNED_TOKEN_SECONDS
from lucid.core.security import api_keys
from lucid.core.validation import HardwareWalletText
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode
from lucid.services import cluster_logins
from lucid.services.callers import Caller
from lucid.services.credentials import TokenReport
from lucid.services.login_types import TokenPair
from lucid.services.look_ups import MOST_AT_ONCE, MOST_WAITING
from lucid.services.revocations import of_user
from tests.support.auth_cluster import ISSUER, AuthClusterServer, answering, lying
from tests.support.hang_ups import HangUp
from tests.support.outcomes import outcome, refused
from tests.support.servers import Reply
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet
from tests.support.workers import CALLER, EPOCH, Fleet, Worker, database_name, fleet_of

AWAY = (ErrorCode.BACKEND_UNAVAILABLE, ErrorCode.BACKEND_BROKEN)
"""A kept connection that ends with the server looks like a broken answer."""


class World:
    """The cluster and two workers of a gateway that logs in with it."""

    def __init__(self, server: AuthClusterServer, fleet: Fleet, workers: list[Worker]) -> None:
        self.server = server
        self.fleet = fleet
        self.a, self.b = workers

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies that came to this path."""
        return [json.loads(each.body) for each in self.server.received if each.target == f"/auth/{path}"]

    async def principal(self, worker: Worker, token: str) -> Any:
        """Whose this token is, as the gateway finds out: from memory, else the cluster is asked and remembered."""
        known = worker.judge(token)
        if known is not None:
            return known
        answer = await worker.credentials.look_up(need_of(token))
        if not isinstance(answer, Principal):
            return answer
        worker.memory.remember(token, answer, self.fleet.now, LEARNED_TOKEN_SECONDS)
        return worker.judge(token)


def need_of(token: str, asker: str = "") -> LookUp:
    return LookUp(api_keys.digest(token), token, asker)


Test = Callable[[World], Awaitable[None]]
Run = Callable[[Test], None]


@pytest.fixture
def run(mongo: MongoChild, redis_server: RedisChild) -> Run:
    def runner(test: Test) -> None:
        async def main() -> None:
            with AuthClusterServer() as server:
                uri = mongo.in_database(database_name())
                async with fleet_of(2, uri, redis_server.uri, cluster=server) as (fleet, workers):
                    server._wall_clock = fleet.wall_clock
                    await test(World(server, fleet, workers))

        asyncio.run(main())

    return runner


# ---- login


def test_a_login_passes_the_clusters_tokens_through(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate(ledger=True)
        world.server.roles[wallet.address] = "node_operator"
        challenge = await world.a.auth.challenge(wallet.address, CALLER)
        signed = wallet.sign(challenge.message)
        # What the device says of itself goes on as it came; what is stored here is in composed form.
        device = HardwareWalletText("ledger", "cafe\u0301")
        login = (wallet.address, signed, challenge.message, device, CALLER)
        pair = await world.b.auth.login_with_wallet(*login)
        assert world.asked("login") == [
            {
                "tron_address": wallet.address,
                "signature": signed,
                "message": challenge.message,
                "hardware_wallet": {"type": "ledger", "device_id": "cafe\u0301"},
            }
        ]
        assert world.server.received[0].field("x-request-id") == CALLER.request_id
        family, login_there = next(iter(world.server.logins.items()))
        assert (pair.refresh_token, pair.token_type, pair.expires_in) == (login_there.current, "Bearer", 900)
        user_id = world.server.users[wallet.address]
        assert pair.user is not None
        assert (pair.user.user_id, pair.user.role) == (user_id, "node_operator")
        assert "nodes:operate" in pair.user.permissions
        principal = await world.principal(world.a, pair.access_token)
        assert (principal.user_id, principal.family, principal.role) == (user_id, family, Role.NODE_OPERATOR)
        stored = await world.a.users.find_by_tron_address(wallet.address)
        assert stored is not None
        assert (stored.user_id, stored.role) == (user_id, "node_operator")
        assert stored.hardware_wallet is not None
        assert stored.hardware_wallet.device_id == "caf\u00e9"
        assert stored.last_login_at is not None
        assert await world.a.redis.keys("lucid:challenge:*") == []
        assert await world.a.connection.database["refresh_tokens"].count_documents({}) == 0

        # Without a hardware wallet there is none in the body.
        await world.a.login(Wallet.generate())
        assert "hardware_wallet" not in world.asked("login")[-1]

    run(test)


def test_what_is_wrong_here_never_reaches_the_cluster(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        challenge = await world.a.auth.challenge(wallet.address, CALLER)
        wrong = Wallet.generate().sign(challenge.message)
        await refused(
            ErrorCode.BAD_SIGNATURE,
            world.a.auth.login_with_wallet(wallet.address, wrong, challenge.message, None, CALLER),
        )
        await refused(
            ErrorCode.UNKNOWN_CHALLENGE,
            world.a.auth.login_with_wallet(wallet.address, wallet.sign("x"), "x", None, CALLER),
        )
        await refused(
            ErrorCode.NOT_IMPLEMENTED,
            world.a.auth.login_with_password("ann@example.org", "correct horse", CALLER),
        )
        assert world.server.received == []

    run(test)


def test_a_refusal_or_an_outage_there_spends_no_challenge(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        challenge = await world.a.auth.challenge(wallet.address, CALLER)
        login = (wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER)
        for fault, code in (
            (answering(401), ErrorCode.BAD_CREDENTIAL),
            (answering(500), ErrorCode.BACKEND_BROKEN),
            (answering(429), ErrorCode.RATE_LIMITED),
            (lying(user__tron_address=Wallet.generate().address), ErrorCode.BACKEND_BROKEN),
        ):
            world.server.fault = fault
            await refused(code, world.a.auth.login_with_wallet(*login))
        world.server.stop()
        assert await outcome(world.a.auth.login_with_wallet(*login)) in AWAY
        assert (await world.a.users.list_users(0, 1))[1] == 0
        world.server.start()
        world.server.fault = None
        assert isinstance(await world.b.auth.login_with_wallet(*login), TokenPair)
        await refused(ErrorCode.UNKNOWN_CHALLENGE, world.a.auth.login_with_wallet(*login))

    run(test)


def test_a_challenge_is_good_once_here_too(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        challenge = await world.a.auth.challenge(wallet.address, CALLER)
        login = (wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER)
        outcomes = await asyncio.gather(
            *(outcome(worker.auth.login_with_wallet(*login)) for worker in (world.a, world.b) * 3)
        )
        assert Counter(isinstance(each, TokenPair) for each in outcomes) == {True: 1, False: 5}
        assert {each for each in outcomes if not isinstance(each, TokenPair)} == {ErrorCode.UNKNOWN_CHALLENGE}

    run(test)


def test_another_user_with_that_address_is_told_to_the_operator(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        now = world.a._utc_now()
        await world.a.users.create(
            UserDocument("somebody", True, "user", now, now, tron_address=wallet.address)
        )
        pair = await world.a.login(wallet)
        assert pair.user is not None
        assert isinstance(await world.principal(world.b, pair.access_token), Principal)
        stored = await world.a.users.find_by_tron_address(wallet.address)
        assert stored is not None
        assert stored.user_id == "somebody"
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 1
        assert wallet.address in told[0].getMessage()
        assert pair.user.user_id in told[0].getMessage()

    run(test)


def test_without_mongodb_the_tokens_go_out_and_in(
    mongo: MongoChild,
    redis_server: RedisChild,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lucid.database.connection.SERVER_SELECTION_MS", 100)

    async def main() -> None:
        with AuthClusterServer(wall_clock=lambda: EPOCH) as server:
            async with fleet_of(2, "mongodb://127.0.0.1:9/x", redis_server.uri, cluster=server) as (
                fleet,
                workers,
            ):
                world = World(server, fleet, workers)
                wallet = Wallet.generate()
                pair = await world.a.login(wallet)
                principal = await world.principal(world.b, pair.access_token)
                assert isinstance(principal, Principal)
                assert "is not recorded" in caplog.text
                assert isinstance(await world.b.auth.refresh(pair.refresh_token, CALLER), TokenPair)
                await world.a.auth.logout(principal, True, world.a.caller(pair))
                for worker in workers:
                    assert await world.principal(worker, pair.access_token) is ErrorCode.BAD_CREDENTIAL
                assert "a logout is not kept" in caplog.text

    asyncio.run(main())


# ---- refresh


def test_a_refresh_is_the_clusters_and_is_charged_to_whoever_is_known(run: Run) -> None:
    async def test(world: World) -> None:
        pair = await world.a.login(Wallet.generate())
        assert pair.user is not None
        user_id = pair.user.user_id
        new = await world.a.auth.refresh(pair.refresh_token, CALLER)
        assert new.user == pair.user
        assert world.asked("refresh") == [{"refresh_token": pair.refresh_token}]
        # The other worker learns of the user by the answer.
        newer = await world.b.auth.refresh(new.refresh_token, CALLER)
        assert world.fleet.charged == [("refresh", user_id)] * 2
        # An answer without the user: this worker knows from the login whose it is.
        world.server.fault = lying(user=None)
        newest = await world.b.auth.refresh(newer.refresh_token, CALLER)
        assert newest.user is None
        # The other worker learns it from the token that the cluster has just given.
        newest = await world.a.auth.refresh(newest.refresh_token, CALLER)
        assert world.fleet.charged[2:] == [("refresh", user_id)] * 2
        # Where neither the answer nor the token tells, it counts for the address.
        world.server.fault = lying(access_token="opaque", user=None)
        last = await world.b.auth.refresh(newest.refresh_token, CALLER)
        assert world.fleet.charged[4:] == [("login", CALLER.address)]
        world.server.fault = None
        await refused(ErrorCode.BAD_CREDENTIAL, world.b.auth.refresh("unknown", CALLER))
        await refused(ErrorCode.BAD_CREDENTIAL, world.b.auth.refresh(pair.refresh_token, CALLER))
        assert world.fleet.charged[5:] == [("login", CALLER.address)] * 2
        # That was a spent one: the cluster has ended the login.
        await refused(ErrorCode.BAD_CREDENTIAL, world.a.auth.refresh(last.refresh_token, CALLER))

    run(test)


def test_over_the_limit_nothing_is_spent_and_nothing_is_lost(run: Run) -> None:
    async def test(world: World) -> None:
        pair = await world.a.login(Wallet.generate())
        world.fleet.used_up = {"refresh", "login"}
        await refused(ErrorCode.RATE_LIMITED, world.a.auth.refresh(pair.refresh_token, CALLER))
        assert world.asked("refresh") == []
        # Known only by the answer: the pair is not kept back, the next one is refused.
        new = await world.b.auth.refresh(pair.refresh_token, CALLER)
        assert isinstance(new, TokenPair)
        await refused(ErrorCode.RATE_LIMITED, world.b.auth.refresh(new.refresh_token, CALLER))
        await refused(ErrorCode.RATE_LIMITED, world.b.auth.refresh("unknown", CALLER))
        world.fleet.used_up = set()
        assert isinstance(await world.b.auth.refresh(new.refresh_token, CALLER), TokenPair)

    run(test)


def test_an_outage_there_is_no_bad_token(run: Run) -> None:
    async def test(world: World) -> None:
        pair = await world.a.login(Wallet.generate())
        world.server.stop()
        assert await outcome(world.b.auth.refresh(pair.refresh_token, CALLER)) in AWAY
        assert world.fleet.charged == []
        world.server.start()
        assert isinstance(await world.b.auth.refresh(pair.refresh_token, CALLER), TokenPair)

    run(test)


def test_what_is_remembered_of_refresh_tokens_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_logins, "MOST_REMEMBERED", 3)

    async def test(world: World) -> None:
        logins = world.a.cluster_logins
        assert logins is not None
        pairs = [await world.a.login(Wallet.generate()) for _ in range(5)]
        assert len(logins._owners) == 3
        for pair in pairs[2:]:
            await world.a.auth.refresh(pair.refresh_token, CALLER)
        assert len(logins._owners) == 3  # a spent one makes room for the new one

    run(test)


# ---- logout


def test_a_logout_there_is_felt_here_at_once(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        pair, other = await world.a.login(wallet), await world.a.login(wallet)
        newer = await world.a.auth.refresh(pair.refresh_token, CALLER)
        for worker in (world.a, world.b):
            for each in (pair, newer, other):
                assert isinstance(await world.principal(worker, each.access_token), Principal)
        principal = world.a.judge(newer.access_token)
        await world.a.auth.logout(principal, False, world.a.caller(newer))
        assert world.asked("logout") == [{"all_logins": False}]
        logout = next(each for each in world.server.received if each.target == "/auth/logout")
        assert logout.field("authorization") == f"Bearer {newer.access_token}"
        for worker in (world.a, world.b):
            for each in (pair, newer):
                assert worker.judge(each.access_token) is ErrorCode.BAD_CREDENTIAL
            assert isinstance(worker.judge(other.access_token), Principal)
        await refused(ErrorCode.BAD_CREDENTIAL, world.b.auth.refresh(newer.refresh_token, CALLER))
        # MongoDB tells those that Redis does not reach, for as long as a token of that login may live.
        word = await world.a.refresh_tokens.revoked_since(world.a._utc_now())
        assert [family for family, *_ in word.families] == [principal.family]
        assert max(moment.timestamp() for moment in word.families[0][1:]) >= principal.expires_at

        await world.b.auth.logout(world.b.judge(other.access_token), True, world.b.caller(other))
        assert world.asked("logout")[1] == {"all_logins": True}
        for worker in (world.a, world.b):
            assert worker.judge(other.access_token) is ErrorCode.BAD_CREDENTIAL
        word = await world.a.refresh_tokens.revoked_since(world.a._utc_now())
        assert [user for user, _ in word.users] == [principal.user_id]
        world.fleet.now += 1.5
        fresh = await world.a.login(wallet)
        assert isinstance(await world.principal(world.b, fresh.access_token), Principal)

    run(test)


def test_a_token_without_a_login_is_logged_out_by_its_name(run: Run) -> None:
    async def test(world: World) -> None:
        wallet = Wallet.generate()
        # A cluster whose tokens name no login, but themselves.
        token = world.server.token(wallet.address, sid=None)
        principal = await world.principal(world.a, token)
        assert principal.family == ""
        another = world.server.token(wallet.address, sid=None)
        assert isinstance(await world.principal(world.b, another), Principal)
        honest = world.server.backend.respond
        world.server.backend.respond = lambda _: Reply(204, body=b"")
        await world.a.auth.logout(principal, False, Caller("192.0.2.1", token=token))
        world.server.backend.respond = honest
        assert await world.principal(world.b, token) is ErrorCode.BAD_CREDENTIAL
        assert isinstance(world.b.judge(another), Principal)

    run(test)


def test_a_logout_that_failed_there_can_be_tried_again(run: Run) -> None:
    async def test(world: World) -> None:
        pair = await world.a.login(Wallet.generate())
        principal = await world.principal(world.a, pair.access_token)
        world.server.fault = answering(500)
        await refused(ErrorCode.BACKEND_BROKEN, world.a.auth.logout(principal, False, world.a.caller(pair)))
        assert isinstance(world.a.judge(pair.access_token), Principal)
        assert world.fleet.published == []
        world.server.fault = None
        await world.a.auth.logout(principal, False, world.a.caller(pair))
        assert world.b.judge(pair.access_token) is None  # it has never asked
        assert await world.principal(world.b, pair.access_token) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_a_logout_ends_here_too_whenever_its_caller_hangs_up(run: Run) -> None:
    async def test(world: World) -> None:
        auth, logins = world.a.auth, world.a.cluster_logins
        for at in itertools.count(1):
            wallet = Wallet.generate()
            pair, other = await world.a.login(wallet), await world.b.login(wallet)
            for each in (pair, other):
                assert isinstance(await world.principal(world.b, each.access_token), Principal)
            principal = await world.principal(world.a, pair.access_token)
            world.server.received.clear()
            hang_up = HangUp(
                at, *((logins, name) for name in ("_cluster", "_revocations", "_refresh_tokens"))
            )
            logout = auth.logout(principal, True, world.a.caller(pair))
            hung_up = await hang_up(logout, auth)
            assert world.asked("logout") == [{"all_logins": True}]
            for each in (pair, other):
                assert world.b.judge(each.access_token) is ErrorCode.BAD_CREDENTIAL
            word = await world.a.refresh_tokens.revoked_since(world.a._utc_now())
            assert principal.family in [family for family, *_ in word.families]
            assert principal.user_id in [user for user, _ in word.users]
            if not hung_up:
                break
        assert hang_up.calls == ["logout", "revoke", "revoke_family", "revoke_user"]

    run(test)


def test_a_token_minted_here_is_logged_out_here(run: Run) -> None:
    async def test(world: World) -> None:
        minted = world.a.auth._issuer.issue(
            user_id="operator", role=Role.ADMIN, family="by-hand", now=world.fleet.now
        )
        principal = world.a.judge(minted.token)
        assert isinstance(principal, Principal)
        await world.a.auth.logout(principal, True, Caller("192.0.2.1", token=minted.token))
        assert world.b.judge(minted.token) is ErrorCode.BAD_CREDENTIAL
        assert world.server.received == []
        word = await world.a.refresh_tokens.revoked_since(world.a._utc_now())
        assert [family for family, *_ in word.families] == ["by-hand"]

    run(test)


# ---- verify


def test_verify_asks_whoever_issued_the_token(run: Run) -> None:
    async def test(world: World) -> None:
        pair = await world.a.login(Wallet.generate())
        assert pair.user is not None
        report = await world.a.credentials.verify(pair.access_token)
        assert (report.active, report.sub, report.iss, report.aud) == (
            True,
            pair.user.user_id,
            ISSUER,
            "",
        )
        assert (report.iat, report.exp) == (int(world.fleet.now), int(world.fleet.now) + 900)
        # Remembered: not asked again for a minute, then asked again.
        await world.a.credentials.verify(pair.access_token)
        assert len(world.asked("verify")) == 1
        world.fleet.now += LEARNED_TOKEN_SECONDS
        assert (await world.a.credentials.verify(pair.access_token)).active
        assert len(world.asked("verify")) == 2
        # What is revoked here is not active, whatever the cluster says.
        await world.b.revocations.revoke(of_user(pair.user.user_id, world.fleet.now))
        assert await world.a.credentials.verify(pair.access_token) == TokenReport(active=False)
        assert await world.b.credentials.verify(pair.access_token) == TokenReport(active=False)

        local = world.a.auth._issuer.issue(
            user_id="operator", role=Role.ADMIN, family="by-hand", now=world.fleet.now
        )
        asked = len(world.asked("verify"))
        report = await world.b.credentials.verify(local.token)
        assert (report.active, report.iss, report.aud) == (True, "lucid", "lucid")
        assert len(world.asked("verify")) == asked
        for bad in ("x", "a.b.c", world.server.token(Wallet.generate().address, iss="stranger")):
            assert await world.a.credentials.verify(bad) == TokenReport(active=False)
        assert len(world.asked("verify")) == asked

        other = world.server.token(Wallet.generate().address)
        world.server.stop()
        assert await outcome(world.a.credentials.verify(other)) in AWAY
        world.server.start()

    run(test)


def test_look_ups_of_tokens_are_merged_and_few(run: Run) -> None:
    async def test(world: World) -> None:
        token = world.server.token(Wallet.generate().address)
        answers = await asyncio.gather(*(world.a.credentials.look_up(need_of(token)) for _ in range(100)))
        assert len(world.asked("verify")) == 1
        assert all(isinstance(answer, Principal) for answer in answers)

        bad = [world.server.token(Wallet.generate().address, exp=1_000 + n) for n in range(120)]
        look_ups = (outcome(world.a.credentials.look_up(need_of(each, f"{n}"))) for n, each in enumerate(bad))
        outcomes = Counter(await asyncio.gather(*look_ups))
        assert outcomes == {
            ErrorCode.BAD_CREDENTIAL: MOST_AT_ONCE + MOST_WAITING,
            ErrorCode.BACKEND_UNAVAILABLE: 120 - MOST_AT_ONCE - MOST_WAITING,
        }

    run(test)


def test_the_audit_log_of_a_cluster_and_no_secret(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    secrets: list[str] = []

    async def test(world: World) -> None:
        wallet = Wallet.generate()
        challenge = await world.a.auth.challenge(wallet.address, CALLER)
        signed = wallet.sign(challenge.message)
        login = (wallet.address, signed, challenge.message, None, CALLER)
        world.server.fault = answering(401)
        await outcome(world.a.auth.login_with_wallet(*login))
        world.server.fault = lying(user__role="root")
        await outcome(world.a.auth.login_with_wallet(*login))
        world.server.fault = None
        pair = await world.a.auth.login_with_wallet(*login)
        new = await world.a.auth.refresh(pair.refresh_token, CALLER)
        await outcome(world.a.auth.refresh(pair.refresh_token, CALLER))
        principal = await world.principal(world.a, world.server.token(wallet.address))
        await world.a.auth.logout(principal, True, world.a.caller(new))
        secrets.extend([signed, challenge.nonce])
        secrets.extend(text for each in (pair, new) for text in (each.access_token, each.refresh_token))

    with caplog.at_level(logging.DEBUG, logger="lucid"):
        run(test)
    audited = [record for record in caplog.records if record.name == "lucid.audit"]
    assert [record.msg for record in audited] == ["login_failed", "login", "revocation"]
    assert [record.__dict__["audit"].get("method") for record in audited] == ["wallet", "wallet", None]
    everything = repr([record.__dict__ for record in caplog.records])
    assert not [secret for secret in secrets if secret in everything]
