"""How conversations end before their time: deadlines, draining, callers who leave."""

import asyncio

import pytest

from lucid.core.exchange import Phase, Role, Source
from lucid.core.rules.routes import Route
from lucid.settings import Timeouts
from tests.support.talks import (
    ANSWERED,
    ASKED,
    CHUNKED,
    EXPECTING,
    GET,
    LOST,
    NOT_FOUND,
    OK,
    OWN,
    POST,
    POSTED,
    Step,
    Talk,
    backend,
    caller,
    perform,
    talks,
    to_backend,
    to_caller,
)
from tests.support.wire import PEER, Caller, World, in_loop

TIMED_OUT = (
    "HTTP/1.1 504 Gateway Timeout\nProxy-Status: lucid; error=http_response_timeout\n{}\n<LUCID_ERR_5003>"
)
TOO_SLOW = "HTTP/1.1 408 Request Timeout\nConnection: close\n\n<LUCID_ERR_1009><eof>"


def after(seconds: float) -> Step:
    return "time", seconds


def nothing_before(seconds: float) -> tuple[Step, Step, Step]:
    """Nothing happens until this many seconds have passed."""
    return after(seconds - 0.5), to_caller(""), after(0.5)


@talks(
    Talk("no head at all", *nothing_before(10.0), to_caller("<closed>")),
    Talk(
        "half a head",
        caller(GET[:9]),
        *nothing_before(10.0),
        to_caller(TOO_SLOW),
        *nothing_before(1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "a byte now and then",
        caller(GET[:9]),
        after(6.0),
        caller(GET[9:10]),
        *nothing_before(4.0),
        to_caller(TOO_SLOW),
    ),
    Talk(
        "a kept connection",
        caller(LOST),
        to_caller(NOT_FOUND),
        *nothing_before(75.0),
        to_caller("<closed>"),
        warm=0,
    ),
    Talk(
        "half a head on a kept connection",
        caller(LOST),
        after(60.0),
        to_caller(NOT_FOUND),
        caller(GET[:9]),
        *nothing_before(10.0),
        to_caller(TOO_SLOW),
        warm=0,
    ),
    Talk(
        "a body for us, in total",
        caller(OWN + b"Content-Length: 5\r\n\r\nhe"),
        after(20.0),
        caller(b"l"),
        *nothing_before(10.0),
        to_caller(TOO_SLOW),
    ),
    Talk(
        "a body that does not begin",
        caller(POST[:-5]),
        *nothing_before(30.0),
        to_caller(TOO_SLOW),
        to_backend(POSTED[:-5] + "<closed>"),
    ),
    Talk(
        "a body that stops",
        caller(POST[:-5]),
        after(20.0),
        caller(b"he"),
        *nothing_before(60.0),
        to_caller(TOO_SLOW),
        to_backend(POSTED[:-3] + "<closed>"),
    ),
    Talk(
        "a silent backend",
        caller(GET + LOST),
        *nothing_before(30.0),
        to_backend(ASKED + "<closed>"),
        to_caller(TIMED_OUT.format("") + NOT_FOUND),
    ),
    Talk(
        "its time begins with the body's end",
        caller(POST[:-1]),
        after(20.0),
        caller(b"o"),
        *nothing_before(30.0),
        to_backend(POSTED + "<closed>"),
        to_caller(TIMED_OUT.format("")),
    ),
    Talk(
        "a backend that stops in mid-answer",
        caller(GET),
        backend(OK[:-1]),
        to_caller(ANSWERED[:-1]),
        *nothing_before(60.0),
        to_backend(ASKED + "<closed>"),
        to_caller("<aborted>"),
    ),
    Talk(
        "a stream that goes on",
        caller(GET),
        backend(CHUNKED),
        *(20 * (after(50.0), backend(b"1\r\nx\r\n"))),
        backend(b"0\r\n\r\n"),
        to_caller("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n" + 20 * "x" + "<end>"),
        to_backend(ASKED),
    ),
    Talk(
        "a rest that is to be read and dropped",
        caller(b"POST /nowhere HTTP/1.1\r\nHost: gw\r\nContent-Length: 5\r\n\r\nhe"),
        to_caller(NOT_FOUND),
        *nothing_before(1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "lingering reads 64 KB at most",
        caller(b"nonsense\n"),
        caller(65_535 * b"x"),
        to_caller("HTTP/1.1 400 Bad Request\nConnection: close\n\n<LUCID_ERR_1001><eof>"),
        caller(b"x"),
        to_caller("<closed>"),
    ),
    Talk(
        "what came with the head is part of that",
        caller(b"BAD\r\n\r\n" + 60_000 * b"x"),
        caller(5_535 * b"x"),
        to_caller("HTTP/1.1 400 Bad Request\nConnection: close\n\n<LUCID_ERR_1001><eof>"),
        caller(b"x"),
        to_caller("<closed>"),
    ),
    Talk(
        "a backend that does not let the body begin is late, not the caller",
        caller(EXPECTING),
        *nothing_before(30.0),
        to_backend(
            "POST /open/a HTTP/1.1\nHost: core:8084\nContent-Length: 5\nExpect: 100-continue\n\n<closed>"
        ),
        to_caller(TIMED_OUT.format("Connection: close\n") + "<eof>"),
    ),
    Talk(
        "a total",
        caller(GET),
        backend(CHUNKED),
        *(3 * (after(2.0), backend(b"1\r\nx\r\n"))),
        to_backend(ASKED + "<closed>"),
        to_caller("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\nxx<aborted>"),
        routes=[Route("/open/**", "core", Role.PUBLIC, timeouts=Timeouts(total=5.0))],
    ),
)
def test_deadlines(talk: Talk) -> None:
    perform(talk)


@talks(
    Talk("idle", ("drain", None), ("time", 1.0), to_caller("<closed>")),
    Talk(
        "idle after an answer",
        caller(LOST),
        to_caller(NOT_FOUND),
        ("drain", None),
        ("time", 1.0),
        to_caller("<closed>"),
    ),
    Talk(
        "a request that was on its way to an idle connection",
        ("drain", None),
        ("time", 0.5),
        caller(LOST),
        to_caller("HTTP/1.1 404 Not Found\nConnection: close\n\n<LUCID_ERR_1004><closed>"),
    ),
    Talk(
        "a head is half here",
        caller(GET[:9]),
        ("drain", None),
        caller(GET[9:]),
        backend(OK),
        to_backend(ASKED),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi<closed>"),
    ),
    Talk(
        "the backend is at work",
        caller(GET + GET),
        ("drain", None),
        backend(OK),
        to_backend(ASKED),
        to_caller("HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nhi<closed>"),
    ),
    Talk(
        "the answer is on its way",
        caller(GET),
        backend(OK[:-1]),
        ("drain", None),
        backend(b"i"),
        to_backend(ASKED),
        to_caller(ANSWERED + "<closed>"),
    ),
    Talk(
        "a refusal",
        caller(LOST[:9]),
        ("drain", None),
        caller(LOST[9:]),
        to_caller("HTTP/1.1 404 Not Found\nConnection: close\n\n<LUCID_ERR_1004><closed>"),
    ),
    Talk(
        "the rest of a body is being dropped",
        caller(b"POST /nowhere HTTP/1.1\r\nHost: gw\r\nContent-Length: 5\r\n\r\nhe"),
        ("drain", None),
        caller(b"llo"),
        to_caller(NOT_FOUND + "<closed>"),
    ),
)
def test_draining(talk: Talk) -> None:
    perform(talk)


GONE: list[tuple[str, list[Step], Phase, list[str], str]] = [
    ("waiting for the backend", [caller(GET)], Phase.FORWARD, ["neutral"], ASKED + "<closed>"),
    ("sending a body", [caller(POST[:-2])], Phase.FORWARD, ["neutral"], POSTED[:-2] + "<closed>"),
    ("reading the answer", [caller(GET), backend(OK[:-1])], Phase.RESPOND, ["success"], ASKED + "<closed>"),
    ("sending a body for us", [caller(OWN + b"Content-Length: 5\r\n\r\nhe")], Phase.FORWARD, [], ""),
    ("pipelining", [caller(GET + GET)], Phase.FORWARD, ["neutral"], ASKED + "<closed>"),
]


@pytest.mark.parametrize(
    "steps, phase, outcomes, heard", [pytest.param(*case[1:], id=case[0]) for case in GONE]
)
@in_loop
async def test_the_caller_is_gone(steps: list[Step], phase: Phase, outcomes: list[str], heard: str) -> None:
    world = World()
    await world.warm()
    end = Caller(world, PEER)
    for who, data in steps:
        transport = end.transport if who == "caller" else world.upstreams[-1]
        transport.deliver(data)
        await world.settle()
    await end.leave()
    assert [(x.status, x.phase, x.failed_by) for x in world.recorded] == [(499, phase, Source.CALLER)]
    assert world.outcomes == outcomes
    assert world.backend.text == heard
    assert not world.wire.connections
    world.check()


@in_loop
async def test_gone_while_dialling_the_connection_is_kept_for_the_next() -> None:
    world = World()
    world.hangs = asyncio.Event()
    end, other = Caller(world, PEER), Caller(world, PEER)
    await end.send(GET)
    await end.leave()
    assert [x.status for x in world.recorded] == [499]
    assert world.outcomes == ["neutral"]
    world.hangs.set()
    await world.breathe()
    assert world.pool.idle == 1
    await other.send(GET)
    world.upstreams[0].deliver(OK)
    assert other.log.text == ANSWERED
    assert len(world.dialled) == 1
    world.check()


@in_loop
async def test_half_closed_while_dialling_with_a_body_due_is_gone() -> None:
    world = World()
    world.hangs = asyncio.Event()
    end = Caller(world, PEER)
    await end.send(POST[:-2])
    await end.half_close()
    world.hangs.set()
    await world.settle()
    assert [x.status for x in world.recorded] == [499]
    assert end.log.text == "<closed>"
    assert "hel" not in world.backend.text
    world.check()


@in_loop
async def test_gone_while_a_key_is_looked_up() -> None:
    world = World()
    end = Caller(world, PEER)
    end.transport.deliver(b"GET /open/a HTTP/1.1\r\nHost: gw\r\nX-API-Key: lucid_" + b"k" * 43 + b"\r\n\r\n")
    assert end.door._need is not None
    await end.leave()
    assert [(x.status, x.phase) for x in world.recorded] == [(499, Phase.AUTHENTICATE)]
    world.check()


@in_loop
async def test_gone_while_we_answer() -> None:
    world = World()
    end = Caller(world, PEER)
    end.door.keeps = True
    await end.send(b"GET /own HTTP/1.1\r\nHost: gw\r\n\r\n")
    await end.leave()
    assert [x.status for x in world.recorded] == [499]
    world.check()
