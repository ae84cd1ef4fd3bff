"""The one record of each exchange: plain counters, and a line of JSON for those worth a line.

What the gateway or a backend failed at always gets its line. Successes and what a caller did wrong get theirs up to
`LINES_PER_SECOND` per worker; beyond that they are counted, and the next line that is written says how many it stands
for (`unlogged`). Lines are gathered and written twice a second in one call, so that a log never waits for a disk in
the middle of a request.
"""

import datetime as dt
import os
import select
from bisect import bisect_left
from collections.abc import Callable

import msgspec

from lucid.core.exchange import Exchange, Source

LINES_PER_SECOND = 100
LATENCY_BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MAX_PENDING_LINES = 10_000
NEWLINE = 0x0A


class RouteCounters:
    """What is counted per route; `statuses[n]` are answers of class n (4: 400 to 499)."""

    __slots__ = ("bytes_in", "bytes_out", "latency", "phases", "seconds", "statuses", "upstream_seconds")

    def __init__(self) -> None:
        self.statuses = [0] * 6
        self.phases = [0] * 8
        self.latency = [0] * (len(LATENCY_BOUNDS_SECONDS) + 1)
        self.seconds = 0.0
        self.upstream_seconds = 0.0
        self.bytes_in = 0
        self.bytes_out = 0


class AccessLog:
    """The gateway's recorder. `write` gets whole lines as bytes, at `flush`."""

    def __init__(
        self, *, write: Callable[[bytes], object], utc_now: Callable[[], dt.datetime], text: bool = False
    ) -> None:
        """`text`: a form for people instead of JSON."""
        self.counters: dict[str, RouteCounters] = {}
        self._write = write
        self._utc_now = utc_now
        self._text = text
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._second = 0
        self._written = 0
        self._unlogged = 0
        self.lost_lines = 0

    def record(self, x: Exchange, now: float) -> None:
        # By pattern, not by row: rows come anew with each reload, what was counted goes on.
        route = x.known_route
        pattern = "" if route is None else route.pattern
        counters = self.counters.get(pattern)
        if counters is None:
            counters = self.counters[pattern] = RouteCounters()
        seconds = now - x.started
        status = x.status
        counters.statuses[status // 100] += 1
        counters.phases[x.phase] += 1
        counters.latency[bisect_left(LATENCY_BOUNDS_SECONDS, seconds)] += 1
        counters.seconds += seconds
        counters.upstream_seconds += x.upstream_seconds
        counters.bytes_in += x.bytes_in
        counters.bytes_out += x.bytes_out
        if status < 500 and (x.failed_by is None or x.failed_by is Source.CALLER):
            second = int(now)
            if second != self._second:
                self._second = second
                self._written = 0
            # Callers can make as many of these as they like; what the gateway or a backend failed at is always told.
            if self._written >= LINES_PER_SECOND:
                self._unlogged += 1
                return
            self._written += 1
        self._line(x, seconds)

    def _line(self, x: Exchange, seconds: float) -> None:
        if len(self._lines) >= MAX_PENDING_LINES:
            self.lost_lines += 1
            return
        head, route, principal = x.known_head, x.known_route, x.known_principal
        line = {
            "time": self._utc_now().strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "event": "request",
            "request_id": x.request_id,
            "trace_id": x.trace_id,
            "method": head.method if head is not None else "",
            "route": route.pattern if route is not None else "",
            "backend": route.backend if route is not None else "",
            "endpoint": x.endpoint,
            "phase": x.phase.name.lower(),
            "status": x.status,
            "error": x.error.value if x.error is not None else "",
            "failed_by": x.failed_by.value if x.failed_by is not None else "",
            "user": principal.user_id if principal is not None else "",
            "address": x.address,
            "seconds": round(seconds, 6),
            "upstream_seconds": round(x.upstream_seconds, 6),
            "bytes_in": x.bytes_in,
            "bytes_out": x.bytes_out,
        }
        if self._unlogged:
            line["unlogged"] = self._unlogged
            self._unlogged = 0
        self._lines.append(_readable(line) if self._text else self._encode(line))

    def flush(self) -> None:
        """Write what is gathered. Called twice a second and at the end."""
        if self._lines:
            lines, self._lines = self._lines, []
            self._write(b"\n".join(lines) + b"\n")


def _readable(line: dict[str, object]) -> bytes:
    milliseconds = float(str(line["seconds"])) * 1000
    who = line["user"] or line["address"]
    what = f"{line['method'] or '?'} {line['route'] or '-'}"
    where = f" -> {line['endpoint']}" if line["endpoint"] else ""
    why = f" {line['error']} in {line['phase']} by {line['failed_by']}" if line["error"] else ""
    return f"{line['time']} {line['status']} {what}{where} {milliseconds:.1f} ms {who}{why}".encode()


def write_to(descriptor: int) -> Callable[[bytes], object]:
    """A writer that never waits: what a full or closed descriptor does not take is lost, but for the rest of a line
    that was begun, which goes out first the next time.

    It asks before each piece instead of making the descriptor non-blocking, which others share: a pipe that is
    writable takes `PIPE_BUF` bytes at once (POSIX).
    """
    rest = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)

    def write(data: bytes) -> None:
        nonlocal rest
        begun, rest = rest, b""
        view = memoryview(begun + data)
        taken = 0
        try:
            while taken < len(view) and poll.poll(0):
                taken += os.write(descriptor, view[taken : taken + select.PIPE_BUF])
        except OSError:
            pass
        if not taken:
            rest = begun
        elif taken < len(view) and view[taken - 1] != NEWLINE:
            left = bytes(view[taken:])
            rest = left[: left.find(b"\n") + 1]

    return write
