"""The flow of bodies between two sides of which one is slow: memory is bounded, and who is slow is who is blamed."""

import pytest

from lucid.core.exchange import Source
from tests.support.talks import (
    ANSWERED,
    ASKED,
    CHUNKED,
    GET,
    OK,
)
from tests.support.wire import PEER, Caller, World, in_loop

BAD = "HTTP/1.1 502 Bad Gateway\nProxy-Status: lucid; error={}\n\n<LUCID_ERR_5001>"
STALE = BAD.format("connection_terminated")

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
    for _ in range(400):
        end.transport.take(20_000)
        await world.settle_pipelines()
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
        await world.settle_pipelines()
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
