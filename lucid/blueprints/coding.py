"""Between bytes and structs, the same for every blueprint: strict decoding with the platform's errors,
encoding.
"""

import re
from typing import Final, Generic, TypeVar

import msgspec
from sanic import HTTPResponse, Request
from sanic.response import raw

from lucid.core.exchange import Exchange, Principal
from lucid.core.validation import bad_field
from lucid.errors import ErrorCode, GatewayError
from lucid.services.auth_service import Caller

JSON: Final = "application/json"
NO_STORE: Final = {"cache-control": "no-store"}
"""On every answer that holds a token or a challenge (RFC 6749, 5.1)."""

T = TypeVar("T", bound=msgspec.Struct)

# msgspec's errors end in the place, or name the field: "Expected `str`, got `int` - at `$.user.name`",
# "Object missing required field `a` - at `$.user`", "Object contains unknown field `b`".
_PLACE: Final = re.compile(r"(?s)(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?")
_NAMED: Final = re.compile(r"Object (?:missing required|contains unknown) field `([^`]*)`")


class Body(Generic[T]):
    """Decodes the bodies of one route into one struct; make it once per blueprint.

    Declare the struct with `forbid_unknown_fields=True`: a misspelt optional field must not pass in silence.
    """

    def __init__(self, kind: type[T]) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> T:
        """The struct. Raises BAD_JSON, or BAD_FIELD with `{"field", "reason"}`. How long a body may be the
        gateway's table says: no longer one reaches a handler.
        """
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise _bad_field(str(error)) from None
        except (ValueError, RecursionError):
            # DecodeError, and the UnicodeDecodeError that msgspec lets through, are ValueErrors.
            raise GatewayError(ErrorCode.BAD_JSON) from None


def keys_of(body: bytes) -> frozenset[str]:
    """The names in a JSON object, for a route whose body has several shapes; empty for anything else."""
    try:
        return frozenset(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
    except (ValueError, RecursionError):
        return frozenset()


def answer(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> HTTPResponse:
    """`value` as JSON."""
    return raw(msgspec.json.encode(value), status=status, headers=headers, content_type=JSON)


def no_content() -> HTTPResponse:
    """204."""
    return raw(b"", status=204)


def exchange_of(request: Request) -> Exchange:
    """The exchange that the gateway judged before this handler ran."""
    exchange: Exchange = request.ctx.exchange
    return exchange


def caller_of(request: Request) -> Caller:
    """From where the request came."""
    exchange = exchange_of(request)
    return Caller(address=exchange.address, request_id=exchange.request_id, exchange=exchange)


def principal_of(request: Request) -> Principal:
    """Who asks, on a route that the gateway's table keeps for users. Raises NO_CREDENTIAL on any other."""
    principal = exchange_of(request).known_principal
    if principal is None or not principal.user_id:
        raise GatewayError(ErrorCode.NO_CREDENTIAL)
    return principal


def _bad_field(text: str) -> GatewayError:
    match = _PLACE.fullmatch(text)
    reason, place = (match[1], match[2] or "") if match else (text, "")
    named = _NAMED.fullmatch(reason)
    if named is not None:
        place = f"{place}.{named[1]}" if place else named[1]
        reason = "is missing" if "missing" in reason else "is not a field of this request"
    return bad_field(place or "body", reason)
