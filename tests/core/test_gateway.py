"""One exchange through all its phases: ids and fields towards both sides, answers of our own, needs, the one exit."""

import datetime as dt
import hashlib
import re
from typing import Any

import msgspec
import pytest

from lucid.core.exchange import Limit, Phase, Source
from lucid.core.rules.addresses import TrustedProxies
from lucid.core.rules.breaker import BreakerMode
from lucid.core.rules.cors import Cors
from lucid.errors import ErrorCode, GatewayError
from tests.support.talks import ANSWERED, GET, LOST, OK
from tests.support.wire import ALICE, PEER, Caller, World, in_loop

KEY = "lucid_" + "k" * 43
KEYHOLDER = msgspec.structs.replace(ALICE, via="api_key", expires_at=0.0)


def get(path: str, *fields: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"GET {path} HTTP/1.1", "Host: gw", *fields, "")).encode()


async def asked(
    *fields: str, path: str = "/open/a", world: World | None = None, peer: str = PEER
) -> list[str]:
    """The lines that the backend gets."""
    world = world or World()
    caller = Caller(world, peer)
    await caller.send(get(path, *fields))
    return world.backend.raw.decode("latin-1").split("\r\n")


def values(lines: list[str], name: str) -> list[str]:
    return [
        value for line in lines for key, _, value in [line.partition(": ")] if key.lower() == name.lower()
    ]


# --- what a backend is told -------------------------------------------------------------------------------

HIS_OWN = [
    "X-User-Id: root",
    "x-user-role: super_admin",
    "X_User_Id: root",
    "X-User_Id: root",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: evil",
    "X-Forwarded-Port: 1",
    "X-Forwarded-Prefix: /",
    "X-Real-IP: 10.0.0.1",
    "Forwarded: for=10.0.0.1",
    "Keep-Alive: 5",
    "TE: trailers",
    "Upgrade: websocket",
    "Proxy-Authorization: Basic a",
    "Connection: X-Secret, keep-alive",
    "X-Secret: 1",
]


@pytest.mark.parametrize(
    "credential, who",
    [
        ("", []),
        ("Authorization: Bearer alice", ["alice"]),
        (f"X-API-Key: {KEY}", ["alice"]),
        ("X-API-Key: bad", []),
    ],
)
@in_loop
async def test_identity_is_ours_to_tell(credential: str, who: list[str]) -> None:
    world = World()
    world.keys[hashlib.sha256(KEY.encode()).digest()] = KEYHOLDER
    lines = await asked(*HIS_OWN, "X-Kept: 1", *filter(None, [credential]), world=world)
    assert values(lines, "x-user-id") == who
    assert values(lines, "x-user-role") == ["user" for _ in who]
    assert values(lines, "x-kept") == ["1"]
    told = {line.partition(":")[0].lower() for line in lines[1:] if line}
    ours = {"host", "x-kept", "x-request-id", "traceparent", "x-forwarded-for", "x-forwarded-proto"}
    assert told == ours | {"x-forwarded-host", "via"} | ({"x-user-id", "x-user-role"} if who else set())
    assert (values(lines, "x-forwarded-proto"), values(lines, "x-forwarded-host")) == (["http"], ["gw"])
    assert values(lines, "x-forwarded-for") == [PEER]
    assert values(lines, "via") == ["1.1 lucid"]


@in_loop
async def test_it_is_told_anew_for_each_request_of_a_connection() -> None:
    world = World()
    caller = Caller(world, PEER)
    for credential in (
        "Authorization: Bearer alice",
        "",
        "Authorization: Bearer root",
        "Authorization: Bearer alice",
    ):
        await caller.send(get("/open/a", *filter(None, [credential])))
        world.upstreams[0].deliver(OK)
    assert [head.get("x-user-id") for head in world.backend.heads] == ["alice", None, "root", "alice"]
    assert [head.get("x-user-role") for head in world.backend.heads] == ["user", None, "admin", "user"]
    ids = [head["x-request-id"] for head in world.backend.heads]
    spans = [head["traceparent"] for head in world.backend.heads]
    assert len(set(ids)) == len(set(spans)) == 4


@pytest.mark.parametrize(
    "proxies, received, address, told",
    [
        (TrustedProxies(), "10.9.9.9", PEER, PEER),
        (TrustedProxies(["203.0.113.0/24"]), "198.51.100.1", "198.51.100.1", f"198.51.100.1, {PEER}"),
        (
            TrustedProxies(["203.0.113.0/24"]),
            "10.9.9.9, 198.51.100.1",
            "198.51.100.1",
            f"198.51.100.1, {PEER}",
        ),
        (TrustedProxies(hops=1), "10.9.9.9, 198.51.100.1", "198.51.100.1", f"198.51.100.1, {PEER}"),
        (TrustedProxies(["198.51.100.0/24"]), "10.9.9.9", PEER, PEER),
    ],
)
@in_loop
async def test_whose_address_it_is(proxies: TrustedProxies, received: str, address: str, told: str) -> None:
    world = World(proxies=proxies)
    lines = await asked(f"X-Forwarded-For: {received}", world=world)
    assert values(lines, "x-forwarded-for") == [told]
    assert world.opened[0].address == address


@in_loop
async def test_an_address_behind_a_proxy_is_told_anew_for_each_request() -> None:
    world = World(proxies=TrustedProxies(hops=1))
    caller = Caller(world, PEER)
    for address in ("198.51.100.1", "198.51.100.2"):
        await caller.send(get("/open/a", f"X-Forwarded-For: {address}"))
        world.upstreams[0].deliver(OK)
    assert [head["x-forwarded-for"] for head in world.backend.heads] == [
        f"198.51.100.1, {PEER}",
        f"198.51.100.2, {PEER}",
    ]


@pytest.mark.parametrize(
    "sent, kept",
    [("abc.D_9-", True), (64 * "a", True), (65 * "a", False), ("a b", False), ("", False), ("ä", False)],
)
@in_loop
async def test_request_ids(sent: str, kept: bool) -> None:
    world = World()
    caller = Caller(world, PEER)
    request = get("/open/a", "X-Request-ID: @").replace(b"@", sent.encode("latin-1"))
    await caller.send(request)
    world.upstreams[0].deliver(OK.replace(b"\r\n\r\n", b"\r\nX-Request-ID: backend\r\n\r\n"))
    known = world.backend.heads[0]["x-request-id"]
    assert caller.log.heads[0]["x-request-id"] == known == world.recorded[0].request_id
    assert (known == sent) is kept
    if not kept:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", known)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    "parent, continued",
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", True),
        (f"01-{TRACE}-00f067aa0ba902b7-01-more", True),
        (f"00-{TRACE}-00f067aa0ba902b7-01-more", False),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", False),
        (f"00-{TRACE}-{16 * '0'}-01", False),
        (f"00-{32 * '0'}-00f067aa0ba902b7-01", False),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", False),
        ("nonsense", False),
    ],
)
@in_loop
async def test_traces(parent: str, continued: bool) -> None:
    world = World()
    lines = await asked(f"traceparent: {parent}", "tracestate: a=1", "tracestate: b=2", world=world)
    (sent,) = values(lines, "traceparent")
    version, trace, span, flags = sent.split("-")
    assert (version, trace == TRACE) == ("00", continued)
    assert flags == ("01" if continued else "00")
    assert span not in (16 * "0", "00f067aa0ba902b7")
    assert re.fullmatch("[0-9a-f]{32}", trace)
    assert values(lines, "tracestate") == (["a=1", "b=2"] if continued else [])
    assert world.opened[0].trace_id == trace


@in_loop
async def test_ids_are_drawn_again_and_again() -> None:
    world = World()
    caller = Caller(world, PEER)
    await caller.send(200 * LOST)
    await world.settle_pipelines()
    assert len({x.request_id for x in world.recorded}) == 200
    assert len({x.trace_id for x in world.recorded}) == 200


# --- what a caller is told --------------------------------------------------------------------------------


@in_loop
async def test_limits_replace_the_backends_own() -> None:
    world = World(tiers=[Limit("authenticated", 1_000)])
    caller = Caller(world, PEER)
    await caller.send(get("/user/a", "Authorization: Bearer alice"))
    names = (
        "RateLimit",
        "RateLimit-Policy",
        "X-RateLimit-Limit",
        "x-ratelimit-remaining",
        "X-RateLimit-Reset",
    )
    fields = "".join(f"{name}: 1\r\n" for name in names).encode()
    world.upstreams[0].deliver(OK.replace(b"Content", fields + b"Content"))
    head = caller.log.heads[0]
    assert head["ratelimit-policy"] == '"authenticated";q=1000;w=60'
    assert re.fullmatch(r'"authenticated";r=999;t=\d+', head["ratelimit"])
    assert (head["x-ratelimit-limit"], head["x-ratelimit-remaining"]) == ("1000", "999")
    assert 1 <= int(head["x-ratelimit-reset"]) <= 61
    world.check()


@in_loop
async def test_limits_through_the_store_over_all_connections() -> None:
    world = World(tiers=[Limit("public", 5)])
    callers = [Caller(world, PEER) for _ in range(3)]
    for caller in 3 * callers:
        await caller.send(GET)
        if caller.door.exchange is not None:
            world.upstreams[-1].deliver(OK)
    statuses = [x.status for x in world.recorded]
    assert (statuses.count(200), statuses.count(429)) == (5, 4)
    refused = next(caller for caller in callers if "429" in caller.log.text)
    head = refused.log.heads[-1]
    assert head["ratelimit-policy"] == '"public";q=5;w=60'
    assert head["x-ratelimit-remaining"] == "0"
    assert 1 <= int(head["retry-after"]) <= 62
    assert "<LUCID_ERR_3001>" in refused.log.text
    assert [x.phase for x in world.recorded if x.status == 429] == 4 * [Phase.ADMIT]
    world.check()


@in_loop
async def test_a_date_is_added_where_it_is_missing_and_only_there() -> None:
    world = World()
    caller = Caller(world, PEER)
    for line in (b"", b"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"):
        await caller.send(GET)
        world.upstreams[0].deliver(OK.replace(b"Content", line + b"Content"))
    assert [head["date"] for head in caller.log.heads] == [
        "Sat, 10 Jan 2026 19:08:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 GMT",
    ]


INVALID = {"www-authenticate": 'Bearer realm="lucid", error="invalid_token"'}


@pytest.mark.parametrize(
    "request_, status, code, fields",
    [
        (get("/nowhere"), 404, "1004", {}),
        (get("/admin/a").replace(b"GET", b"PUT"), 405, "1005", {"allow": "GET, HEAD"}),
        (get("/user/a"), 401, "2001", {"www-authenticate": 'Bearer realm="lucid"'}),
        (
            get("/user/a", "Authorization: Bearer expired"),
            401,
            "2002",
            {"www-authenticate": 'Bearer realm="lucid", error="invalid_token"'},
        ),
        (
            get("/user/a", "Authorization: Bearer x"),
            401,
            "2003",
            {"www-authenticate": 'Bearer realm="lucid", error="invalid_token"'},
        ),
        (get("/admin/a", "Authorization: Bearer alice"), 403, "2004", {}),
        (get("/user/a", "Authorization: Bearer alice", f"X-API-Key: {KEY}"), 400, "2008", {}),
        (get("/open/%00"), 400, "1001", {}),
    ],
)
@in_loop
async def test_refusals_keep_the_connection(
    request_: bytes, status: int, code: str, fields: dict[str, str]
) -> None:
    world = World(tiers=[Limit("public", 100), Limit("authenticated", 1_000)])
    caller = Caller(world, PEER)
    await caller.send(request_ + GET)
    world.upstreams[0].deliver(OK)
    head = caller.log.heads[0]
    assert head[""].startswith(f"HTTP/1.1 {status} ")
    assert {name: head.get(name) for name in fields} == fields
    assert f"<LUCID_ERR_{code}>HTTP/1.1 200 OK" in caller.log.text
    assert ("ratelimit" in head) is (status in (401, 403) or code == "2008")
    assert world.recorded[0].failed_by is Source.CALLER
    assert not world.outcomes or len(world.outcomes) == 1
    world.check()


@in_loop
async def test_an_open_breaker_is_503_with_when_to_come_again() -> None:
    world = World()
    world.breaker.override(BreakerMode.OPEN, world.loop.now)
    caller = Caller(world, PEER)
    await caller.send(GET)
    assert caller.log.text == (
        "HTTP/1.1 503 Service Unavailable\nRetry-After: 30\nProxy-Status: lucid; error=destination_unavailable\n\n"
        "<LUCID_ERR_5002>"
    )
    assert not world.backend.text
    world.check()


@in_loop
async def test_a_refused_head_request_gets_no_body() -> None:
    world = World()
    caller = Caller(world, PEER)
    await caller.send(LOST.replace(b"GET", b"HEAD") + LOST)
    first, second = caller.log.raw.split(b"HTTP/1.1 404")[1:]
    assert b"Content-Length: " in first
    assert first.endswith(b"\r\n\r\n")
    assert b"LUCID_ERR_1004" in second
    world.check()


# --- CORS -------------------------------------------------------------------------------------------------

APP = "https://app.example"
BACKENDS_OWN = b"Access-Control-Allow-Origin: *\r\nAccess-Control-Max-Age: 1\r\n"


@pytest.mark.parametrize("origin, allowed", [(APP, [APP]), ("https://evil", []), ("", [])])
@in_loop
async def test_the_gateway_speaks_cors_in_the_backends_place(origin: str, allowed: list[str]) -> None:
    world = World(cors=Cors((APP,)))
    caller = Caller(world, PEER)
    await caller.send(get("/open/a", *([f"Origin: {origin}"] if origin else [])))
    world.upstreams[0].deliver(OK.replace(b"Content", BACKENDS_OWN + b"Vary: Accept\r\nContent"))
    lines = caller.log.raw.decode().split("\r\n")
    assert values(lines, "access-control-allow-origin") == allowed
    assert values(lines, "access-control-max-age") == []
    assert values(lines, "vary") == ["Accept", "Origin"]
    assert values(world.backend.raw.decode().split("\r\n"), "origin") == ([origin] if origin else [])


@in_loop
async def test_without_cors_backends_speak_for_themselves() -> None:
    world = World()
    caller = Caller(world, PEER)
    await caller.send(get("/open/a", f"Origin: {APP}"))
    world.upstreams[0].deliver(OK.replace(b"Content", BACKENDS_OWN + b"Content"))
    assert "Access-Control-Allow-Origin: *\nAccess-Control-Max-Age: 1\n" in caller.log.text


@in_loop
async def test_a_preflight_and_a_refusal_with_cors() -> None:
    world = World(cors=Cors((APP,), allow_credentials=True))
    caller = Caller(world, PEER)
    preflight = get("/admin/a", f"Origin: {APP}", "Access-Control-Request-Method: GET").replace(
        b"GET /", b"OPTIONS /"
    )
    await caller.send(preflight + get("/admin/a", f"Origin: {APP}"))
    first, second = caller.log.heads
    assert first[""] == "HTTP/1.1 204 No Content"
    assert first["access-control-allow-methods"] == "GET, HEAD"
    assert second["access-control-allow-origin"] == first["access-control-allow-origin"] == APP
    assert "retry-after" in second["access-control-expose-headers"]
    assert [x.status for x in world.recorded] == [204, 401]
    world.check()


@in_loop
async def test_a_preflights_answer_has_a_date() -> None:
    world = World()
    caller = Caller(world, PEER)
    await caller.send(b"OPTIONS * HTTP/1.1\r\nHost: gw\r\n\r\n")
    assert "date" in caller.log.heads[0]


# --- needs ------------------------------------------------------------------------------------------------


@in_loop
async def test_a_key_is_looked_up_and_remembered() -> None:
    world = World()
    world.keys[hashlib.sha256(KEY.encode()).digest()] = KEYHOLDER
    caller = Caller(world, PEER)
    for _ in range(2):
        await caller.send(get("/user/a", f"X-API-Key: {KEY}"))
        world.upstreams[0].deliver(OK)
    assert caller.log.text == 2 * ANSWERED
    assert len(world.looked_up) == 1
    await world.advance(11.0)
    await caller.send(get("/user/a", f"X-API-Key: {KEY}"))
    assert len(world.looked_up) == 2
    world.upstreams[0].deliver(OK)
    world.check()


@pytest.mark.parametrize(
    "error, told, code",
    [
        (GatewayError(ErrorCode.DEPENDENCY_AWAY, "mongodb", fields=(("Retry-After", "5"),)), "503", "5004"),
        (KeyError("oops"), "500", "5006"),
    ],
)
@in_loop
async def test_a_look_up_that_fails(error: Exception, told: str, code: str, caplog: Any) -> None:
    world = World()
    world.keys[hashlib.sha256(KEY.encode()).digest()] = error  # type: ignore[assignment]
    caller = Caller(world, PEER)
    await caller.send(get("/user/a", f"X-API-Key: {KEY}") + LOST)
    assert caller.log.heads[0][""].startswith(f"HTTP/1.1 {told}")
    assert caller.log.heads[0].get("retry-after") == ("5" if told == "503" else None)
    assert f"<LUCID_ERR_{code}>" in caller.log.text
    assert len(caller.log.heads) == 2
    assert world.recorded[0].failed_by is Source.GATEWAY
    assert bool(caplog.records) is (told == "500"), "a fault of ours leaves a traceback"
    world.check()


@in_loop
async def test_a_look_up_that_fails_makes_its_caller_public_where_all_may_come() -> None:
    world = World()
    away = GatewayError(ErrorCode.DEPENDENCY_AWAY)
    world.keys[hashlib.sha256(KEY.encode()).digest()] = away  # type: ignore[assignment]
    caller = Caller(world, PEER)
    await caller.send(get("/open/a", f"X-API-Key: {KEY}"))
    assert "X-User-Id" not in world.backend.text
    world.upstreams[0].deliver(OK)
    assert caller.log.text == ANSWERED
    assert len(world.looked_up) == 1
    world.check()


@in_loop
async def test_a_key_is_not_remembered_beyond_its_own_end() -> None:
    world = World()
    now = dt.datetime(2026, 1, 10, 19, 8, tzinfo=dt.UTC).timestamp()
    ending = msgspec.structs.replace(KEYHOLDER, expires_at=now + 2.0)
    world.keys[hashlib.sha256(KEY.encode()).digest()] = ending
    caller = Caller(world, PEER)
    for seconds, looked_up in ((0.0, 1), (1.9, 1), (0.2, 2)):
        await world.advance(seconds)
        await caller.send(get("/user/a", f"X-API-Key: {KEY}"))
        world.upstreams[0].deliver(OK)
        assert len(world.looked_up) == looked_up
    world.check()


@in_loop
async def test_what_arrives_while_a_need_is_met_waits_its_turn() -> None:
    world = World()
    world.keys[hashlib.sha256(KEY.encode()).digest()] = KEYHOLDER
    caller = Caller(world, PEER)
    caller.transport.deliver(get("/user/a", f"X-API-Key: {KEY}"))
    caller.transport.deliver(GET)
    assert world.backend.text == ""
    await world.settle()
    for _ in range(2):
        world.upstreams[0].deliver(OK)
    assert caller.log.text == 2 * ANSWERED
    world.check()


@in_loop
async def test_a_fault_of_ours_costs_no_connection(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("lucid.core.wire.forwarding.forward_path", lambda *_: 1 / 0)
    world = World()
    await world.warm()
    caller = Caller(world, PEER)
    await caller.send(GET)
    assert caller.log.text == "HTTP/1.1 500 Internal Server Error\n\n<LUCID_ERR_5006>"
    assert caplog.records
    world.check()


# --- the one exit -----------------------------------------------------------------------------------------


@in_loop
async def test_finish_records_once_and_settles_what_is_open() -> None:
    world = World()
    caller = Caller(world, PEER)
    await caller.send(GET)
    x = world.opened[0]
    world.gateway.abandon(x)
    world.gateway.abandon(x)
    world.gateway.finish(x)
    assert (x.status, x.failed_by, x.finished) == (499, Source.CALLER, True)
    assert world.recorded == [x]
    assert world.outcomes == ["neutral"]


@in_loop
async def test_error_refusals_say_what_the_error_says() -> None:
    world = World()
    error = GatewayError(ErrorCode.CONFLICT, "taken", details={"field": "email"}, fields=(("A", "b"),))
    refusal = world.gateway.error_refusal(error)
    assert (refusal.code, refusal.message, refusal.details) == (
        ErrorCode.CONFLICT,
        "taken",
        {"field": "email"},
    )
    assert (refusal.fields, refusal.source, refusal.close) == ((("A", "b"),), Source.CALLER, False)
    assert world.gateway.error_refusal(GatewayError(ErrorCode.DEPENDENCY_AWAY)).source is Source.GATEWAY
