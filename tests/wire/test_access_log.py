"""The one record of each exchange: what is counted, what gets a line, what a line says."""

import datetime as dt
import json
import os
import sys
from typing import Any

import pytest

from lucid.core.exchange import Exchange, Phase, Role, Source
from lucid.core.rules.framing import Head, Memo, parse_head
from lucid.core.rules.routes import Route
from lucid.core.wire.access_log import LINES_PER_SECOND, MAX_PENDING_LINES, AccessLog, write_to
from lucid.errors import ErrorCode
from tests.support.wire import ALICE

ROUTE = Route("/open/**", "core", Role.PUBLIC)


class Log(AccessLog):
    """An access log that is written into a list."""

    def __init__(self, *, text: bool = False) -> None:
        self.written: list[bytes] = []
        super().__init__(
            write=self.written.append,
            utc_now=lambda: dt.datetime(2026, 1, 10, 19, 8, 0, 123_000, dt.UTC),
            text=text,
        )

    def lines(self) -> list[dict[str, Any]]:
        self.flush()
        return [json.loads(line) for data in self.written for line in data.splitlines()]


def exchange(status: int = 200, *, started: float = 100.0, route: Route | None = ROUTE) -> Exchange:
    head = parse_head(b"GET /open/a HTTP/1.1\r\nHost: gw\r\n\r\n", Memo())
    assert isinstance(head, Head)
    x = Exchange(head, "10.0.0.1", "203.0.113.7", started)
    x.route = route
    x.status = status
    x.phase = Phase.RESPOND
    x.request_id, x.trace_id = "req", "trace"
    return x


def test_a_line() -> None:
    log = Log()
    x = exchange(502)
    x.principal = ALICE
    x.endpoint = "core:8084"
    x.error, x.failed_by = ErrorCode.BACKEND_BROKEN, Source.BACKEND
    x.bytes_in, x.bytes_out, x.upstream_seconds = 3, 4, 0.25
    log.record(x, 100.5)
    assert log.lines() == [
        {
            "time": "2026-01-10T19:08:00.123000Z",
            "event": "request",
            "request_id": "req",
            "trace_id": "trace",
            "method": "GET",
            "route": "/open/**",
            "backend": "core",
            "endpoint": "core:8084",
            "phase": "respond",
            "status": 502,
            "error": "LUCID_ERR_5001",
            "failed_by": "backend",
            "user": "alice",
            "address": "203.0.113.7",
            "seconds": 0.5,
            "upstream_seconds": 0.25,
            "bytes_in": 3,
            "bytes_out": 4,
        }
    ]


def test_a_line_of_what_had_no_head() -> None:
    log = Log()
    x = Exchange(None, "10.0.0.1", "10.0.0.1", 100.0)
    x.status, x.error, x.failed_by = 400, ErrorCode.MALFORMED_HEAD, Source.CALLER
    log.record(x, 100.0)
    (line,) = log.lines()
    assert (line["method"], line["route"], line["phase"], line["user"]) == ("", "", "parse", "")


@pytest.mark.parametrize(
    "error, said",
    [
        (False, "2026-01-10T19:08:00.123000Z 200 GET /open/** -> core:8084 1.5 ms alice"),
        (True, "2026-01-10T19:08:00.123000Z 400 ? - 1.5 ms 203.0.113.7 LUCID_ERR_1001 in parse by caller"),
    ],
)
def test_a_line_for_people(error: bool, said: str) -> None:
    log = Log(text=True)
    x = exchange()
    x.principal, x.endpoint = ALICE, "core:8084"
    if error:
        x = Exchange(None, "203.0.113.7", "203.0.113.7", 100.0)
        x.status, x.error, x.failed_by = 400, ErrorCode.MALFORMED_HEAD, Source.CALLER
    log.record(x, 100.0015)
    log.flush()
    assert log.written == [said.encode() + b"\n"]


def test_what_is_counted_per_route() -> None:
    log = Log()
    for status, seconds in [(200, 0.0005), (204, 0.001), (404, 0.3), (499, 11.0)]:
        x = exchange(status)
        x.bytes_in, x.bytes_out, x.upstream_seconds = 1, 2, seconds / 2
        log.record(x, 100.0 + seconds)
    log.record(exchange(404, route=None), 100.0)
    counters = log.counters["/open/**"]
    assert counters.statuses == [0, 0, 2, 0, 2, 0]
    assert counters.phases[Phase.RESPOND] == sum(counters.phases) == 4
    assert counters.latency[0] + counters.latency[1] == 2
    assert (counters.latency[8], counters.latency[-1], sum(counters.latency)) == (1, 1, 4)
    assert counters.seconds == pytest.approx(11.3015)
    assert counters.upstream_seconds == pytest.approx(11.3015 / 2)
    assert (counters.bytes_in, counters.bytes_out) == (4, 8)
    assert log.counters[""].statuses[4] == 1


def test_a_reload_goes_on_counting() -> None:
    log = Log()
    log.record(exchange(), 100.0)
    log.record(exchange(route=Route("/open/**", "core", Role.PUBLIC)), 100.0)
    assert log.counters["/open/**"].statuses[2] == 2


def test_reloads_take_no_memory() -> None:
    log = Log()
    route = Route("/open/**", "core", Role.PUBLIC)
    references = sys.getrefcount(route)
    log.record(exchange(route=route), 100.0)
    assert sys.getrefcount(route) == references, "the row of a table that was replaced can go"


def test_successes_are_sampled_failures_never() -> None:
    log = Log()
    for _ in range(LINES_PER_SECOND + 50):
        log.record(exchange(), 100.2)
    log.record(exchange(500), 100.9)
    for _ in range(5):
        log.record(exchange(), 101.0)
    lines = log.lines()
    assert len(lines) == LINES_PER_SECOND + 1 + 5
    assert [line.get("unlogged") for line in lines[-6:]] == [50, None, None, None, None, None]
    assert log.counters["/open/**"].statuses[2] == LINES_PER_SECOND + 55


def test_what_callers_do_wrong_cannot_flood_the_log() -> None:
    log = Log()
    for _ in range(LINES_PER_SECOND + 50):
        x = exchange(429)
        x.failed_by = Source.CALLER
        log.record(x, 100.2)
    assert len(log.lines()) == LINES_PER_SECOND


def test_an_answer_that_broke_off_is_no_success() -> None:
    log = Log()
    for _ in range(LINES_PER_SECOND + 1):
        x = exchange(200)
        x.failed_by = Source.BACKEND
        log.record(x, 100.0)
    assert len(log.lines()) == LINES_PER_SECOND + 1


def test_lines_are_gathered_and_bounded() -> None:
    log = Log()
    for _ in range(MAX_PENDING_LINES + 7):
        log.record(exchange(500), 100.0)
    assert not log.written
    assert log.lost_lines == 7
    log.flush()
    assert len(log.written) == 1
    assert log.written[0].count(b"\n") == MAX_PENDING_LINES
    log.flush()
    assert len(log.written) == 1, "nothing to say, nothing written"


def test_the_writer_writes_all() -> None:
    reading, writing = os.pipe()
    write_to(writing)(b"line\n")
    os.close(writing)
    assert os.read(reading, 99) == b"line\n"
    os.close(reading)


def test_the_writer_survives_a_reader_that_left() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    write_to(writing)(b"line\n")
    os.close(writing)


def test_what_is_cut_short_does_not_spoil_what_comes_next() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    write = write_to(writing)
    for _ in range(100):
        write(10 * (999 * b"x" + b"\n"))
    taken = os.read(reading, 1_048_576)
    write(b"next\n")
    write(b"after\n")
    taken += os.read(reading, 1_048_576)
    os.close(reading)
    os.close(writing)
    *lines, cut, one, two = taken.splitlines()
    assert (one, two) == (b"next", b"after")
    assert {len(line) for line in lines} == {999}
    assert len(cut) <= 999
