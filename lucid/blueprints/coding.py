"""Between bytes and structs, the same for every blueprint: strict decoding with the platform's errors,
encoding.
"""

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar
from urllib.parse import parse_qsl

import msgspec
from sanic import HTTPResponse, Request
from sanic.response import raw

from lucid.core.exchange import Exchange, Principal
from lucid.core.validation import bad_field
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller

JSON: Final = "application/json"
MAX_QUERY_PARAMETERS: Final = 32

T = TypeVar("T", bound=msgspec.Struct)

# msgspec's errors end in the place, or name the field: "Expected `str`, got `int` - at `$.user.name`",
# "Object missing required field `a` - at `$.user`", "Object contains unknown field `b`".
_PLACE: Final = re.compile(r"(?s)(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?")
_NAMED: Final = re.compile(r"Object (?:missing required|contains unknown) field `([^`]*)`")


class Body(Generic[T]):
    """Decodes the bodies of one route; make it once per route.

    Declare the structs with `forbid_unknown_fields=True`: a misspelt optional field must not pass in silence. Of
    several structs the body is that one whose fields have most of the body's names, the first of equals.
    """

    def __init__(self, *kinds: type[T], optional: bool = False) -> None:
        """`optional`: no body is the first struct with its defaults."""
        self._kinds = [
            (
                frozenset(field.encode_name for field in msgspec.structs.fields(kind)),
                msgspec.json.Decoder(kind).decode,
            )
            for kind in kinds
        ]
        self._default = kinds[0] if optional else None

    def read(self, body: bytes) -> T:
        """The struct. Raises BAD_JSON, or BAD_FIELD with `{"field", "reason"}`. How long a body may be the
        gateway's table says: no longer one reaches a handler.
        """
        if not body and self._default is not None:
            return self._default()
        try:
            return self._decoder(body)(body)
        except msgspec.ValidationError as error:
            raise _bad_field(str(error)) from None
        except (ValueError, RecursionError):
            # DecodeError, and the UnicodeDecodeError that msgspec lets through, are ValueErrors.
            raise GatewayError(ErrorCode.BAD_JSON) from None

    def _decoder(self, body: bytes) -> Callable[[bytes], T]:
        if len(self._kinds) == 1:
            return self._kinds[0][1]
        try:
            names = frozenset(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
        except (ValueError, RecursionError):
            names = frozenset()  # the decoder says what is wrong
        return max(self._kinds, key=lambda kind: len(kind[0] & names))[1]


class Query(Generic[T]):
    """Decodes the query strings of one route into one struct, whose fields all have defaults."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind

    def read(self, query: str) -> T:
        """The struct. Raises BAD_FIELD: an unknown parameter, one that comes twice, a value that is none."""
        try:
            pairs = parse_qsl(
                query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_PARAMETERS
            )
        except ValueError:
            raise bad_field("query", "is not a query string that can be read") from None
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise bad_field(next(name for name in names if names.count(name) > 1), "must be given once")
        try:
            read = msgspec.convert(values, self._kind, strict=False)
        except msgspec.ValidationError as error:
            raise _bad_field(str(error)) from None
        for name, text in values.items():
            number = getattr(read, name)
            # msgspec reads `1e3` and `1.0` as integers too.
            if isinstance(number, int) and str(number) != text:
                raise bad_field(name, "must be an integer in plain digits")
        return read


def answer_json(value: Any, status: int = 200, fields: dict[str, str] | None = None) -> HTTPResponse:
    """`value` as JSON."""
    return raw(msgspec.json.encode(value), status=status, headers=fields, content_type=JSON)


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
    head = exchange.known_head
    return Caller(
        address=exchange.address,
        request_id=exchange.request_id,
        exchange=exchange,
        token=(head.fields.token or "") if head is not None else "",
    )


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
