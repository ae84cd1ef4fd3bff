"""The same pools as an `httpx` transport, so that services talk to clusters as people expect to.

    client = httpx.AsyncClient(transport=PoolTransport(balancer, breaker, time.monotonic), base_url="http://sessions")

One transport stands for one backend: the URL's host is a name for people, the connection goes to the backend's
endpoints. Connections, places, breaker and strictness are the data plane's own; timeouts and exceptions are httpx's.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx

from lucid.core.rules.breaker import FAILURE_STATUSES, CircuitBreaker, Outcome, Permit
from lucid.core.rules.framing import LAST_CHUNK, Answer, Fault, Fields, Memo, chunk, parse_head
from lucid.core.wire.pool import Balancer
from lucid.core.wire.upstream import Failure, FailureKind, Upstream

MAX_BUFFERED_BYTES = 65_536

_HOP_BY_HOP = frozenset(
    {b"connection", b"host", b"content-length", b"transfer-encoding", b"keep-alive", b"te", b"upgrade"}
)


class BreakerOpen(httpx.ConnectError):
    """The backend's breaker refused the call; nothing was sent."""


_ERRORS: Mapping[FailureKind, type[httpx.TransportError]] = {
    FailureKind.REFUSED: httpx.ConnectError,
    FailureKind.UNKNOWN_HOST: httpx.ConnectError,
    FailureKind.TLS: httpx.ConnectError,
    FailureKind.CONNECT_TIMEOUT: httpx.ConnectTimeout,
    FailureKind.OVERLOAD: httpx.PoolTimeout,
    FailureKind.STALE: httpx.ReadError,
    FailureKind.CUT_OFF: httpx.RemoteProtocolError,
    FailureKind.BROKEN: httpx.RemoteProtocolError,
    FailureKind.TIMEOUT: httpx.ReadTimeout,
}


class _Inbox:
    """A sink that keeps what comes back until it is awaited; holds the connection when it is not."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream: Upstream | None = upstream
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._wake = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._held = False
        self.answer: Answer | None = None
        self.done = False
        self.failure: Failure | None = None

    def interim(self, answer: Answer) -> None:
        pass

    def answer_begun(self, answer: Answer, content: bytes, done: bool) -> None:
        self.answer = answer
        self.answer_content(content, done)

    def answer_content(self, content: bytes, done: bool) -> None:
        if content:
            self._pieces.append(content)
            self._size += len(content)
        if done:
            self.done = True
            self._upstream = None
            self._writable.set()
        elif self._size > MAX_BUFFERED_BYTES and self._upstream is not None and not self._held:
            self._held = True
            self._upstream.pause_reading()
        self._wake.set()

    def answer_failed(self, failure: Failure) -> None:
        self.failure = failure
        self._upstream = None
        self._writable.set()
        self._wake.set()

    def upstream_full(self) -> None:
        self._writable.clear()

    def upstream_ready(self) -> None:
        self._writable.set()

    async def send(self, data: bytes, done: bool, seconds: float | None) -> None:
        """Send more of the request's body. An answer that is already here ends the sending."""
        if self._upstream is None:
            return
        self._upstream.send(data, done)
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._writable.wait()
            except TimeoutError:
                raise httpx.WriteTimeout("the backend does not take the request's body") from None

    async def head(self, seconds: float | None) -> Answer:
        while self.answer is None:
            await self._next(seconds)
        return self.answer

    async def piece(self, seconds: float | None) -> bytes | None:
        """The next piece of content; None: the body is whole."""
        while True:
            if self._pieces:
                content = self._pieces.popleft()
                self._size -= len(content)
                if self._held and self._size <= MAX_BUFFERED_BYTES // 2 and self._upstream is not None:
                    self._held = False
                    self._upstream.resume_reading()
                return content
            if self.done:
                return None
            await self._next(seconds)

    async def _next(self, seconds: float | None) -> None:
        """Wait until something came; raises what went wrong, once all that came before it was taken."""
        if self.failure is not None:
            raise _as_httpx(self.failure)
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            self.abort()
            raise httpx.ReadTimeout("the backend did not answer in time") from None

    def abort(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()


class _Content(httpx.AsyncByteStream):
    """The answer's body. httpx calls `aclose` in every case; an unread body closes its connection."""

    def __init__(self, inbox: _Inbox, seconds: float | None, broke: Callable[[], None]) -> None:
        self._inbox = inbox
        self._seconds = seconds
        self._broke = broke

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while (content := await self._inbox.piece(self._seconds)) is not None:
                yield content
        except httpx.TransportError:
            self._broke()
            raise

    async def aclose(self) -> None:
        self._inbox.abort()


class PoolTransport(httpx.AsyncBaseTransport):
    """See the module. Safe for any number of requests at once; owns nothing, so closing it does nothing."""

    def __init__(
        self, balancer: Balancer, breaker: CircuitBreaker | None, monotonic: Callable[[], float]
    ) -> None:
        """`breaker` None: calls that must not be refused nor counted, such as health checks."""
        self._balancer = balancer
        self._breaker = breaker
        self._monotonic = monotonic

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx's own exceptions, BreakerOpen among them."""
        if request.url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{request.url.scheme} is not spoken here")
        permit: Permit | None = None
        if self._breaker is not None:
            permit = self._breaker.try_acquire(self._monotonic())
            if permit is None:
                raise BreakerOpen(f"{self._balancer.name} is not available at present")
        outcome = Outcome.NEUTRAL
        try:
            response, outcome = await self._exchange(request, permit)
            return response
        except (
            httpx.ConnectError,
            httpx.TimeoutException,
            httpx.RemoteProtocolError,
            httpx.ReadError,
        ) as error:
            if not isinstance(error, httpx.PoolTimeout):
                outcome = Outcome.FAILURE
            raise
        finally:
            if permit is not None and self._breaker is not None:
                self._breaker.settle(permit, outcome, self._monotonic())

    async def _exchange(
        self, request: httpx.Request, permit: Permit | None
    ) -> tuple[httpx.Response, Outcome]:
        timeouts: Mapping[str, Any] = request.extensions.get("timeout", {})
        pool = self._balancer.choose()
        head, coded, length = _head(request, pool.authority)
        stream = request.stream
        if not isinstance(stream, httpx.AsyncByteStream):
            raise TypeError("a synchronous body cannot be sent from an event loop")
        bodiless = not coded and length == 0
        for attempt in (1, 2):
            try:
                upstream = await pool.acquire(
                    connect_seconds=timeouts.get("connect") or 0.0, wait_seconds=timeouts.get("pool") or 0.0
                )
            except Failure as failure:
                raise _as_httpx(failure) from None
            inbox = _Inbox(upstream)
            try:
                upstream.begin(inbox, request.method, head, bodiless)
                if not bodiless:
                    await _send_body(inbox, stream, coded, length, timeouts.get("write"))
                answer = await inbox.head(timeouts.get("read"))
            except httpx.ReadError:
                # A kept connection that was dead before a byte came back: once more, where nothing was consumed.
                stale = inbox.failure is not None and inbox.failure.kind is FailureKind.STALE
                if (
                    stale
                    and bodiless
                    and attempt == 1
                    and request.method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")
                ):
                    continue
                raise
            except BaseException:
                inbox.abort()
                raise
            return self._response(request, inbox, answer, permit, timeouts.get("read"))
        raise httpx.ReadError("the backend closed two kept connections")  # pragma: no cover

    def _response(
        self,
        request: httpx.Request,
        inbox: _Inbox,
        answer: Answer,
        permit: Permit | None,
        seconds: float | None,
    ) -> tuple[httpx.Response, Outcome]:
        def broke() -> None:
            if permit is not None and self._breaker is not None:
                self._breaker.body_broke(permit, self._monotonic())

        # Without Set-Cookie: a client shared by all users would send one user's cookie for the next one.
        lines = [
            line.partition(": ")
            for line in answer.forwarded.split("\r\n")
            if line and not line.lower().startswith("set-cookie:")
        ]
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, _, value in lines]
        if answer.length >= 0:
            headers.append((b"Content-Length", str(answer.length).encode()))
        response = httpx.Response(
            answer.status,
            headers=headers,
            stream=_Content(inbox, seconds, broke),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": answer.reason.encode("latin-1")},
        )
        return response, Outcome.FAILURE if answer.status in FAILURE_STATUSES else Outcome.SUCCESS


async def _send_body(
    inbox: _Inbox, stream: httpx.AsyncByteStream, coded: bool, length: int, seconds: float | None
) -> None:
    """Raises httpx.LocalProtocolError where the body is not as long as its head says."""
    sent = 0
    async for content in stream:
        sent += len(content)
        if not coded and sent > length:
            break
        if content:
            await inbox.send(chunk(content) if coded else content, False, seconds)
    if not coded and sent != length:
        raise httpx.LocalProtocolError(f"the body is not of the {length} bytes that Content-Length says")
    await inbox.send(LAST_CHUNK if coded else b"", True, seconds)


def _head(request: httpx.Request, authority: str) -> tuple[bytes, bool, int]:
    """The request's head, whether its body is chunked, and its length otherwise.

    Raises httpx.LocalProtocolError for what another server could read as something else than was meant.
    """
    lines = [
        request.method.encode("ascii", "replace") + b" " + request.url.raw_path + b" HTTP/1.1",
        b"Host: " + authority.encode("ascii"),
    ]
    lines += [name + b": " + value for name, value in request.headers.raw if name.lower() not in _HOP_BY_HOP]
    length = request.headers.get("content-length")
    coded = length is None and "transfer-encoding" in request.headers
    if length is not None:
        lines.append(b"Content-Length: " + length.encode("latin-1"))
    elif coded:
        lines.append(b"Transfer-Encoding: chunked")
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise httpx.LocalProtocolError("a CR or LF in the request's method, target or fields")
    data = b"\r\n".join([*lines, b"", b""])
    head = parse_head(data, _NOTHING_KEPT)
    if isinstance(head, Fault):
        raise httpx.LocalProtocolError(head.reason)
    return data, coded, head.length


_NOTHING_KEPT: Memo[Fields] = Memo(0)


def _as_httpx(failure: Failure) -> httpx.TransportError:
    return _ERRORS[failure.kind](failure.reason)
