"""What every answer of the control plane has: errors as envelopes, and the fields that the gateway adds."""

import logging
from typing import Any, Final

from sanic import HTTPResponse, Request, Sanic
from sanic.exceptions import RequestCancelled, SanicException
from sanic.handlers import ErrorHandler
from sanic.response import BaseHTTPResponse, raw

from lucid.core.exchange import Exchange, Source
from lucid.core.gateway import Gateway
from lucid.core.policy import REALM
from lucid.errors import ErrorCode, GatewayError, envelope

_log: Final = logging.getLogger(__name__)

_CALLER_LEFT: Final = 499
"""nginx's number for it, and that of the record (Gateway.abandon)."""
_SANIC_CODES: Final = {
    400: ErrorCode.BAD_FIELD,
    404: ErrorCode.NO_SUCH_ROUTE,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    408: ErrorCode.TOO_SLOW,
    413: ErrorCode.BODY_TOO_LARGE,
    503: ErrorCode.DEPENDENCY_AWAY,
}


class EnvelopeHandler(ErrorHandler):
    """Sanic's error handler: whatever was raised leaves as the platform's envelope, a traceback only in the log."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    def default(self, request: Request, exception: BaseException) -> HTTPResponse:
        if isinstance(exception, RequestCancelled):
            # Sanic's word for a caller who hung up. The record of the exchange is written, and nobody reads this.
            return raw(b"", status=_CALLER_LEFT)
        if isinstance(exception, GatewayError):
            error = exception
        elif isinstance(exception, SanicException) and exception.status_code in _SANIC_CODES:
            error = GatewayError(_SANIC_CODES[exception.status_code])
        else:
            _log.error("a handler failed on %s", request.path, exc_info=exception)
            error = GatewayError(ErrorCode.INTERNAL)
        x = _exchange(request)
        if x is not None:
            x.error = error.code
            x.failed_by = Source.GATEWAY if error.code.status >= 500 else Source.CALLER
        body = envelope(
            error.code,
            str(error),
            error.details,
            x.request_id if x is not None else "",
            self._gateway.timestamp(),
        )
        fields = dict(error.fields)
        if error.code.status == 401:
            fields.setdefault("WWW-Authenticate", REALM)
        return raw(body, status=error.code.status, headers=fields, content_type="application/json")

    @staticmethod
    def log(request: Request, exception: Exception) -> None:
        """Sanic's own line about each error: the record of the exchange says it already."""


def install(app: Sanic[Any, Any], gateway: Gateway) -> None:
    """Make all answers of `app` the gateway's: call once, before it serves."""
    app.error_handler = EnvelopeHandler(gateway)

    async def add_fields(request: Request, response: BaseHTTPResponse) -> None:
        x = _exchange(request)
        if x is None:
            return
        for name, value in (*gateway.added_fields(x), *gateway.security_fields):
            if name.lower() == "vary" and "vary" in response.headers:
                value = f"{response.headers['vary']}, {value}"
            # What a handler has set stays: a docs page needs a policy of its own.
            elif name in response.headers:
                continue
            response.headers[name] = value

    app.register_middleware(add_fields, "response")


def _exchange(request: Request) -> Exchange | None:
    return getattr(request.ctx, "exchange", None)
