"""A connection from downstream: bytes in, exchanges one after another, bytes out.

Both planes stand behind the same strict head check and the same policy, and both end here. A proxied exchange is
driven by callbacks from its first byte to its last: `data_received` judges and writes upstream, the upstream's
callbacks write downstream (forwarding.py), and no task wakes. Only a need (quota to fetch, a key to look up, a
connection to dial) runs in a task of its own, which then goes on where the callbacks stopped.

The stages of a connection:

    HEAD     waiting for a head, or for the rest of one
    NEED     a need is being met; what arrives is kept (bounded), unread
    COLLECT  a body for the control plane is arriving
    CONTROL  Sanic is answering
    FORWARD  a backend is at work: bodies stream both ways
    SWALLOW  an early answer was sent; a small rest of the body is read and dropped (9.6)
    LINGER   as SWALLOW, but the connection ends with it

One deadline per connection, `deadline`, is set at every change of stage and enforced by `Wire.sweep`.
"""

import asyncio
import enum
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from lucid.core.exchange import Exchange, Lease, LookUp, Phase, Preflight, Principal, Refusal, Source
from lucid.core.gateway import Gateway
from lucid.core.rules.framing import (
    CHUNKED,
    MAX_HEAD_BYTES,
    Body,
    Fault,
    Fields,
    Memo,
    body_for,
    oversized_fault,
    parse_head,
    unfinished_fault,
)
from lucid.core.rules.routes import Route
from lucid.core.wire.pool import Balancer
from lucid.core.wire.upstream import Upstream
from lucid.errors import ErrorCode, GatewayError

_log = logging.getLogger("lucid.gateway")

HEAD_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75.0
"""nginx's default."""
BODY_SECONDS = 30.0
"""A body of the control plane, in total."""
CONTROL_SECONDS = 30.0
"""A handler's time. Every dependency has a shorter deadline of its own."""
CLOSE_SECONDS = 10.0
"""In which a caller must take some of the bytes that wait for it, once it has kept them waiting."""
LINGER_SECONDS = 1.0
LINGER_BYTES = 65_536
MAX_UNREAD_BYTES = 65_536
HEADS_AT_ONCE = 32
"""Taken from one connection before others have their turn."""
DRAIN_IDLE_SECONDS = 1.0
WRITE_BUFFER_BYTES = 65_536
NEVER = float("inf")


class Stage(enum.IntEnum):
    HEAD = 0
    NEED = 1
    COLLECT = 2
    CONTROL = 3
    FORWARD = 4
    SWALLOW = 5
    LINGER = 6
    CLOSED = 7


class Wire:
    """What all connections of a worker share. Made by the composition root, found at `app.ctx.wire`."""

    def __init__(self, gateway: Gateway, backends: Mapping[str, Balancer], *, scheme: str) -> None:
        """`backends` by name; `scheme` is what callers speak here, http or https."""
        self.gateway = gateway
        self.backends = backends
        self.scheme = scheme
        self.fields: Memo[Fields] = Memo()
        self.connections: set[Connection] = set()
        self.draining = False
        self._swept_pools = 0.0

    def sweep(self, now: float) -> None:
        """Enforce deadlines. Called a few times a second; a deadline is late by that at most."""
        for connection in [c for c in self.connections if c.deadline <= now]:
            connection.expire()
        if now - self._swept_pools >= 1.0:
            self._swept_pools = now
            for balancer in self.backends.values():
                balancer.sweep(now)

    def drain(self) -> None:
        """From now on each answer ends its connection. An idle one has a moment: a request that is on its way gets
        its answer, with `Connection: close`, instead of a reset."""
        self.draining = True
        latest = self.gateway.monotonic() + DRAIN_IDLE_SECONDS
        for connection in self.connections:
            if connection.idle:
                connection.deadline = min(connection.deadline, latest)
            else:
                connection.close_if_idle()  # it is not: it ends behind what it is at


_HEAD, _FORWARD = Stage.HEAD, Stage.FORWARD
_FORWARDING = Phase.FORWARD


class Connection:
    """The part of the protocol that needs neither Sanic nor a backend. Subclasses fill in the two planes.

    It has no slots: two bases with slots of their own cannot be mixed, and Sanic's protocol has them.
    """

    _out: asyncio.Transport
    _wire: Wire
    _gateway: Gateway
    _stage: Stage
    _buffer: bytes
    _pumping: bool
    _pump_due: bool
    _eof: bool
    _keep_alive: bool
    _body: Body | None
    _collected: bytearray | None
    _upstream: Upstream | None
    _need: asyncio.Task[None] | None
    _answering: bool
    _rechunk: bool
    _full: bool
    _hold: bool
    _latest: float
    _waited_for: bool
    _left: int
    _unsent: int
    _spelled: tuple[Fields, Principal, str, str] | None
    _spelled_text: str
    exchange: Exchange | None
    deadline: float
    peer: str
    address: str

    def _set_up(self, wire: Wire) -> None:
        self._wire = wire
        self._gateway = wire.gateway
        self._stage = Stage.CLOSED
        self._buffer = b""
        self._pumping = False
        self._pump_due = False
        self._eof = False
        self._keep_alive = True
        self._body = None
        self._collected = None
        self._upstream = None
        self._need = None
        self._answering = False
        self._rechunk = False
        self._full = False
        self._hold = False
        self._latest = NEVER
        self._waited_for = True
        self._left = 0
        self._unsent = 0
        self._spelled = None
        self._spelled_text = ""
        self.exchange = None
        self.deadline = NEVER
        self.peer = ""
        self.address = ""

    # --- the planes ------------------------------------------------------------------------------------

    def _forward(self, x: Exchange, route: Route) -> None:
        """The data plane: send the exchange to a backend."""
        raise NotImplementedError

    def _stream_up(self, data: bytes) -> None:
        """More of the body of an exchange that is being forwarded."""
        raise NotImplementedError

    def _expire_forward(self, x: Exchange) -> None:
        """The deadline of an exchange that is being forwarded has passed."""
        raise NotImplementedError

    def _answer_here(self, x: Exchange, body: bytes) -> None:
        """The control plane: answer the exchange, whose body is whole."""
        raise NotImplementedError

    def _answer_goes_on(self) -> None:
        """The caller reads again what is being forwarded."""
        raise NotImplementedError

    def _expire_answer(self, x: Exchange) -> None:
        """The deadline of an exchange that is being answered here has passed."""
        raise NotImplementedError

    # --- the transport's side -------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._out = transport
        self._wire.connections.add(self)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else "unix"
        self.address = self._gateway.policy.client_address(self.peer, ())
        self._stage = _HEAD
        self.deadline = self._gateway.monotonic() + HEAD_SECONDS

    def data_received(self, data: bytes) -> None:
        stage = self._stage
        if stage is _HEAD:
            self._buffer = self._buffer + data if self._buffer else data
            self._pump()
        elif stage is _FORWARD and self._body is not None:
            self._stream_up(data)
        elif stage is Stage.COLLECT:
            self._collect(data)
        elif stage is Stage.SWALLOW or stage is Stage.LINGER:
            self._swallow(data)
        elif stage is not Stage.CLOSED:
            self._buffer += data
        if len(self._buffer) > MAX_UNREAD_BYTES and not self._hold:
            self._hold = True
            self._out.pause_reading()

    def eof_received(self) -> bool:
        """A caller that half-closes still gets the answers to all that it asked (9.3.2, 9.6); one that owes a body
        has broken it off."""
        self._eof = True
        if self._body is not None:
            self._abandon()
        elif self.exchange is not None or self._pump_due or (self._full and self._buffer):
            # TLS has no half-close; asyncio would warn of each True, at a caller's will.
            return self._out.get_extra_info("sslcontext") is None
        self._close()
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self._wire.connections.discard(self)
        self._stage = Stage.CLOSED
        self.deadline = NEVER
        self._abandon()

    def pause_writing(self) -> None:
        self._full = True
        self._unsent = self._out.get_write_buffer_size()
        if self._upstream is not None:
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        if self._upstream is not None:
            self._upstream.resume_reading()
            self._answer_goes_on()
        self._pump()

    def _abandon(self) -> None:
        """The caller is gone: whatever is under way for it ends, and its connection to a backend closes."""
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self._need is not None:
            self._need.cancel()
            self._need = None
        if self.exchange is not None:
            self._gateway.abandon(self.exchange)
            self.exchange = None

    def _close(self) -> None:
        """Close once what was written has gone out; a caller that does not take it is cut off in the end."""
        self._stage = Stage.CLOSED
        self._buffer = b""
        self.deadline = self._gateway.monotonic() + CLOSE_SECONDS
        self._unsent = self._out.get_write_buffer_size()
        if not self._out.is_closing():
            self._out.close()

    def _takes(self) -> bool:
        """Whether the caller has taken any of what waits for it since this was last asked: slow is not stuck."""
        unsent, self._unsent = self._unsent, self._out.get_write_buffer_size()
        return self._unsent < unsent

    @property
    def idle(self) -> bool:
        """Whether neither an exchange nor a part of a head is here."""
        return self._stage is _HEAD and not self._buffer

    def close_if_idle(self) -> bool:
        """Close unless an exchange or a part of a head is here; then close behind it."""
        if self.idle:
            self._close()
            return True
        self._keep_alive = False
        return False

    def _release(self) -> None:
        """Read from the caller again."""
        if self._hold:
            self._hold = False
            if not self._out.is_closing():
                self._out.resume_reading()

    # --- heads ----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Take heads out of the buffer for as long as one is whole and the connection is free.

        A caller that does not read its answers gets no further ones: they would pile up in our memory.
        """
        if self._pumping:
            return
        self._pumping = True
        turns = HEADS_AT_ONCE
        try:
            while self._buffer and self._stage is _HEAD and not self._full and turns:
                turns -= 1
                if not self._take_head():
                    break
        finally:
            self._pumping = False
        if self._stage is _HEAD and not self._full:
            if not turns and self._buffer:
                self._pump_later()
                return
            if self._eof:
                self._close()  # What is left, if anything, will never be whole.
                return
        self._release_if_small()

    def _pump_later(self) -> None:
        """One caller's pipeline must not keep the others waiting: the rest of it has its turn after theirs."""
        if not self._hold:
            self._hold = True
            self._out.pause_reading()
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._pump_due = False
        if self._stage is _HEAD:
            self._pump()

    def _release_if_small(self) -> None:
        """Read on, unless what was read is still enough: each answer would let in another read of it."""
        if self._hold and self._body is None and len(self._buffer) <= MAX_UNREAD_BYTES:
            self._release()

    def _take_head(self) -> bool:
        """Begin the next exchange; False: its head is not whole yet."""
        data = self._buffer
        if data[0] == 13:
            if data == b"\r":
                return False
            if data.startswith(b"\r\n"):
                data = data[2:]  # once (2.2): a second empty line is a malformed request line
        end = data.find(b"\r\n\r\n") + 4
        fault: Fault | None
        if end == 3:
            fault = unfinished_fault(data)
            if fault is None:
                if self.deadline > (latest := self._gateway.monotonic() + HEAD_SECONDS):
                    self.deadline = latest
                return False
            self._buffer = b""
            self._begin_refused(fault)
            return True
        if end == len(data):
            self._buffer = b""
        else:
            self._buffer = data[end:]
            data = data[:end]
        head = parse_head(data, self._wire.fields) if end <= MAX_HEAD_BYTES else oversized_fault(data)
        if head is None or isinstance(head, Fault):
            self._begin_refused(head or Fault(431, "the head is too long"))
            return True
        gateway = self._gateway
        x = self.exchange = gateway.open(head, self.peer, self.address)
        self._keep_alive = head.keep_alive and not self._wire.draining
        self._answering = False
        self._body = None
        self._left = 0
        self._latest = NEVER
        try:
            self._advance(x)
        except Exception:
            self._fail_inside(x)
        return True

    def _begin_refused(self, fault: Fault) -> None:
        x = self.exchange = self._gateway.open(None, self.peer, self.address)
        self._refuse(x, self._gateway.parse_refusal(fault))

    # --- judging --------------------------------------------------------------------------------------------

    def _advance(self, x: Exchange) -> None:
        """Take the exchange as far as it goes without waiting."""
        verdict = self._gateway.judge(x)
        if verdict is None:
            route = x.route
            x.phase = _FORWARDING
            if route.backend:
                self._forward(x, route)
            else:
                self._begin_collecting(x)
        elif isinstance(verdict, Refusal):
            self._refuse(x, verdict)
        elif isinstance(verdict, Preflight):
            left = self._unread_body(x)
            self._send_own(x, self._gateway.preflight_answer(x, verdict, close=self._must_close()), left)
        else:
            self._wait_for(self._meet(x, verdict))

    def _wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._stage = Stage.NEED
        # Each need has a deadline of its own; a route's total is the exchange's.
        self.deadline = self._latest
        self._need = asyncio.get_running_loop().create_task(coroutine)

    async def _meet(self, x: Exchange, need: LookUp | Lease) -> None:
        try:
            await self._gateway.meet(x, need)
        except GatewayError as error:
            self._resume(x, self._gateway.error_refusal(error))
        except Exception:
            self._resume(x, self._internal_error("a need could not be met"))
        else:
            self._resume(x, None)

    def _resume(self, x: Exchange, refusal: Refusal | None) -> None:
        """Go on after a need, unless the caller has left meanwhile."""
        self._need = None
        if self.exchange is not x or self._stage is not Stage.NEED:
            return
        if refusal is not None:
            self._refuse(x, refusal)
            return
        try:
            self._advance(x)
        except Exception:
            self._fail_inside(x)

    def _fail_inside(self, x: Exchange) -> None:
        """A fault of ours: the caller gets an envelope, the log the traceback."""
        refusal = self._internal_error("an exchange failed inside the gateway")
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self.exchange is x and not self._answering:
            self._refuse(x, refusal)
        else:
            self._abort(x)

    def _internal_error(self, what: str) -> Refusal:
        _log.exception(what)
        return Refusal(ErrorCode.INTERNAL, source=Source.GATEWAY)

    def _body_is_sound(self, x: Exchange, route: Route, body: Body, size: int) -> bool:
        """Whether the body may go on; otherwise the exchange has ended here."""
        x.bytes_in += size
        if body.fault:
            self._break_off(x, self._gateway.body_refusal(body.fault))
            return False
        if x.bytes_in > route.max_body:
            details = {"limit_bytes": route.max_body}
            self._break_off(x, Refusal(ErrorCode.BODY_TOO_LARGE, details=details, close=True))
            return False
        return True

    def _break_off(self, x: Exchange, refusal: Refusal) -> None:
        """The caller's body cannot be taken further: the backend's request is cancelled."""
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self._answering:
            self._abort(x)
        else:
            self._refuse(x, refusal)

    # --- bodies for the control plane -----------------------------------------------------------------------

    def _begin_collecting(self, x: Exchange) -> None:
        head = x.head
        if head.length == 0:
            self._answer_here(x, b"")
            return
        self._stage = Stage.COLLECT
        self._release()
        self.deadline = self._gateway.monotonic() + BODY_SECONDS
        self._body = body_for(head.length)
        self._collected = bytearray()
        unread, self._buffer = self._buffer, b""
        if unread:
            self._collect(unread)
        if self._stage is not Stage.COLLECT:
            return
        if self._eof:
            self._abandon()
            self._close()
        elif head.minor and head.fields.expect is not None:
            self._out.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _collect(self, data: bytes) -> None:
        x, body, collected = self.exchange, self._body, self._collected
        assert x is not None and body is not None and collected is not None
        content = body.feed(data)
        if not self._body_is_sound(x, x.route, body, len(content)):
            return
        collected += content
        if body.done:
            self._buffer = body.rest
            self._body = None
            self._collected = None
            self._answer_here(x, bytes(collected))

    # --- answers of our own, and the end --------------------------------------------------------------------

    def _must_close(self) -> bool:
        return not self._keep_alive or self._wire.draining

    def _refuse(self, x: Exchange, refusal: Refusal) -> None:
        """Answer in place of the backend or the handler."""
        if refusal.close or (x.known_head is not None and not x.head.minor):
            self._keep_alive = False
        left = self._unread_body(x)
        self._send_own(x, self._gateway.refusal_answer(x, refusal, close=self._must_close()), left)

    def _unread_body(self, x: Exchange) -> int:
        """Bytes of the request's body that nobody will read; -1: more than can be said, or than is worth reading.

        Call it before the answer is spelled: a rest that is not read ends the connection.
        """
        left = self._left_of_body(x)
        if left > LINGER_BYTES:
            left = -1
        if left < 0:
            self._keep_alive = False
        return left

    def _left_of_body(self, x: Exchange) -> int:
        head = x.known_head
        if head is None:
            return -1
        if head.length == 0:
            return 0
        if head.length == CHUNKED or head.fields.expect is not None:
            return -1
        if self._body is not None:
            return self._body.left
        return head.length - x.bytes_in

    def _send_own(self, x: Exchange, answer: bytes, unread: int = 0) -> None:
        self._body = None
        self._collected = None
        self._out.write(answer)
        self._left = unread
        self._end(x)

    def _end(self, x: Exchange) -> None:
        """The answer is on its way: record it, and turn to the next exchange or to the connection's end."""
        self._gateway.finish(x)
        self.exchange = None
        if self._body is not None:
            self._body = None
            self._left = -1
        self._release_if_small()
        if not self._keep_alive:
            if self._left and not self._eof:
                self._linger()
            else:
                self._close()
            return
        now = self._gateway.monotonic()
        if self._left:
            self._stage = Stage.SWALLOW
            self.deadline = now + LINGER_SECONDS
            unread, self._buffer = self._buffer, b""
            if unread:
                self._swallow(unread)
            return
        self._stage = _HEAD
        self.deadline = now + KEEP_ALIVE_SECONDS
        if self._buffer or self._eof:
            self._pump()

    def _abort(self, x: Exchange) -> None:
        """An answer under way cannot be finished: break off visibly, without a clean last chunk."""
        self._gateway.finish(x)
        self.exchange = None
        self._stage = Stage.CLOSED
        self._out.abort()

    def _linger(self) -> None:
        """Half-close and read on for a moment, or a reset would eat the answer (9.6)."""
        self._stage = Stage.LINGER
        self.deadline = self._gateway.monotonic() + LINGER_SECONDS
        self._left = LINGER_BYTES - len(self._buffer)
        self._buffer = b""
        if self._left <= 0:
            self._close()
        elif self._out.can_write_eof():
            self._out.write_eof()

    def _swallow(self, data: bytes) -> None:
        if self._stage is Stage.LINGER:
            self._left -= len(data)
            if self._left <= 0:
                self._close()
            return
        if len(data) < self._left:
            self._left -= len(data)
            return
        self._buffer = data[self._left :]
        self._left = 0
        if not self._keep_alive or self._wire.draining:
            self._close()
            return
        self._stage = _HEAD
        self.deadline = self._gateway.monotonic() + KEEP_ALIVE_SECONDS
        if self._buffer:
            self._pump()

    def expire(self) -> None:
        """The deadline has passed: what that means depends on the stage."""
        self.deadline = NEVER
        x = self.exchange
        if (self._full or self._stage is Stage.CLOSED) and self._takes():
            self.deadline = self._gateway.monotonic() + CLOSE_SECONDS
        elif self._stage is Stage.CLOSED:
            self._out.abort()
        elif self._pump_due:
            self.deadline = self._gateway.monotonic() + HEAD_SECONDS
        elif self._stage is _HEAD and self._buffer and not self._full:
            self._buffer = b""
            self._begin_refused(Fault(408, "the head did not arrive in time"))
        elif x is None:
            self._close()
        elif self._stage is Stage.COLLECT:
            self._refuse(x, self._gateway.parse_refusal(Fault(408, "the body did not arrive in time")))
        elif self._stage is Stage.CONTROL:
            self._expire_answer(x)
        elif self._stage is Stage.NEED:
            if self._need is not None:
                self._need.cancel()
                self._need = None
            self._expire_forward(x)
        else:
            self._expire_forward(x)
