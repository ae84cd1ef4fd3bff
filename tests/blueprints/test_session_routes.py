"""The routes of sessions over HTTP, on a real Sanic server and a real database.

The gateway's own part, judging before a handler runs, is played by a middleware that believes a field.
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

from lucid.blueprints import sessions
from lucid.core.exchange import ROLES, Exchange, Principal
from lucid.core.security.roles import TIERS
from lucid.database.connection import Connection
from lucid.database.session_repository import SessionRepository
from lucid.errors import ErrorCode, GatewayError, envelope
from lucid.services.session_service import SessionService
from tests.support.served import served
from tests.support.stores import MongoChild

PATH = "/api/v1/sessions"
FIELDS = {"session_id", "user_id", "status", "metadata", "created_at", "updated_at", "ended_at"}

_numbers = itertools.count()


class Silent:
    def wake(self, session_id: str) -> None:
        pass


def application(service: SessionService) -> Sanic[Any, Any]:
    app: Sanic[Any, Any] = Sanic(f"sessions-{next(_numbers)}", configure_logging=False)
    app.config.AUTO_EXTEND = False
    app.config.TOUCHUP = False  # rewrites Sanic's own classes at start, once per process
    app.blueprint(sessions.resource(service).blueprint)

    @app.on_request
    async def judge(request: Request) -> None:
        exchange = Exchange(None, peer="192.0.2.1", address="192.0.2.1", started=0.0)
        if "x-test" in request.headers:
            user_id, _, role = request.headers["x-test"].partition(":")
            given = ROLES[role or "user"]
            exchange.principal = Principal(given, TIERS[given], user_id, user_id, via="token")
        request.ctx.exchange = exchange

    @app.exception(GatewayError)
    async def refuse(_request: Request, error: GatewayError) -> HTTPResponse:
        body = envelope(error.code, str(error), error.details, "r-1", dt.datetime.now(dt.UTC))
        return raw(body, error.code.status, dict(error.fields), content_type="application/json")

    return app


class Api:
    """The routes, as a named caller uses them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(self, who: str, method: str, path: str = "", **given: Any) -> httpx.Response:
        return await self._client.request(
            method, PATH + path, headers={"x-test": who} if who else {}, **given
        )

    async def refused(
        self, status: int, code: ErrorCode, who: str, method: str, path: str = "", **given: Any
    ) -> dict[str, Any]:
        answer = await self(who, method, path, **given)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code.value), (method, path, given)
        details: dict[str, Any] = error["details"]
        return details


Test = Callable[[Api], Awaitable[None]]


@pytest.fixture
def run(mongo: MongoChild) -> Callable[[Test], None]:
    def runner(test: Test) -> None:
        async def main() -> None:
            connection = Connection(mongo.in_database(f"session_routes_{next(_numbers)}"))
            service = SessionService(SessionRepository(connection), Silent())
            try:
                async with served(application(service)) as client:
                    await test(Api(client))
            finally:
                connection.close()

        asyncio.run(main())

    return runner


def test_a_session_from_its_beginning_to_its_end(run: Callable[[Test], None]) -> None:
    async def test(api: Api) -> None:
        answer = await api("alice", "POST", json={"metadata": {"title": "é", "n": [1, 2.5, None]}})
        assert answer.status_code == 201
        assert answer.headers["content-type"] == "application/json"
        made = answer.json()
        name = made["session_id"]
        assert answer.headers["location"] == f"{PATH}/{name}"
        assert set(made) == FIELDS
        assert (made["user_id"], made["status"], made["ended_at"]) == ("alice", "INITIALIZING", None)
        assert made["metadata"] == {"title": "é", "n": [1, 2.5, None]}
        moment = dt.datetime.strptime(made["created_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=dt.UTC)
        assert abs((dt.datetime.now(dt.UTC) - moment).total_seconds()) < 60

        for path in (f"/{name}", f"/{name}/"):
            answer = await api("alice", "GET", path)
            assert (answer.status_code, answer.json()) == (200, made)
        answer = await api("alice", "HEAD", f"/{name}")
        assert (answer.status_code, answer.content) == (200, b"")
        answer = await api("alice", "PATCH", f"/{name}", json={"status": "ACTIVE", "metadata": {"a": 1}})
        assert answer.status_code == 200
        assert (answer.json()["status"], answer.json()["metadata"]) == ("ACTIVE", {"a": 1})
        details = await api.refused(
            409, ErrorCode.ILLEGAL_MOVE, "alice", "PATCH", f"/{name}", json={"status": "ACTIVE"}
        )
        assert details == {"from": "ACTIVE", "to": "ACTIVE"}
        for _ in range(2):
            answer = await api("alice", "DELETE", f"/{name}")
            assert (answer.status_code, answer.content) == (204, b"")
        ended = (await api("alice", "GET", f"/{name}")).json()
        assert (ended["status"], ended["ended_at"]) == ("TERMINATED", ended["updated_at"])
        assert (await api("alice", "PATCH", f"/{name}", json={"metadata": {}})).json()["metadata"] == {}

    run(test)


def test_the_metadata_of_a_new_session_may_be_absent(run: Callable[[Test], None]) -> None:
    async def test(api: Api) -> None:
        bodies: tuple[dict[str, Any], ...] = ({}, {"content": b""}, {"json": {}}, {"json": {"metadata": {}}})
        for given in bodies:
            answer = await api("alice", "POST", **given)
            assert (answer.status_code, answer.json()["metadata"]) == (201, {})

    run(test)


def test_completed_and_failed_sessions_cannot_be_terminated(run: Callable[[Test], None]) -> None:
    async def test(api: Api) -> None:
        for moves in (["ACTIVE", "COMPLETED"], ["FAILED"]):
            place = "/" + (await api("alice", "POST")).json()["session_id"]
            for status in moves:
                assert (await api("alice", "PATCH", place, json={"status": status})).status_code == 200
            details = await api.refused(409, ErrorCode.ILLEGAL_MOVE, "alice", "DELETE", place)
            assert details == {"from": moves[-1], "to": "TERMINATED"}

    run(test)


BAD_CREATES: dict[str, tuple[bytes, str]] = {
    "null": (b'{"metadata": null}', "metadata"),
    "a list": (b'{"metadata": []}', "metadata"),
    "a text": (b'"x"', "body"),
    "another field": (b'{"status": "ACTIVE"}', "status"),
    "an operator": (b'{"metadata": {"a": {"$gt": 1}}}', "metadata.a"),
    "a dot": (b'{"metadata": {"a.b": 1}}', "metadata"),
    "too large a number": (b'{"metadata": {"a": 99999999999999999999}}', "metadata.a"),
    "too deep": (b'{"metadata": ' + b'{"a":' * 20 + b"1" + b"}" * 21, "metadata" + ".a" * 8),
    "too long": (b'{"metadata": {"a": "' + b"x" * 20_000 + b'"}}', "metadata.a"),
}


def test_bad_bodies_and_queries_name_their_field(run: Callable[[Test], None]) -> None:
    async def test(api: Api) -> None:
        place = "/" + (await api("alice", "POST")).json()["session_id"]
        before = (await api("alice", "GET", place)).json()
        for method, path in (("POST", ""), ("PATCH", place)):
            for name, (content, field) in BAD_CREATES.items():
                if method == "PATCH" and name == "another field":
                    continue
                details = await api.refused(400, ErrorCode.BAD_FIELD, "alice", method, path, content=content)
                assert details["field"] == field, (name, details)
            await api.refused(400, ErrorCode.BAD_JSON, "alice", method, path, content=b'{"metadata": {}')
        for body, field in (
            ({}, "body"),
            ({"status": None}, "status"),
            ({"status": "active"}, "status"),
            ({"status": "DELETED"}, "status"),
            ({"status": "ACTIVE", "user_id": "bob"}, "user_id"),
            ({"session_id": "x"}, "session_id"),
        ):
            details = await api.refused(400, ErrorCode.BAD_FIELD, "alice", "PATCH", place, json=body)
            assert details["field"] == field
        await api.refused(400, ErrorCode.BAD_JSON, "alice", "PATCH", place)
        assert (await api("alice", "GET", place)).json() == before
        for query, field in (
            ("page=0", "page"),
            ("page=1000001", "page"),
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("status=active", "status"),
            ("status=null", "status"),
            ("status=", "status"),
            ("user_id=", "user_id"),
            ("user_id=a%0A", "user_id"),
            ("user_id=%24ne", "user_id"),
            ("owner=alice", "owner"),
            ("page=1&page=2", "page"),
        ):
            details = await api.refused(400, ErrorCode.BAD_FIELD, "alice", "GET", f"?{query}")
            assert details["field"] == field, query

    run(test)


def test_who_may(run: Callable[[Test], None]) -> None:
    async def test(api: Api) -> None:
        place = "/" + (await api("alice", "POST")).json()["session_id"]
        nowhere = "/00000000-0000-4000-8000-000000000000"
        for who in ("bob", "bob:node_operator"):
            for path in (place, nowhere, "/short", "/a%20b%20c%20d%20e"):
                await api.refused(404, ErrorCode.NOT_FOUND, who, "GET", path)
                await api.refused(404, ErrorCode.NOT_FOUND, who, "PATCH", path, json={"status": "ACTIVE"})
                await api.refused(404, ErrorCode.NOT_FOUND, who, "PATCH", path, json={"metadata": {}})
                await api.refused(404, ErrorCode.NOT_FOUND, who, "DELETE", path)
            await api.refused(403, ErrorCode.ROLE_TOO_LOW, who, "GET", "?user_id=alice")
            assert (await api(who, "GET", "?user_id=bob")).json() == {
                "items": [],
                "page": 1,
                "limit": 20,
                "total": 0,
            }
        for method, path in (("POST", ""), ("GET", ""), ("GET", place), ("DELETE", place)):
            await api.refused(401, ErrorCode.NO_CREDENTIAL, "", method, path)
        for who in ("root:admin", "root:super_admin"):
            assert (await api(who, "GET", place)).json()["user_id"] == "alice"
            assert (await api(who, "PATCH", place, json={"metadata": {"by": who}})).status_code == 200
            listed = (await api(who, "GET", "?user_id=alice&status=INITIALIZING&limit=1&page=1")).json()
            assert [item["metadata"] for item in listed["items"]] == [{"by": who}]
            assert (listed["page"], listed["limit"], listed["total"]) == (1, 1, 1)
            assert (await api(who, "GET", "?user_id=root")).json()["total"] == 0
        assert (await api("root:admin", "DELETE", place)).status_code == 204
        assert (await api("root:admin", "GET", "?status=TERMINATED")).json()["total"] == 1
        assert (await api("alice", "GET", "?status=ACTIVE")).json()["items"] == []

    run(test)


def test_what_the_document_is_told() -> None:
    """The table of operations, by which the OpenAPI document is made."""
    service = SessionService.__new__(SessionService)
    told = {(each.method, each.path): each for each in sessions.resource(service).operations}
    one = PATH + "/{session_id}"
    assert {key: (each.status, each.has_location) for key, each in told.items()} == {
        ("POST", PATH): (201, True),
        ("GET", PATH): (200, False),
        ("GET", one): (200, False),
        ("PATCH", one): (200, False),
        ("DELETE", one): (204, False),
    }
    for (_, path), operation in told.items():
        assert operation.summary.endswith(".") and "\n" not in operation.summary
        assert ErrorCode.DEPENDENCY_AWAY in operation.errors
        assert (ErrorCode.NOT_FOUND in operation.errors) == (path == one)
        assert list(operation.parameters) == (["session_id"] if path == one else [])
    assert ErrorCode.ROLE_TOO_LOW in told["GET", PATH].errors
    for method in ("PATCH", "DELETE"):
        assert ErrorCode.ILLEGAL_MOVE in told[method, one].errors
    assert "replaces the\nstored object whole" in told["PATCH", one].description
