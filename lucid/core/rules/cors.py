"""Cross-origin requests from browsers (the CORS protocol of the Fetch standard), for both planes alike.

1. Off until an origin is configured: then a preflight is an ordinary OPTIONS request, answers are not
   touched, and backends may speak CORS themselves.
2. On: the gateway answers preflights before it asks for a credential, since a browser sends none with them.
   The answers of backends lose their own `Access-Control-…` fields and get the gateway's.
3. A preflight from an origin that is not configured is answered too, without the fields that would let the
   browser go on: it is no business of authentication, limits or backends either.
4. Nothing of the request is echoed but what was configured, and header names that are tokens.
"""

import re
from collections.abc import Set as AbstractSet
from typing import Final

from lucid.core.exchange import Preflight
from lucid.core.rules.routes import ALL_METHODS

Fields = tuple[tuple[str, str], ...]

MAX_AGE_SECONDS: Final = 600
"""Browsers cap it at 7,200 (Chromium) or 86,400 (Firefox). Ten minutes: until then a change may not show."""

# Named one by one since `*` never covers Authorization, and nothing at all once credentials are allowed.
_REQUEST_FIELDS: Final = (
    "accept",
    "authorization",
    "content-type",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "range",
    "traceparent",
    "tracestate",
    "x-api-key",
    "x-csrf-token",
    "x-request-id",
)
_EXPOSED_FIELDS: Final = (
    "content-range",
    "etag",
    "location",
    "proxy-status",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "www-authenticate",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-request-id",
)
_MOST_REQUESTED = 64
"""Field names of one preflight that are looked at."""

DROPPED_PREFIX: Final = "access-control-"
"""Of the fields of a backend's answer for which the gateway speaks."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.\-]*://(?:[a-z0-9._\-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


class Cors:
    """The configured origins and what they are told. Immutable.

    `origins` are `scheme://host[:port]`, compared whole with what the browser sends, or `*` for every one.
    Raises ValueError, naming the origin, for anything else (a path, a slash at the end, `null`), and for `*`
    with credentials, which would hand every site the user's login.
    """

    __slots__ = ("_answers", "_any", "_credentials", "_otherwise", "_vary", "enabled")

    def __init__(self, origins: tuple[str, ...] = (), allow_credentials: bool = False) -> None:
        self.enabled = bool(origins)
        self._any = "*" in origins
        self._credentials = allow_credentials
        if self._any and allow_credentials:
            raise ValueError("the origin * cannot be allowed together with credentials")
        known = [_serialised(origin) for origin in origins if origin != "*"]
        # A cache must not give one origin's answer to another, so also those that allow nothing vary.
        self._vary: Fields = () if self._any or not origins else (("Vary", "Origin"),)
        exposed = ("Access-Control-Expose-Headers", ", ".join(_EXPOSED_FIELDS))
        self._answers: dict[str | None, Fields] = {
            origin: (*self._allow_origin(origin), exposed, *self._vary) for origin in known if not self._any
        }
        self._otherwise: Fields = (*self._allow_origin("*"), exposed) if self._any else self._vary

    def _allow_origin(self, origin: str) -> Fields:
        allowed = (("Access-Control-Allow-Origin", origin),)
        return (*allowed, ("Access-Control-Allow-Credentials", "true")) if self._credentials else allowed

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call us. False for all while off; ours is not known here."""
        return self._any or origin in self._answers

    def answer_fields(self, origin: str | None) -> Fields:
        """The fields for every answer but a preflight's, to a request with this `Origin` (None: without).

        Whoever adds them must first take from the answer the fields that `drops` names. `Vary` is a line of
        its own beside the answer's own one.
        """
        return self._answers.get(origin, self._otherwise)

    def drops(self, name: str) -> bool:
        """Whether a backend's answer loses the field of this lower-case name: the gateway speaks for it."""
        return self.enabled and name.startswith(DROPPED_PREFIX)

    def preflight(
        self,
        origin: str | None,
        requested_method: str | None,
        requested_fields: str | None,
        methods: AbstractSet[str] | None,
    ) -> Preflight | None:
        """The answer to an OPTIONS request, if it is a preflight; None: it is an ordinary request.

        The first three are the values of `Origin`, `Access-Control-Request-Method` and `-Headers` (None:
        absent). `methods` are those of the path's route, None all of them.
        """
        if not self.enabled or origin is None or requested_method is None:
            return None
        vary = "Access-Control-Request-Method, Access-Control-Request-Headers"
        if not self._any:
            vary = f"Origin, {vary}"
        if not self.allows(origin):
            return Preflight((("Vary", vary),))
        return Preflight(
            (
                *self._allow_origin("*" if self._any else origin),
                ("Access-Control-Allow-Methods", ", ".join(_methods(methods, requested_method))),
                ("Access-Control-Allow-Headers", ", ".join(self._request_fields(requested_fields))),
                ("Access-Control-Max-Age", str(MAX_AGE_SECONDS)),
                ("Vary", vary),
            )
        )

    def _request_fields(self, requested: str | None) -> tuple[str, ...]:
        """Backends have fields of their own: without credentials those asked for are allowed too.

        That is what `*` means there; with credentials the fixed list is all.
        """
        if self._credentials or not requested:
            return _REQUEST_FIELDS
        entries = requested.lower().split(",", _MOST_REQUESTED)[:_MOST_REQUESTED]
        asked = (entry.strip(" \t") for entry in entries)
        return tuple(dict.fromkeys((*_REQUEST_FIELDS, *filter(_TOKEN.fullmatch, asked))))


def _serialised(origin: str) -> str:
    """A configured origin as browsers write it: in lower case and without its scheme's own port."""
    lower = origin.lower()
    if not _ORIGIN.fullmatch(lower):
        raise ValueError(f"{origin!r} is no origin: it must be scheme://host or scheme://host:port")
    if lower.startswith("https://"):
        return lower.removesuffix(":443")
    return lower.removesuffix(":80") if lower.startswith("http://") else lower


def _methods(methods: AbstractSet[str] | None, requested: str) -> tuple[str, ...]:
    """Named one by one for a route that takes all: `*` is no wildcard to a request with credentials."""
    if methods is not None:
        return tuple(sorted(methods))
    if requested in ALL_METHODS or not _TOKEN.fullmatch(requested):
        return ALL_METHODS
    return (*ALL_METHODS, requested)
