"""Login, refresh and logout over real stores, most of it with two workers."""

import asyncio
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from lucid.core.exchange import LookUp, Principal, Role
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys, nonces
from lucid.core.security.jwt import LONGEST_LIFE_MINUTES, REVOCATION_AHEAD_SECONDS, TokenVerifier
from lucid.core.security.passwords import UNKNOWN
from lucid.core.security.roles import PERMISSIONS
from lucid.core.validation import HardwareWalletText
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError
from lucid.services import challenges
from lucid.services.callers import Caller
from lucid.services.login_delays import FREE_ACCOUNT_FAILURES
from lucid.services.login_types import TokenPair
from lucid.services.revocations import KEY, USERS_KEY, Revocation, Revocations, of_user
from lucid.services.user_rules import UserChanges
from lucid.settings import RateSettings, TokenSettings
from tests.support.hang_ups import HangUp, audited
from tests.support.outcomes import outcome, refused
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet
from tests.support.workers import CALLER, SETTINGS, Fleet, Worker, database_name, fleet_of

EMAIL, PASSWORD = "Ann@example.org", "correct horse"
OTHER = Caller("198.51.100.7")

Test = Callable[[Fleet, Worker, Worker], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(mongo: MongoChild, redis_server: RedisChild) -> Run:
    def runner(test: Test, **options: Any) -> None:
        async def main() -> None:
            uri = mongo.in_database(database_name())
            async with fleet_of(2, uri, redis_server.uri, **options) as (fleet, (a, b)):
                await test(fleet, a, b)

        asyncio.run(main())

    return runner


def after(place: Any, name: str, event: Callable[..., Awaitable[None]]) -> None:
    """Once, behind the next call of `place.name`, `event` comes about before its caller goes on."""
    call = getattr(place, name)

    async def instead(*arguments: Any, **named: Any) -> Any:
        setattr(place, name, call)
        answer = await call(*arguments, **named)
        await event()
        return answer

    setattr(place, name, instead)


class Calls:
    """What the worker's service asks of its stores."""

    def __init__(self, worker: Worker) -> None:
        self.made: list[str] = []
        auth = worker.auth
        auth._users = self.spy("users", auth._users)
        auth._refresh_tokens = self.spy("refresh_tokens", auth._refresh_tokens)
        worker.delays._redis = self.spy("redis", worker.redis)

    def spy(self, label: str, store: Any) -> Any:
        made = self.made

        class Spy:
            def __getattr__(self, name: str) -> Any:
                made.append(f"{label}.{name}")
                return getattr(store, name)

        return Spy()


async def register(worker: Worker, email: str = EMAIL, stored: str | None = None) -> UserDocument:
    """A user with PASSWORD, or with `stored`."""
    now = worker._utc_now()
    stored = worker.hasher.hash_password(PASSWORD) if stored is None else stored
    user = UserDocument(nonces.new_id(), True, "user", now, now, email=email, password=stored)
    return await worker.users.create(user)


async def living_families(worker: Worker, user_id: str) -> int:
    rows = worker.connection.database["refresh_tokens"]
    return await rows.count_documents({"kind": "family", "user_id": user_id, "revoked_at": None})


# ---- challenge


def test_the_text_of_a_challenge(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        challenge = await a.auth.challenge(wallet.address, CALLER)
        assert challenge.message == (
            "gateway.lucid.example wants you to sign in with your TRON account:\n"
            f"{wallet.address}\n\n"
            "Sign in to Lucid. This costs nothing and sends no transaction.\n\n"
            "URI: https://gateway.lucid.example\n"
            "Version: 1\n"
            "Chain ID: tron:0x2b6653dc\n"
            f"Nonce: {challenge.nonce}\n"
            "Issued At: 2030-01-01T00:00:00Z\n"
            "Expiration Time: 2030-01-01T00:05:00Z"
        )
        assert challenge.expires_at == "2030-01-01T00:05:00Z"
        assert len(bytes.fromhex(challenge.nonce)) == 16
        assert (await b.auth.challenge(wallet.address, CALLER)).nonce != challenge.nonce
        for key in await a.redis.keys("*"):
            assert key.startswith(b"lucid:challenge")
            assert 290 < await a.redis.ttl(key) <= 300

    run(test)


def test_a_challenge_for_no_address(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        address = Wallet.generate().address
        for bad in (address[:-1] + ("1" if address[-1] != "1" else "2"), "T" * 34, "", "x" * 20_000):
            error = await refused(ErrorCode.BAD_FIELD, a.auth.challenge(bad, CALLER))
            assert error.details["field"] == "tron_address"
            await refused(ErrorCode.BAD_FIELD, a.auth.login_with_wallet(bad, "", "", None, CALLER))
        assert await a.redis.keys("*") == []

    run(test)


def test_outstanding_challenges_are_bounded_and_the_oldest_go(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(challenges, "MAX_OUTSTANDING", 7)

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet, other = Wallet.generate(), Wallet.generate()
        kept = await a.auth.challenge(other.address, CALLER)
        made = []
        for _ in range(7 + 3):
            fleet.now += 0.01
            made.append(await a.auth.challenge(wallet.address, CALLER))
        keys = await a.redis.keys(f"lucid:challenge:{{{wallet.address}}}:*")
        assert len(keys) == 7
        for challenge, good in ((made[2], False), (made[3], True), (made[-1], True)):
            login = a.auth.login_with_wallet(
                wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER
            )
            assert isinstance(await outcome(login), TokenPair) is good
        assert await a.challenges.find(other.address, kept.message) == kept.nonce

    run(test)


@pytest.mark.parametrize("theirs", ["198.51.100.{}", "2001:db8:{:x}::1"])
def test_nobody_elses_challenges_push_out_the_owners(
    run: Run, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    monkeypatch.setattr(challenges, "MAX_OUTSTANDING", 3)

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        mine = await a.auth.challenge(wallet.address, CALLER)
        for number in range(1, 40):
            fleet.now += 0.001
            await a.auth.challenge(wallet.address, Caller(theirs.format(number // 10 + 1)))
        # Four askers, three each, and mine.
        assert len(await a.redis.keys(f"lucid:challenge:{{{wallet.address}}}:*")) == 4 * 3 + 1
        login = (wallet.address, wallet.sign(mine.message), mine.message, None)
        assert isinstance(await b.auth.login_with_wallet(*login, OTHER), TokenPair)

    run(test)


def test_one_ipv6_network_is_one_asker(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenges, "MAX_OUTSTANDING", 3)

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        for number in range(10):
            fleet.now += 0.001
            await a.auth.challenge(wallet.address, Caller(f"2001:db8:0:1::{number:x}"))
        assert len(await a.redis.keys(f"lucid:challenge:{{{wallet.address}}}:*")) == 3

    run(test)


def test_the_bound_is_beyond_what_an_address_may_ask_for() -> None:
    assert RateSettings().public * challenges.LIFETIME_SECONDS / 60 < challenges.MAX_OUTSTANDING


# ---- login


def test_a_first_login_on_one_worker_with_a_challenge_of_another(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        challenge = await a.auth.challenge(wallet.address, CALLER)
        pair = await b.auth.login_with_wallet(
            wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER
        )
        assert (pair.token_type, pair.expires_in) == ("Bearer", 900)
        assert pair.user.tron_address == wallet.address
        assert pair.user.role == "user"
        assert pair.user.permissions == PERMISSIONS[Role.USER]
        assert uuid.UUID(pair.user.user_id).version == 4
        principal = a.judge(pair.access_token)
        assert isinstance(principal, Principal)
        assert (principal.user_id, principal.role) == (pair.user.user_id, Role.USER)
        stored = await a.users.find_by_tron_address(wallet.address)
        assert stored is not None
        assert stored.user_id == pair.user.user_id
        assert stored.last_login_at is not None
        assert await a.redis.keys("lucid:challenge:*") == []

        again = await a.login(wallet)
        assert again.user == pair.user
        assert again.refresh_token != pair.refresh_token
        assert a.judge(again.access_token).family != principal.family

    run(test)


def test_a_ledger_logs_in_and_is_recorded(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate(ledger=True)
        challenge = await a.auth.challenge(wallet.address, CALLER)
        device = HardwareWalletText("ledger", "cafe\u0301-1")
        await a.auth.login_with_wallet(
            wallet.address, wallet.sign(challenge.message), challenge.message, device, CALLER
        )
        stored = await a.users.find_by_tron_address(wallet.address)
        assert stored is not None
        assert stored.hardware_wallet is not None
        assert stored.hardware_wallet.type == "ledger"
        assert stored.hardware_wallet.device_id == "caf\u00e9-1"  # composed

    run(test)


def test_whatever_is_wrong_is_refused_and_spends_nothing(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet, thief = Wallet.generate(), Wallet.generate()
        challenge = await a.auth.challenge(wallet.address, CALLER)
        theirs = await a.auth.challenge(thief.address, CALLER)
        message, good = challenge.message, wallet.sign(challenge.message)
        unknown, signature = ErrorCode.UNKNOWN_CHALLENGE, ErrorCode.BAD_SIGNATURE

        def flipped(text: str) -> str:
            return text[:-4] + ("0" if text[-4] != "0" else "1") + text[-3:]

        for who, text, signed, code in (
            (wallet, message, thief.sign(message), signature),
            (wallet, message, flipped(good), signature),
            (wallet, message, "", signature),
            (wallet, message, wallet.sign(message + "\n"), signature),
            (wallet, message + "\n", wallet.sign(message + "\n"), unknown),
            (wallet, message.replace("\n", "\r\n"), wallet.sign(message.replace("\n", "\r\n")), unknown),
            (wallet, message.replace("gateway.", "evil."), wallet.sign("x"), unknown),
            (wallet, message.replace("costs nothing", "costs a lot"), good, unknown),
            (wallet, "x\n" + message, good, unknown),
            (wallet, "no challenge at all", wallet.sign("no challenge at all"), unknown),
            (wallet, "", wallet.sign(""), unknown),
            (wallet, f"Nonce: {challenge.nonce}", wallet.sign(f"Nonce: {challenge.nonce}"), unknown),
            (wallet, theirs.message, wallet.sign(theirs.message), unknown),
            (thief, message, thief.sign(message), unknown),
            (thief, message, good, unknown),
            (wallet, f"Nonce: {'0' * 32}\n{message}", good, unknown),
        ):
            await refused(code, a.auth.login_with_wallet(who.address, signed, text, None, CALLER))
        assert (await a.users.list_users(0, 10))[1] == 0
        await a.auth.login_with_wallet(wallet.address, good, message, None, CALLER)

    run(test)


def test_a_challenge_is_good_once(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        challenge = await a.auth.challenge(wallet.address, CALLER)
        signed = wallet.sign(challenge.message)

        def login(worker: Worker) -> Coroutine[Any, Any, TokenPair]:
            return worker.auth.login_with_wallet(wallet.address, signed, challenge.message, None, CALLER)

        outcomes = await asyncio.gather(*(outcome(login(worker)) for worker in (a, b) * 10))
        assert Counter(isinstance(o, TokenPair) for o in outcomes) == {True: 1, False: 19}
        assert {o for o in outcomes if not isinstance(o, TokenPair)} == {ErrorCode.UNKNOWN_CHALLENGE}
        for worker in (a, b):
            await refused(ErrorCode.UNKNOWN_CHALLENGE, login(worker))
        assert (await a.users.list_users(0, 10))[1] == 1

    run(test)


def test_an_expired_challenge(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        challenge = await a.auth.challenge(wallet.address, CALLER)
        for key in await a.redis.keys("lucid:challenge:*"):
            await a.redis.pexpire(key, 1)
        await asyncio.sleep(0.02)  # Redis' own clock: the only one here that cannot be a number
        await refused(
            ErrorCode.UNKNOWN_CHALLENGE,
            a.auth.login_with_wallet(
                wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER
            ),
        )

    run(test)


def test_fifty_first_logins_at_once_make_one_user(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pairs = await asyncio.gather(*(worker.login(wallet) for worker in (a, b) * 25))
        assert len({pair.user.user_id for pair in pairs}) == 1
        assert len({pair.refresh_token for pair in pairs}) == 50
        assert (await a.users.list_users(0, 10))[1] == 1
        families = await a.connection.database["refresh_tokens"].count_documents({"kind": "family"})
        assert families == 50

    run(test)


def test_a_deleted_user_comes_back_as_a_new_one(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        first = await a.login(wallet)
        await a.user_service.delete(first.user.user_id, a.judge(first.access_token), CALLER)
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(first.refresh_token, CALLER))
        second = await a.login(wallet)
        assert second.user.user_id != first.user.user_id
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(first.refresh_token, CALLER))
        assert isinstance(a.judge(second.access_token), Principal)

    run(test)


def test_roles_are_computed_at_login_and_refresh(mongo: MongoChild, redis_server: RedisChild) -> None:
    wallet = Wallet.generate()
    uri = mongo.in_database(database_name())

    async def login(admins: frozenset[str]) -> TokenPair:
        async with fleet_of(1, uri, redis_server.uri, admins=admins) as (_, (worker,)):
            return await worker.login(wallet)

    async def refresh(pair: TokenPair, admins: frozenset[str]) -> TokenPair:
        async with fleet_of(1, uri, redis_server.uri, admins=admins) as (_, (worker,)):
            refreshed = await worker.auth.refresh(pair.refresh_token, CALLER)
            assert worker.judge(refreshed.access_token).role.label == refreshed.user.role
            stored = await worker.users.find_by_tron_address(wallet.address)
            assert stored is not None
            assert stored.role in ("user", "node_operator")  # never what the list gives
            return refreshed

    async def promote(user_id: str) -> None:
        async with fleet_of(1, uri, redis_server.uri) as (_, (worker,)):
            await worker.users.update(user_id, {"role": "node_operator"})

    listed, nobody = frozenset({wallet.address}), frozenset[str]()
    pair = asyncio.run(login(listed))
    assert pair.user.role == "super_admin"
    assert "users:write" in pair.user.permissions
    pair = asyncio.run(refresh(pair, nobody))
    assert pair.user.role == "user"
    asyncio.run(promote(pair.user.user_id))
    pair = asyncio.run(refresh(pair, nobody))
    assert pair.user.role == "node_operator"
    assert asyncio.run(refresh(pair, listed)).user.role == "super_admin"


def test_a_user_deleted_while_the_wallet_logs_in_gets_nothing(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        first = await a.login(wallet)
        admin = Principal(Role.SUPER_ADMIN, "admin", "root", "root", via="token")
        challenge = await a.auth.challenge(wallet.address, CALLER)

        async def deleted(*_: Any) -> None:
            await b.user_service.delete(first.user.user_id, admin, CALLER)
            fleet.now += 60

        after(a.refresh_tokens, "start_family", deleted)
        login = (wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER)
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.login_with_wallet(*login))
        assert await living_families(a, first.user.user_id) == 0

    run(test)


# ---- login with email and password


def test_email_and_password(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        user = await register(a)
        fleet.now += 100
        pair = await b.auth.login_with_password(EMAIL.upper(), PASSWORD, CALLER)
        assert (pair.token_type, pair.expires_in) == ("Bearer", 900)
        assert (pair.user.user_id, pair.user.tron_address, pair.user.role) == (user.user_id, None, "user")
        assert pair.user.permissions == PERMISSIONS[Role.USER]
        principal = a.judge(pair.access_token)
        assert isinstance(principal, Principal)
        assert principal.user_id == user.user_id
        stored = await a.users.find_by_id(user.user_id)
        assert stored.last_login_at.timestamp() == fleet.now
        assert stored.password == user.password
        newer = await a.auth.refresh(pair.refresh_token, CALLER)
        assert a.judge(newer.access_token).family == principal.family
        await b.auth.logout(b.judge(newer.access_token), False, CALLER)
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(newer.refresh_token, CALLER))

    run(test)


def test_what_cannot_be_an_email_or_a_password_is_no_attempt(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for email in (
            "",
            "ann",
            "ann@",
            "@example.org",
            "a b@example.org",
            "ann@example.org\n",
            "\ud800@x.org",
        ):
            error = await refused(ErrorCode.BAD_FIELD, a.auth.login_with_password(email, PASSWORD, CALLER))
            assert error.details["field"] == "email"
        for password in ("", "x" * 129):
            error = await refused(ErrorCode.BAD_FIELD, a.auth.login_with_password(EMAIL, password, CALLER))
            assert error.details["field"] == "password"
        assert await a.redis.keys("*") == []
        assert a.hasher.verified == []
        # One shorter than what may be chosen today is an attempt like any other.
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.login_with_password(EMAIL, "x", CALLER))

    run(test)


def test_no_account_is_told_from_another_by_answer_or_by_work(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        user = await register(a)
        gone = await register(a, "gone@example.org")
        await a.users.delete(gone.user_id, revoke_tokens_at=b._utc_now())
        await a.users.create(
            UserDocument(
                nonces.new_id(), True, "user", b._utc_now(), b._utc_now(), email="wallet@example.org"
            )
        )
        await a.users.create(
            UserDocument(
                nonces.new_id(),
                True,
                "user",
                b._utc_now(),
                b._utc_now(),
                email="odd@example.org",
                password="?",
            )
        )
        calls = Calls(a)
        seen = []
        for email, password in (
            ("nobody@example.org", PASSWORD),
            (EMAIL, "wrong password"),
            ("gone@example.org", PASSWORD),
            ("wallet@example.org", PASSWORD),
            ("odd@example.org", PASSWORD),
        ):
            calls.made.clear()
            a.hasher.verified.clear()
            error = await refused(
                ErrorCode.BAD_CREDENTIAL, a.auth.login_with_password(email, password, CALLER)
            )
            hashed = [text in (UNKNOWN, user.password, "?") for text in a.hasher.verified]
            seen.append((str(error), error.details, error.fields, list(calls.made), hashed, a.hasher.hashed))
        assert seen[0][3:] == (
            ["redis.eval", "redis.exists", "redis.eval", "users.find_by_email"],
            [True],
            2,
        )
        assert all(each == seen[0] for each in seen)
        # The same when they have to wait, of one that is there and of one that is not.
        waits = []
        for email in (EMAIL, "nobody@example.org"):
            for _ in range(FREE_ACCOUNT_FAILURES):
                await refused(ErrorCode.BAD_CREDENTIAL, a.auth.login_with_password(email, "wrong", OTHER))
            calls.made.clear()
            error = await refused(ErrorCode.RATE_LIMITED, a.auth.login_with_password(email, PASSWORD, CALLER))
            waits.append((str(error), error.details, error.fields, list(calls.made)))
        assert waits[0] == waits[1]
        assert waits[0][1] == {"retry_after_seconds": 1}

    run(test)


def test_a_hundred_guesses_at_once_are_few(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        await register(a)
        a.hasher.verified.clear()
        guesses = (
            worker.auth.login_with_password(EMAIL, f"guess {number}", Caller(f"10.0.{number}.1"))
            for number, worker in enumerate((a, b) * 50)
        )
        outcomes = Counter(await asyncio.gather(*(outcome(guess) for guess in guesses)))
        assert outcomes == {
            ErrorCode.BAD_CREDENTIAL: FREE_ACCOUNT_FAILURES + 1,
            ErrorCode.RATE_LIMITED: 100 - FREE_ACCOUNT_FAILURES - 1,
        }
        assert len(a.hasher.verified) + len(b.hasher.verified) == FREE_ACCOUNT_FAILURES + 1
        # The owner waits a second, then comes in, and the account is as new.
        await refused(ErrorCode.RATE_LIMITED, a.auth.login_with_password(EMAIL, PASSWORD, CALLER))
        fleet.now += 1
        assert isinstance(await b.auth.login_with_password(EMAIL, PASSWORD, CALLER), TokenPair)
        for _ in range(FREE_ACCOUNT_FAILURES):
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.login_with_password(EMAIL, "wrong", CALLER))
        assert isinstance(await b.auth.login_with_password(EMAIL, PASSWORD, CALLER), TokenPair)

    run(test)


def test_an_attempt_whose_password_nobody_looked_at_is_none(
    mongo: MongoChild, redis_server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lucid.database.connection.SERVER_SELECTION_MS", 100)

    async def main() -> None:
        uri = mongo.in_database(database_name())
        async with fleet_of(1, uri, redis_server.uri) as (fleet, (a,)):
            await register(a)
            no_mongo = Worker(fleet, "mongodb://127.0.0.1:9/x", redis_server.uri)
            no_redis = Worker(fleet, uri, "redis://127.0.0.1:9/0")
            full = Worker(fleet, uri, redis_server.uri)
            full.hashing._most = 0
            for _ in range(FREE_ACCOUNT_FAILURES + 2):
                await refused(
                    ErrorCode.DEPENDENCY_AWAY, no_mongo.auth.login_with_password(EMAIL, PASSWORD, CALLER)
                )
                await refused(
                    ErrorCode.BACKEND_UNAVAILABLE, full.auth.login_with_password(EMAIL, PASSWORD, CALLER)
                )
            # Nobody can say whether there is a wait: no guess is free.
            error = await refused(
                ErrorCode.DEPENDENCY_AWAY, no_redis.auth.login_with_password(EMAIL, PASSWORD, CALLER)
            )
            assert error.details == {"dependency": "redis"}
            assert no_redis.hasher.verified == []
            assert await a.redis.keys("lucid:login_failures:*") == []
            assert isinstance(await a.auth.login_with_password(EMAIL, PASSWORD, CALLER), TokenPair)
            for worker in (no_mongo, no_redis, full):
                await worker.close()

    asyncio.run(main())


def test_a_password_at_an_old_cost_is_stored_anew(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        old = a.hasher.hash_password(PASSWORD, cost="old")
        user = await register(a, stored=old)
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.login_with_password(EMAIL, "wrong", CALLER))
        assert (await a.users.find_by_id(user.user_id)).password == old
        # Of several at once, all come in, whoever stores it.
        pairs = await asyncio.gather(
            *(worker.auth.login_with_password(EMAIL, PASSWORD, CALLER) for worker in (a, b, a))
        )
        assert (await a.users.find_by_id(user.user_id)).password == a.hasher.hash_password(PASSWORD)
        for pair in pairs:
            assert isinstance(a.judge(pair.access_token), Principal)
            assert isinstance(await a.auth.refresh(pair.refresh_token, CALLER), TokenPair)
        assert await living_families(a, user.user_id) == 3
        hashed = a.hasher.hashed
        await a.auth.login_with_password(EMAIL, PASSWORD, CALLER)
        assert a.hasher.hashed == hashed

    run(test)


def test_a_password_that_cannot_be_stored_anew_now_is_good_all_the_same(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        user = await register(a, stored=a.hasher.hash_password(PASSWORD, cost="old"))

        async def full(*_: Any) -> None:
            a.hashing._most = 0

        after(a.hashing, "verify", full)
        assert isinstance(await a.auth.login_with_password(EMAIL, PASSWORD, CALLER), TokenPair)
        assert (await a.users.find_by_id(user.user_id)).password == user.password

    run(test)


@pytest.mark.parametrize("moment", ["verify", "start_family", "update"])
def test_a_password_changed_during_the_login(run: Run, moment: str) -> None:
    """Wherever the change falls: no token and no family of the old password lives on."""

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        user = await register(a)
        mine = await b.auth.login_with_password(EMAIL, PASSWORD, CALLER)

        async def change(*_: Any) -> None:
            changes = UserChanges(password="another password", current_password=PASSWORD)
            await b.user_service.update("me", changes, b.judge(mine.access_token), CALLER)
            fleet.now += 60  # and the login is slow

        place = {"verify": a.hashing, "start_family": a.refresh_tokens, "update": a.users}[moment]
        after(place, moment, change)
        got = await outcome(a.auth.login_with_password(EMAIL, PASSWORD, CALLER))
        if moment == "update":
            # It came before the change, and ended with it.
            for worker in (a, b):
                assert worker.judge(got.access_token) is ErrorCode.BAD_CREDENTIAL
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(got.refresh_token, CALLER))
        else:
            assert got is ErrorCode.BAD_CREDENTIAL
        assert await living_families(a, user.user_id) == 0
        again = await a.auth.login_with_password(EMAIL, "another password", CALLER)
        assert isinstance(b.judge(again.access_token), Principal)

    run(test)


@pytest.mark.parametrize("moment", ["verify", "start_family", "update"])
def test_a_user_deleted_during_the_login(run: Run, moment: str) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        user = await register(a)
        admin = Principal(Role.SUPER_ADMIN, "admin", "root", "root", via="token")

        async def delete(*_: Any) -> None:
            await b.user_service.delete(user.user_id, admin, CALLER)
            fleet.now += 60

        after(
            {"verify": a.hashing, "start_family": a.refresh_tokens, "update": a.users}[moment], moment, delete
        )
        got = await outcome(a.auth.login_with_password(EMAIL, PASSWORD, CALLER))
        if moment == "update":
            assert b.judge(got.access_token) is ErrorCode.BAD_CREDENTIAL
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(got.refresh_token, CALLER))
        else:
            assert got is ErrorCode.BAD_CREDENTIAL
        assert await living_families(a, user.user_id) == 0

    run(test)


def test_keys_that_only_verify_issue_nothing(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        await refused(ErrorCode.NOT_IMPLEMENTED, a.login(wallet))
        await refused(ErrorCode.NOT_IMPLEMENTED, a.auth.refresh("x", CALLER))
        await refused(ErrorCode.NOT_IMPLEMENTED, a.auth.login_with_password(EMAIL, PASSWORD, CALLER))
        assert (await a.users.list_users(0, 1))[1] == 0

    run(test, settings=TokenSettings(previous_keys=("k" * 32,)))


# ---- refresh


def test_a_refresh_gives_a_new_pair_and_keeps_the_first_expiry(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pair = await a.login(wallet)
        family = a.judge(pair.access_token).family
        fleet.now += 6 * 86_400
        new = await b.auth.refresh(pair.refresh_token, CALLER)
        assert new.user == pair.user
        assert new.refresh_token != pair.refresh_token
        assert b.judge(new.access_token).family == family
        assert a.judge(pair.access_token) is ErrorCode.CREDENTIAL_EXPIRED
        fleet.now += 86_400 - 0.01
        newest = await a.auth.refresh(new.refresh_token, CALLER)
        fleet.now += 0.01
        await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(newest.refresh_token, CALLER))
        assert fleet.charged == [
            ("refresh", pair.user.user_id),
            ("refresh", pair.user.user_id),
            ("login", CALLER.address),
        ]

    run(test)


def test_what_is_stored_of_a_token_opens_nothing(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        rows = await a.connection.database["refresh_tokens"].find({}).to_list(10)
        shown = repr(rows)
        assert pair.refresh_token not in shown
        assert pair.access_token not in shown
        digest = api_keys.digest(pair.refresh_token)
        for guess in (digest.hex(), str(digest), a.judge(pair.access_token).family, "", "x" * 256):
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(guess, CALLER))
        assert set(fleet.charged) == {("login", CALLER.address)}
        assert isinstance(await a.auth.refresh(pair.refresh_token, CALLER), TokenPair)

    run(test)


def test_a_spent_token_that_returns_ends_its_family_everywhere(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        stolen = await a.login(wallet)
        bystander = await a.login(wallet)
        second = await a.auth.refresh(stolen.refresh_token, CALLER)
        third = await a.auth.refresh(second.refresh_token, CALLER)
        assert all(isinstance(w.judge(p.access_token), Principal) for w in (a, b) for p in (second, third))
        await refused(ErrorCode.BAD_CREDENTIAL, b.auth.refresh(stolen.refresh_token, CALLER))
        for pair in (stolen, second, third):
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(pair.refresh_token, CALLER))
            assert a.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
            assert b.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
        assert len(fleet.published) == 1
        # The same user's other login goes on.
        assert isinstance(b.judge(bystander.access_token), Principal)
        assert isinstance(await b.auth.refresh(bystander.refresh_token, CALLER), TokenPair)

    run(test)


def test_one_token_used_many_times_at_once_gives_one_pair_and_ends_the_family(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for _ in range(5):
            first = await a.login(Wallet.generate())
            outcomes = await asyncio.gather(
                *(outcome(w.auth.refresh(first.refresh_token, CALLER)) for w in (a, b) * 3)
            )
            pairs = [o for o in outcomes if isinstance(o, TokenPair)]
            assert len(pairs) == 1
            assert Counter(o for o in outcomes if not isinstance(o, TokenPair)) == {
                ErrorCode.BAD_CREDENTIAL: 5
            }
            for pair in (first, pairs[0]):
                assert a.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
                await refused(ErrorCode.BAD_CREDENTIAL, b.auth.refresh(pair.refresh_token, CALLER))

    run(test)


def test_no_chain_of_refreshes_outruns_a_revocation(run: Run) -> None:
    """While the thief's copy returns, the owner refreshes as fast as can be: the family ends all the same."""

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for _ in range(5):
            stolen = await a.login(Wallet.generate())
            pair = await a.auth.refresh(stolen.refresh_token, CALLER)

            async def owner(pair: TokenPair = pair) -> TokenPair:
                while True:
                    try:
                        pair = await a.auth.refresh(pair.refresh_token, CALLER)
                    except GatewayError:
                        return pair

            running = asyncio.create_task(owner())
            await refused(ErrorCode.BAD_CREDENTIAL, b.auth.refresh(stolen.refresh_token, CALLER))
            last = await asyncio.wait_for(running, 10)
            assert a.judge(last.access_token) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_limits_of_refresh(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        fleet.used_up = {"refresh"}
        await refused(ErrorCode.RATE_LIMITED, a.auth.refresh(pair.refresh_token, CALLER))
        fleet.used_up = {"login"}
        await refused(ErrorCode.RATE_LIMITED, a.auth.refresh("unknown", CALLER))
        # What was refused spent nothing.
        assert isinstance(await a.auth.refresh(pair.refresh_token, CALLER), TokenPair)

    run(test)


@pytest.mark.parametrize("moment", ["find_family", "find_by_id", "rotate"])
def test_a_role_changed_during_a_refresh_leaves_no_old_token(run: Run, moment: str) -> None:
    """Wherever the change falls, and however slow the refresh is."""

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        user_id = pair.user.user_id
        admin = Principal(Role.SUPER_ADMIN, "admin", "root", "root", via="token")

        async def promote(*_: Any) -> None:
            await b.user_service.update(user_id, UserChanges(role="node_operator"), admin, CALLER)
            fleet.now += 60

        after(a.users if moment == "find_by_id" else a.refresh_tokens, moment, promote)
        new = await a.auth.refresh(pair.refresh_token, CALLER)
        for worker in (a, b):
            assert worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
            verdict = worker.judge(new.access_token)
            assert (
                verdict.role is Role.NODE_OPERATOR
                if moment == "find_family"
                else verdict is ErrorCode.BAD_CREDENTIAL
            )
        # The login itself goes on, with the new role.
        newest = await b.auth.refresh(new.refresh_token, CALLER)
        assert a.judge(newest.access_token).role is Role.NODE_OPERATOR

    run(test)


def test_a_role_changed_in_the_same_moment_is_in_the_next_token(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pair = await a.login(wallet)
        admin = Principal(Role.SUPER_ADMIN, "admin", "root", "root", via="token")
        await b.user_service.update(pair.user.user_id, UserChanges(role="node_operator"), admin, CALLER)
        assert a.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
        # Not a millisecond later, and issued by another worker.
        for new in (await a.auth.refresh(pair.refresh_token, CALLER), await a.login(wallet)):
            assert a.judge(new.access_token).role is Role.NODE_OPERATOR
            assert isinstance(b.judge(new.access_token), Principal)

    run(test)


@pytest.mark.parametrize("moment", ["find_family", "find_by_id", "rotate"])
def test_a_user_deleted_during_a_refresh(run: Run, moment: str) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        user_id = pair.user.user_id
        admin = Principal(Role.SUPER_ADMIN, "admin", "root", "root", via="token")

        async def delete(*_: Any) -> None:
            await b.user_service.delete(user_id, admin, CALLER)
            fleet.now += 60

        after(a.users if moment == "find_by_id" else a.refresh_tokens, moment, delete)
        got = await outcome(a.auth.refresh(pair.refresh_token, CALLER))
        if moment == "rotate":
            assert b.judge(got.access_token) is ErrorCode.BAD_CREDENTIAL
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(got.refresh_token, CALLER))
        else:
            assert got is ErrorCode.BAD_CREDENTIAL
        assert b.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
        assert await living_families(a, user_id) == 0

    run(test)


# ---- logout and revocation


def test_logout_ends_one_login_on_all_workers(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pair, other = await a.login(wallet), await b.login(wallet)
        newer = await a.auth.refresh(pair.refresh_token, CALLER)
        tokens = [pair.access_token, newer.access_token, other.access_token]
        assert all(isinstance(w.judge(token), Principal) for w in (a, b) for token in tokens)
        await a.auth.logout(a.judge(newer.access_token), False, CALLER)
        for worker in (a, b):
            assert [worker.judge(token) for token in tokens[:2]] == [ErrorCode.BAD_CREDENTIAL] * 2
            assert isinstance(worker.judge(other.access_token), Principal)
        await refused(ErrorCode.BAD_CREDENTIAL, b.auth.refresh(newer.refresh_token, CALLER))
        assert isinstance(await b.auth.refresh(other.refresh_token, CALLER), TokenPair)

    run(test)


def test_logout_of_all_logins_and_a_new_one_in_the_same_second(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pairs = [await worker.login(wallet) for worker in (a, b, a)]
        stranger = await a.login(Wallet.generate())
        fleet.now += 0.002
        await b.auth.logout(b.judge(pairs[0].access_token), True, CALLER)
        fleet.now += 0.002
        fresh = await a.login(wallet)
        for worker in (a, b):
            for pair in pairs:
                assert worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
                await refused(ErrorCode.BAD_CREDENTIAL, worker.auth.refresh(pair.refresh_token, CALLER))
            assert isinstance(worker.judge(fresh.access_token), Principal)
            assert isinstance(worker.judge(stranger.access_token), Principal)
        assert isinstance(await a.auth.refresh(fresh.refresh_token, CALLER), TokenPair)

    run(test)


def test_all_logins_twice_in_one_moment(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        pairs = []
        for worker in (a, b, a):
            pairs.append(await worker.login(wallet))
            assert isinstance(b.judge(pairs[-1].access_token), Principal)
            await worker.auth.logout(worker.judge(pairs[-1].access_token), True, CALLER)
        for pair in pairs:
            assert a.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
        # By the word about the user alone, as a worker that knows nothing of the logins has it.
        late = TokenMemory(TokenVerifier(SETTINGS, fleet.wall_clock).verify, fleet.wall_clock, 10)
        moment = (await a.users.find_by_id(pairs[0].user.user_id)).tokens_revoked_at.timestamp()
        late.revoke_user(pairs[0].user.user_id, moment, fleet.now + 900)
        for pair in pairs:
            assert late.principal(pair.access_token, fleet.now) is ErrorCode.BAD_CREDENTIAL
        assert isinstance(late.principal((await b.login(wallet)).access_token, fleet.now), Principal)

    run(test)


def test_all_logins_ends_tokens_of_workers_whose_clock_is_ahead(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        fleet.now += 1.5
        ahead = await b.auth.refresh(pair.refresh_token, CALLER)
        fleet.now -= 1.5
        other = a.auth._issuer.issue(
            user_id=pair.user.user_id, role=Role.USER, family="another", now=fleet.now + 1.5
        )
        assert isinstance(b.judge(other.token), Principal)
        await a.auth.logout(a.judge(pair.access_token), True, CALLER)
        for worker in (a, b):
            assert worker.judge(other.token) is ErrorCode.BAD_CREDENTIAL
            assert worker.judge(ahead.access_token) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_a_worker_that_starts_or_missed_messages_loads_revocations(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet, other = Wallet.generate(), Wallet.generate()
        pair, all_of_them = await a.login(wallet), await a.login(other)
        fleet.cut = True
        await a.auth.logout(a.judge(pair.access_token), False, CALLER)
        await a.auth.logout(a.judge(all_of_them.access_token), True, CALLER)
        await a.redis.zadd(KEY, {b"not json": fleet.now + 100, b'{"until":"x"}': fleet.now + 100})
        assert isinstance(b.judge(pair.access_token), Principal)
        await b.revocations.load_revocations()
        assert b.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
        assert b.judge(all_of_them.access_token) is ErrorCode.BAD_CREDENTIAL
        # They are kept as long as a token of that moment can live, and no longer.
        scores = [score for _, score in await a.redis.zrange(KEY, 0, -1, withscores=True)]
        assert max(scores) == pytest.approx(fleet.now + 900 + 5 + 1)
        fleet.now += 1_000
        late = await a.login(wallet)
        await a.auth.logout(a.judge(late.access_token), False, CALLER)
        assert await a.redis.zcard(KEY) == 1

    run(test)


def test_a_token_that_lives_longer_is_revoked_as_long(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        issued = a.auth._issuer.issue(
            user_id="operator", role=Role.ADMIN, family="by-hand", now=fleet.now, minutes=60 * 24
        )
        await a.auth.logout(a.judge(issued.token), False, CALLER)
        fleet.now += 23 * 3_600
        await b.revocations.load_revocations()
        assert b.judge(issued.token) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_all_logins_ends_the_longest_token_there_is_for_all_its_life(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        user_id = pair.user.user_id

        def minted() -> str:
            return a.auth._issuer.issue(
                user_id=user_id,
                role=Role.ADMIN,
                family="by-hand",
                now=fleet.now,
                minutes=LONGEST_LIFE_MINUTES,
            ).token

        old = minted()
        fleet.now += 1
        await a.auth.logout(a.judge(pair.access_token), True, CALLER)
        fleet.now += REVOCATION_AHEAD_SECONDS + 1
        await a.revocations.revoke(of_user(user_id, fleet.now))
        await b.revocations.revoke(of_user(user_id, fleet.now - 1))
        # However often: one entry a user, since it stays so long; of several moments the latest.
        assert await a.redis.zrange(USERS_KEY, 0, -1, withscores=True) == [(user_id.encode(), fleet.now)]
        fleet.now += 1
        young = minted()
        fleet.now += LONGEST_LIFE_MINUTES * 60 - 10
        # Enough others that memories are swept.
        for batch in (range(900), range(900, 1_800)):
            await a.revocations.revoke(*(Revocation(family=f"f{n}", until=fleet.now + 1) for n in batch))
        late = TokenMemory(TokenVerifier(SETTINGS, fleet.wall_clock).verify, fleet.wall_clock, 10)
        await Revocations(a.redis, late, fleet.publish, fleet.wall_clock).load_revocations()
        for memory in (a.memory, b.memory, late):
            assert memory.principal(old, fleet.now) is ErrorCode.BAD_CREDENTIAL
            assert isinstance(memory.principal(young, fleet.now), Principal)
        fleet.now += 2 * 3_600
        await a.revocations.revoke(Revocation(family="last", until=fleet.now + 1))
        assert await a.redis.zcard(USERS_KEY) == 0

    run(test)


def test_messages_that_make_no_sense_are_passed_over(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        pair = await a.login(Wallet.generate())
        for body in ({}, {"family": "f"}, {"until": None}, {"until": 1, "family": 7}, {"until": 9e9}):
            a.revocations.on_revocation(body)
        assert isinstance(a.judge(pair.access_token), Principal)
        principal = a.judge(pair.access_token)
        a.revocations.on_revocation({"token": principal.token_id, "until": fleet.now + 900, "new": 1})
        assert a.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_an_api_key_cannot_log_out(run: Run) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        principal = Principal(Role.USER, "authenticated", "u", "u", token_id="k", via="api_key")
        await refused(ErrorCode.ROLE_TOO_LOW, a.auth.logout(principal, True, CALLER))

    run(test)


# ---- callers who hang up


def hang_up_at(at: int, worker: Worker) -> HangUp:
    stores = ("_users", "_refresh_tokens", "_revocations", "_hashing", "_delays")
    return HangUp(at, *((worker.auth, name) for name in stores))


def test_a_wallets_new_user_is_recorded_whenever_its_caller_hangs_up(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lucid.audit")

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for at in itertools.count(1):
            wallet = Wallet.generate()
            caplog.clear()
            hang_up = hang_up_at(at, a)
            hung_up = await hang_up(a.login(wallet), a.auth)
            assert await a.users.find_by_tron_address(wallet.address) is not None
            assert audited(caplog) == (["user_created"] if hung_up else ["user_created", "login"])
            if not hung_up:
                break
        assert hang_up.calls == ["upsert_by_tron_address", "start_family", "find_by_id"]
        caplog.clear()
        await b.login(wallet)
        assert audited(caplog) == ["login"]

    run(test)


@pytest.mark.parametrize("all_logins", [False, True])
def test_a_logout_ends_whenever_its_caller_hangs_up(
    run: Run, caplog: pytest.LogCaptureFixture, all_logins: bool
) -> None:
    caplog.set_level(logging.INFO, "lucid.audit")

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for at in itertools.count(1):
            wallet = Wallet.generate()
            pairs = [await worker.login(wallet) for worker in (a, b)]
            caplog.clear()
            hang_up = hang_up_at(at, a)
            logout = a.auth.logout(a.judge(pairs[0].access_token), all_logins, CALLER)
            hung_up = await hang_up(logout, a.auth)
            for pair in pairs if all_logins else pairs[:1]:
                for worker in (a, b):
                    assert worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
                await refused(ErrorCode.BAD_CREDENTIAL, b.auth.refresh(pair.refresh_token, CALLER))
            assert audited(caplog) == ["revocation"]
            if not hung_up:
                break
        more = ["find_by_id", "update", "revoke_user"] if all_logins else []
        assert hang_up.calls == ["revoke_family", *more, "revoke"]

    run(test)


@pytest.mark.parametrize("why", ["reused", "deleted"])
def test_a_family_ends_whenever_its_caller_hangs_up(run: Run, why: str) -> None:
    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for at in itertools.count(1):
            pair = await a.login(Wallet.generate())
            token, calls = pair.access_token, ["find_family"]
            if why == "reused":
                token = (await a.auth.refresh(pair.refresh_token, CALLER)).access_token
            else:
                await a.users.delete(pair.user.user_id, revoke_tokens_at=a._utc_now())
                calls.append("find_by_id")
            hang_up = hang_up_at(at, a)
            hung_up = await hang_up(a.auth.refresh(pair.refresh_token, CALLER), a.auth)
            # Whoever leaves before it is found out has done nothing.
            dead = at > len(calls)
            assert await living_families(a, pair.user.user_id) == (0 if dead else 1)
            for worker in (a, b):
                assert (worker.judge(token) is ErrorCode.BAD_CREDENTIAL) is dead
            if not hung_up:
                break
        assert hang_up.calls == [*calls, "revoke_family", "revoke"]

    run(test)


@pytest.mark.parametrize("password", [PASSWORD, "wrong"])
def test_a_guess_is_judged_and_recorded_whenever_its_caller_hangs_up(
    run: Run, caplog: pytest.LogCaptureFixture, password: str
) -> None:
    caplog.set_level(logging.INFO, "lucid.audit")

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        for at in itertools.count(1):
            await register(a, f"user{at}@example.org")
            await a.redis.flushall()
            caplog.clear()
            hang_up = hang_up_at(at, a)
            login = a.auth.login_with_password(f"user{at}@example.org", password, CALLER)
            hung_up = await hang_up(login, a.auth)
            # Whoever leaves before it is known whether there is a wait has guessed nothing.
            told = "login" if password == PASSWORD else "login_failed"
            assert audited(caplog) == ([] if at == 1 else [told])
            counts = await a.redis.keys("lucid:login_failures:*")
            assert len(counts) == (2 if password != PASSWORD and at > 1 else 0)
            if not hung_up:
                break
        more = ["start_family", "update", "succeeded"] if password == PASSWORD else []
        assert hang_up.calls == ["admit", "find_by_email", "verify", *more]

    run(test)


# ---- without its stores, and its log


def test_without_redis_or_mongodb(
    mongo: MongoChild, redis_server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lucid.database.connection.SERVER_SELECTION_MS", 300)
    wallet = Wallet.generate()
    away = ErrorCode.DEPENDENCY_AWAY

    async def main() -> None:
        uri = mongo.in_database(database_name())
        async with fleet_of(2, uri, redis_server.uri) as (fleet, (a, b)):
            pair = await a.login(wallet)
            no_redis = Worker(fleet, uri, "redis://127.0.0.1:9/0")
            no_mongo = Worker(fleet, "mongodb://127.0.0.1:9/x", redis_server.uri)
            error = await refused(away, no_redis.auth.challenge(wallet.address, CALLER))
            assert error.details == {"dependency": "redis"}
            challenge = await a.auth.challenge(wallet.address, CALLER)
            signed = wallet.sign(challenge.message)
            login = (wallet.address, signed, challenge.message, None, CALLER)
            await refused(away, no_redis.auth.login_with_wallet(*login))
            await refused(away, no_redis.revocations.load_revocations())
            error = await refused(away, no_mongo.auth.login_with_wallet(*login))
            assert error.details == {"dependency": "mongodb"}
            await refused(away, no_mongo.auth.refresh(pair.refresh_token, CALLER))
            await refused(away, no_mongo.credentials.look_up(LookUp(bytes(32))))

            # Tokens are checked in memory and need nobody.
            principal = no_mongo.judge(pair.access_token)
            assert isinstance(principal, Principal)
            await refused(away, no_mongo.auth.logout(principal, False, CALLER))
            assert isinstance(no_mongo.judge(pair.access_token), Principal)
            # Without Redis the login ends all the same: this worker refuses, the others are sent the message.
            await no_redis.auth.logout(principal, False, CALLER)
            assert no_redis.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
            assert [body["family"] for body in fleet.published] == [principal.family]
            await refused(ErrorCode.BAD_CREDENTIAL, a.auth.refresh(pair.refresh_token, CALLER))

            # The challenge outlived the outages.
            assert isinstance(await b.auth.login_with_wallet(*login), TokenPair)
            for worker in (no_redis, no_mongo):
                await worker.close()

    asyncio.run(main())


def test_the_audit_log_tells_events_and_no_secret(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    secrets: list[str] = []
    users: list[str] = []

    async def test(fleet: Fleet, a: Worker, b: Worker) -> None:
        wallet = Wallet.generate()
        caller = Caller("192.0.2.9", "r-9", token="x.bearer.x")
        challenge = await a.auth.challenge(wallet.address, CALLER)
        signed = wallet.sign(challenge.message)
        await outcome(
            a.auth.login_with_wallet(
                wallet.address, Wallet.generate().sign(challenge.message), challenge.message, None, caller
            )
        )
        pair = await a.auth.login_with_wallet(wallet.address, signed, challenge.message, None, caller)
        new = await a.auth.refresh(pair.refresh_token, caller)
        await outcome(a.auth.refresh(pair.refresh_token, caller))
        other = await a.login(wallet)
        await a.auth.logout(a.judge(other.access_token), True, caller)
        user = await register(a)
        users.extend([user.user_id, pair.user.user_id])
        typed = await a.auth.login_with_password(EMAIL, PASSWORD, caller)
        for email, password in [("nobody@example.org", "pass word 1")] + [(EMAIL, "pass word 2")] * 7:
            await outcome(a.auth.login_with_password(email, password, caller))
        secrets.extend(
            [signed, challenge.nonce, SETTINGS.secret_key, PASSWORD, user.password or "?", caller.token]
            + ["pass word", EMAIL, EMAIL.lower(), "nobody@"]
            + [text for p in (pair, new, other, typed) for text in (p.access_token, p.refresh_token)]
        )
        assert not any(secret in repr((pair, caller, user)) for secret in secrets if "@" not in secret)

    with caplog.at_level(logging.DEBUG, logger="lucid"):
        run(test)
    audited = [record for record in caplog.records if record.name == "lucid.audit"]
    assert [record.msg for record in audited] == [
        "login_failed",
        "user_created",
        "login",
        "refresh_reuse",
        "login",
        "revocation",
        "login",
        *["login_failed"] * 8,
    ]
    lines = [record.__dict__["audit"] for record in audited]
    assert lines[0]["event"] == "login_failed"
    assert (lines[0]["address"], lines[0]["request_id"], lines[0]["code"]) == (
        "192.0.2.9",
        "r-9",
        "LUCID_ERR_2005",
    )
    assert lines[0]["method"] == "wallet"
    assert (lines[1]["address"], lines[1]["request_id"], lines[1]["user_id"]) == (
        "192.0.2.9",
        "r-9",
        users[1],
    )
    assert (lines[6]["method"], lines[6]["user_id"]) == ("password", users[0])
    failed = [(line["method"], line["code"], line.get("user_id")) for line in lines[7:]]
    assert failed == [
        ("password", "LUCID_ERR_2003", None),
        *[("password", "LUCID_ERR_2003", users[0])] * 6,
        ("password", "LUCID_ERR_3001", None),
    ]
    everything = repr([record.__dict__ for record in caplog.records])
    assert not [secret for secret in secrets if secret in everything]
