"""The error tree: every way in which the gateway itself says no, with its code and its status.

An `ErrorCode` is a value: rules and policy return it inside a refusal. `GatewayError` is the same thing
raised, for code that is called by people's handlers (blueprints, services, database). Both end in
`envelope`, the one function that spells the platform's error answer.
"""

import datetime as dt
import enum
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from lucid import SERVICE_NAME


class ErrorCode(enum.Enum):
    """The registry of codes. 1XXX validation, 2XXX identity, 3XXX limits, 4XXX business rules, 5XXX system.

    `status` is the usual status; a refusal may carry a more exact one of the same family (a head that is
    malformed in its version is still 1001, with 505).
    """

    status: int
    message: str

    def __new__(cls, code: int, status: int, message: str) -> Self:
        member = object.__new__(cls)
        member._value_ = f"LUCID_ERR_{code}"
        member.status = status
        member.message = message
        return member

    MALFORMED_HEAD = 1001, 400, "The request's head is malformed"
    BAD_JSON = 1002, 400, "The body is not valid JSON"
    BAD_FIELD = 1003, 400, "A field of the request is invalid"
    NO_SUCH_ROUTE = 1004, 404, "No such route"
    METHOD_NOT_ALLOWED = 1005, 405, "Method not allowed here"
    BODY_TOO_LARGE = 1006, 413, "The body is too large"
    HEAD_TOO_LARGE = 1007, 431, "The request's head is too large"
    MALFORMED_BODY = 1008, 400, "The body's framing is malformed"
    TOO_SLOW = 1009, 408, "The request did not arrive in time"

    NO_CREDENTIAL = 2001, 401, "A credential is required"
    CREDENTIAL_EXPIRED = 2002, 401, "The credential has expired"
    BAD_CREDENTIAL = 2003, 401, "The credential is not valid"
    ROLE_TOO_LOW = 2004, 403, "The role does not permit this"
    BAD_SIGNATURE = 2005, 401, "The signature does not match"
    UNKNOWN_CHALLENGE = 2006, 401, "The challenge is unknown, spent or expired"
    ADDRESS_NOT_ALLOWED = 2007, 403, "The client's address is not allowed here"
    TWO_CREDENTIALS = 2008, 400, "Send either Authorization or X-API-Key, not both"

    RATE_LIMITED = 3001, 429, "Rate limit exceeded"

    CONFLICT = 4001, 409, "The resource conflicts with another"
    ILLEGAL_MOVE = 4002, 409, "The move is not legal in the present state"
    NOT_FOUND = 4003, 404, "Not found"

    BACKEND_BROKEN = 5001, 502, "The backend is unreachable or gave a broken answer"
    BACKEND_UNAVAILABLE = 5002, 503, "The backend is not available at present"
    BACKEND_TIMEOUT = 5003, 504, "The backend did not answer in time"
    DEPENDENCY_AWAY = 5004, 503, "A part that the gateway depends on is away"
    DRAINING = 5005, 503, "The gateway is shutting down"
    INTERNAL = 5006, 500, "Internal error"
    NOT_IMPLEMENTED = 5007, 501, "Not implemented here"


class GatewayError(Exception):
    """Raised by services and blueprints; answered with the envelope of its code.

    `details` is shown to the caller: it never holds a secret. `fields` are extra answer fields such as
    `("Retry-After", "5")`.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str = "",
        *,
        details: Mapping[str, Any] | None = None,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message or code.message)
        self.code = code
        self.details = details or {}
        self.fields = fields


AWAY_RETRY_SECONDS = 5


def away(dependency: str, message: str = "") -> GatewayError:
    """The error of a call that needs `dependency` ("mongodb", "redis") and did not get it."""
    return GatewayError(
        ErrorCode.DEPENDENCY_AWAY,
        message,
        details={"dependency": dependency},
        fields=(("Retry-After", str(AWAY_RETRY_SECONDS)),),
    )


_encode = msgspec.json.Encoder().encode


def rfc3339(moment: dt.datetime) -> str:
    """A UTC datetime as RFC 3339 with seconds and `Z`."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def envelope(
    code: ErrorCode, message: str, details: Mapping[str, Any], request_id: str, moment: dt.datetime
) -> bytes:
    """The platform's error body, as JSON. `message` empty: the code's own."""
    return _encode(
        {
            "error": {
                "code": code.value,
                "message": message or code.message,
                "details": details,
                "request_id": request_id,
                "timestamp": rfc3339(moment),
                "service": SERVICE_NAME,
                "version": "v1",
            }
        }
    )
