"""The pools as an httpx transport, against a real server on loopback, in real time with small time-outs."""

import asyncio
import contextlib
import functools
import gzip
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from lucid.core.rules.breaker import BreakerMode, Outcome
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.transport import BreakerOpen, PoolTransport
from tests.support.wire import SpyBreaker

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Handler = Callable[["Request", Writer], Awaitable[None]]

HI = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
SECONDS = 0.2


class Request:
    """A request as it came: its head, and a reader for its body."""

    def __init__(self, head: bytes, reader: Reader, connection: int) -> None:
        self.line, *self.lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        self.fields = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in self.lines)
        }
        self.reader = reader
        self.connection = connection
        self.body = b""

    async def read(self) -> "Request":
        if "content-length" in self.fields:
            self.body = await self.reader.readexactly(int(self.fields["content-length"]))
        while self.fields.get("transfer-encoding") == "chunked":
            size = int(await self.reader.readline(), 16)
            self.body += (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                break
        return self


class Bench:
    """A server, a pool to it, a breaker that takes notes, and a client of httpx over both."""

    def __init__(self, port: int, scheme: str, max_connections: int) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.left = 0
        """Connections that the gateway has ended."""
        self.pool = Pool(
            scheme=scheme,
            host="127.0.0.1",
            port=port,
            max_connections=max_connections,
            monotonic=time.monotonic,
            tls=ssl.create_default_context() if scheme == "https" else None,
        )
        self.breaker = SpyBreaker("sessions")
        transport = PoolTransport(
            Balancer("sessions", [self.pool], time.monotonic), self.breaker, time.monotonic
        )
        self.client = httpx.AsyncClient(transport=transport, base_url="http://sessions", timeout=5.0)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for _, outcome in self.breaker.outcomes]

    async def until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(200):
            if is_so():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it never came about")


@contextlib.asynccontextmanager
async def bench(handler: Handler, *, scheme: str = "http", max_connections: int = 4) -> AsyncIterator[Bench]:
    made: list[Bench] = []

    async def serve(reader: Reader, writer: Writer) -> None:
        one = made[0]
        one.connections += 1
        number = one.connections
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request = Request(head, reader, number)
                one.requests.append(request)
                await handler(request, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            one.left += 1
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.append(Bench(server.sockets[0].getsockname()[1], scheme, max_connections))
    try:
        yield made[0]
    finally:
        await made[0].client.aclose()
        made[0].pool.close()
        server.close()
        for _ in range(5):
            await asyncio.sleep(0)


def timed(seconds: float = 10.0) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run an asynchronous test, in real time and bounded."""

    def decorate(test: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            asyncio.run(asyncio.wait_for(test(*args, **kwargs), seconds))

        return run

    return decorate


async def says_hi(request: Request, writer: Writer) -> None:
    await request.read()
    writer.write(HI)


async def says_nothing(request: Request, writer: Writer) -> None:
    await asyncio.sleep(60)


# --- requests and answers --------------------------------------------------------------------------------


@timed()
async def test_a_request_as_it_arrives() -> None:
    async with bench(says_hi) as b:
        answer = await b.client.post(
            "http://people-say-sessions/a/%2e%2e/b?c=%20d",
            json={"a": 1},
            headers={"X-A": "b", "Connection": "close", "TE": "trailers"},
        )
        assert (answer.status_code, answer.text, answer.http_version) == (200, "hi", "HTTP/1.1")
        request = b.requests[0]
        assert request.line == "POST /a/%2e%2e/b?c=%20d HTTP/1.1"
        assert request.body == b'{"a":1}'
        assert request.fields["host"] == b.pool.authority
        assert request.fields["x-a"] == "b"
        assert not {"connection", "te"} & set(request.fields)
        assert b.outcomes == [Outcome.SUCCESS]


@timed()
async def test_connections_are_used_again() -> None:
    async with bench(says_hi) as b:
        for _ in range(5):
            await b.client.get("/")
        assert b.connections == 1
        assert (b.pool.open, b.pool.idle) == (1, 1)
        await asyncio.gather(*(b.client.get("/") for _ in range(20)))
        assert b.connections <= 4
        assert b.pool.in_flight == 0


@pytest.mark.parametrize(
    "method, said, status, content",
    [
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, b""),
        ("GET", b"HTTP/1.1 103 Early Hints\r\n\r\n" + HI, 200, b"hi"),
        ("GET", b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n", 302, b""),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 200, b"hi"),
        (
            "GET",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
            % (len(gzip.compress(b"hi")), gzip.compress(b"hi")),
            200,
            b"hi",
        ),
    ],
)
@timed()
async def test_an_answer(method: str, said: bytes, status: int, content: bytes) -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(said)

    async with bench(handler) as b:
        for _ in range(2):
            answer = await b.client.request(method, "/")
            assert (answer.status_code, answer.content) == (status, content)
        assert b.connections == 1


@timed()
async def test_fields_that_occur_twice_are_not_merged() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-A: a, b\r\nX-A: c\r\nContent-Length: 0\r\n\r\n")

    async with bench(handler) as b:
        answer = await b.client.get("/")
        assert answer.headers.get_list("x-a") == ["a, b", "c"]


@timed()
async def test_no_cookie_is_kept_for_the_next_request() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nContent-Length: 0\r\n\r\n")

    async with bench(handler) as b:
        await b.client.get("/")
        await b.client.get("/")
        assert "cookie" not in b.requests[1].fields


# --- streams ---------------------------------------------------------------------------------------------


@timed()
async def test_an_answer_is_read_while_it_is_written() -> None:
    go_on = asyncio.Event()

    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await go_on.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    async with bench(handler) as b, b.client.stream("GET", "/") as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"one"
        go_on.set()
        assert await anext(pieces) == b"two"


@timed()
async def test_a_body_is_read_while_it_is_written() -> None:
    arrived = asyncio.Event()

    async def handler(request: Request, writer: Writer) -> None:
        assert await request.reader.readexactly(8) == b"3\r\none\r\n"
        arrived.set()
        await request.read()
        writer.write(HI)

    async def content() -> AsyncIterator[bytes]:
        yield b"one"
        yield b""
        await arrived.wait()
        yield b"two"

    async with bench(handler) as b:
        answer = await b.client.post("/", content=content())
        assert answer.text == "hi"
        assert b.requests[0].body == b"two"
        assert "content-length" not in b.requests[0].fields


@timed()
async def test_what_is_not_read_is_not_kept_in_memory() -> None:
    size = 32 * 1_048_576
    written = 0

    async def handler(request: Request, writer: Writer) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while written < size:
            writer.write(65_536 * b"x")
            written += 65_536
            await writer.drain()

    async with bench(handler) as b, b.client.stream("GET", "/") as answer:
        await asyncio.sleep(0.1)
        assert written < size // 2, "the server is held up, but for what the kernel's buffers take"
        total = 0
        async for piece in answer.aiter_raw():
            total += len(piece)
        assert total == size
    assert b.outcomes == [Outcome.SUCCESS]


@timed()
async def test_a_large_body_goes_out_as_fast_as_it_is_taken() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        await asyncio.sleep(0.05)
        await request.read()
        writer.write(HI)

    async with bench(handler) as b:
        answer = await b.client.post("/", content=4 * 1_048_576 * b"x")
        assert answer.text == "hi"
        assert len(b.requests[0].body) == 4 * 1_048_576


@timed()
async def test_an_answer_that_is_not_read_to_its_end_closes_its_connection() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")

    async with bench(handler) as b:
        async with b.client.stream("GET", "/"):
            pass
        await b.until(lambda: b.left == 1)
        assert b.pool.open == 0
        assert b.outcomes == [Outcome.SUCCESS]


@timed()
async def test_an_early_answer_ends_the_sending() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(1)

    async with bench(handler) as b:
        answer = await b.client.post("/", content=32 * 1_048_576 * b"x", timeout=SECONDS)
        assert answer.status_code == 413
        assert b.pool.in_flight == 0


# --- time-outs and failures ------------------------------------------------------------------------------


@timed()
async def test_connect_timeout() -> None:
    # A server that does not speak TLS and says nothing: the handshake never ends.
    async with bench(says_nothing, scheme="https") as b:
        with pytest.raises(httpx.ConnectTimeout):
            await b.client.get("/", timeout=httpx.Timeout(5.0, connect=SECONDS))
        assert b.outcomes == [Outcome.FAILURE]
        assert b.pool.open == 0


@timed()
async def test_read_timeout_before_and_in_the_answer() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        if "begin" in request.line:
            writer.write(HI[:-1])
        await asyncio.sleep(60)

    async with bench(handler) as b:
        with pytest.raises(httpx.ReadTimeout):
            await b.client.get("/", timeout=SECONDS)
        with pytest.raises(httpx.ReadTimeout):
            await b.client.get("/begin", timeout=SECONDS)
        assert b.outcomes == [Outcome.FAILURE, Outcome.SUCCESS]
        assert b.breaker.snapshot(time.monotonic()).broken_bodies == 1
        await b.until(lambda: b.pool.open == 0)


@timed()
async def test_write_timeout() -> None:
    async with bench(says_nothing) as b:
        with pytest.raises(httpx.WriteTimeout):
            await b.client.post("/", content=32 * 1_048_576 * b"x", timeout=SECONDS)
        assert b.outcomes == [Outcome.FAILURE]
        await b.until(lambda: b.pool.open == 0)


@timed()
async def test_pool_timeout_is_not_the_backends_failure() -> None:
    async with bench(says_nothing, max_connections=1) as b:
        task = asyncio.ensure_future(b.client.get("/"))
        await b.until(lambda: len(b.requests) == 1)
        with pytest.raises(httpx.PoolTimeout):
            await b.client.get("/", timeout=SECONDS)
        assert b.outcomes == [Outcome.NEUTRAL]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@timed()
async def test_refused() -> None:
    async with bench(says_hi) as b:
        port = b.pool._port
        b.pool._port = 1
        with pytest.raises(httpx.ConnectError):
            await b.client.get("/")
        assert b.outcomes == [Outcome.FAILURE]
        b.pool._port = port
        assert (await b.client.get("/")).text == "hi"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200",
        b"nonsense\r\n\r\n",
        HI[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    ],
)
@timed()
async def test_a_broken_answer(said: bytes) -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(said)
        raise ConnectionResetError

    async with bench(handler) as b:
        with pytest.raises(httpx.RemoteProtocolError):
            await b.client.get("/")
        snapshot = b.breaker.snapshot(time.monotonic())
        assert snapshot.failures == 1
        await b.until(lambda: b.pool.open == 0)


@pytest.mark.parametrize("method, again", [("GET", True), ("PUT", True), ("POST", False), ("PATCH", False)])
@timed()
async def test_a_kept_connection_that_was_dead(method: str, again: bool) -> None:
    async def handler(request: Request, writer: Writer) -> None:
        if len(b.requests) == 2:
            raise ConnectionResetError
        await says_hi(request, writer)

    async with bench(handler) as b:
        await b.client.get("/")
        if again:
            assert (await b.client.request(method, "/")).text == "hi"
            assert [request.connection for request in b.requests] == [1, 1, 2]
        else:
            with pytest.raises(httpx.ReadError):
                await b.client.request(method, "/")
        assert b.outcomes == [Outcome.SUCCESS, Outcome.SUCCESS if again else Outcome.FAILURE]


@timed()
async def test_a_body_is_never_sent_twice() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        if len(b.requests) == 2:
            raise ConnectionResetError
        await says_hi(request, writer)

    async with bench(handler) as b:
        await b.client.get("/")
        with pytest.raises(httpx.ReadError):
            await b.client.put("/", content=b"once")


# --- breaker and cancellation ----------------------------------------------------------------------------


@timed()
async def test_an_open_breaker_sends_nothing() -> None:
    async with bench(says_hi) as b:
        b.breaker.override(BreakerMode.OPEN, time.monotonic())
        with pytest.raises(BreakerOpen, match="sessions"):
            await b.client.get("/")
        assert b.connections == 0


@timed()
async def test_statuses_that_are_failures_open_the_breaker() -> None:
    async def handler(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")

    async with bench(handler) as b:
        for _ in range(5):
            assert (await b.client.get("/")).status_code == 503
        with pytest.raises(BreakerOpen):
            await b.client.get("/")


@timed()
async def test_without_a_breaker_nothing_is_refused_nor_counted() -> None:
    async with bench(says_hi) as b:
        b.breaker.override(BreakerMode.OPEN, time.monotonic())
        transport = PoolTransport(Balancer("sessions", [b.pool], time.monotonic), None, time.monotonic)
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("http://sessions/")).text == "hi"
        assert not b.outcomes
        assert (b.pool.open, b.pool.idle) == (1, 1), "closing a client closes none of the pool's connections"


@timed()
async def test_a_cancelled_call_says_nothing_about_the_backend() -> None:
    async with bench(says_nothing) as b:
        task = asyncio.ensure_future(b.client.get("/"))
        await b.until(lambda: len(b.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert b.outcomes == [Outcome.NEUTRAL]
        await b.until(lambda: b.pool.open == 0)


@timed()
async def test_a_body_that_fails_on_our_side_says_nothing_about_the_backend() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"one"
        raise ValueError("ours")

    async with bench(says_nothing) as b:
        with pytest.raises(ValueError, match="ours"):
            await b.client.post("/", content=content())
        assert b.outcomes == [Outcome.NEUTRAL]
        await b.until(lambda: b.pool.open == 0)


# --- what is not sent ------------------------------------------------------------------------------------


@timed()
async def test_what_is_not_spoken_here() -> None:
    async with bench(says_hi) as b:
        with pytest.raises(httpx.UnsupportedProtocol):
            await b.client.get("ftp://sessions/")
        request = httpx.Request("POST", "http://sessions/", content=iter([b"a"]))
        with pytest.raises(TypeError):
            await b.client._transport.handle_async_request(request)
        assert b.connections == 0


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"X-A": "b\r\nX-User-Id: root"}},
        {"headers": {"X-A": "b\nX-User-Id: root"}},
        {"headers": {"X-A\r\nX-User-Id": "root"}},
        {"method": "GET / HTTP/1.1\r\nX-User-Id: root\r\nX-A:"},
    ],
)
@timed()
async def test_a_request_that_would_be_read_as_another_is_not_sent(options: dict[str, Any]) -> None:
    async with bench(says_hi) as b:
        with pytest.raises(httpx.LocalProtocolError):
            await b.client.request(**{"method": "GET", "url": "/", **options})
        assert not b.requests


@pytest.mark.parametrize("content", [b"a", b"hiGET / HTTP/1.1\r\nHost: a\r\n\r\n"])
@timed()
async def test_a_body_that_is_not_as_long_as_it_says_ends_its_connection(content: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield content

    async with bench(says_hi) as b:
        with pytest.raises(httpx.LocalProtocolError):
            await b.client.post("/", content=pieces(), headers={"Content-Length": "2"}, timeout=SECONDS)
        await b.until(lambda: b.left == 1)
        assert len(b.requests) == 1
        assert b.outcomes == [Outcome.NEUTRAL]
