"""The protocol that Sanic serves with, and the control plane. The one place in core that knows Sanic.

An exchange of the control plane is handed to Sanic once its body is whole: Sanic reads a head and a body that *we*
spelled, so that its lax parser (chunk sizes, field names, lengths) never sees a caller's bytes, and its middleware
never waits for a body. All else of a connection is Connection's and Forwarding's.
"""

import asyncio
from typing import Any, cast

from sanic.http import Http
from sanic.http.constants import Stage as SanicStage
from sanic.models.server_types import ConnInfo
from sanic.server.protocols.http_protocol import HttpProtocol

from lucid.core.exchange import Exchange, Phase
from lucid.core.wire.connection import CONTROL_SECONDS, Stage, Wire
from lucid.core.wire.forwarding import Forwarding
from lucid.errors import ErrorCode, GatewayError


class _Done(Exception):
    """Sanic asked for bytes beyond the one request that it was given."""


class _ControlHttp(Http):
    """Sanic's HTTP for one request that is already whole: our head, our body, nothing behind them."""

    def __init__(self, protocol: "GatewayProtocol") -> None:
        super().__init__(protocol)  # type: ignore[no-untyped-call]
        self._receive_more = self._no_more

    async def _no_more(self) -> None:
        raise _Done

    @property
    def head_only(self) -> bool:
        # Sanic routes HEAD apart from GET; it is handed GET, and answers without a body.
        x = cast("GatewayProtocol", self.protocol).exchange
        return x is not None and x.head.method == "HEAD"

    @head_only.setter
    def head_only(self, value: object) -> None:
        pass


class GatewayProtocol(Forwarding, HttpProtocol):
    """See the module. Sanic makes one per connection, from `app.ctx.wire`."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop, app: Any, **kwargs: Any) -> None:
        super().__init__(loop=loop, app=app, **kwargs)
        wire: Wire = app.ctx.wire
        self._set_up(wire)
        self.request_handler = self._handle

    # --- the transport's side, as far as Sanic must know -----------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.connections.discard(self)
        self._can_write.set()
        if self.conn_info is not None:
            self.conn_info.lost = True
        super().connection_lost(exc)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._can_write.clear()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._can_write.set()
        super().resume_writing()

    def close(self, timeout: float | None = None) -> None:
        self._close()

    def abort(self) -> None:
        # Sanic's own forgets the transport at once, while callbacks may still be on their way to it.
        self._out.abort()

    def check_timeouts(self) -> None:
        """Sanic's own timeouts are off: `deadline` is the only clock of a connection."""

    # --- the control plane -----------------------------------------------------------------------------

    def _answer_here(self, x: Exchange, body: bytes) -> None:
        self._stage = Stage.CONTROL
        self.deadline = self._gateway.monotonic() + CONTROL_SECONDS
        self._task = self.loop.create_task(self._control(x, body))

    async def _control(self, x: Exchange, body: bytes) -> None:
        if self.conn_info is None:
            self.conn_info = ConnInfo(self._out, unix=self._unix)  # type: ignore[arg-type]
        self.recv_buffer = bytearray(self._head_for_sanic(x, len(body)) + body)
        http = self._http = _ControlHttp(self)
        try:
            await http.http1()  # type: ignore[no-untyped-call]
        except _Done:
            pass
        except asyncio.CancelledError:
            return
        finally:
            self._http = None
            self._task = None
        if self.exchange is x:
            if not x.status and http.response is not None:
                x.status = http.response.status  # Sanic answered before it called anybody.
            if http.stage is not SanicStage.IDLE or not http.keep_alive:
                self._keep_alive = False
            self._end(x)

    def _head_for_sanic(self, x: Exchange, length: int) -> bytes:
        """All that Sanic is told. None of the caller's fields: what handlers may know is in the exchange."""
        head, target = x.head, x.target
        method = "GET" if head.method == "HEAD" else head.method
        connection = "keep-alive" if self._keep_alive and not self._must_close() else "close"
        framing = f"content-length: {length}\r\n" if length else ""
        path = target.path.removesuffix("/") or "/"
        return (
            f"{method} {path}{target.query} HTTP/1.1\r\nhost: {head.host or 'localhost'}\r\n"
            f"connection: {connection}\r\n{framing}\r\n"
        ).encode("latin-1")

    async def _handle(self, request: Any) -> None:
        """Stands where Sanic calls its application."""
        x = self.exchange
        request.ctx.exchange = x
        await self.app.handle_request(request)
        response = self._http.response if self._http is not None else None
        if x is not None and response is not None:
            x.phase = Phase.RESPOND
            x.status = response.status
            x.bytes_out = len(getattr(response, "body", None) or b"")

    def _expire_answer(self, x: Exchange) -> None:
        # Sanic's own way to end a handler: it answers with `exception` when its task is cancelled.
        if self._http is not None and self._task is not None:
            self._http.exception = GatewayError(ErrorCode.DEPENDENCY_AWAY, "the answer took too long")
            self._task.cancel()
