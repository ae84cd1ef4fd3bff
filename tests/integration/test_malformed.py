"""Every malformed request gets its clear error on both planes, and the next request is served."""

import re
import socket

import pytest

from tests.integration.conftest import error_of, say
from tests.integration.test_limits import token_for
from tests.support.servers import Backend, GatewayProcess

PLANES = {"data": b"/api/v1/nodes/x", "control": b"/api/v1/auth/verify"}


@pytest.fixture(scope="module")
def token() -> bytes:
    return token_for("u1").encode()


@pytest.fixture
def port(door: GatewayProcess) -> int:
    return door.port


HEADS: list[tuple[str, int, bytes]] = [
    (
        "space before the colon (5.1)",
        400,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello",
    ),
    ("bare LF (2.2)", 400, b"POST {path} HTTP/1.1\nHost: x\n\n"),
    ("bare CR (2.2)", 400, b"POST {path} HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n"),
    ("NUL in a value (5.5)", 400, b"POST {path} HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n"),
    ("folded line (5.2)", 400, b"POST {path} HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"),
    ("no Host (3.2)", 400, b"POST {path} HTTP/1.1\r\n\r\n"),
    ("two Hosts (3.2)", 400, b"POST {path} HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"),
    ("Host with a path (3.2)", 400, b"POST {path} HTTP/1.1\r\nHost: x/y\r\n\r\n"),
    ("HTTP/2.0 (2.3)", 505, b"POST {path} HTTP/2.0\r\nHost: x\r\n\r\n"),
    ("two spaces (3)", 400, b"POST  {path} HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("CONNECT (3.2.3)", 501, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"),
    (
        "length and coding (6.1)",
        400,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "gzip, chunked (6.1)",
        501,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ),
    (
        "chunked not last (6.1)",
        400,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    ),
    ("coding in 1.0 (6.1)", 400, b"POST {path} HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (
        "two lengths (6.2)",
        400,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    ),
    ("signed length (6.2)", 400, b"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx"),
    (
        "length of 20 digits (6.2)",
        400,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    ),
    (
        "an expectation unknown",
        417,
        b"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: tea\r\nContent-Length: 1\r\n\r\nx",
    ),
    ("a dot segment", 400, b"POST {path}/%2e%2e/x HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("an encoded slash", 400, b"POST {path}%2fx HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("bad UTF-8", 400, b"POST {path}/%ff HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a raw byte in the target", 400, b"POST {path}/\xff HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a TLS hello", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ("a long target", 414, b"POST {path}/" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a long field", 431, b"POST {path} HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9_000 + b"\r\n\r\n"),
    ("a long head", 431, b"POST {path} HTTP/1.1\r\nHost: x\r\n" + b"A: aaaaaaaaaaaaaa\r\n" * 1_000 + b"\r\n"),
    ("many fields", 431, b"POST {path} HTTP/1.1\r\nHost: x\r\n" + b"A: a\r\n" * 101 + b"\r\n"),
]

BODIES: list[tuple[str, bytes]] = [
    ("0x in a size", b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("a signed size", b"+5\r\nhello\r\n0\r\n\r\n"),
    ("an underscore", b"0_5\r\nhello\r\n0\r\n\r\n"),
    ("full-width digits", "５\r\nhello\r\n0\r\n\r\n".encode()),
    ("no CRLF behind the data", b"5\r\nhelloX0\r\n\r\n"),
    ("a bare LF", b"5\nhello\r\n0\r\n\r\n"),
]


def envelope_of(answer: bytes, status: int) -> str:
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    error = error_of(answer)
    assert error["service"] == "api-gateway"
    assert error["request_id"].encode() in answer.partition(b"\r\n\r\n")[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", error["timestamp"])
    return str(error["code"])


@pytest.mark.parametrize("plane", PLANES)
def test_every_malformed_head_is_refused_alone(port: int, plane: str) -> None:
    for name, status, head in HEADS:
        answer = say(port, head.replace(b"{path}", PLANES[plane]))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (name, answer[:200])
        envelope_of(answer, status)
        assert b"\r\nConnection: close\r\n" in answer or status == 400, name


@pytest.mark.parametrize("plane", PLANES)
def test_every_malformed_chunk_is_refused(port: int, plane: str, token: bytes, backend: Backend) -> None:
    for name, body in BODIES:
        head = (
            b"POST "
            + PLANES[plane]
            + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + token
            + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer = say(port, head + body)
        assert answer.startswith(b"HTTP/1.1 400 "), (name, answer[:200])
        envelope_of(answer, 400)
    assert not backend.forwarded, "a malformed body reached the backend whole"


def test_a_body_that_is_not_what_the_route_wants(port: int, token: bytes) -> None:
    bodies: list[tuple[bytes, str, str | None]] = [
        (b"{", "LUCID_ERR_1002", None),
        (b"\xff\xfe", "LUCID_ERR_1002", None),
        (b'{"token":' + b"[" * 5_000, "LUCID_ERR_1003", "token"),
        (b"[]", "LUCID_ERR_1003", "body"),
        (b"{}", "LUCID_ERR_1003", "token"),
        (b'{"token": 1}', "LUCID_ERR_1003", "token"),
        (b'{"token": "a", "more": 1}', "LUCID_ERR_1003", "more"),
    ]
    for body, code, field in bodies:
        head = (
            b"POST /api/v1/auth/verify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + token
            + b"\r\nContent-Length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
        )
        answer = say(port, head + body)
        assert envelope_of(answer, 400) == code, (body[:40], answer)
        if field is not None:
            assert error_of(answer)["details"]["field"] == field, (body, answer)


def test_a_refused_request_does_not_run_its_body_as_the_next_one(port: int) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    head = (
        b"POST /api/v1/auth/verify HTTP/1.1\r\nHost: x\r\nContent-Length: "
        + str(len(smuggled)).encode()
        + b"\r\n\r\n"
    )
    answer = say(
        port, head + smuggled + b"GET /no/such HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", seconds=2.0
    )
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"healthy" not in answer


def test_too_large_a_body_for_the_control_plane(port: int, token: bytes) -> None:
    head = b"POST /api/v1/auth/verify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token
    announced = say(port, head + b"\r\nContent-Length: 70000\r\n\r\n")
    assert envelope_of(announced, 413) == "LUCID_ERR_1006"
    streamed = say(
        port,
        head
        + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"fff0\r\n"
        + b"x" * 65_520
        + b"\r\nff\r\n"
        + b"x" * 255,
    )
    assert envelope_of(streamed, 413) == "LUCID_ERR_1006"


def test_pipelined_requests_of_both_planes_are_answered_in_order(port: int, token: bytes) -> None:
    bearer = b"\r\nAuthorization: Bearer " + token + b"\r\n"
    requests = [
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/v1/nodes/1 HTTP/1.1\r\nHost: x" + bearer + b"\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /api/v1/auth/verify HTTP/1.1\r\nHost: x"
        + bearer
        + b"Content-Length: 13\r\n\r\n"
        + b'{"token":"a"}',
        b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/v1/nodes/2 HTTP/1.1\r\nHost: x" + bearer + b"Connection: close\r\n\r\n",
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
        connection.sendall(b"".join(requests))
        received = b""
        while piece := connection.recv(65_536):
            received += piece
    statuses = re.findall(rb"HTTP/1\.1 (\d\d\d) ", received)
    assert statuses == [b"200", b"200", b"404", b"200", b"200", b"200"], received
