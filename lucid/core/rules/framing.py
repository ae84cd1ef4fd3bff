"""Where a message begins and ends, and nothing else is believed.

One strict check of a request's head stands before both planes; answers from backends are held to the
same rules. A head that passes matches one regular expression as a whole; a head that does not is looked
at again, slowly, only to say what is wrong with it, so that the slow path decides nothing.

A block of field lines is parsed once and remembered by its text: clients repeat themselves on a
connection, and parsing is a pure function of the text (`FieldMemo`, bounded).

Bodies are read by decoders with one shape: `feed(data)` gives the pieces of content, then `done`, `rest`
(bytes behind the message's end) and `fault` (why the framing is lost; nothing may be read after it).

Sections are RFC 9112's unless another RFC is named; row numbers are those of docs/http.md.
"""

import ipaddress
import re
from typing import Final, Generic, TypeVar

V = TypeVar("V")

MAX_HEAD_BYTES: Final = 16_384
"""nginx: 4 x 8 KB, Envoy 60 KB, node 16 KB."""
MAX_TARGET_BYTES: Final = 8_192
"""RFC 9112 3 asks for 8,000 at least."""
MAX_FIELD_BYTES: Final = 8_192
MAX_FIELDS: Final = 100
"""Envoy, Apache: 100."""
MAX_ANSWER_HEAD_BYTES: Final = 65_536
MAX_CHUNK_LINE_BYTES: Final = 256
MAX_CHUNK_EXTENSION_BYTES: Final = 16_384
"""Per message: extensions in every chunk are a known way to make a server work for nothing (CVE-2023-39326)."""
MAX_TRAILER_BYTES: Final = 8_192
MAX_CONTENT_LENGTH: Final = (1 << 63) - 1

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_OWS = " \t"
_VALUE = r"[\t\x20-\x7e\x80-\xff]"

# Possessive quantifiers: nothing in a head is worth backtracking for, and a hostile head may not buy any.
_REQUEST_LINE = re.compile(rf"({_TOKEN}++) ([\x21\x22\x24-\x5b\x5d-\x7e]++) HTTP/1\.([0-9])")
_STATUS_LINE = re.compile(rf"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ({_VALUE}*+))?")
_BLOCK = re.compile(rf"(?:{_TOKEN}++:{_VALUE}*+\r\n)*+")
_LINE = re.compile(r"([^:]++):[ \t]*+([^\r]*+)\r\n")
_NAME = re.compile(rf"{_TOKEN}++")
_VERSION = re.compile(r"HTTP/([0-9])\.([0-9])")
_ODD_CHARACTER = re.compile(r"[^a-z0-9]")
_DIGITS = re.compile(r"[0-9]{1,19}")
# 7.1.1: *( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] ).
_QUOTED = r'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
_CHUNK_LINE = re.compile(
    rf"([0-9A-Fa-f]{{1,16}})"
    rf"((?:[ \t]*+;[ \t]*+{_TOKEN}++(?:[ \t]*+=[ \t]*+(?:{_TOKEN}++|{_QUOTED}))?+)*+)".encode()
)
_REG_NAME = r"[A-Za-z0-9\-._~!$&'()*+;=]"
_HOST = re.compile(
    rf"(?:\[[0-9A-Fa-f:.]{{2,45}}\]|(?=[^:]){_REG_NAME}*+(?:%[0-9A-Fa-f]{{2}}{_REG_NAME}*+)*+)(?::([0-9]{{0,5}}))?"
)
_ABSOLUTE = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*+)(.*+)")

HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy proxy-connection te trailer transfer-encoding upgrade proxy-authenticate"
    " proxy-authorization http2-settings sec-websocket-key sec-websocket-version sec-websocket-protocol"
    " sec-websocket-extensions sec-websocket-accept".split()
)
"""RFC 9110 7.6.1, the fields that earlier RFCs named, and those of an upgrade, which ends at the gateway."""

GATEWAYS_OWN: Final = frozenset(
    "authorization x-api-key x-user-id x-user-role x-request-id traceparent tracestate x-forwarded-for"
    " x-forwarded-proto x-forwarded-host x-forwarded-port x-forwarded-prefix x-forwarded-server"
    " x-real-ip forwarded host content-length expect".split()
)
"""What the gateway says to backends, or says in its own way; the caller's copies never pass, under no spelling."""

_NOT_FORWARDED = HOP_BY_HOP | GATEWAYS_OWN

_ANSWER_DROPPED = HOP_BY_HOP | frozenset(
    "content-length x-request-id ratelimit ratelimit-policy x-ratelimit-limit x-ratelimit-remaining"
    " x-ratelimit-reset".split()
)

CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2


class Fault:
    """Why a message is refused: `status` for a caller's (a backend's is always 502), and one plain sentence."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason

    def __repr__(self) -> str:
        return f"Fault({self.status}, {self.reason!r})"


class Fields:
    """A request's field lines, read once. Immutable by custom: it is shared by all requests with this text.

    `length` is the body's length in bytes, or CHUNKED. `forwarded` are the lines that may go to a backend,
    in their order, each with its CRLF. None is an absent field, "" an empty one.
    """

    __slots__ = (
        "about_itself",
        "api_key",
        "authorization",
        "close",
        "coded",
        "expect",
        "forwarded",
        "forwarded_for",
        "forwarded_proto",
        "host",
        "keep_alive",
        "length",
        "origin",
        "request_headers",
        "request_id",
        "request_method",
        "token",
        "traceparent",
        "tracestate",
    )

    def __init__(self) -> None:
        self.length = 0
        self.coded = False
        self.host: str | None = None
        self.close = False
        self.keep_alive = False
        self.expect: str | None = None
        self.authorization: str | None = None
        self.token: str | None = None
        """What follows `Bearer` in Authorization; None: the field is absent or of another scheme."""
        self.api_key: str | None = None
        self.origin: str | None = None
        self.request_method: str | None = None
        self.request_headers: str | None = None
        self.request_id: str | None = None
        self.traceparent: str | None = None
        self.tracestate: tuple[str, ...] = ()
        self.forwarded_for: tuple[str, ...] = ()
        self.forwarded_proto: str | None = None
        self.forwarded = ""
        self.about_itself = False
        """Whether any of X-Request-ID, traceparent and X-Forwarded-For is here."""


class Head:
    """A request's head that passed. `target` is in origin form or `*`, not yet canonical (see targets.py)."""

    __slots__ = ("fields", "host", "keep_alive", "length", "method", "minor", "size", "target")

    def __init__(self, method: str, target: str, minor: int, fields: Fields, host: str, size: int) -> None:
        self.method = method
        self.target = target
        self.minor = minor
        self.fields = fields
        self.host = host
        self.length = fields.length
        self.keep_alive = not fields.close and (minor == 1 or fields.keep_alive)
        self.size = size


class Answer:
    """The head of a backend's answer that passed, shared by all answers with this text.

    `length` is what the fields say (bytes, CHUNKED or UNTIL_CLOSE); `body_length` what the exchange makes of it.
    `forwarded` holds the lines that may go to the caller, each with its CRLF.
    """

    __slots__ = (
        "forwarded",
        "has_date",
        "keep_alive",
        "length",
        "length_line",
        "minor",
        "reason",
        "start",
        "status",
    )

    def __init__(self, minor: int, status: int, reason: str) -> None:
        self.minor = minor
        self.status = status
        self.reason = reason
        self.length = UNTIL_CLOSE
        self.keep_alive = minor == 1
        self.has_date = False
        self.forwarded = ""
        self.start = b""
        """Status line and forwardable lines, as bytes."""
        self.length_line = b""
        """Content-Length with its CRLF, where the answer has one."""


def body_length(answer: Answer, method: str) -> int:
    """The length of the content that follows (6.3): bytes, CHUNKED or UNTIL_CLOSE."""
    if method == "HEAD" or answer.status < 200 or answer.status in (204, 304):
        return 0
    return answer.length


class Memo(Generic[V]):
    """What was parsed from a text, by the text: two generations, so that a flood of texts evicts in O(1).

    Holds at most 2 x `capacity` entries of at most `MAX_TEXT` characters each.
    """

    MAX_TEXT = 2_048
    __slots__ = ("_capacity", "_old", "_young")

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._young: dict[str, V] = {}
        self._old: dict[str, V] = {}

    def get(self, text: str) -> V | None:
        value = self._young.get(text)
        if value is None and self._old:
            value = self._old.get(text)
            if value is not None:
                self.put(text, value)
        return value

    def put(self, text: str, value: V) -> None:
        if len(text) > self.MAX_TEXT:
            return
        if len(self._young) >= self._capacity:
            self._old = self._young
            self._young = {}
        self._young[text] = value

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


# --- requests ------------------------------------------------------------------------------------------


def parse_head(data: bytes, memo: Memo[Fields]) -> Head | Fault:
    """Judge a whole head: from its first byte to the empty line's CRLF, at most MAX_HEAD_BYTES (the caller's part)."""
    text = data.decode("latin-1")
    end = text.find("\r\n")
    line = _REQUEST_LINE.fullmatch(text, 0, end)
    block = text[end + 2 : -2]
    fields = memo.get(block)
    if fields is None:
        if line is None or _BLOCK.fullmatch(block) is None:
            return _diagnose(text)
        parsed = parse_fields(block)
        if isinstance(parsed, Fault):
            return parsed
        memo.put(block, parsed)
        fields = parsed
    elif line is None:
        return _diagnose(text)
    method, target, digit = line.groups()
    if len(target) > MAX_TARGET_BYTES:
        return Fault(414, "the target is longer than 8,192 bytes")
    minor = 0 if digit == "0" else 1
    host = fields.host
    if host is None:
        if minor:
            return Fault(400, "Host is missing (RFC 9112 3.2)")
        host = ""
    if minor == 0 and fields.coded:
        return Fault(400, "Transfer-Encoding in an HTTP/1.0 request (RFC 9112 6.1)")
    if minor and fields.expect is not None and fields.expect != "100-continue":
        return Fault(417, "the only expectation known is 100-continue")
    if target[0] != "/" or method == "CONNECT":
        return _other_form(method, target, minor, fields, host, len(data))
    return Head(method, target, minor, fields, host, len(data))


def _other_form(method: str, target: str, minor: int, fields: Fields, host: str, size: int) -> Head | Fault:
    """Targets that do not begin with a slash (3.2.2 to 3.2.4)."""
    if method == "CONNECT":
        return Fault(501, "CONNECT is not implemented")
    if target == "*":
        if method != "OPTIONS":
            return Fault(400, "the target * is for OPTIONS only (RFC 9112 3.2.4)")
        return Head(method, target, minor, fields, host, size)
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return Fault(400, "the target is neither a path nor an absolute http URI")
    authority, path = absolute.groups()
    if not _is_host(authority):
        return Fault(400, "the target's authority is not a host")
    if host and host.lower() != authority.lower():
        return Fault(400, "Host differs from the target's authority (RFC 9112 3.2.2)")
    if not path and method == "OPTIONS":
        path = "*"  # 3.2.4
    elif not path.startswith("/"):
        path = "/" + path
    return Head(method, path, minor, fields, authority, size)


def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text)
    if match is None or len(text) > 261 or int(match[1] or 0) > 65_535:
        return False
    if text[0] != "[":
        return True
    try:
        ipaddress.IPv6Address(text[1 : text.index("]")])
    except ValueError:
        return False
    return True


def parse_fields(block: str) -> Fields | Fault:
    """Read a block that matches the grammar: each line with its CRLF. Pure, so its result may be remembered."""
    if block.count("\n") > MAX_FIELDS:
        return Fault(431, "more than 100 fields")
    fields = Fields()
    lines: list[tuple[str, str]] = []
    named: set[str] = set()
    codings: list[str] = []
    length: str | None = None
    for name, value in _LINE.findall(block):
        if len(name) + len(value) > MAX_FIELD_BYTES:
            return Fault(431, "a field is longer than 8,192 bytes")
        low = name.lower()
        if not low.replace("-", "").isalnum():
            # CGI-style servers read `X_User_Id` and `X.User.Id` as `X-User-Id`; a caller may not smuggle it so.
            if _ODD_CHARACTER.sub("-", low) not in _NOT_FORWARDED:
                lines.append((low, f"{name}: {value.rstrip(_OWS)}\r\n"))
            continue
        if low not in _NOT_FORWARDED:
            value = value.rstrip(_OWS)
            lines.append((low, f"{name}: {value}\r\n"))
            if low == "origin":
                if fields.origin is not None:
                    return Fault(400, "Origin occurs twice")
                fields.origin = value
            elif low == "access-control-request-method":
                fields.request_method = value
            elif low == "access-control-request-headers":
                fields.request_headers = value
            continue
        value = value.rstrip(_OWS)
        match low:
            case "host":
                if fields.host is not None:
                    return Fault(400, "Host occurs twice (RFC 9112 3.2)")
                if not _is_host(value):
                    return Fault(400, "Host is not a host with an optional port (RFC 9112 3.2)")
                fields.host = value
            case "content-length":
                if length is not None:
                    return Fault(400, "Content-Length occurs twice (RFC 9112 6.3)")
                length = value
            case "transfer-encoding":
                if fields.coded:
                    return Fault(400, "Transfer-Encoding occurs twice (RFC 9112 6.1)")
                fields.coded = True
                codings = [coding.strip(_OWS).lower() for coding in value.split(",")]
            case "connection":
                named.update(option.strip(_OWS).lower() for option in value.split(","))
            case "authorization":
                if fields.authorization is not None:
                    return Fault(400, "Authorization occurs twice")
                fields.authorization = value
                scheme, _, token = value.partition(" ")
                if scheme.lower() == "bearer":
                    fields.token = token.strip(_OWS)
            case "x-api-key":
                if fields.api_key is not None:
                    return Fault(400, "X-API-Key occurs twice")
                fields.api_key = value
            case "expect":
                fields.expect = value.lower() if fields.expect is None else "twice"
            case "x-request-id":
                fields.request_id = value if fields.request_id is None else ""
            case "traceparent":
                fields.traceparent = value if fields.traceparent is None else ""
            case "tracestate":
                fields.tracestate += (value,)
            case "x-forwarded-for":
                fields.forwarded_for += (value,)
            case "x-forwarded-proto":
                fields.forwarded_proto = value.lower() if fields.forwarded_proto is None else ""
            case _:
                pass
    if fields.coded:
        if length is not None:
            return Fault(400, "Transfer-Encoding together with Content-Length (RFC 9112 6.1)")
        fault = _coding_fault(codings)
        if fault is not None:
            return fault
        fields.length = CHUNKED
    elif length is not None:
        if _DIGITS.fullmatch(length) is None or int(length) > MAX_CONTENT_LENGTH:
            return Fault(400, "Content-Length is not a number of bytes (RFC 9112 6.2)")
        fields.length = int(length)
    fields.about_itself = (
        fields.request_id is not None or fields.traceparent is not None or bool(fields.forwarded_for)
    )
    fields.close = "close" in named
    fields.keep_alive = "keep-alive" in named
    fields.forwarded = "".join(
        [line for low, line in lines if low not in named] if named else [line for _, line in lines]
    )
    return fields


def _coding_fault(codings: list[str]) -> Fault | None:
    if codings == ["chunked"]:
        return None
    if codings[-1] != "chunked" or codings.count("chunked") > 1 or not all(_NAME.match(c) for c in codings):
        return Fault(400, "chunked is not the last transfer coding (RFC 9112 6.3)")
    return Fault(501, "the only transfer coding implemented is chunked")


def unfinished_fault(data: bytes | bytearray) -> Fault | None:
    """What is already wrong with a head that has not ended yet: it need not be waited for."""
    if len(data) >= MAX_HEAD_BYTES:
        return _too_large(data)
    if data and (data[0] <= 0x20 or data[0] >= 0x7F):
        return Fault(400, "the request does not begin with a method")
    if data.count(b"\n") != data.count(b"\r\n"):
        return Fault(400, "a bare LF ends a line (RFC 9112 2.2)")
    carriage_returns = data.count(b"\r") - data.endswith(b"\r")
    if carriage_returns != data.count(b"\r\n"):
        return Fault(400, "a CR stands alone (RFC 9112 2.2)")
    return None


def _too_large(data: bytes | bytearray) -> Fault:
    if data.find(b"\r\n", 0, MAX_TARGET_BYTES + 64) == -1:
        return Fault(414, "the target is longer than 8,192 bytes")
    return Fault(431, "the head is longer than 16,384 bytes")


def oversized_fault(data: bytes) -> Fault | None:
    """The fault of a whole head that is larger than MAX_HEAD_BYTES, or None."""
    return _too_large(data) if len(data) > MAX_HEAD_BYTES else None


def _diagnose(text: str) -> Fault:
    """Say what is wrong with a head that did not match. Every path ends in a fault."""
    early = unfinished_fault(text.encode("latin-1")[: MAX_HEAD_BYTES - 1])
    if early is not None:
        return early
    start, _, rest = text.partition("\r\n")
    parts = start.split(" ")
    if len(parts) != 3:
        return Fault(400, "the request line is not three parts with single spaces (RFC 9112 3)")
    method, target, version = parts
    if _NAME.fullmatch(method) is None:
        return Fault(400, "the method is not a token (RFC 9112 3.1)")
    match = _VERSION.fullmatch(version)
    if match is None:
        return Fault(400, "the version is malformed (RFC 9112 2.3)")
    if match[1] != "1":
        return Fault(505, "the only major version spoken is 1")
    if _REQUEST_LINE.fullmatch(start) is None:
        return Fault(
            400, "the target has a character that no URI has (RFC 9112 3.2)" if target else "no target"
        )
    for number, line in enumerate(rest[:-4].split("\r\n")):
        if line[:1] in (" ", "\t"):
            where = "before the first field" if number == 0 else "folds a field"
            return Fault(400, f"a line that begins with whitespace {where} (RFC 9112 2.2, 5.2)")
        name, colon, _value = line.partition(":")
        if not colon:
            return Fault(400, "a field line has no colon (RFC 9112 5)")
        if name.endswith((" ", "\t")):
            return Fault(400, "whitespace stands before a field's colon (RFC 9112 5.1)")
        if _NAME.fullmatch(name) is None:
            return Fault(400, "a field name is not a token (RFC 9112 5.1)")
    return Fault(400, "a field value has a control character (RFC 9110 5.5)")


# --- answers -------------------------------------------------------------------------------------------


def parse_answer(data: bytes, memo: Memo[Answer]) -> Answer | Fault:
    """Judge the whole head of a backend's answer, by the same rules; a fault's status is always 502."""
    text = data.decode("latin-1")
    known = memo.get(text)
    if known is not None:
        return known
    end = text.find("\r\n")
    line = _STATUS_LINE.fullmatch(text, 0, end)
    block = text[end + 2 : -2]
    if line is None:
        return Fault(502, "the backend's status line is malformed")
    if _BLOCK.fullmatch(block) is None:
        return Fault(502, "a field line of the backend's answer is malformed")
    answer = Answer(0 if line[1] == "0" else 1, int(line[2]), line[3] or "")
    if answer.status > 599:
        return Fault(502, "the backend's status is not one of HTTP")
    fault = _answer_fields(answer, block)
    if fault is not None:
        return fault
    answer.start = f"HTTP/1.1 {answer.status} {answer.reason}\r\n{answer.forwarded}".encode("latin-1")
    if answer.length >= 0:
        answer.length_line = b"Content-Length: %d\r\n" % answer.length
    memo.put(text, answer)
    return answer


def _answer_fields(answer: Answer, block: str) -> Fault | None:
    lines: list[tuple[str, str]] = []
    named: set[str] = set()
    length: str | None = None
    coding: str | None = None
    for name, value in _LINE.findall(block):
        low = name.lower()
        if low not in _ANSWER_DROPPED:
            lines.append((low, f"{name}: {value.rstrip(_OWS)}\r\n"))
            if low == "date":
                answer.has_date = True
        elif low == "content-length":
            if length is not None:
                return Fault(502, "the backend sent two lengths")
            length = value.rstrip(_OWS)
        elif low == "transfer-encoding":
            if coding is not None:
                return Fault(502, "the backend sent two Transfer-Encoding fields")
            coding = value.rstrip(_OWS).lower()
        elif low == "connection":
            named.update(option.strip(_OWS).lower() for option in value.split(","))
    if coding is not None:
        if length is not None:
            return Fault(502, "the backend sent Transfer-Encoding together with Content-Length")
        if coding != "chunked" or answer.minor == 0:
            return Fault(502, "the backend's transfer coding is not chunked alone")
        answer.length = CHUNKED
    elif length is not None:
        if _DIGITS.fullmatch(length) is None or int(length) > MAX_CONTENT_LENGTH:
            return Fault(502, "the backend's Content-Length is not a number of bytes")
        answer.length = int(length)
    answer.keep_alive = "close" not in named and (answer.minor == 1 or "keep-alive" in named)
    if answer.status == 204 and (coding or answer.length > 0):
        answer.keep_alive = False  # RFC 9110 8.6: content is announced where none may be, and may yet come
    answer.has_date = answer.has_date and "date" not in named
    answer.forwarded = "".join([line for low, line in lines if low not in named])
    return None


# --- bodies --------------------------------------------------------------------------------------------


class LengthBody:
    """A body of a known number of bytes."""

    __slots__ = ("_left", "done", "fault", "rest")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest: bytes = b""
        self.fault = ""

    @property
    def left(self) -> int:
        """Bytes that have not arrived yet."""
        return self._left

    def feed(self, data: bytes) -> bytes:
        """The content in `data`; afterwards look at `done` and `rest`."""
        size = len(data)
        if size < self._left:
            self._left -= size
            return data
        content = data[: self._left]
        self.rest = data[self._left :]
        self._left = 0
        self.done = True
        return content

    def eof(self) -> None:
        """The sender closed: a body that is not done is broken off."""
        if not self.done:
            self.fault = "the connection closed before the body's end"


class UntilCloseBody:
    """An answer's body that ends with its connection (6.3 rule 8)."""

    __slots__ = ("done", "fault", "rest")

    left = -1

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self.fault = ""

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> None:
        self.done = True


class ChunkedBody:
    """The chunked coding (7.1), strict: 1*HEXDIG, the CRLF behind the data verified, extensions and trailers bounded.

    Trailers are checked and dropped, never merged into fields (7.1.2).
    """

    __slots__ = ("_buffer", "_extensions", "_left", "_state", "_trailers", "done", "fault", "rest")

    left = -1
    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self) -> None:
        self._state = self._SIZE
        self._buffer = b""
        self._left = 0
        self._extensions = 0
        self._trailers = 0
        self.done = False
        self.rest = b""
        self.fault = ""

    def feed(self, data: bytes) -> bytes:
        """The content in `data` without its coding; afterwards look at `fault`, `done` and `rest`."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        pieces: list[bytes] = []
        at = 0
        while not self.done and not self.fault:
            if self._state == self._DATA:
                piece = data[at : at + self._left]
                if not piece:
                    break
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._state = self._DATA_END
            elif self._state == self._DATA_END:
                if len(data) - at < 2:
                    if data[at:] not in (b"", b"\r"):
                        self.fault = "no CRLF behind a chunk (RFC 9112 7.1)"
                    break
                if data[at : at + 2] != b"\r\n":
                    self.fault = "no CRLF behind a chunk (RFC 9112 7.1)"
                    break
                at += 2
                self._state = self._SIZE
            else:
                at = self._line(data, at)
                if at < 0:
                    at = ~at
                    break
        if self.done:
            self.rest = data[at:]
        elif not self.fault:
            self._buffer = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line(self, data: bytes, at: int) -> int:
        """Take the line at `at`; returns where the next begins, or ~at when the line has not ended yet."""
        bound = MAX_CHUNK_LINE_BYTES if self._state == self._SIZE else MAX_TRAILER_BYTES - self._trailers
        end = data.find(b"\n", at, at + bound + 2)
        if end == -1:
            if len(data) - at > bound + 1:  # a last CR may still get its LF
                self.fault = "a chunk's line or the trailers are too long"
            return ~at
        if data[end - 1 : end] != b"\r" or end == at:
            self.fault = "a bare LF in the chunked coding (RFC 9112 7.1)"
            return ~at
        line = data[at : end - 1]
        if self._state == self._SIZE:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None:
                self.fault = "a chunk's size is not 1*HEXDIG (RFC 9112 7.1)"
                return ~at
            self._extensions += len(match[2])
            if self._extensions > MAX_CHUNK_EXTENSION_BYTES:
                self.fault = "too many chunk extensions"
                return ~at
            self._left = int(match[1], 16)
            self._state = self._DATA if self._left else self._TRAILER
        elif line:
            self._trailers += len(line) + 2
            if _BLOCK.fullmatch(line.decode("latin-1") + "\r\n") is None:
                self.fault = "a trailer is not a field line (RFC 9112 7.1.2)"
                return ~at
        else:
            self.done = True
        return end + 1

    def eof(self) -> None:
        if not self.done:
            self.fault = "the connection closed before the last chunk"


Body = LengthBody | UntilCloseBody | ChunkedBody


def body_for(length: int) -> Body:
    """The decoder for a length: bytes, CHUNKED or UNTIL_CLOSE."""
    if length >= 0:
        return LengthBody(length)
    return ChunkedBody() if length == CHUNKED else UntilCloseBody()


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding; `data` must not be empty, for an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"
