"""Backends that misbehave, and the flow of bodies between two sides of which one is slow.

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


# --- the flow of bodies ----------------------------------------------------------------------------------

PIECE = 65_536 * b"x"
MOST_BYTES = 3 * 65_536
"""What may be in memory for one exchange: the buffer's limit, and the piece that went over it."""


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize("coded", [False, True])
@in_loop
async def test_a_slow_caller_slows_its_backend_down(coded: bool) -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(GET)
    end.transport.stalled = True
    transport = world.upstreams[0]
    transport.deliver(CHUNKED if coded else head(64 * len(PIECE)))
    for n in range(64):
        piece = b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if coded else PIECE
        transport.deliver(piece + (b"0\r\n\r\n" if coded and n == 63 else b""))
    assert not transport.reading
    assert end.transport.buffered <= MOST_BYTES
    for _ in range(400):
        end.transport.take(20_000)
        await world.settle()
        assert end.transport.buffered <= MOST_BYTES
    end.transport.take()
    assert end.log.text.count("x") == 64 * len(PIECE)
    assert end.log.whole
    world.check()


@pytest.mark.parametrize("coded", [False, True])
@in_loop
async def test_a_slow_backend_slows_its_caller_down(coded: bool) -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    transport = world.upstreams[0]
    transport.stalled = True
    framing = b"Transfer-Encoding: chunked" if coded else b"Content-Length: %d" % (64 * len(PIECE))
    await end.send(b"POST /open/a HTTP/1.1\r\nHost: gw\r\n" + framing + b"\r\n\r\n")
    for _ in range(64):
        end.transport.deliver(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if coded else PIECE)
    end.transport.deliver((b"0\r\n\r\n" if coded else b"") + GET)
    assert not end.transport.reading
    for _ in range(400):
        transport.take(20_000)
        await world.settle()
        assert transport.buffered <= MOST_BYTES
    transport.take()
    await world.settle()
    assert world.backend.text.count("x") == 64 * len(PIECE)
    transport.deliver(OK)
    transport.deliver(OK)
    assert end.log.text == 2 * ANSWERED
    assert end.transport.reading
    world.check()


@in_loop
async def test_a_flood_of_requests_is_read_no_faster_than_it_is_answered() -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    for _ in range(50):
        end.transport.deliver(100 * GET)
    assert not end.transport.reading
    assert len(end.door._buffer) <= MOST_BYTES
    for _ in range(5_000):
        world.upstreams[0].deliver(OK)
        await world.settle()
    assert end.log.text == 5_000 * ANSWERED
    world.check()


@in_loop
async def test_a_caller_that_does_not_read_its_answers_gets_no_further_ones() -> None:
    world = World()
    end = Caller(world, PEER)
    end.transport.stalled = True
    for _ in range(50):
        end.transport.deliver(100 * b"GET /nowhere HTTP/1.1\r\nHost: gw\r\n\r\n")
    assert not end.transport.reading
    assert end.transport.buffered < MOST_BYTES
    assert len(world.recorded) < 200
    for _ in range(200):
        end.transport.take(20_000)
        await world.settle()
    end.transport.take()
    assert end.log.text.count("404 Not Found") == 5_000
    world.check()


@in_loop
async def test_a_half_closed_caller_that_reads_slowly_gets_all_its_answers() -> None:
    world = World()
    end = Caller(world, PEER)
    end.transport.stalled = True
    await end.send(200 * b"GET /nowhere HTTP/1.1\r\nHost: gw\r\n\r\n")
    await end.half_close()
    for _ in range(20):
        end.transport.take(20_000)
        await world.settle()
    assert end.log.text.count("404 Not Found") == 200


@in_loop
async def test_a_caller_that_reads_too_slowly_is_cut_off_and_the_backend_not_blamed() -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(GET)
    end.transport.stalled = True
    world.upstreams[0].deliver(head(1_000_000) + 100_000 * b"x")
    await world.advance(59.5)
    assert not end.transport.closing
    await world.advance(0.5)
    assert end.log.text == "<aborted>"
    assert world.backend.text == ASKED + "<closed>"
    assert world.outcomes == ["success"]
    assert world.breaker.snapshot(world.loop.now).broken_bodies == 0
    assert [(x.status, x.failed_by) for x in world.recorded] == [(499, Source.CALLER)]
    world.check()


@in_loop
async def test_a_caller_that_reads_slowly_but_reads_is_served() -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(GET)
    end.transport.stalled = True
    world.upstreams[0].deliver(head(50 * 65_536))
    for _ in range(50):
        world.upstreams[0].deliver(PIECE)
    for _ in range(60):
        await world.advance(30.0)
        end.transport.take(70_000)
        await world.settle()
    assert end.log.whole
    world.check()


@in_loop
async def test_a_caller_that_takes_nothing_cannot_hold_a_closing_connection() -> None:
    world = World()
    end = Caller(world, PEER)
    end.transport.stalled = True
    await end.send(b"GET /nowhere HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n")
    await world.advance(9.5)
    assert not end.transport.lost
    await world.advance(0.5)
    assert end.transport.lost
    world.check()


HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: <" + 9_000 * b"x" + b">\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([head(100_000) + 100_000 * b"x"], id="head"),
        pytest.param([head(100_000) + 50_000 * b"x", 50_000 * b"x"], id="content"),
        pytest.param([7 * HINTS, HINTS + OK], id="interim"),
    ],
)
@in_loop
async def test_a_connection_goes_back_to_the_pool_reading(pieces: list[bytes]) -> None:
    world = World()
    end = Caller(world, PEER)
    await end.send(GET)
    end.transport.stalled = True
    for piece in pieces:
        world.upstreams[0].deliver(piece)
    end.transport.take()
    await world.settle()
    assert world.pool.idle == 1
    assert world.upstreams[0].reading


@in_loop
async def test_a_connection_whose_request_has_not_gone_out_is_not_used_again() -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    world.upstreams[0].stalled = True
    await end.send(b"POST /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 65536\r\n\r\n" + PIECE)
    world.upstreams[0].deliver(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    await world.settle()
    assert world.pool.idle == 0


@in_loop
async def test_a_backend_that_does_not_take_the_body_is_late() -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    world.upstreams[0].stalled = True
    await end.send(b"POST /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 1000000\r\n\r\n")
    end.transport.deliver(PIECE)
    end.transport.deliver(PIECE)
    assert not end.transport.reading
    await world.advance(90.0)
    assert "504 Gateway Timeout" in end.log.text
    assert world.outcomes == ["failure"]


@in_loop
async def test_a_backend_that_closes_while_it_is_written_to_has_failed_at_once() -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    world.upstreams[0].stalled = True
    await end.send(b"POST /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 65536\r\n\r\n" + PIECE)
    world.upstreams[0].deliver_eof()
    await world.settle()
    assert end.log.text == STALE
    world.check()


@in_loop
async def test_an_early_answer_lets_a_held_caller_go_on() -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    world.upstreams[0].stalled = True
    await end.send(b"POST /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 1000000\r\n\r\n")
    end.transport.deliver(PIECE)
    end.transport.deliver(PIECE[:1_000])
    assert not end.transport.reading
    world.upstreams[0].deliver(OK)
    await world.settle()
    assert end.transport.reading, "what is left must be read, or a reset would eat the answer"
    assert end.log.text == ANSWERED.replace("\n\n", "\nConnection: close\n\n") + "<eof>"
    world.check()
