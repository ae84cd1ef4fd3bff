"""The client of the authentication cluster against a real one on loopback: healthy, slow, down and lying.

Real time with small time-outs; the breaker's clock and the gateway's wall clock are moved by hand.
"""

import asyncio
import contextlib
import functools
import gzip
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.rules.breaker import BreakerState, Outcome
from lucid.core.security import nonces
from lucid.core.security.jwt import TokenIssuer, issuer_of
from lucid.core.security.roles import PERMISSIONS
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.transport import PoolTransport
from lucid.errors import ErrorCode, GatewayError
from lucid.services.auth_cluster import MAX_ANSWER_BYTES, AuthCluster
from lucid.services.cluster_answers import ClusterLogin, ClusterTokens
from lucid.settings import TokenSettings
from tests.support import auth_cluster as cluster_faults
from tests.support.auth_cluster import ISSUER, AuthClusterServer, Endless, Fault, answering, lying, slow
from tests.support.servers import SECRET, HangupError, Received, Reply
from tests.support.wallet import Wallet
from tests.support.wire import SpyBreaker

REQUEST_ID = "req-1"
DETAILS = {"dependency": "auth-service"}
MESSAGE = "gateway.example wants you to sign in"
ALICE, BOB = Wallet.generate(), Wallet.generate()
AWAY_RETRY = (("Retry-After", "5"),)


class Bench:
    """The cluster, a pool to it, a breaker that takes notes, and the client over both."""

    def __init__(self, server: AuthClusterServer, max_connections: int, options: dict[str, Any]) -> None:
        self.server = server
        self.ahead = 0.0
        """How far the breaker's clock is ahead of the real one."""
        self.wall_ahead = 0.0
        self.pool = Pool(
            scheme="http",
            host="127.0.0.1",
            port=server.backend.port,
            max_connections=max_connections,
            monotonic=time.monotonic,
        )
        self.breaker = SpyBreaker("auth-service")
        balancer = Balancer("auth-service", [self.pool], time.monotonic)
        self.cluster = AuthCluster(
            httpx.AsyncClient(
                transport=PoolTransport(balancer, self.breaker, self.monotonic),
                base_url=server.url,
                trust_env=False,
            ),
            issuers={ISSUER, "another"},
            wall_clock=lambda: time.time() + self.wall_ahead,
            retry_after=lambda: self.breaker.retry_after(self.monotonic()),
            **options,
        )

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def state(self) -> BreakerState:
        return self.breaker.snapshot(self.monotonic()).state

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for _, outcome in self.breaker.outcomes]

    async def login(self, wallet: Wallet = ALICE) -> ClusterLogin:
        return await self.cluster.login(login_body(wallet), REQUEST_ID)

    async def until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(400):
            if is_so():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it never came about")


@contextlib.asynccontextmanager
async def bench(
    *, max_connections: int = 8, prefix: str = "", fault: Fault | None = None, **options: Any
) -> AsyncIterator[Bench]:
    with AuthClusterServer(prefix=prefix) as server:
        server.fault = fault
        made = Bench(server, max_connections, options)
        try:
            yield made
        finally:
            await made.cluster.aclose()
            made.pool.close()
            await asyncio.sleep(0)


def timed(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test, bounded."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20.0):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


def login_body(wallet: Wallet = ALICE) -> dict[str, Any]:
    return {"tron_address": wallet.address, "signature": wallet.sign(MESSAGE), "message": MESSAGE}


async def error_of(call: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await call
    return caught.value


async def assert_broken(call: Awaitable[object], caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """BACKEND_BROKEN, and exactly one warning that says why."""
    caplog.clear()
    error = await error_of(call)
    assert (error.code, error.details) == (ErrorCode.BACKEND_BROKEN, DETAILS)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("lucid")]
    assert len(warnings) == 1
    assert reason in warnings[0]


# --- healthy -------------------------------------------------------------------------------------------


@timed
async def test_login_passes_the_body_on_and_the_tokens_back() -> None:
    async with bench() as b:
        b.server.roles[ALICE.address] = "node_operator"
        device = {"hardware_wallet": {"type": "ledger", "device_id": "Nano"}}
        login = await b.cluster.login({**login_body(), **device}, REQUEST_ID)
        assert login.user_id == b.server.user_id(ALICE.address)
        assert (login.tron_address, login.role) == (ALICE.address, Role.NODE_OPERATOR)
        assert login.permissions == PERMISSIONS[Role.NODE_OPERATOR]
        assert (login.token_type, login.expires_in) == ("Bearer", 900)
        assert issuer_of(login.access_token) == ISSUER
        assert login.refresh_token in [known.current for known in b.server.logins.values()]
        (received,) = b.server.received
        assert (received.method, received.target) == ("POST", "/auth/login")
        assert json.loads(received.body) == {**login_body(), **device}
        assert received.field("x-request-id") == REQUEST_ID
        assert received.field("content-type") == "application/json"
        assert received.field("accept-encoding") == "identity"
        assert received.field("authorization") is None
        assert b.outcomes == [Outcome.SUCCESS]


@timed
async def test_a_life_of_tokens() -> None:
    async with bench(max_connections=1) as b:
        first, other = await b.login(), await b.login()
        principal = await b.cluster.verify(first.access_token, REQUEST_ID)
        assert isinstance(principal, Principal)
        assert (principal.user_id, principal.identifier) == (first.user_id, first.user_id)
        assert (principal.role, principal.tier, principal.via) == (Role.USER, "authenticated", "token")
        assert principal.family in b.server.logins
        assert principal.token_id
        assert principal.expires_at == principal.issued_at + 900

        second = await b.cluster.refresh(first.refresh_token, REQUEST_ID)
        assert isinstance(second, ClusterLogin)
        assert second.user_id == first.user_id
        assert second.refresh_token != first.refresh_token
        assert isinstance(await b.cluster.verify(second.access_token, REQUEST_ID), Principal)

        await b.cluster.logout(second.access_token, False, REQUEST_ID)
        logout = b.server.received[-1]
        assert (logout.target, json.loads(logout.body)) == ("/auth/logout", {"all_logins": False})
        assert logout.field("authorization") == f"Bearer {second.access_token}"
        assert await b.cluster.verify(second.access_token, REQUEST_ID) is ErrorCode.BAD_CREDENTIAL
        assert isinstance(await b.cluster.verify(other.access_token, REQUEST_ID), Principal)
        await b.cluster.logout(second.access_token, False, REQUEST_ID)  # once more is no error

        again = await b.login()
        await b.cluster.logout(again.access_token, True, REQUEST_ID)
        assert await b.cluster.verify(other.access_token, REQUEST_ID) is ErrorCode.BAD_CREDENTIAL
        error = await error_of(b.cluster.refresh(other.refresh_token, REQUEST_ID))
        assert error.code is ErrorCode.BAD_CREDENTIAL
        assert all(received.field("x-request-id") == REQUEST_ID for received in b.server.received)
        assert b.server.backend.connections == 1, "every answer was read, so one connection served all"


@timed
async def test_a_spent_refresh_token_is_refused() -> None:
    async with bench() as b:
        login = await b.login()
        await b.cluster.refresh(login.refresh_token, REQUEST_ID)
        error = await error_of(b.cluster.refresh(login.refresh_token, REQUEST_ID))
        assert error.code is ErrorCode.BAD_CREDENTIAL


@timed
async def test_a_refresh_need_not_say_whose_it_is() -> None:
    async with bench() as b:
        login = await b.login()
        b.server.fault = lying(user=None)
        tokens = await b.cluster.refresh(login.refresh_token, REQUEST_ID)
        assert type(tokens) is ClusterTokens
        assert issuer_of(tokens.access_token) == ISSUER
        assert tokens.access_token not in repr(tokens)
        assert tokens.refresh_token not in repr(tokens)


@timed
async def test_without_permissions_the_role_s_own_are_told() -> None:
    async with bench(fault=lying(user__permissions=None)) as b:
        assert (await b.login()).permissions == PERMISSIONS[Role.USER]


@timed
async def test_the_path_of_the_url_comes_first() -> None:
    async with bench(prefix="/v2") as b:
        await b.login()
        assert b.server.received[0].target == "/v2/auth/login"


@timed
async def test_a_hundred_verifies_at_once_get_their_own_principals() -> None:
    wallets = [Wallet.generate() for _ in range(100)]
    async with bench(max_connections=16, verify_seconds=15.0) as b:
        tokens = [b.server.token(wallet.address) for wallet in wallets]
        principals = await asyncio.gather(*(b.cluster.verify(token, REQUEST_ID) for token in tokens))
        assert [getattr(principal, "user_id", principal) for principal in principals] == [
            b.server.user_id(wallet.address) for wallet in wallets
        ]
        assert b.server.backend.connections <= 16
        assert b.outcomes == [Outcome.SUCCESS] * 100
        assert b.pool.in_flight == 0


@timed
async def test_cookies_do_not_go_from_one_user_to_the_next() -> None:
    async with bench(fault=cluster_faults.with_fields(("Set-Cookie", "login=alice; Path=/"))) as b:
        await b.login()
        await b.login(BOB)
        assert [received.field("cookie") for received in b.server.received] == [None, None]


# --- tokens that are not good --------------------------------------------------------------------------


@timed
async def test_only_tokens_of_the_issuers_are_shown_to_the_cluster() -> None:
    own = TokenIssuer(TokenSettings(secret_key=SECRET)).issue(
        user_id="u", role=Role.USER, family="f", now=time.time()
    )
    async with bench() as b:
        for token in (own.token, b.server.token(ALICE.address, iss="stranger"), "opaque", ""):
            assert not b.cluster.issues(token)
            assert await b.cluster.verify(token, REQUEST_ID) is ErrorCode.BAD_CREDENTIAL
        assert not b.server.received


@timed
async def test_a_forged_token_is_bad() -> None:
    async with bench() as b:
        head, payload, signature = b.server.token(ALICE.address).split(".")
        forged = f"{head}.{payload}.{signature[::-1]}"
        assert b.cluster.issues(forged)
        assert await b.cluster.verify(forged, REQUEST_ID) is ErrorCode.BAD_CREDENTIAL


@timed
async def test_an_expired_token_is_expired_by_this_clock() -> None:
    async with bench() as b:
        token = b.server.token(ALICE.address)
        b.wall_ahead = 901.0
        assert await b.cluster.verify(token, REQUEST_ID) is ErrorCode.CREDENTIAL_EXPIRED


@timed
async def test_what_verify_leaves_out_the_token_says() -> None:
    async with bench() as b:
        token = b.server.token(ALICE.address)
        whole = await b.cluster.verify(token, REQUEST_ID)
        user_id = b.server.user_id(ALICE.address)
        b.server.fault = lying(sub=None, user_id=user_id, sid=None, jti=None, iat=None, iss=None)
        assert isinstance(whole, Principal)
        assert await b.cluster.verify(token, REQUEST_ID) == whole
        # Neither side names them.
        anonymous = b.server.token(ALICE.address, sid=None, jti=None, iat=None)
        principal = await b.cluster.verify(anonymous, REQUEST_ID)
        assert isinstance(principal, Principal)
        assert (principal.family, principal.token_id, principal.issued_at) == ("", "", 0.0)


@timed
async def test_the_moment_is_exact_where_the_token_s_id_tells_it() -> None:
    async with bench() as b:
        second = int(time.time())
        for token_id, moment in (
            (nonces.timed_id(second + 0.25), second + 0.25),
            (nonces.timed_id(second - 60.0), second),  # of another second than `iat`
            ("token-1", second),
        ):
            token = b.server.token(ALICE.address, jti=token_id, iat=second)
            principal = await b.cluster.verify(token, REQUEST_ID)
            assert isinstance(principal, Principal)
            assert (principal.issued_at, principal.moment) == (second, moment)


@timed
async def test_an_issuer_without_a_name_is_none() -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        cluster = AuthCluster(client, issuers=["", ISSUER])
        with AuthClusterServer() as server:
            for token in ("", "opaque", server.token(ALICE.address, iss="")):
                assert not cluster.issues(token)
                assert await cluster.verify(token, REQUEST_ID) is ErrorCode.BAD_CREDENTIAL


@timed
async def test_a_token_s_own_claims_are_used_only_where_they_make_sense() -> None:
    async with bench() as b:
        token = b.server.token(ALICE.address, "a b", jti=7, iat=2**60)
        b.server.fault = lying(sid=None, jti=None, iat=None)
        principal = await b.cluster.verify(token, REQUEST_ID)
        assert isinstance(principal, Principal)
        assert (principal.family, principal.token_id, principal.issued_at) == ("", "", 0.0)


@timed
async def test_logging_out_needs_a_token_that_fits_a_field() -> None:
    async with bench() as b:
        error = await error_of(b.cluster.logout(None, False, REQUEST_ID))
        assert error.code is ErrorCode.NO_CREDENTIAL
        for token in ("", "a\r\nX-User-Id: root", "é", "a" * 4_097):
            error = await error_of(b.cluster.logout(token, False, REQUEST_ID))
            assert error.code is ErrorCode.BAD_CREDENTIAL
        assert not b.server.received


@timed
async def test_a_login_needs_an_address() -> None:
    async with bench() as b:
        error = await error_of(b.cluster.login({"email": "a@b.example"}, REQUEST_ID))
        assert error.code is ErrorCode.BAD_FIELD
        assert not b.server.received


@timed
async def test_a_request_id_that_is_none_is_not_sent() -> None:
    async with bench() as b:
        for request_id in ("", "a\r\nX-User-Id: root", "é"):
            await b.cluster.login(login_body(), request_id)
        assert [received.field("x-request-id") for received in b.server.received] == [None] * 3


# --- the cluster's statuses ----------------------------------------------------------------------------

DONE = None
BROKEN, BAD = ErrorCode.BACKEND_BROKEN, ErrorCode.BAD_CREDENTIAL
STATUSES: list[tuple[int, ErrorCode | None, ErrorCode | None, ErrorCode | None]] = [
    # status, login and refresh, logout, verify
    (201, BROKEN, DONE, BROKEN),
    (204, BROKEN, DONE, BROKEN),
    (301, BROKEN, BROKEN, BROKEN),
    (400, BAD, BROKEN, BAD),
    (401, BAD, DONE, BAD),
    (403, BAD, ErrorCode.ROLE_TOO_LOW, BROKEN),
    (404, BROKEN, DONE, BROKEN),
    (409, BAD, BROKEN, BROKEN),
    (418, BROKEN, BROKEN, BROKEN),
    (422, BAD, BROKEN, BAD),
    (429, ErrorCode.RATE_LIMITED, ErrorCode.RATE_LIMITED, ErrorCode.RATE_LIMITED),
    (500, BROKEN, BROKEN, BROKEN),
    (502, BROKEN, BROKEN, BROKEN),
    (503, BROKEN, BROKEN, BROKEN),
]


@pytest.mark.parametrize("status, pair, logout, verify", STATUSES, ids=str)
@timed
async def test_statuses(
    status: int, pair: ErrorCode | None, logout: ErrorCode | None, verify: ErrorCode | None
) -> None:
    async def code_of(call: Awaitable[object]) -> object:
        try:
            return await call
        except GatewayError as error:
            return error.code

    body = b"" if status == 204 else b'{"detail": "no"}'
    async with bench(fault=answering(status, body)) as b:
        token = b.server.token(ALICE.address)
        assert await code_of(b.cluster.login(login_body(), REQUEST_ID)) is pair
        assert await code_of(b.cluster.refresh("some-refresh-token", REQUEST_ID)) is pair
        assert await code_of(b.cluster.logout(token, False, REQUEST_ID)) is logout
        assert await code_of(b.cluster.verify(token, REQUEST_ID)) is verify
        assert len(b.server.received) == 4


@pytest.mark.parametrize(
    "value, told",
    [("1", "1"), ("3600", "3600"), ("0", ""), ("3601", ""), ("-5", ""), ("soon", ""), ("9" * 5_000, "")],
)
@timed
async def test_a_sane_retry_after_of_the_cluster_s_limit_is_passed_on(value: str, told: str) -> None:
    async with bench(fault=answering(429, b"{}", ("Retry-After", value))) as b:
        error = await error_of(b.login())
        assert (error.code, error.details) == (ErrorCode.RATE_LIMITED, DETAILS)
        assert error.fields == ((("Retry-After", told),) if told else ())


# --- lying ---------------------------------------------------------------------------------------------

LOGIN_LIES: list[tuple[dict[str, Any], str]] = [
    ({"access_token": None}, "access_token"),
    ({"access_token": ""}, "access_token is no token"),
    ({"access_token": "two words"}, "access_token is no token"),
    ({"access_token": "a" * 4_097}, "access_token is no token"),
    ({"access_token": "a\r\nX: y"}, "access_token is no token"),
    ({"access_token": "tök"}, "access_token is no token"),
    ({"access_token": 7}, "access_token"),
    ({"refresh_token": ""}, "refresh_token is no token"),
    ({"refresh_token": "a" * 4_097}, "refresh_token is no token"),
    ({"refresh_token": "a\n"}, "refresh_token is no token"),
    ({"refresh_token": ["a"]}, "refresh_token"),
    ({"token_type": "MAC"}, "token_type is not Bearer"),
    ({"token_type": None}, "token_type"),
    ({"expires_in": 0}, "expires_in is out of bounds"),
    ({"expires_in": -1}, "expires_in is out of bounds"),
    ({"expires_in": 10**30}, "expires_in is out of bounds"),
    ({"expires_in": "900"}, "expires_in"),
    ({"expires_in": True}, "expires_in"),
    ({"expires_in": 900.5}, "expires_in"),
    ({"user": None}, "the user is missing"),
    ({"user": "alice"}, "user"),
    ({"user__user_id": ""}, "user.user_id is no user id"),
    ({"user__user_id": "a\r\nb"}, "user.user_id is no user id"),
    ({"user__user_id": "a" * 65}, "user.user_id is no user id"),
    ({"user__user_id": "somebody-else"}, "user.user_id is not the access token's sub"),
    ({"user__role": "root"}, "user.role is unknown"),
    ({"user__role": "public"}, "user.role is unknown"),
    ({"user__role": None}, "role"),
    ({"user__tron_address": BOB.address}, "user.tron_address is not the one that logged in"),
    ({"user__tron_address": None}, "user.tron_address is not the one that logged in"),
    ({"user__tron_address": "T" + "1" * 33}, "user.tron_address is no address"),
    ({"user__permissions": ["sessions"]}, "permissions"),
    ({"user__permissions": ["sessions:read\r\n"]}, "permissions"),
    ({"user__permissions": ["a:b"] * 257}, "permissions"),
    ({"user__permissions": [7]}, "permissions"),
]


@pytest.mark.parametrize("members, reason", LOGIN_LIES, ids=lambda value: str(value)[:40])
@timed
async def test_lies_about_a_login(
    members: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench() as b:
        first = await b.login()
        b.server.fault = lying(**members)
        await assert_broken(b.login(), caplog, reason)
        if "user" not in members and "tron_address" not in "".join(members):
            await assert_broken(b.cluster.refresh(first.refresh_token, REQUEST_ID), caplog, reason)


@timed
async def test_tokens_of_somebody_else_are_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    async with bench() as b:
        b.server.fault = lying(access_token=b.server.token(BOB.address))
        await assert_broken(b.login(), caplog, "not the access token's sub")


@timed
async def test_a_kind_of_token_that_says_nothing_is_passed_on() -> None:
    async with bench(fault=lying(access_token="opaque-token", token_type="bearer")) as b:
        login = await b.login()
        assert (login.access_token, login.token_type) == ("opaque-token", "Bearer")


VERIFY_LIES: list[tuple[dict[str, Any], str]] = [
    ({"active": None}, "active"),
    ({"active": "true"}, "active"),
    ({"active": 1}, "active"),
    ({"sub": "somebody-else"}, "sub is not the token's"),
    ({"sub": None}, "sub is no user id"),
    ({"sub": "a\r\nb"}, "sub is no user id"),
    ({"sub": 7}, "sub"),
    ({"user_id": "somebody-else"}, "two users"),
    ({"iss": "another"}, "iss is not the token's"),
    ({"role": "root"}, "role is unknown"),
    ({"role": None}, "role is unknown"),
    ({"sid": "another-login"}, "sid is not the token's"),
    ({"sid": "a\r\nb"}, "sid is no name"),
    ({"sid": "a" * 129}, "sid is no name"),
    ({"jti": "another-token"}, "jti is not the token's"),
    ({"exp": None}, "exp is missing"),
    ({"exp": "soon"}, "exp"),
    ({"exp": True}, "exp"),
    ({"exp": 0}, "exp is out of bounds"),
    ({"exp": -1}, "exp is out of bounds"),
    ({"exp": 900}, "iat is out of bounds"),
    ({"exp": 2**53}, "exp is out of bounds"),
    ({"exp": 10**400}, "exp is out of bounds"),
    ({"iat": 2**53}, "iat is out of bounds"),
    ({"iat": -1}, "iat is out of bounds"),
]


@pytest.mark.parametrize("members, reason", VERIFY_LIES, ids=lambda value: str(value)[:40])
@timed
async def test_lies_about_a_token(
    members: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench() as b:
        token = b.server.token(ALICE.address)
        b.server.fault = lying(**members)
        await assert_broken(b.cluster.verify(token, REQUEST_ID), caplog, reason)


JSON_TYPE = ("Content-Type", "application/json")
NONSENSE: list[tuple[Fault, str]] = [
    (answering(200, b"\x00\xff garbage", JSON_TYPE), "it is no JSON"),
    (answering(200, b"", JSON_TYPE), "it is no JSON"),
    (answering(200, b"[]", JSON_TYPE), "Expected `object`"),
    (answering(200, b'"ok"', JSON_TYPE), "Expected `object`"),
    (answering(200, b'{"active": true, "sub": "\xff"}', JSON_TYPE), ""),
    (answering(200, b'{"x": ' + b"[" * 60_000, JSON_TYPE), "it is no JSON"),
    (answering(200, b"{}" + b" " * MAX_ANSWER_BYTES, JSON_TYPE), f"more than {MAX_ANSWER_BYTES} bytes"),
    (
        answering(200, gzip.compress(b"{}"), JSON_TYPE, ("Content-Encoding", "gzip")),
        "it is no JSON",
    ),
    (cluster_faults.promising(MAX_ANSWER_BYTES + 1), f"more than {MAX_ANSWER_BYTES} bytes"),
    (cluster_faults.promising(MAX_ANSWER_BYTES), "RemoteProtocolError"),
    (cluster_faults.of_type("text/html"), "Content-Type"),
    (cluster_faults.of_type("application/json-seq"), "Content-Type"),
    (cluster_faults.of_type(""), "Content-Type"),
    (cluster_faults.bad_gateway, "status is 502"),
    (cluster_faults.cut_off, "RemoteProtocolError"),
    (answering(302, b"", ("Location", "/auth/login")), "status is 302"),
    (answering(308, b"", ("Location", "https://elsewhere.example/")), "status is 308"),
    (answering(307, b"", ("Location", "http://a:b/")), "while it came"),
]


@pytest.mark.parametrize("number", range(len(NONSENSE)))
@timed
async def test_answers_that_are_none(number: int, caplog: pytest.LogCaptureFixture) -> None:
    fault, reason = NONSENSE[number]
    async with bench(fault=fault) as b:
        await assert_broken(b.cluster.verify(b.server.token(ALICE.address), REQUEST_ID), caplog, reason)
        await assert_broken(b.login(), caplog, reason)
        assert len(b.server.received) == 2, "no redirect is followed"
        await b.until(lambda: b.pool.in_flight == 0)


@timed
async def test_an_endless_answer_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    endless = Endless()
    async with bench(fault=endless) as b:
        await assert_broken(b.login(), caplog, "bytes")
        await b.until(lambda: b.pool.open == 0)
        # What the sockets' buffers and the server's own hold on top of the 64 KB.
        assert endless.taken < cluster_faults.ENDLESS_PIECES / 4


@timed
async def test_an_honest_answer_may_be_as_long_as_the_bound() -> None:
    async with bench() as b:

        def padded(_: Received, reply: Reply) -> Reply:
            assert isinstance(reply.body, bytes)
            reply.body = reply.body.ljust(MAX_ANSWER_BYTES)
            return reply

        b.server.fault = padded
        assert (await b.login()).tron_address == ALICE.address


@timed
async def test_no_token_and_no_value_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with bench() as b:
        login = await b.login()
        given_out = [login.access_token, login.refresh_token]
        for fault in (
            lying(user__role="sEcReT"),
            lying(expires_in="sEcReT"),
            answering(200, b'{"access_token": "sEcReT', JSON_TYPE),
            answering(500, b"sEcReT"),
            cluster_faults.cut_off,
        ):
            b.server.fault = fault
            assert (await error_of(b.login())).code is BROKEN
            _, refresh_token = b.server.new_login(ALICE.address)
            given_out.append(refresh_token)
            error = await error_of(b.cluster.refresh(refresh_token, REQUEST_ID))
            assert error.code is BROKEN
            assert "sEcReT" not in f"{error} {error.details}"
        b.server.fault = lying(sub="sEcReT", role="sEcReT")
        assert (await error_of(b.cluster.verify(login.access_token, REQUEST_ID))).code is BROKEN
        assert caplog.text.count("was not understood") == 11
        for secret in (*given_out, "sEcReT", login_body()["signature"], ALICE.address):
            assert secret not in caplog.text
        assert login.access_token not in repr(login)
        assert login.refresh_token not in repr(login)


# --- slow ----------------------------------------------------------------------------------------------


@timed
async def test_a_slow_cluster_is_a_timeout_that_the_breaker_counts() -> None:
    async with bench(fault=slow(3.0), call_seconds=0.4, verify_seconds=0.2) as b:
        token = b.server.token(ALICE.address)
        for call in (b.login(), b.cluster.verify(token, REQUEST_ID), b.cluster.logout(token, True, "")):
            error = await error_of(call)
            assert (error.code, error.details) == (ErrorCode.BACKEND_TIMEOUT, DETAILS)
        assert b.outcomes == [Outcome.FAILURE] * 3
        await b.until(lambda: b.pool.open == 0)


@timed
async def test_an_answer_in_drops_ends_with_the_call_s_deadline() -> None:
    class Drops(list[bytes]):
        def __iter__(self) -> Any:
            for _ in range(100):
                time.sleep(0.05)
                yield b" "

    async with bench(fault=lambda _, reply: Reply(200, reply.fields, Drops()), call_seconds=0.4) as b:
        began = time.monotonic()
        error = await error_of(b.login())
        assert error.code is ErrorCode.BACKEND_TIMEOUT
        assert 0.35 < time.monotonic() - began < 4.5  # the drops go on for 5 s
        await b.until(lambda: b.pool.open == 0)


# --- down ----------------------------------------------------------------------------------------------


@timed
async def test_down_the_breaker_opens_and_recovers() -> None:
    async with bench() as b:
        await b.login()
        b.server.stop()
        await b.until(lambda: b.pool.open == 0)
        for _ in range(5):
            error = await error_of(b.login())
            assert (error.code, error.code.status) == (ErrorCode.BACKEND_UNAVAILABLE, 503)
            assert (error.details, error.fields) == (DETAILS, AWAY_RETRY)
        assert b.state() is BreakerState.OPEN
        error = await error_of(b.login())
        assert (error.code, error.details) == (ErrorCode.BACKEND_UNAVAILABLE, DETAILS)
        ((name, seconds),) = error.fields
        assert name == "Retry-After"
        assert 29 <= int(seconds) <= 33

        b.server.start()
        b.ahead += 20.0
        assert (await error_of(b.login())).code is ErrorCode.BACKEND_UNAVAILABLE
        assert len(b.server.received) == 1, "while it is open nothing is sent"
        b.ahead += 14.0
        token = (await b.login()).access_token
        assert b.state() is BreakerState.HALF_OPEN
        assert isinstance(await b.cluster.verify(token, REQUEST_ID), Principal)
        assert b.state() is BreakerState.CLOSED


@timed
async def test_a_proxy_s_502_opens_the_breaker_and_a_401_does_not() -> None:
    async with bench(fault=answering(401, b"{}")) as b:
        for _ in range(10):
            assert (await error_of(b.login())).code is BAD
        assert b.state() is BreakerState.CLOSED
        assert b.server.backend.connections == 1, "a refusal is no reason to dial again"
        b.server.fault = cluster_faults.bad_gateway
        for _ in range(5):
            assert (await error_of(b.login())).code is BROKEN
        assert b.state() is BreakerState.OPEN


@timed
async def test_bodies_that_break_off_open_the_breaker() -> None:
    async with bench(fault=cluster_faults.cut_off) as b:
        # Each begins as a success and ends as a failure: never five in a row, but all of those in the window.
        codes = [(await error_of(b.login())).code for _ in range(25)]
        assert set(codes) == {BROKEN, ErrorCode.BACKEND_UNAVAILABLE}
        assert b.state() is BreakerState.OPEN


@timed
async def test_a_full_pool_is_overload_and_says_nothing_about_the_cluster() -> None:
    async with bench(max_connections=1, fault=slow(1.0), call_seconds=1.0) as b:
        first = asyncio.ensure_future(error_of(b.login()))
        await b.until(lambda: len(b.server.received) == 1)
        error = await error_of(b.login())
        assert (error.code, error.fields) == (ErrorCode.BACKEND_UNAVAILABLE, AWAY_RETRY)
        assert b.outcomes == [Outcome.NEUTRAL]
        await first


@timed
async def test_a_kept_connection_that_died_is_replaced_for_verify_alone() -> None:
    async with bench(max_connections=1) as b:
        token = (await b.login()).access_token

        def dies(_: Received, reply: Reply) -> Reply:
            b.server.fault = None
            raise HangupError

        b.server.fault = dies
        assert isinstance(await b.cluster.verify(token, REQUEST_ID), Principal)
        assert [received.target for received in b.server.received] == [
            "/auth/login",
            "/auth/verify",
            "/auth/verify",
        ]
        b.server.fault = dies
        assert (await error_of(b.login())).code is BROKEN
        assert [received.target for received in b.server.received[3:]] == ["/auth/login"]


@timed
async def test_hanging_up_every_time_is_broken_for_verify_too(caplog: pytest.LogCaptureFixture) -> None:
    async with bench(fault=cluster_faults.hanging_up) as b:
        await assert_broken(b.cluster.verify(b.server.token(ALICE.address), REQUEST_ID), caplog, "Error")


@timed
async def test_a_closed_client_is_unavailable() -> None:
    async with bench() as b:
        await b.cluster.aclose()
        error = await error_of(b.login())
        assert (error.code, error.fields) == (ErrorCode.BACKEND_UNAVAILABLE, AWAY_RETRY)


@timed
async def test_without_word_from_the_breaker_a_fixed_time_is_told() -> None:
    class Refusing(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    client = httpx.AsyncClient(transport=Refusing(), base_url="http://auth", trust_env=False)
    cluster = AuthCluster(client, issuers=[ISSUER])
    assert (await error_of(cluster.login(login_body(), REQUEST_ID))).fields == AWAY_RETRY
    await cluster.aclose()


# --- cancellation --------------------------------------------------------------------------------------


@timed
async def test_a_cancelled_call_gives_its_place_back() -> None:
    async with bench(max_connections=1) as b:
        token = b.server.token(ALICE.address)
        b.server.fault = slow(30.0)
        for number in range(1, 4):
            task = asyncio.ensure_future(b.cluster.verify(token, REQUEST_ID))
            await b.until(lambda: len(b.server.received) == number)  # noqa: B023
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await b.until(lambda: b.pool.open == 0)
        assert b.outcomes == [Outcome.NEUTRAL] * 3
        b.server.fault = None
        assert isinstance(await b.cluster.verify(token, REQUEST_ID), Principal)


@timed
async def test_a_call_cancelled_within_the_answer_s_body_gives_its_place_back() -> None:
    async with bench(max_connections=1, fault=Endless()) as b:

        async def read_slowly(response: httpx.Response) -> bytes:
            reading.set()
            await asyncio.sleep(60)
            return b""

        reading = asyncio.Event()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lucid.services.auth_cluster._read", read_slowly)
            task = asyncio.ensure_future(b.login())
            await reading.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await b.until(lambda: b.pool.open == 0)
        b.server.fault = None
        await b.login()
