"""The routes over HTTP, on a real Sanic server with the identity of one worker behind it.

The gateway's own part, judging before a handler runs, is played by a middleware that only checks the token.
"""

import asyncio
import datetime as dt
import itertools
from collections.abc import Awaitable, Callable

import httpx
import pytest
from sanic import HTTPResponse, Request, Sanic
from sanic.response import raw

from lucid import __version__
from lucid.blueprints import auth, health, meta, users
from lucid.core.exchange import Exchange, Principal
from lucid.errors import GatewayError, envelope
from tests.support.served import served
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet
from tests.support.workers import CALLER, Worker, database_name, fleet_of

_numbers = itertools.count()


class State:
    ready = True
    missing: tuple[str, ...] = ()


def application(worker: Worker, state: State) -> Sanic:
    app = Sanic(f"identity-{next(_numbers)}", configure_logging=False)
    app.config.AUTO_EXTEND = False
    app.config.TOUCHUP = False  # rewrites Sanic's own classes at start, once per process
    resources = (
        auth.resource(worker.auth, worker.credentials),
        users.resource(worker.user_service),
        meta.resource(),
        health.resource(
            lambda: {"mongodb": "healthy", "redis": "unhealthy"}, lambda: (state.ready, state.missing)
        ),
    )
    app.blueprint([resource.blueprint for resource in resources])

    @app.on_request
    async def judge(request: Request) -> None:
        exchange = Exchange(None, peer="192.0.2.1", address="192.0.2.1", started=0.0)
        exchange.request_id = "r-1"
        verdict = worker.judge(request.token) if request.token else None
        exchange.principal = verdict if isinstance(verdict, Principal) else None
        request.ctx.exchange = exchange

    @app.exception(GatewayError)
    async def refuse(_request: Request, error: GatewayError) -> HTTPResponse:
        body = envelope(error.code, str(error), error.details, "r-1", dt.datetime.now(dt.UTC))
        return raw(body, error.code.status, dict(error.fields), content_type="application/json")

    return app


Test = Callable[[httpx.AsyncClient, Worker, State], Awaitable[None]]


@pytest.fixture
def run(mongo: MongoChild, redis_server: RedisChild) -> Callable[[Test], None]:
    def runner(test: Test) -> None:
        async def main() -> None:
            async with fleet_of(1, mongo.in_database(database_name()), redis_server.uri) as (_, (worker,)):
                state = State()
                async with served(application(worker, state)) as client:
                    await test(client, worker, state)

        asyncio.run(main())

    return runner


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_a_wallet_from_challenge_to_logout(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, worker: Worker, state: State) -> None:
        wallet = Wallet.generate(ledger=True)
        answer = await http.post("/api/v1/auth/challenge", json={"tron_address": wallet.address})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        challenge = answer.json()
        assert set(challenge) == {"message", "nonce", "expires_at"}

        body = {
            "tron_address": wallet.address,
            "signature": wallet.sign(challenge["message"]),
            "message": challenge["message"],
            "hardware_wallet": {"type": "ledger", "device_id": "nano"},
        }
        answer = await http.post("/api/v1/auth/login", json=body)
        assert answer.status_code == 200
        login = answer.json()
        assert set(login) == {"access_token", "refresh_token", "token_type", "expires_in", "user"}
        assert set(login["user"]) == {"user_id", "tron_address", "role", "permissions"}
        assert (login["token_type"], login["expires_in"]) == ("Bearer", 900)
        answer = await http.post("/api/v1/auth/login", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "LUCID_ERR_2006")

        token = bearer(login["access_token"])
        answer = await http.get("/api/v1/auth/status", headers=token)
        assert (answer.status_code, answer.json()["user_id"]) == (200, login["user"]["user_id"])
        me = await http.get("/api/v1/users/me", headers=token)
        by_id = await http.get(f"/api/v1/users/{login['user']['user_id']}/", headers=token)
        assert me.status_code == 200
        assert me.json() == by_id.json()
        assert me.json()["tron_address"] == wallet.address
        other = await http.get("/api/v1/users/somebody", headers=token)
        assert (other.status_code, other.json()["error"]["code"]) == (404, "LUCID_ERR_4003")
        answer = await http.post("/api/v1/auth/verify", json={"token": login["access_token"]}, headers=token)
        assert answer.json()["active"] is True
        assert answer.json()["sub"] == login["user"]["user_id"]

        answer = await http.post("/api/v1/auth/refresh", json={"refresh_token": login["refresh_token"]})
        assert answer.status_code == 200
        newer = answer.json()
        assert set(newer) == set(login)
        answer = await http.post("/api/v1/auth/logout", headers=bearer(newer["access_token"]))
        assert (answer.status_code, answer.content) == (204, b"")
        for pair in (login, newer):
            answer = await http.get("/api/v1/auth/status", headers=bearer(pair["access_token"]))
            assert answer.status_code == 401
            answer = await http.post("/api/v1/auth/refresh", json={"refresh_token": pair["refresh_token"]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "LUCID_ERR_2003")

    run(test)


def test_all_logins_and_head(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, worker: Worker, state: State) -> None:
        wallet = Wallet.generate()
        first, second = await worker.login(wallet), await worker.login(wallet)
        answer = await http.head("/api/v1/users/me", headers=bearer(first.access_token))
        assert (answer.status_code, answer.content) == (200, b"")
        answer = await http.post(
            "/api/v1/auth/logout", json={"all_logins": True}, headers=bearer(first.access_token)
        )
        assert answer.status_code == 204
        answer = await http.get("/api/v1/auth/status", headers=bearer(second.access_token))
        assert answer.status_code == 401

    run(test)


def test_faults_of_login(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, worker: Worker, state: State) -> None:
        async def login(body: object) -> tuple[int, dict[str, object]]:
            content = body if isinstance(body, bytes) else None
            answer = await http.post(
                "/api/v1/auth/login", content=content, json=None if content is not None else body
            )
            return answer.status_code, answer.json()["error"]

        status, error = await login({"email": "ann@example.org", "password": "p"})
        assert (status, error["code"]) == (401, "LUCID_ERR_2003")
        status, error = await login({"email": "a@b.c", "password": "p"})
        assert (status, error["details"]["field"]) == (400, "email")
        status, error = await login({"email": "ann@example.org"})
        assert (status, error["details"]) == (400, {"field": "password", "reason": "is missing"})
        status, error = await login({"tron_address": "T" * 34, "email": "a@b.c"})
        assert (status, error["code"]) == (400, "LUCID_ERR_1003")
        status, error = await login(b"{")
        assert (status, error["code"]) == (400, "LUCID_ERR_1002")
        wallet = Wallet.generate()
        challenge = await worker.auth.challenge(wallet.address, CALLER)
        status, error = await login(
            {"tron_address": wallet.address, "signature": "0" * 130, "message": challenge.message}
        )
        assert (status, error["code"]) == (401, "LUCID_ERR_2005")
        bad = wallet.address[:-1] + ("1" if wallet.address[-1] != "1" else "2")
        answer = await http.post("/api/v1/auth/challenge", json={"tron_address": bad})
        assert answer.status_code == 400
        assert answer.json()["error"]["details"]["field"] == "tron_address"
        answer = await http.post("/api/v1/auth/logout")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "LUCID_ERR_2001")

    run(test)


def test_meta_and_health(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, worker: Worker, state: State) -> None:
        info = (await http.get("/api/v1/meta/info")).json()
        assert info == {
            "service": "api-gateway",
            "description": "Lucid API Gateway",
            "version": __version__,
            "api_version": "v1",
            "chain": "lucid_blocks",
        }
        version = await http.get("/api/v1/meta/version")
        assert version.json() == {"service": "api-gateway", "version": __version__, "api_version": "v1"}

        answer = await http.get("/health")
        assert answer.status_code == 200
        body = answer.json()
        moment = dt.datetime.strptime(body.pop("timestamp"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=dt.UTC)
        assert abs((dt.datetime.now(dt.UTC) - moment).total_seconds()) < 60
        assert body == {
            "status": "healthy",
            "service": "api-gateway",
            "version": __version__,
            "dependencies": {"mongodb": "healthy", "redis": "unhealthy"},
        }
        assert (await http.head("/health")).status_code == 200

        answer = await http.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "missing": []})
        state.missing = ("redis",)
        answer = await http.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "degraded", "missing": ["redis"]})
        state.ready = False
        answer = await http.get("/health/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "LUCID_ERR_5005")
        assert answer.json()["error"]["details"] == {"missing": ["redis"]}

    run(test)
