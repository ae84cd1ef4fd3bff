"""The routes of users and their API keys over HTTP, on a real Sanic server over real stores.

The gateway's own part, judging before a handler runs, is played by a middleware that only reads the credential.
"""

import asyncio
import datetime as dt
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sanic import HTTPResponse, Request, Sanic
from sanic.response import raw

from lucid.blueprints import api_keys, users
from lucid.core.exchange import Exchange, Principal, Role
from lucid.core.security import api_keys as keys
from lucid.database.documents import UserDocument
from lucid.errors import GatewayError, envelope
from tests.support.accounts import PASSWORD, Accounts, accounts, database_name, principal_of, quick_hash
from tests.support.served import served
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet

NEW = "another password"
VIEW = {
    "user_id",
    "tron_address",
    "email",
    "role",
    "permissions",
    "created_at",
    "updated_at",
    "last_login_at",
}
KEY_VIEW = {"key_id", "name", "role", "created_at", "expires_at", "last_used_at"}

_numbers = itertools.count()


def application(world: Accounts) -> Sanic[Any, Any]:
    app: Sanic[Any, Any] = Sanic(f"users-{next(_numbers)}", configure_logging=False)
    app.config.AUTO_EXTEND = False
    app.config.TOUCHUP = False  # rewrites Sanic's own classes at start, once per process
    resources = (users.resource(world.service), api_keys.resource(world.key_service))
    app.blueprint([resource.blueprint for resource in resources])

    async def by_key(key: str) -> Principal | None:
        found = await world.api_keys.find_by_digest(keys.digest(key))
        return found and principal_of(found.user_id, Role[found.role.upper()], "api_key")

    @app.on_request
    async def judge(request: Request) -> None:
        exchange = Exchange(None, peer="192.0.2.1", address="192.0.2.1", started=0.0)
        exchange.request_id = "r-1"
        key = request.headers.get("x-api-key")
        verdict = await by_key(key) if key else world.judge(request.token) if request.token else None
        if isinstance(verdict, Principal):
            exchange.principal = verdict
        request.ctx.exchange = exchange

    @app.exception(GatewayError)
    async def refuse(_request: Request, error: GatewayError) -> HTTPResponse:
        body = envelope(error.code, str(error), error.details, "r-1", dt.datetime.now(dt.UTC))
        return raw(body, error.code.status, dict(error.fields), content_type="application/json")

    return app


class Http:
    """Speaks as one caller; gives status, code of the error, details and body."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self._client = client
        self._headers = headers

    async def __call__(self, method: str, path: str, body: object = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else None
        return await self._client.request(
            method,
            f"/api/v1{path}",
            content=content,
            json=None if content is not None else body,
            headers=self._headers,
        )

    async def refused(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        answer = await self(method, path, body)
        error = answer.json()["error"]
        return answer.status_code, error["code"].removeprefix("LUCID_ERR_")

    async def bad(self, method: str, path: str, body: object) -> str:
        answer = await self(method, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "LUCID_ERR_1003")
        return str(error["details"]["field"])


class Site:
    def __init__(self, client: httpx.AsyncClient, world: Accounts) -> None:
        self._client = client
        self.world = world
        self.nobody = Http(client, {})

    def as_user(self, user: UserDocument) -> Http:
        return Http(self._client, {"authorization": f"Bearer {self.world.login(user)}"})

    def with_key(self, key: str) -> Http:
        return Http(self._client, {"x-api-key": key})


Test = Callable[[Site], Awaitable[None]]


@pytest.fixture
def run(mongo: MongoChild, redis_server: RedisChild) -> Callable[[Test], None]:
    def runner(test: Test) -> None:
        async def main() -> None:
            uri = mongo.in_database(database_name())
            async with accounts(redis_server.uri, uri) as world, served(application(world)) as client:
                await test(Site(client, world))

        asyncio.run(main())

    return runner


def test_registering(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        body = {"email": "Ann@example.org", "password": NEW}
        answer = await site.nobody("POST", "/users", body)
        assert answer.status_code == 201
        view = answer.json()
        assert set(view) == VIEW
        assert (view["email"], view["role"], view["tron_address"]) == ("Ann@example.org", "user", None)
        assert answer.headers["location"] == f"/api/v1/users/{view['user_id']}"
        user = await site.world.stored(view["user_id"])
        assert (await site.as_user(user)("GET", f"/users/{view['user_id']}")).json() == view

        answer = await site.nobody("POST", "/users/", {**body, "email": "ann@EXAMPLE.org"})
        assert answer.status_code == 409
        assert answer.json()["error"]["details"] == {"fields": ["email"]}
        post = "POST", "/users"
        assert await site.nobody.bad(*post, {"email": "bob@example.org"}) == "password"
        assert await site.nobody.bad(*post, {"password": NEW}) == "email"
        assert await site.nobody.bad(*post, {**body, "role": "admin"}) == "role"
        assert await site.nobody.bad(*post, {**body, "email": "bob"}) == "email"
        assert await site.nobody.bad(*post, {**body, "email": None}) == "email"
        assert await site.nobody.bad(*post, {**body, "password": "short"}) == "password"
        assert await site.nobody.bad(*post, {**body, "password": "p" * 129}) == "password"
        assert await site.nobody.refused(*post, b"{") == (400, "1002")
        assert await site.nobody.refused(*post, b'{"email": "\\ud800@x.org"') == (400, "1002")

    run(test)


def test_oneself_and_others(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        world = site.world
        user, other, admin = await world.add(), await world.add(), await world.add("admin")
        me, him = site.as_user(user), site.as_user(admin)
        assert (await me("GET", "/users/me")).json() == (await him("GET", f"/users/{user.user_id}")).json()
        head = await me("HEAD", "/users/me")
        assert (head.status_code, head.content) == (200, b"")
        for method, body in (("GET", None), ("PATCH", {"email": "n@example.org"}), ("DELETE", None)):
            assert await me.refused(method, f"/users/{other.user_id}", body) == (404, "4003")
            assert await me.refused(method, "/users/%24ne", body) == (404, "4003")
            assert await site.nobody.refused(method, "/users/me", body) == (401, "2001")
        assert await me.refused("PATCH", "/users/me", {"role": "admin"}) == (403, "2004")
        assert await him.refused("PATCH", f"/users/{user.user_id}", {"role": "admin"}) == (403, "2004")
        answer = await him("PATCH", f"/users/{user.user_id}", {"role": "node_operator"})
        assert (answer.status_code, answer.json()["role"]) == (200, "node_operator")
        # The token of before is dead.
        assert await me.refused("GET", "/users/me") == (401, "2001")
        me = site.as_user(await world.stored(user.user_id))
        assert (await me("GET", "/users/me")).json()["role"] == "node_operator"

        answer = await him("DELETE", f"/users/{user.user_id}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert await him.refused("DELETE", f"/users/{user.user_id}") == (404, "4003")
        assert await me.refused("GET", "/users/me") == (401, "2001")
        assert (await him("DELETE", "/users/me")).status_code == 204

    run(test)


def test_changing_oneself(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        world = site.world
        user, taken = await world.add(), await world.add()
        me = site.as_user(user)
        patch = "PATCH", "/users/me"
        assert await me.bad(*patch, {}) == "body"
        assert await me.bad(*patch, {"name": "x"}) == "name"
        assert await me.bad(*patch, {"email": None}) == "email"
        assert await me.bad(*patch, {"role": "root"}) == "role"
        assert await me.bad(*patch, {"tron_address": "x"}) == "tron_address"
        assert await me.bad(*patch, {"password": NEW}) == "current_password"
        assert await me.refused(*patch, b"") == (400, "1002")
        assert await me.refused(*patch, b"[]") == (400, "1003")
        assert await me.refused(*patch, {"email": taken.email}) == (409, "4001")
        wrong = {"password": NEW, "current_password": "wrong"}
        answer = await me(*patch, wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "LUCID_ERR_2003")
        assert answer.json()["error"]["details"] == {"field": "current_password"}

        wallet = Wallet.generate()
        proof = await world.wallet_proof(wallet)
        forged = {**proof, "signature": Wallet.generate().sign(proof["message"])}
        assert await me.refused(*patch, forged) == (401, "2005")
        assert await me.refused(*patch, {**proof, "message": "m"}) == (401, "2006")
        body = {"email": "new@example.org", "password": NEW, "current_password": PASSWORD, **proof}
        answer = await me(*patch, body)
        assert answer.status_code == 200
        assert set(answer.json()) == VIEW
        assert (answer.json()["email"], answer.json()["tron_address"]) == (
            "new@example.org",
            wallet.address,
        )
        assert (await world.stored(user.user_id)).password == quick_hash(NEW)
        assert await me.refused("GET", "/users/me") == (401, "2001")

    run(test)


def test_the_list(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        world = site.world
        wallet = Wallet.generate()
        admin = await world.add("admin")
        world.now += 1
        user = await world.add(tron_address=wallet.address)
        him = site.as_user(admin)
        answer = await him("GET", "/users")
        assert answer.status_code == 200
        page = answer.json()
        assert set(page) == {"items", "page", "limit", "total"}
        assert (page["page"], page["limit"], page["total"]) == (1, 20, 2)
        assert [each["user_id"] for each in page["items"]] == [user.user_id, admin.user_id]
        assert all(set(each) == VIEW for each in page["items"])
        for query, ids in (
            ("?page=2&limit=1", [admin.user_id]),
            (f"?email={user.email}", [user.user_id]),
            (f"?tron_address={wallet.address}&role=user", [user.user_id]),
            ("?role=super_admin", []),
        ):
            answer = await him("GET", f"/users{query}")
            assert [each["user_id"] for each in answer.json()["items"]] == ids
        for query, field in (
            ("?page=0", "page"),
            ("?page=x", "page"),
            ("?limit=101", "limit"),
            ("?limit=0", "limit"),
            ("?role=root", "role"),
            ("?email=x", "email"),
            ("?tron_address=x", "tron_address"),
            ("?tron_address=T" + "1" * 33, "tron_address"),
            ("?sort=email", "sort"),
            ("?page=1&page=2", "page"),
        ):
            assert await him.bad("GET", f"/users{query}", None) == field
        assert await site.as_user(user).refused("GET", "/users") == (403, "2004")
        assert await site.nobody.refused("GET", "/users") == (401, "2001")

    run(test)


def test_api_keys_from_making_to_ending(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        user, other = await site.world.add("node_operator"), await site.world.add()
        me = site.as_user(user)
        answer = await me("GET", "/users/me/api-keys")
        assert answer.json() == {"items": [], "page": 1, "limit": 20, "total": 0}
        expires_at = "2030-01-02T00:00:00+01:00"
        body = {"name": "backup", "role": "node_operator", "expires_at": expires_at}
        answer = await me("POST", "/users/me/api-keys", body)
        assert answer.status_code == 201
        made = answer.json()
        assert set(made) == {*KEY_VIEW, "key"}
        assert answer.headers["location"] == f"/api/v1/users/me/api-keys/{made['key_id']}"
        assert made["expires_at"] == "2030-01-01T23:00:00Z"
        plain = (await me("POST", "/users/me/api-keys", {"name": "plain"})).json()
        assert (plain["role"], plain["expires_at"]) == ("user", None)
        answer = await me("GET", "/users/me/api-keys?limit=1&page=2")
        assert (answer.json()["total"], [set(each) for each in answer.json()["items"]]) == (2, [KEY_VIEW])

        by_key = site.with_key(made["key"])
        assert (await by_key("GET", "/users/me")).json()["user_id"] == user.user_id
        for method, path, sent in (
            ("GET", "/users/me/api-keys", None),
            ("POST", "/users/me/api-keys", {"name": "n"}),
            ("DELETE", f"/users/me/api-keys/{made['key_id']}", None),
            ("PATCH", "/users/me", {"email": "n@example.org"}),
            ("PATCH", "/users/me", {"password": NEW, "current_password": PASSWORD}),
        ):
            assert await by_key.refused(method, path, sent) == (403, "2004")
            assert await site.nobody.refused(method, path, sent) == (401, "2001")

        path = f"/users/me/api-keys/{made['key_id']}"
        assert await site.as_user(other).refused("DELETE", path) == (404, "4003")
        answer = await me("DELETE", path)
        assert (answer.status_code, answer.content) == (204, b"")
        assert await me.refused("DELETE", path) == (404, "4003")
        assert await me.refused("DELETE", "/users/me/api-keys/unknown") == (404, "4003")
        assert await by_key.refused("GET", "/users/me") == (401, "2001")

    run(test)


def test_faults_of_api_keys(run: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        me = site.as_user(await site.world.add())
        post = "POST", "/users/me/api-keys"
        assert await me.bad(*post, {}) == "name"
        assert await me.bad(*post, {"name": ""}) == "name"
        assert await me.bad(*post, {"name": "n", "key": "k"}) == "key"
        assert await me.bad(*post, {"name": "n", "role": "root"}) == "role"
        assert await me.bad(*post, {"name": "n", "expires_at": "tomorrow"}) == "expires_at"
        assert await me.bad(*post, {"name": "n", "expires_at": "2030-01-02T00:00:00"}) == "expires_at"
        assert await me.bad(*post, {"name": "n", "expires_at": "2029-01-01T00:00:00Z"}) == "expires_at"
        assert await me.refused(*post, {"name": "n", "role": "node_operator"}) == (403, "2004")
        assert await me.bad("GET", "/users/me/api-keys?limit=0", None) == "limit"
        assert await me.bad("GET", "/users/me/api-keys?user_id=x", None) == "user_id"

    run(test)
