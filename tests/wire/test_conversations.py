"""Conversations through a connection: what the caller and the backend say, and what each of them is told.

Every one is played whole, cut at every boundary between two bytes, and byte by byte (`replay`), with the same
outcome, one record per exchange, each permit settled once, and no connection left in use. Backends that
misbehave are in test_upstream.py, fields and envelopes in tests/core/test_gateway.py.
"""

import pytest

from lucid.core.wire.connection import HEADS_AT_ONCE
from tests.support.talks import (
    ANSWERED,
    ASKED,
    CHUNKED,
    CODED,
    EOF,
    EXPECTING,
    GET,
    LOST,
    NOT_FOUND,
    OK,
    OWN,
    POST,
    POSTED,
    TO_CODED,
    Talk,
    backend,
    caller,
    replay,
    talks,
    to_backend,
    to_caller,
)
from tests.support.wire import PEER, Caller, World, in_loop


def one(method: str, answer: bytes, told: str) -> Talk:
    """A request without a body, its answer, and what the caller is told; the connections are kept."""
    again = (caller(GET), to_backend(ASKED), backend(OK), to_caller(ANSWERED))
    return Talk(
        f"{method} {answer.split(b' ', 1)[1][:20].decode()!r} {told[-20:]!r}",
        caller(f"{method} /open/a HTTP/1.1\r\nHost: gw\r\n\r\n".encode()),
        to_backend(f"{method} /open/a HTTP/1.1\nHost: core:8084\n\n"),
        backend(answer),
        to_caller(told),
        *again,
    )


@talks(
    one("GET", OK, ANSWERED),
    one("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    one(
        "GET",
        b"HTTP/1.1 201\r\nX-A:b \r\nContent-Length:1\r\n\r\n!",
        "HTTP/1.1 201 \nX-A: b\nContent-Length: 1\n\n!",
    ),
    one(
        "GET",
        CHUNKED + b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: t\r\n\r\n",
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nabcde<end>",
    ),
    one("GET", CHUNKED + b"0\r\n\r\n", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n<end>"),
    one("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HTTP/1.1 200 OK\nContent-Length: 9\n\n"),
    one("HEAD", CHUNKED, "HTTP/1.1 200 OK\n\n"),
    one("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\n\n"),
    one("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\n\n"),
    one(
        "GET",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
        "HTTP/1.1 304 Not Modified\nContent-Length: 7\n\n",
    ),
    one(
        "GET",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK,
        "HTTP/1.1 103 Early Hints\nLink: </a.css>\n\n" + ANSWERED,
    ),
    one(
        "GET",
        b"HTTP/1.1 200 OK\r\nConnection: X-B\r\nX-B: 1\r\nKeep-Alive: 5\r\nA: 2\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\nA: 2\nContent-Length: 0\n\n",
    ),
)
def test_an_answer(talk: Talk) -> None:
    replay(talk)


@talks(
    Talk(
        "until the backend closes",
        caller(GET),
        to_backend(ASKED),
        backend(b"HTTP/1.1 200 OK\r\n\r\nab"),
        to_caller("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nab"),
        backend(b"cd"),
        backend(EOF),
        to_caller("cd<end>"),
        to_backend("<closed>"),
        caller(GET),
        to_backend("<connection 2>" + ASKED),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "nothing until the backend closes",
        caller(GET),
        backend(b"HTTP/1.0 200 OK\r\n\r\n"),
        backend(EOF),
        to_backend(ASKED + "<closed>"),
        to_caller("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n<end>"),
    ),
    Talk(
        "the backend closes behind its answer",
        caller(GET),
        backend(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"),
        to_backend(ASKED + "<closed>"),
        to_caller(ANSWERED),
    ),
    Talk(
        "the first connection is dialled",
        caller(GET),
        to_backend(ASKED),
        backend(OK),
        to_caller(ANSWERED),
        warm=0,
    ),
    Talk(
        "the target's authority counts",
        caller(b"GET http://gw/open/a?b HTTP/1.1\r\nHost: gw\r\n\r\n"),
        to_backend("GET /open/a?b HTTP/1.1\nHost: core:8084\n\n"),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "the canonical form is what goes on",
        caller(b"GET /open/%61%2a/?%61 HTTP/1.1\r\nHost: gw\r\n\r\n"),
        to_backend("GET /open/a%2A/?%61 HTTP/1.1\nHost: core:8084\n\n"),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "an empty line before a request is ignored",
        caller(b"\r\n" + GET),
        to_backend(ASKED),
        backend(OK),
        to_caller(ANSWERED),
        caller(b"\r\n" + LOST),
        to_caller(NOT_FOUND),
    ),
    Talk(
        "1.0: closes by itself",
        caller(b"GET /open/a HTTP/1.0\r\n\r\n"),
        to_backend(ASKED),
        backend(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi<closed>"),
    ),
    Talk(
        "1.0: kept when asked for",
        caller(b"GET /open/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
        to_backend(ASKED),
        backend(OK),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: keep-alive\n\nhi"),
        caller(b"GET /open/a HTTP/1.0\r\n\r\n"),
        to_backend(ASKED),
        backend(OK),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi<closed>"),
    ),
    Talk(
        "1.0: no chunks, so the body ends with the connection",
        caller(b"GET /open/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
        backend(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"),
        to_backend(ASKED),
        to_caller("HTTP/1.1 200 OK\nConnection: close\n\nabc<closed>"),
    ),
    Talk(
        "1.1: closes when asked for",
        caller(b"GET /open/a HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n" + GET),
        to_backend(ASKED),
        backend(OK),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi<closed>"),
    ),
    Talk(
        "pipelined: answered in order, one at a time",
        caller(GET + LOST + GET.replace(b"/a", b"/b") + b"GET /own HTTP/1.1\r\nHost: gw\r\n\r\n"),
        to_backend(ASKED),
        to_caller(""),
        backend(OK),
        to_caller(ANSWERED + NOT_FOUND),
        to_backend(ASKED.replace("/a", "/b")),
        backend(OK),
        to_caller(ANSWERED + "HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ),
    Talk(
        "a half-closed caller gets its answer",
        caller(GET),
        caller(EOF),
        to_caller(""),
        backend(OK),
        to_backend(ASKED),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\n\nhi<closed>"),
    ),
    Talk("a half-closed idle connection ends", caller(EOF), to_caller("<closed>")),
    Talk("half a head and then the end", caller(GET[:9]), caller(EOF), to_caller("<closed>")),
)
def test_messages(talk: Talk) -> None:
    replay(talk)


EARLY = "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi"
BROKEN_CHUNK = "HTTP/1.1 400 Bad Request\nConnection: close\n\n<LUCID_ERR_1008>"
TOO_LARGE = "HTTP/1.1 413 Content Too Large\n{}\n<LUCID_ERR_1006>"


@talks(
    Talk(
        "a length",
        caller(POST + GET),
        to_backend(POSTED),
        backend(OK),
        to_backend(ASKED),
        backend(OK),
        to_caller(2 * ANSWERED),
    ),
    Talk("dialled", caller(POST), to_backend(POSTED), backend(OK), to_caller(ANSWERED), warm=0),
    Talk(
        "no content",
        caller(b"PUT /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 0\r\n\r\n"),
        to_backend("PUT /open/a HTTP/1.1\nHost: core:8084\nContent-Length: 0\n\n"),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "chunks are framed anew, trailers and extensions dropped",
        caller(CODED + b"002;a=b\r\nhe\r\n3\r\nllo\r\n0\r\nX-User-Id: root\r\n\r\n" + GET),
        to_backend(TO_CODED + "hello<end>"),
        backend(OK),
        to_backend(ASKED),
        backend(OK),
        to_caller(2 * ANSWERED),
    ),
    Talk(
        "no chunks at all",
        caller(CODED + b"0\r\n\r\n"),
        to_backend(TO_CODED + "<end>"),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "Expect: the backend decides",
        caller(EXPECTING),
        to_backend("POST /open/a HTTP/1.1\nHost: core:8084\nContent-Length: 5\nExpect: 100-continue\n\n"),
        backend(b"HTTP/1.1 100 Continue\r\n\r\n"),
        to_caller("HTTP/1.1 100 Continue\n\n"),
        caller(b"hello"),
        to_backend("hello"),
        backend(OK),
        to_caller(ANSWERED),
    ),
    Talk(
        "Expect: the backend's final answer instead",
        caller(EXPECTING),
        backend(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n"),
        to_backend(
            "POST /open/a HTTP/1.1\nHost: core:8084\nContent-Length: 5\nExpect: 100-continue\n\n<closed>"
        ),
        to_caller("HTTP/1.1 417 No\nContent-Length: 0\nConnection: close\n\n<eof>"),
    ),
    Talk(
        "Expect: a refusal instead",
        caller(EXPECTING.replace(b"/open/a", b"/user/a")),
        to_caller(
            'HTTP/1.1 401 Unauthorized\nWWW-Authenticate: Bearer realm="lucid"\nConnection: close\n\n'
            "<LUCID_ERR_2001><eof>"
        ),
    ),
    Talk(
        "an early answer ends both connections",
        caller(POST[:-2]),
        to_backend(POSTED[:-2]),
        backend(OK),
        to_backend("<closed>"),
        to_caller(EARLY + "<eof>"),
        caller(b"lo"),
        ("time", 1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "an early answer that goes on while the body does",
        caller(POST[:-2]),
        backend(OK[:-1]),
        to_caller(EARLY[:-1]),
        caller(b"lo"),
        to_backend(POSTED),
        backend(b"i"),
        to_caller("i<closed>"),
    ),
    Talk(
        "an early answer in chunks, the caller's body left over",
        caller(CODED + b"1\r\na\r\n"),
        backend(CHUNKED + b"1\r\nx\r\n"),
        to_caller("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nConnection: close\n\nx"),
        backend(b"0\r\n\r\n"),
        to_backend(TO_CODED + "a<closed>"),
        to_caller("<end><eof>"),
    ),
    Talk(
        "announced too large: the small rest is read, the next request served",
        caller(b"POST /tiny/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 11\r\n\r\n" + b"GET /x HTTP" + LOST),
        to_caller(TOO_LARGE.format("") + NOT_FOUND),
    ),
    Talk(
        "announced too large: the rest is too much to read",
        caller(b"POST /tiny/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 65537\r\n\r\n" + GET),
        to_caller(TOO_LARGE.format("Connection: close\n") + "<eof>"),
        ("time", 1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "too large in mid-stream",
        caller(b"POST /tiny/a HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n"),
        to_backend("POST /tiny/a HTTP/1.1\nHost: core:8084\nTransfer-Encoding: chunked\n\n12345678"),
        caller(b"3\r\n"),
        caller(b"abc"),
        caller(b"\r\n" + GET),
        to_caller(TOO_LARGE.format("Connection: close\n") + "<eof>"),
        to_backend("<closed>"),
        # What is too much is never passed on; how much of the rest is, depends on the cut.
        loose=True,
    ),
    Talk(
        "a bad chunk in mid-body",
        caller(CODED + b"2\r\nhe\r\n"),
        caller(b"0x1\r\n"),
        caller(GET),
        to_backend(TO_CODED + "he<closed>"),
        to_caller(BROKEN_CHUNK + "<eof>"),
        ("time", 1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "a bad chunk in the first piece",
        caller(CODED + b"0x1\r\n" + GET),
        to_backend("<closed>"),
        to_caller(BROKEN_CHUNK + "<eof>"),
        loose=True,
    ),
    Talk(
        "a body that was broken off",
        caller(POST[:-2]),
        caller(EOF),
        to_backend(POSTED[:-2] + "<closed>"),
        to_caller("<closed>"),
    ),
)
def test_bodies(talk: Talk) -> None:
    replay(talk)


OPTIONS = b"OPTIONS * HTTP/1.1\r\nHost: gw\r\n"
ALLOW = "HTTP/1.1 204 No Content\nAllow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\n{}\n"
ECHOED = "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"


@talks(
    Talk("a length", caller(OWN + b"Content-Length: 5\r\n\r\nhello" + LOST), to_caller(ECHOED + NOT_FOUND)),
    Talk(
        "chunked",
        caller(OWN + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n" + LOST),
        to_caller(ECHOED + NOT_FOUND),
    ),
    Talk(
        "Expect",
        caller(OWN + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
        to_caller("HTTP/1.1 100 Continue\n\n"),
        caller(b"hello"),
        to_caller(ECHOED),
    ),
    Talk(
        "1.0 is told no 100",
        caller(OWN.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
        to_caller(""),
        caller(b"hello"),
        to_caller(ECHOED.replace("\n\n", "\nConnection: close\n\n") + "<closed>"),
    ),
    Talk(
        "a bad chunk",
        caller(OWN + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab" + LOST),
        to_caller(BROKEN_CHUNK + "<eof>"),
    ),
    Talk(
        "too large in mid-stream",
        caller(OWN + b"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + 65_537 * b"x"),
        to_caller(TOO_LARGE.format("Connection: close\n") + "<eof>"),
    ),
    Talk("broken off", caller(OWN + b"Content-Length: 5\r\n\r\nhell"), caller(EOF), to_caller("<closed>")),
    Talk(
        "both planes in turn",
        caller(OWN + b"Content-Length: 5\r\n\r\nhello" + POST + OWN + b"\r\n"),
        to_backend(POSTED),
        backend(OK),
        to_caller(ECHOED + ANSWERED + "HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ),
    Talk("OPTIONS *", caller(OPTIONS + b"\r\n" + LOST), to_caller(ALLOW.format("") + NOT_FOUND)),
    Talk(
        "the body of OPTIONS * is no request",
        caller(OPTIONS + b"Content-Length: 35\r\n\r\n" + LOST + LOST),
        to_caller(ALLOW.format("") + NOT_FOUND),
    ),
    Talk(
        "1.0: OPTIONS * closes as it must",
        caller(OPTIONS.replace(b"1.1", b"1.0") + b"\r\n"),
        to_caller(ALLOW.format("Connection: close\n") + "<closed>"),
    ),
)
def test_own_routes(talk: Talk) -> None:
    replay(talk)


@pytest.mark.parametrize(
    "status, request_",
    [
        ("400 Bad Request", b"GET / HTTP/1.1\nHost: gw\r\n\r\n"),
        ("400 Bad Request", b" GET / HTTP/1.1\r\nHost: gw\r\n\r\n"),
        ("400 Bad Request", b"\r\n\r\n" + GET),
        ("400 Bad Request", b"GET / HTTP/1.1\r\n\r\n"),
        ("400 Bad Request", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
        ("400 Bad Request", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
        ("400 Bad Request", b"GET / HTTP/1.1\r\nHost: a\r\n b: c\r\n\r\n"),
        ("400 Bad Request", b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n"),
        (
            "400 Bad Request",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0",
        ),
        ("400 Bad Request", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n0"),
        ("417 Expectation Failed", b"POST / HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 1\r\n\r\n0"),
        ("501 Not Implemented", b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"),
        ("501 Not Implemented", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0"),
        ("505 HTTP Version Not Supported", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    ],
)
def test_a_head_that_cannot_be_believed_ends_the_connection(status: str, request_: bytes) -> None:
    code = "LUCID_ERR_5007" if status.startswith("501") else "LUCID_ERR_1001"
    told = f"HTTP/1.1 {status}\nConnection: close\n\n<{code}><eof>"
    replay(Talk(status, caller(request_ + LOST), to_caller(told), ("time", 1.0), to_caller("<closed>")))


@pytest.mark.parametrize(
    "code, request_",
    [
        ("414 URI Too Long", b"GET /" + 9_000 * b"a" + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
        (
            "431 Request Header Fields Too Large",
            b"GET / HTTP/1.1\r\nHost: a\r\nA: " + 9_000 * b"a" + b"\r\n\r\n",
        ),
        (
            "431 Request Header Fields Too Large",
            b"GET / HTTP/1.1\r\nHost: a\r\n" + 101 * b"A: a\r\n" + b"\r\n",
        ),
        (
            "431 Request Header Fields Too Large",
            b"GET / HTTP/1.1\r\nHost: a\r\n" + 20 * (b"A: " + 999 * b"a" + b"\r\n") + b"\r\n",
        ),
        (
            "431 Request Header Fields Too Large",
            b"GET / HTTP/1.1\r\nHost: a\r\n" + 30 * (b"A: " + 999 * b"a" + b"\r\n"),
        ),
    ],
)
def test_a_head_too_large(code: str, request_: bytes) -> None:
    told = f"HTTP/1.1 {code}\nConnection: close\n\n<LUCID_ERR_1007><eof>"
    replay(Talk(code, caller(request_), to_caller(told)))


@in_loop
async def test_a_pipeline_of_refused_requests_does_not_recurse() -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(500 * LOST + GET)
    assert end.log.text == HEADS_AT_ONCE * NOT_FOUND, "then others have their turn"
    await world.settle_pipelines()
    assert end.log.text == 500 * NOT_FOUND
    world.upstreams[0].deliver(OK)
    assert end.log.text == 500 * NOT_FOUND + ANSWERED
    world.check()


@in_loop
async def test_a_half_closed_caller_gets_the_answers_to_all_that_it_asked() -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(GET + LOST + GET + GET[:9])
    await end.half_close()
    for _ in range(2):
        assert not end.transport.closing
        world.upstreams[0].deliver(OK)
        await world.settle()
    assert [x.status for x in world.recorded] == [200, 404, 200]
    assert [head[""][9:12] for head in end.log.heads] == ["200", "404", "200"]
    assert end.log.text.endswith("<closed>")
    world.check()
