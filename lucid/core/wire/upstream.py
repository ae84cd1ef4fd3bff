"""One connection to an endpoint, as a protocol: a request goes out, its answer comes back by callbacks.

The one who uses a connection is its *sink*. `begin` starts a request; from then on the sink hears, in this order,
any number of `interim`, then `answer_begun` once and `answer_content` as often as needed, the last of them with
`done`, or else `answer_failed` once. After `done` or a failure the connection has let go of its sink and is
already back in its pool, or closed; the sink must not touch it again.

Backends are not believed either: an answer whose framing is lost fails and the connection closes, so that one
backend's bug never reaches the next caller (docs/http.md, forwarding).
"""

import asyncio
import enum
from collections.abc import Callable
from typing import Protocol, cast

from lucid.core.rules.framing import (
    MAX_ANSWER_HEAD_BYTES,
    UNTIL_CLOSE,
    Answer,
    Body,
    Fault,
    Memo,
    body_for,
    body_length,
    parse_answer,
)

MAX_INTERIM_ANSWERS = 8


class FailureKind(enum.Enum):
    """How a backend failed. `value` is RFC 9209's word for it (Proxy-Status)."""

    REFUSED = "connection_refused"
    CONNECT_TIMEOUT = "connection_timeout"
    UNKNOWN_HOST = "dns_error"
    TLS = "tls_protocol_error"
    STALE = "connection_terminated"
    """A reused connection turned out dead before a byte of the answer: the request may be sent once more."""
    BROKEN = "http_protocol_error"
    CUT_OFF = "http_response_incomplete"
    TIMEOUT = "http_response_timeout"
    OVERLOAD = "connection_limit_reached"


class Failure(Exception):
    """A backend's failure: handed to sinks as a value, raised by `Pool.acquire`."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Sink(Protocol):
    """Who hears what comes back. No method may raise."""

    def interim(self, answer: Answer) -> None: ...
    def answer_begun(self, answer: Answer, content: bytes, done: bool) -> None: ...
    def answer_content(self, content: bytes, done: bool) -> None: ...
    def answer_failed(self, failure: Failure) -> None: ...
    def upstream_full(self) -> None: ...
    def upstream_ready(self) -> None: ...


class Upstream(asyncio.Protocol):
    """A connection. Its pool makes it, lends it, and takes it back by `on_idle` or loses it by `on_lost`."""

    __slots__ = (
        "_answer",
        "_body",
        "_buffer",
        "_interims",
        "_memo",
        "_method",
        "_on_idle",
        "_on_lost",
        "_paused",
        "_request_done",
        "_sink",
        "_transport",
        "idle_since",
        "label",
    )

    def __init__(
        self,
        label: str,
        memo: Memo[Answer],
        on_idle: "Callable[[Upstream], None]",
        on_lost: "Callable[[Upstream], None]",
    ) -> None:
        self.label = label
        self._memo = memo
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._method = ""
        self._request_done = True
        self._paused = False
        self._buffer = b""
        self._body: Body | None = None
        self._answer: Answer | None = None
        self._interims = 0
        self.idle_since = 0.0
        """When it came to its pool last; 0: never, so it cannot have gone stale there."""

    # --- the sink's side -------------------------------------------------------------------------------

    def begin(self, sink: Sink, method: str, data: bytes, request_done: bool) -> None:
        """Send a request's head with as much of its body as is at hand. The connection must be idle."""
        transport = self._transport
        assert self._sink is None and transport is not None
        self._sink = sink
        self._method = method
        self._request_done = request_done
        self._interims = 0
        transport.write(data)

    def send(self, data: bytes, request_done: bool) -> None:
        """Send more of the request's body, coded as its head said."""
        if self._transport is not None and self._sink is not None:
            self._request_done = request_done
            if data:
                self._transport.write(data)

    def abort(self) -> None:
        """The sink is no longer interested: the connection closes at once and the sink hears nothing more."""
        self._sink = None
        self._close()

    def pause_reading(self) -> None:
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- the transport's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            # Bytes on an idle connection belong to no request: whatever they are, they must not answer the next one.
            self._close()
            return
        if self._body is not None:
            self._content(self._body, data)
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while self._sink is not None:
            end = data.find(b"\r\n\r\n")
            if end == -1 or end + 4 > MAX_ANSWER_HEAD_BYTES:
                if len(data) > MAX_ANSWER_HEAD_BYTES:
                    self._fail(FailureKind.BROKEN, "the backend's head is longer than 65,536 bytes")
                else:
                    self._buffer = data
                return
            answer = parse_answer(data[: end + 4], self._memo)
            data = data[end + 4 :]
            if isinstance(answer, Fault):
                self._fail(FailureKind.BROKEN, answer.reason)
                return
            if answer.status >= 200:
                self._begin_answer(answer, data)
                return
            self._interims += 1
            if answer.status == 101 or self._interims > MAX_INTERIM_ANSWERS:
                self._fail(FailureKind.BROKEN, "the backend sent an interim answer that nobody asked for")
                return
            self._sink.interim(answer)
            if not data:
                return

    def _begin_answer(self, answer: Answer, data: bytes) -> None:
        sink = self._sink
        assert sink is not None
        length = body_length(answer, self._method)
        self._answer = answer
        if length == len(data):
            self._let_go(b"")
            sink.answer_begun(answer, data, True)
            return
        body = body_for(length)
        content = body.feed(data) if data else b""
        if body.fault:
            self._fail(FailureKind.BROKEN, body.fault)
        elif body.done:
            self._let_go(body.rest)
            sink.answer_begun(answer, content, True)
        else:
            self._body = body
            sink.answer_begun(answer, content, False)

    def _content(self, body: Body, data: bytes) -> None:
        sink = self._sink
        assert sink is not None
        content = body.feed(data)
        if body.fault:
            self._fail(FailureKind.BROKEN, body.fault)
        elif body.done:
            self._let_go(body.rest)
            sink.answer_content(content, True)
        elif content:
            sink.answer_content(content, False)

    def _let_go(self, rest: bytes) -> None:
        """The answer is whole. Reuse only what is certain: both messages ended, and nothing came behind them."""
        answer = self._answer
        assert answer is not None
        transport = self._transport
        bounded = answer.length != UNTIL_CLOSE or body_length(answer, self._method) == 0
        sent = self._request_done and transport is not None and not transport.get_write_buffer_size()
        self._sink = None
        self._answer = None
        self._body = None
        if bounded and sent and not rest and answer.keep_alive:
            if self._paused:
                self.resume_reading()
            self._on_idle(self)
        else:
            self._close()

    def _fail(self, kind: FailureKind, reason: str) -> None:
        sink, self._sink = self._sink, None
        self._close()
        if sink is not None:
            sink.answer_failed(Failure(kind, reason))

    def eof_received(self) -> bool:
        # At once, not when all that was written has gone out: nobody is there to read it.
        self._ended(None)
        self._close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)
        self._ended(exc)

    def _ended(self, exc: Exception | None) -> None:
        """Nothing more will come: the end of an answer that has no other, or a failure."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._body is not None:
            self._body.eof()
            if self._body.done and exc is None:
                sink.answer_content(b"", True)
            else:
                sink.answer_failed(
                    Failure(FailureKind.CUT_OFF, "the backend closed the connection in mid-answer")
                )
        elif self.idle_since and not self._buffer and not self._interims:
            sink.answer_failed(Failure(FailureKind.STALE, "the backend closed a kept connection"))
        else:
            sink.answer_failed(
                Failure(FailureKind.CUT_OFF, "the backend closed the connection without an answer")
            )

    def pause_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_full()

    def resume_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_ready()
