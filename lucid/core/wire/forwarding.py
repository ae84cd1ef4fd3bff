"""The data plane of a connection: an exchange goes to a backend, and what comes back goes to the caller.

`Forwarding` is the sink of its upstream (upstream.py): bodies stream both ways inside the transports' callbacks, and
when one side's buffer is full the other side is not read.
"""

from collections.abc import Mapping

from lucid.core.exchange import Exchange, Phase, Refusal, Source
from lucid.core.rules.breaker import FAILURE_STATUSES, Outcome
from lucid.core.rules.cors import DROPPED_PREFIX
from lucid.core.rules.framing import CHUNKED, LAST_CHUNK, Answer, Fault, Head, body_for, body_length, chunk
from lucid.core.rules.headers import answer_head, lasting_lines, upstream_head, without_fields
from lucid.core.rules.routes import Route, forward_path
from lucid.core.wire.connection import NEVER, Connection, Stage
from lucid.core.wire.pool import Pool
from lucid.core.wire.upstream import Failure, FailureKind, Upstream
from lucid.errors import ErrorCode

_FORWARD = Stage.FORWARD

WAIT_SECONDS = 2.0
"""For a place in the pool, on routes without a connect timeout."""

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})

_FAILURES: Mapping[FailureKind, ErrorCode] = {
    FailureKind.CONNECT_TIMEOUT: ErrorCode.BACKEND_TIMEOUT,
    FailureKind.TIMEOUT: ErrorCode.BACKEND_TIMEOUT,
    FailureKind.OVERLOAD: ErrorCode.BACKEND_UNAVAILABLE,
}


class Forwarding(Connection):
    """See the module."""

    # --- towards the backend --------------------------------------------------------------------------------

    def _forward(self, x: Exchange, route: Route) -> None:
        total = route.timeouts.total
        self._latest = x.started + total if total else NEVER
        pool = self._wire.backends[route.backend].choose()
        x.endpoint = pool.label
        # Spelled before a connection is taken: a fault in the spelling costs none.
        data = self._head_up(x, forward_path(route, x.target), pool.authority)
        upstream = pool.take()
        if upstream is None:
            self._wait_for(self._dial(x, route, pool, data))
        else:
            self._send_up(x, route, upstream, data)

    async def _dial(self, x: Exchange, route: Route, pool: Pool, data: bytes) -> None:
        """Take a new connection, or wait for one; what an endpoint refuses goes to another one of the backend."""
        connect = route.timeouts.connect
        balancer = self._wire.backends[route.backend]
        tried = {pool}
        try:
            while True:
                try:
                    upstream = await pool.acquire(
                        connect_seconds=connect, wait_seconds=connect or WAIT_SECONDS
                    )
                    break
                except Failure as failure:
                    another = balancer.choose_another(tried)
                    if another is None:
                        self._need = None
                        if self.exchange is x:
                            self.answer_failed(failure)
                        return
                    pool = another
                    tried.add(pool)
                    x.endpoint = pool.label
                    data = self._head_up(x, forward_path(route, x.target), pool.authority)
            self._need = None
            if self.exchange is not x or self._stage is not Stage.NEED:
                pool.give_back(upstream)
                return
            self._send_up(x, route, upstream, data)
        except Exception:
            self._need = None
            if self.exchange is x:
                self._fail_inside(x)

    def _send_up(self, x: Exchange, route: Route, upstream: Upstream, data: bytes) -> None:
        head = x.head
        length = head.length
        self._stage = _FORWARD
        self._upstream = upstream
        if length:
            self._release()
        x.upstream_started = now = self._gateway.monotonic()
        timeouts = route.timeouts
        self.deadline = min(now + timeouts.head, self._latest) if timeouts.head else self._latest
        # Who is waited for: the backend, unless it is the caller's body that does not come.
        self._waited_for = length == 0 or (head.fields.expect is not None and head.minor == 1)
        if length == 0:
            upstream.begin(self, head.method, data, True)
            return
        body = self._body = body_for(length)
        content = b""
        if self._buffer:
            unread, self._buffer = self._buffer, b""
            content = body.feed(unread)
            if not self._body_is_sound(x, route, body, len(content)):
                upstream.abort()
                return
        if self._eof and not body.done:
            self._abandon()
            self._close()
            return
        upstream.begin(self, head.method, data + self._coded(content, length, body.done), body.done)
        if body.done:
            self._buffer = body.rest
            self._body = None

    def _head_up(self, x: Exchange, path: str, authority: str) -> bytes:
        """The request's head as a backend gets it.

        Callers repeat themselves on a connection, so all that does not change from one exchange to the next is
        spelled once for all of them: the caller's own lines, who they are, and where they come from.
        """
        head = x.head
        fields = head.fields
        spelled = self._spelled
        if (
            spelled is None
            or spelled[0] is not fields
            or spelled[1] is not x.principal
            or spelled[2] != head.host
            or spelled[3] != authority
        ):
            self._spelled = (fields, x.principal, head.host, authority)
            policy = self._gateway.policy
            hops = policy.forwarded_for(x.peer, fields.forwarded_for)
            scheme = policy.forwarded_scheme(x.peer, fields.forwarded_proto) or self._wire.scheme
            self._spelled_text = lasting_lines(head, x.principal, authority, hops, scheme)
        state = (
            "".join([f"tracestate: {value}\r\n" for value in fields.tracestate]) if x.trace_continued else ""
        )
        trace = f"00-{x.trace_id}-{x.span_id}-{x.trace_flags}"
        changing = f"{state}X-Request-ID: {x.request_id}\r\ntraceparent: {trace}\r\n"
        return upstream_head(head, path, self._spelled_text, changing)

    def _coded(self, content: bytes, length: int, done: bool) -> bytes:
        if length != CHUNKED:
            return content
        return (chunk(content) if content else b"") + (LAST_CHUNK if done else b"")

    def _stream_up(self, data: bytes) -> None:
        """More of the request's body arrived."""
        x, body, upstream = self.exchange, self._body, self._upstream
        assert x is not None and body is not None
        content = body.feed(data)
        if not self._body_is_sound(x, x.route, body, len(content)):
            return
        if upstream is not None:
            self._waited_for = body.done
            upstream.send(self._coded(content, x.head.length, body.done), body.done)
            if not self._answering:
                timeouts = x.route.timeouts
                self._await(timeouts.head if body.done else timeouts.idle)
        if body.done:
            self._buffer = body.rest
            self._body = None

    # --- back from the backend (upstream.Sink) --------------------------------------------------------------

    def interim(self, answer: Answer) -> None:
        x = self.exchange
        if answer.status == 100:
            self._waited_for = False
        if x is not None and x.head.minor and answer.status in (100, 103):
            self._out.write(answer_head(answer, b""))

    def answer_begun(self, answer: Answer, content: bytes, done: bool) -> None:
        x = self.exchange
        assert x is not None
        gateway = self._gateway
        x.status = answer.status
        x.phase = Phase.RESPOND
        now = gateway.monotonic()
        x.upstream_seconds = now - x.upstream_started
        if answer.status in FAILURE_STATUSES:
            x.failed_by = Source.BACKEND
            gateway.policy.settle(x, Outcome.FAILURE, now)
        else:
            gateway.policy.settle(x, Outcome.SUCCESS, now)
        claim = x.claim
        added = b"%bX-Request-ID: %b\r\n%b" % (
            self._framing(x.head, answer),
            x.request_id.encode(),
            claim.fields(now) if claim is not None else b"",
        )
        if not answer.has_date:
            added += f"Date: {gateway.http_date()}\r\n".encode()
        data = self._head_with_cors(x, answer, added) if gateway.cors.enabled else answer_head(answer, added)
        self._answering = True
        x.bytes_out = len(content)
        if done:
            self._upstream = None
        self._out.write(data + (self._recoded(content, done) if self._rechunk else content))
        if done:
            self._end(x)
        else:
            self._await(x.route.timeouts.idle)

    def _framing(self, head: Head, answer: Answer) -> bytes:
        """The lines that say where the answer ends, and whether the connection does."""
        if self._body is not None:
            # The caller's body is not wanted to its end: neither connection can be used again (9.3).
            self._keep_alive = False
        self._rechunk = False
        framing = answer.length_line
        if answer.status == 204:
            framing = b""
        elif answer.length < 0 and body_length(answer, head.method) < 0:
            if head.minor:
                framing = b"Transfer-Encoding: chunked\r\n"
                self._rechunk = True
            else:
                self._keep_alive = False
        if not self._keep_alive or self._wire.draining:
            self._keep_alive = False
            return framing + b"Connection: close\r\n"
        return framing if head.minor else framing + b"Connection: keep-alive\r\n"

    def _head_with_cors(self, x: Exchange, answer: Answer, added: bytes) -> bytes:
        lines = without_fields(answer.forwarded, (DROPPED_PREFIX,))
        fields = "".join(
            [f"{name}: {value}\r\n" for name, value in self._gateway.cors.answer_fields(x.head.fields.origin)]
        )
        start = f"HTTP/1.1 {answer.status} {answer.reason}\r\n{lines}{fields}".encode("latin-1")
        return b"%b%b\r\n" % (start, added)

    def _recoded(self, content: bytes, done: bool) -> bytes:
        if not self._rechunk:
            return content
        return (chunk(content) if content else b"") + (LAST_CHUNK if done else b"")

    def answer_content(self, content: bytes, done: bool) -> None:
        x = self.exchange
        assert x is not None
        x.bytes_out += len(content)
        if done:
            self._upstream = None
        data = self._recoded(content, done)
        if data:
            self._out.write(data)
        if done:
            self._end(x)
        else:
            self._await(x.route.timeouts.idle)

    def answer_failed(self, failure: Failure) -> None:
        x = self.exchange
        assert x is not None
        self._upstream = None
        gateway = self._gateway
        now = gateway.monotonic()
        if self._answering:
            x.failed_by = Source.BACKEND
            x.error = ErrorCode.BACKEND_BROKEN
            gateway.policy.body_broke(x, now)
            self._abort(x)
            return
        if failure.kind is FailureKind.STALE and x.head.length == 0 and x.head.method in _IDEMPOTENT:
            self._forward(x, x.route)
            return
        # A pool without a place is our own limit. A connection that broke under an unfinished upload may have carried
        # an answer that was lost with it, and a body that never began is the caller's doing: no caller may open the
        # breaker for all others.
        overload = failure.kind is FailureKind.OVERLOAD
        uploading = self._body is not None and (
            failure.kind in (FailureKind.CUT_OFF, FailureKind.STALE)
            or (failure.kind is FailureKind.TIMEOUT and x.head.fields.expect is not None and not x.bytes_in)
        )
        neutral = overload or uploading
        gateway.policy.settle(x, Outcome.NEUTRAL if neutral else Outcome.FAILURE, now)
        code = _FAILURES.get(failure.kind, ErrorCode.BACKEND_BROKEN)
        fields: tuple[tuple[str, str], ...] = (("Proxy-Status", f"lucid; error={failure.kind.value}"),)
        if code is ErrorCode.BACKEND_UNAVAILABLE:
            fields = (("Retry-After", "1"), *fields)
        details = {"backend": x.route.backend, "reason": failure.kind.value}
        source = Source.GATEWAY if overload else Source.BACKEND
        self._refuse(x, Refusal(code, details=details, fields=fields, source=source))

    def upstream_full(self) -> None:
        self._waited_for = True
        if not self._hold:
            self._hold = True
            self._out.pause_reading()

    def upstream_ready(self) -> None:
        self._waited_for = self._body is None
        self._release()

    # --- deadlines ------------------------------------------------------------------------------------------

    def _await(self, seconds: float) -> None:
        """From now, something must happen within so many seconds (0: none), and all of it within the route's total."""
        if seconds:
            self.deadline = min(self._gateway.monotonic() + seconds, self._latest)
        else:
            self.deadline = self._latest

    def _answer_goes_on(self) -> None:
        x = self.exchange
        if x is not None and self._answering:
            self._await(x.route.timeouts.idle)

    def _expire_forward(self, x: Exchange) -> None:
        if self._full and self._gateway.monotonic() < self._latest:
            # It is the caller that does not read, not the backend that does not send.
            self._abandon()
            self._stage = Stage.CLOSED
            self._out.abort()
            return
        if self._body is not None and not self._answering and not self._waited_for:
            self._break_off(x, self._gateway.parse_refusal(Fault(408, "the body did not arrive in time")))
            return
        if self._upstream is not None:
            self._upstream.abort()
        self.answer_failed(Failure(FailureKind.TIMEOUT, "the backend did not answer in time"))
