"""How heads are spelled: towards backends, and back to callers. Text in, bytes out.

A request's head is built from the caller's forwardable lines (framing.py has already dropped what must not
pass) followed by what the gateway vouches for, so that its own fields always stand last and alone.
"""

import re
from collections.abc import Mapping
from typing import Final

from lucid.core.exchange import Principal
from lucid.core.rules.framing import CHUNKED, Answer, Head

VIA: Final = "Via: 1.1 lucid\r\n"

SECURITY_FIELDS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    # Of one caller and one moment. RFC 9111, 3.5 keeps shared caches from answers to Authorization only, and a 404 may
    # be kept by heuristics.
    ("Cache-Control", "no-store"),
)
"""On every answer that the gateway makes itself (OWASP's list for APIs); backends answer for their own."""

REASONS: Final[Mapping[int, str]] = {
    100: "Continue",
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_WITH_CONTENT: Final = frozenset({"POST", "PUT", "PATCH"})
"""Methods for which an empty body is announced as such (RFC 9110 8.6)."""


def sane_request_id(value: str | None) -> str:
    """The caller's own request id if it is one, else "" (make one)."""
    return value if value and _REQUEST_ID.fullmatch(value) else ""


def parent_trace(value: str | None) -> tuple[str, str] | None:
    """(trace id, flags) of a valid `traceparent`, else None: a bad one starts a new trace and is never copied.

    W3C Trace Context 2.2: version ff is invalid, an all-zero id is invalid, a later version may have more behind
    its flags.
    """
    if value is None:
        return None
    match = _TRACEPARENT.fullmatch(value)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5] is not None):
        return None
    if match[2] == "0" * 32 or match[3] == "0" * 16:
        return None
    return match[2], f"{int(match[4], 16) & 3:02x}"


def lasting_lines(head: Head, principal: Principal, authority: str, hops: str, scheme: str) -> str:
    """The lines towards a backend that stay the same while a caller repeats itself, each with its CRLF.

    `authority` is the endpoint's; `hops` the believed X-Forwarded-For; `scheme` what the caller speaks.
    """
    who = ""
    if principal.user_id:
        who = f"X-User-Id: {principal.user_id}\r\nX-User-Role: {principal.role.label}\r\n"
    return (
        f"Host: {authority}\r\n{head.fields.forwarded}{who}X-Forwarded-For: {hops}\r\n"
        f"X-Forwarded-Proto: {scheme}\r\nX-Forwarded-Host: {head.host}\r\n{VIA}"
    )


def upstream_head(head: Head, path: str, lasting: str, changing: str) -> bytes:
    """The request's head as a backend gets it: `lasting` from `lasting_lines`, `changing` what each exchange has of
    its own, lines with their CRLF both; between them what follows from the body."""
    framing = _body_lines(head) if head.length or head.method in _WITH_CONTENT else ""
    return f"{head.method} {path} HTTP/1.1\r\n{lasting}{framing}{changing}\r\n".encode("latin-1")


def _body_lines(head: Head) -> str:
    if head.length == 0:
        return "Content-Length: 0\r\n"
    framing = (
        "Transfer-Encoding: chunked\r\n" if head.length == CHUNKED else f"Content-Length: {head.length}\r\n"
    )
    return f"{framing}Expect: 100-continue\r\n" if head.fields.expect is not None and head.minor else framing


def answer_head(answer: Answer, added: bytes) -> bytes:
    """The answer's head as the caller gets it: the backend's lines, then the gateway's, each with its CRLF."""
    return b"%b%b\r\n" % (answer.start, added)


def own_head(status: int, fields: list[tuple[str, str]]) -> bytes:
    """The head of an answer that the gateway makes. No value may hold CR or LF: values are ours or checked."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
    return f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n{lines}\r\n".encode("latin-1")


def without_fields(lines: str, prefixes: tuple[str, ...]) -> str:
    """`lines` less those whose lower-case name begins with one of `prefixes`."""
    kept = [line for line in lines.split("\r\n") if line and not line.lower().startswith(prefixes)]
    return "\r\n".join([*kept, ""])
