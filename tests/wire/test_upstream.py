"""Backends that misbehave.

What a backend says is held to the rules that callers are held to; whatever it does, its connection is either
certainly clean and used again, or closed, and the next caller never hears of it.
"""

import asyncio
import socket
import ssl

import pytest

from lucid.core.exchange import Source
from tests.support.talks import (
    ANSWERED,
    ASKED,
    CHUNKED,
    EOF,
    GET,
    OK,
    POST,
    POSTED,
    RESET,
    Step,
    Talk,
    backend,
    caller,
    perform,
    replay,
    talks,
    to_backend,
    to_caller,
)
from tests.support.wire import PEER, Caller, World, in_loop

BAD = "HTTP/1.1 502 Bad Gateway\nProxy-Status: lucid; error={}\n\n<LUCID_ERR_5001>"
BROKEN = BAD.format("http_protocol_error")
CUT_OFF = BAD.format("http_response_incomplete")
STALE = BAD.format("connection_terminated")
LATE = "HTTP/1.1 504 Gateway Timeout\nProxy-Status: lucid; error=connection_timeout\n\n<LUCID_ERR_5003>"
FULL = (
    "HTTP/1.1 503 Service Unavailable\nRetry-After: 1\n"
    "Proxy-Status: lucid; error=connection_limit_reached\n\n<LUCID_ERR_5002>"
)
BEGUN = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"


def failed(*outcomes: str) -> Step:
    return "outcomes", list(outcomes or ("failure",))


BAD_CERTIFICATE = ssl.SSLCertVerificationError(1, "bad certificate")
BAD_CERTIFICATE.reason = "CERTIFICATE_VERIFY_FAILED"  # as the one has that OpenSSL makes


# --- before an answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, told",
    [
        (ConnectionRefusedError(111, "refused"), BAD.format("connection_refused")),
        (OSError(113, "no route"), BAD.format("connection_refused")),
        (socket.gaierror(-2, "unknown"), BAD.format("dns_error")),
        (BAD_CERTIFICATE, BAD.format("tls_protocol_error")),
        (TimeoutError(), LATE),
    ],
)
def test_not_connected(error: Exception, told: str) -> None:
    talk = Talk(
        "", caller(GET), to_caller(told), failed(), caller(GET), to_caller(told), warm=0, refuses=error
    )
    replay(talk)


@in_loop
async def test_not_connected_for_a_reason_that_nobody_thought_of() -> None:
    world = World(refuses=UnicodeError("label empty or too long"))  # as getaddrinfo has it of a long name
    end = Caller(world, PEER)
    await end.send(GET)
    assert end.log.text.startswith("HTTP/1.1 50")
    world.check()


@in_loop
async def test_not_connected_in_time() -> None:
    world = World()
    world.hangs = asyncio.Event()
    end = Caller(world, PEER)
    await end.send(GET)
    await world.advance(1.5)
    assert end.log.text == ""
    await world.advance(0.5)
    await world.breathe()
    assert end.log.text == LATE
    assert world.outcomes == ["failure"]
    world.check()


@in_loop
async def test_no_place_in_the_pool_is_nobodys_failure() -> None:
    world = World(max_connections=1)
    one, two, three = (Caller(world, PEER) for _ in range(3))
    await one.send(GET)
    await two.send(GET)
    await three.send(POST)
    world.upstreams[0].deliver(OK)
    await world.settle()
    assert world.backend.text == ASKED + ASKED, "who waited first is first"
    await world.advance(2.0)
    await world.breathe()
    assert three.log.text == FULL
    world.upstreams[0].deliver(OK)
    assert world.outcomes == ["success", "neutral", "success"]
    world.check()


ENDS = [pytest.param(EOF, id="closed"), pytest.param(RESET, id="reset")]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("said", [b"", OK[:9], OK[:-3], b"HTTP/1.1 103 Early Hints\r\n\r\n"])
def test_a_fresh_connection_ends_before_the_answer(said: bytes, end: str) -> None:
    hints = "HTTP/1.1 103 Early Hints\n\n" if b"103" in said else ""
    said_steps = [backend(said)] if said else []
    replay(
        Talk(
            "",
            caller(GET),
            *said_steps,
            backend(end),
            to_backend(ASKED + ("<closed>" if end == EOF else "")),
            to_caller(hints + CUT_OFF),
            failed(),
            warm=0,
        )
    )


@pytest.mark.parametrize("end", ENDS)
def test_a_kept_connection_that_was_dead_is_tried_once_more(end: str) -> None:
    closed = "<closed>" if end == EOF else ""
    replay(
        Talk(
            "",
            caller(GET),
            backend(end),
            to_backend(f"{ASKED}{closed}<connection 2>{ASKED}"),
            to_caller(""),
            backend(OK),
            to_caller(ANSWERED),
            failed("success"),
        )
    )


@pytest.mark.parametrize("end", ENDS)
def test_but_not_a_second_time_nor_for_what_may_have_been_done(end: str) -> None:
    closed = "<closed>" if end == EOF else ""
    replay(
        Talk(
            "",
            caller(GET),
            backend(end),
            backend(end),
            to_backend(f"{ASKED}{closed}<connection 2>{ASKED}{closed}"),
            to_caller(CUT_OFF),
            failed(),
        )
    )
    replay(Talk("", caller(POST), backend(end), to_backend(POSTED + closed), to_caller(STALE), failed()))
    empty = POST[:-5].replace(b"5", b"0"), POSTED[:-5].replace("5", "0")
    replay(
        Talk("", caller(empty[0]), backend(end), to_backend(empty[1] + closed), to_caller(STALE), failed())
    )
    partly = caller(GET), backend(OK[:9]), backend(end)
    replay(Talk("", *partly, to_backend(ASKED + closed), to_caller(CUT_OFF), failed()))
    hint = caller(GET), backend(b"HTTP/1.1 103 Early Hints\r\n\r\n"), backend(end)
    told = to_caller("HTTP/1.1 103 Early Hints\n\n" + CUT_OFF)
    replay(Talk("", *hint, to_backend(ASKED + closed), told, failed()))


@in_loop
async def test_several_dead_connections_do_not_use_up_the_one_more_try() -> None:
    world = World()
    await world.warm(3)
    end = Caller(world, PEER)
    await end.send(GET)
    for _ in range(3):
        await world.settle()
        next(t for t in reversed(world.upstreams[:3]) if not t.lost).reset()
        await world.settle()
    world.upstreams[-1].deliver(OK)
    assert end.log.text == ANSWERED
    world.check()


# --- broken answers --------------------------------------------------------------------------------------

OK_LINE = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"\r\n" + OK,
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nhi",
        OK_LINE + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
        OK_LINE + b"Content-Length: 2, 2\r\n\r\nhi",
        OK_LINE + b"Content-Length: -2\r\n\r\n",
        OK_LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK_LINE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK_LINE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK_LINE + b"X-A : b\r\n\r\n",
        OK_LINE + b"X-A: b\r\n c\r\n\r\n",
        OK_LINE + b"X-A: \x00\r\n\r\n",
        OK_LINE + b"X-A: b\rX-B: c\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        OK_LINE + b"X-A: " + 65_536 * b"a" + b"\r\n\r\n",
    ],
)
def test_a_head_that_is_not_believed(answer: bytes) -> None:
    replay(
        Talk(
            "",
            caller(GET + GET),
            backend(answer),
            to_backend(f"{ASKED}<closed><connection 2>{ASKED}"),
            to_caller(BROKEN),
            failed(),
            loose=True,
        )
    )


@pytest.mark.parametrize("count, told", [(8, ANSWERED), (9, BROKEN)])
def test_interim_answers_are_bounded(count: int, told: str) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    closed = "" if count == 8 else "<closed>"
    before = 8 * "HTTP/1.1 103 Early Hints\n\n"
    replay(
        Talk(
            "",
            caller(GET),
            backend(count * hints),
            backend(OK),
            to_backend(ASKED + closed),
            to_caller(before + told),
            loose=True,
        )
    )


CODED_LINE = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "chunks", [b"x\r\n", b"0x1\r\na\r\n", b"1\nabc", b"-1\r\n", b"1\r\nabc\r\n", b"0\r\nbad trailer\r\n\r\n"]
)
def test_chunks_that_are_not_believed(chunks: bytes) -> None:
    at_once = Talk(
        "",
        caller(GET),
        backend(CHUNKED + chunks),
        to_backend(ASKED + "<closed>"),
        to_caller(BROKEN),
        failed(),
    )
    perform(at_once)
    # Once the head has gone out, there is no other way to say it than to break off.
    heard, told = to_backend(ASKED + "<closed>"), to_caller(BEGUN + "<aborted>")
    later = Talk("", caller(GET), backend(CHUNKED), backend(chunks), heard, told, failed("success"))
    perform(later)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "said, told", [(OK[:-1], ANSWERED[:-1]), (CHUNKED, BEGUN), (CHUNKED + b"2\r\nab\r\n", BEGUN + "ab")]
)
def test_an_answer_that_breaks_off_breaks_off_visibly(said: bytes, told: str, end: str) -> None:
    closed = "<closed>" if end == EOF else ""
    replay(
        Talk(
            "",
            caller(GET),
            backend(said),
            backend(end),
            to_backend(ASKED + closed),
            to_caller(told + "<aborted>"),
        )
    )


def test_an_answer_until_the_close_that_is_reset_breaks_off_visibly() -> None:
    replay(
        Talk(
            "",
            caller(GET),
            backend(OK_LINE + b"\r\nab"),
            backend(RESET),
            to_backend(ASKED),
            to_caller(BEGUN + "ab<aborted>"),
        )
    )


@in_loop
async def test_a_body_that_breaks_is_one_failure_of_the_breaker() -> None:
    world = World(breaker={"failure_threshold": 2})
    end = Caller(world, PEER)
    await end.send(GET)
    world.upstreams[0].deliver(OK[:-1])
    world.upstreams[0].reset()
    await world.settle()
    snapshot = world.breaker.snapshot(world.loop.now)
    assert (snapshot.broken_bodies, snapshot.failures, snapshot.state.value) == (1, 1, "closed")
    assert [(x.status, x.failed_by) for x in world.recorded] == [(200, Source.BACKEND)]
    world.check()


@talks(
    Talk(
        "behind its answer",
        caller(GET),
        backend(OK + b"!"),
        to_caller(ANSWERED),
        to_backend(ASKED + "<closed>"),
    ),
    Talk(
        "a second answer",
        caller(GET + GET),
        backend(OK + OK),
        to_caller(ANSWERED),
        to_backend(f"{ASKED}<closed><connection 2>{ASKED}"),
        backend(OK),
        to_caller(ANSWERED),
        loose=True,
    ),
    Talk(
        "behind chunks",
        caller(GET),
        backend(CHUNKED + b"0\r\n\r\n!"),
        to_caller(BEGUN + "<end>"),
        to_backend(ASKED + "<closed>"),
    ),
    Talk(
        "content of a HEAD",
        caller(GET.replace(b"GET", b"HEAD")),
        backend(OK),
        to_caller(ANSWERED[:-2]),
        to_backend(ASKED.replace("GET", "HEAD") + "<closed>"),
    ),
    Talk(
        "content of a 204",
        caller(GET),
        backend(b"HTTP/1.1 204 X\r\nContent-Length: 2\r\n\r\nhi"),
        to_caller("HTTP/1.1 204 X\n\n"),
        to_backend(ASKED + "<closed>"),
    ),
    Talk(
        "on an idle connection",
        backend(OK),
        to_backend("<closed>"),
        caller(GET),
        to_backend(ASKED),
        backend(OK),
        to_caller(ANSWERED),
    ),
)
def test_bytes_that_belong_to_no_request_close_the_connection(talk: Talk) -> None:
    replay(talk)


@pytest.mark.parametrize(
    "status, outcome",
    [
        (200, "success"),
        (404, "success"),
        (500, "success"),
        (502, "failure"),
        (503, "failure"),
        (504, "failure"),
    ],
)
def test_what_counts_as_a_failure(status: int, outcome: str) -> None:
    answer = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n"
    perform(
        Talk(
            "",
            caller(GET),
            backend(answer.encode()),
            to_backend(ASKED),
            to_caller(answer.replace("\r", "")),
            failed(outcome),
        )
    )
