"""What was said over a connection, made comparable."""

import json
import re
from collections.abc import Callable, Iterable

from lucid.core.rules.headers import SECURITY_FIELDS


class Transcript:
    """What one side was sent, made comparable: heads with "\\n" and without the lines that every message has
    (after a look at each), chunked bodies decoded, with `<end>` behind them, envelopes as their codes."""

    def __init__(self, methods: Callable[[], list[str]] | None) -> None:
        """`methods` of the requests in their order, for answers; None: these are requests."""
        self.text = ""
        self.raw = b""
        self.heads: list[dict[str, str]] = []
        self._methods = methods
        self._rest = b""
        self._left = 0
        self._chunked = False
        self._to_the_end = False
        self._number = 0
        self._answers = 0
        self._json = False

    def note(self, word: str) -> None:
        """The gateway ended the connection. How does not matter towards a backend."""
        if self._methods is None and word == "aborted":
            word = "closed"
        self.text += f"<{word}>"

    @property
    def whole(self) -> bool:
        """Whether everything so far was whole messages."""
        return not self._rest and not self._left and not self._chunked

    def feed(self, data: bytes, number: int) -> None:
        if number != self._number:
            if self._number:
                self.text += f"<connection {number}>"
            self._number = number
            self._rest, self._left, self._chunked = b"", 0, False
        self.raw += data
        self._rest += data
        while self._rest and self._step():
            pass

    def _step(self) -> bool:
        if self._to_the_end:
            self._say(len(self._rest))
            return True
        if self._chunked:
            line, found, rest = self._rest.partition(b"\r\n")
            size = int(line, 16) if re.fullmatch(rb"[0-9a-f]+", line) else -1
            if not found or len(rest) < size + 2:
                return False
            assert size >= 0, f"a bad chunk: {line!r}"
            assert rest[size : size + 2] == b"\r\n"
            self.text += rest[:size].decode("latin-1") if size else "<end>"
            self._rest = rest[size + 2 :]
            self._chunked = bool(size)
            return True
        if self._json and len(self._rest) < self._left:
            return False
        if self._left:
            size = min(self._left, len(self._rest))
            self._left -= size
            self._say(size)
            return True
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if not found:
            return False
        self._rest = rest
        self._head(head.decode("latin-1"))
        return True

    def _say(self, size: int) -> None:
        data, self._rest = self._rest[:size], self._rest[size:]
        if not self._json:
            self.text += data.decode("latin-1")
            return
        self._json = False
        error = json.loads(data)["error"]
        assert error["request_id"] == self.heads[-1]["x-request-id"]
        assert error["timestamp"] == "2026-01-10T19:08:00Z"
        assert (error["service"], error["version"]) == ("api-gateway", "v1")
        assert error["message"]
        self.text += f"<{error['code']}>"

    def _head(self, head: str) -> None:
        start, *lines = head.split("\r\n")
        fields: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, f"a bad line: {line!r}"
            assert name.lower() not in fields or name.lower() in REPEATABLE, f"{name} twice"
            fields[name.lower()] = value
        status = int(start.split(" ")[1]) if self._methods is not None else 0
        method = ""
        if self._methods is not None and status >= 200:
            methods = self._methods()
            method = methods[self._answers] if self._answers < len(methods) else ""
            self._answers += 1
        dropped = () if 0 < status < 200 else self._common(fields, status)
        self.heads.append({"": start, **fields})
        kept = [line for line in lines if line.partition(":")[0].lower() not in dropped]
        self.text += "\n".join([start, *kept, "", ""])
        bodiless = method == "HEAD" or status == 204 or status == 304 or 0 < status < 200
        self._chunked = not bodiless and fields.get("transfer-encoding") == "chunked"
        self._left = 0 if bodiless else int(fields.get("content-length", 0))
        self._json = self._left > 0 and "content-type" in dropped
        self._to_the_end = (
            status >= 200 and not bodiless and not self._chunked and "content-length" not in fields
        )

    def _common(self, fields: dict[str, str], status: int) -> Iterable[str]:
        """The names of the lines that every message of this kind must have."""
        if self._methods is None:
            assert fields["via"] == "1.1 lucid"
            return [name for name in VOUCHED if fields[name] or name == "x-forwarded-host"]
        assert fields["x-request-id"]
        dropped = ["x-request-id", "date"] if fields.get("date") == DATE else ["x-request-id"]
        if fields.get("x-frame-options") == "DENY":
            for name, value in SECURITY_FIELDS:
                assert fields[name.lower()] == value
                dropped.append(name.lower())
            if fields.get("content-type") == "application/json":
                dropped += ["content-type", "content-length"]
        elif status != 204:
            assert "date" in fields
        return dropped


DATE = "Sat, 10 Jan 2026 19:08:00 GMT"
VOUCHED = ("x-request-id", "traceparent", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "via")
REPEATABLE = frozenset({"via", "set-cookie", "vary", "tracestate", "cookie"})
