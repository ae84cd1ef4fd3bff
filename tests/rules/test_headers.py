"""How heads are spelled: ids, traces, and that nothing from outside becomes a line of its own."""

import re
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.exchange import Principal, Role
from lucid.core.rules.framing import CHUNKED, Answer, Head, Memo, parse_answer, parse_head
from lucid.core.rules.headers import (
    REASONS,
    SECURITY_FIELDS,
    answer_head,
    lasting_lines,
    own_head,
    parent_trace,
    sane_request_id,
    upstream_head,
    without_fields,
)
from lucid.errors import ErrorCode

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
CALLER = Principal(Role.USER, "authenticated", "u1", user_id="u1")
NOBODY = Principal(Role.PUBLIC, "public", "192.0.2.9")
HOPS = "X-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: gateway.example\r\n"


def read(*lines: str, start: str = "GET /a HTTP/1.1") -> Head:
    text = "".join(f"{line}\r\n" for line in (start, "Host: gateway.example", *lines, ""))
    found = parse_head(text.encode("latin-1"), Memo())
    assert isinstance(found, Head), found
    return found


def answer(*lines: str) -> Answer:
    found = parse_answer("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"), Memo())
    assert isinstance(found, Answer), found
    return found


def sent(head: Head, path: str = "/a", caller: Principal = CALLER) -> bytes:
    lasting = lasting_lines(head, caller, "10.0.0.1:80", "192.0.2.9", "https")
    return upstream_head(head, path, lasting, "X-Request-ID: r\r\n")


# --- ids and traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["a", "0", ".", "A-Za-z0-9._-", "x" * 64, "6ba7b810-9dad-41d1-80b4-00c04fd430c8", "..", "-"]
)
def test_a_request_id_that_is_kept(value: str) -> None:
    assert sane_request_id(value) == value


NO_IDS = " |a b|a\n|a\r\n|\na|a,b|a/b|a:b|a\"|a'|<a>|{a}|a\0|é|\u00b2|１|%41|" + "x" * 65


@pytest.mark.parametrize("value", [None, "", *NO_IDS.split("|")])
def test_a_request_id_that_is_not(value: str | None) -> None:
    assert sane_request_id(value) == ""


# The cases of the W3C's own trace-context suite are among these.
@pytest.mark.parametrize(
    "value, flags",
    [
        (f"00-{TRACE}-{SPAN}-00", "00"),
        (f"00-{TRACE}-{SPAN}-01", "01"),
        (f"00-{'1' * 32}-{'0' * 15}1-01", "01"),
        (f"cc-{TRACE}-{SPAN}-01", "01"),
        (f"01-{TRACE}-{SPAN}-00-", "00"),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", "01"),
        (f"fe-{TRACE}-{SPAN}-01-.;\xff", "01"),
    ],
)
def test_a_trace_that_goes_on(value: str, flags: str) -> None:
    found = parent_trace(value)
    assert found == (value[3:35], flags)


@pytest.mark.parametrize("version", ["00", "01", "fe"])
@pytest.mark.parametrize(
    "flags, kept", [("ff", "03"), ("fc", "00"), ("80", "00"), ("05", "01"), ("02", "02")]
)
def test_reserved_flags_are_set_to_zero_trace_context_2_2_2(version: str, flags: str, kept: str) -> None:
    """The last two bits are defined (sampled, and random since level 2); others must not be propagated."""
    assert parent_trace(f"{version}-{TRACE}-{SPAN}-{flags}") == (TRACE, kept)


# Written out with T for the trace's id and S for the span's.
NO_TRACES = (
    (
        "|00|T|00-T-S|00-T-S-|00-T-S-1|00-T-S-001|ff-T-S-01|ff-T-S-01-x|FF-T-S-01|0-T-S-01|000-T-S-01|0g-T-S-01|.0-T-S-01|"
        "CC-T-S-01|00-T-S-0A|00-T-S-.0|00-T0-S-01|00-T-S0-01|00-aT-S-01|00-.T-S-01|00-T-S-01-|00-T-S-01-x|cc-T-S-01.x|"
        "cc-T-S-01x|cc-T-S-011| 00-T-S-01|00-T-S-01 |00-T-S-01\n|cc-T-S-01-\n|00_T_S_01|00-T-S-01,x|\xe9"
    )
    .replace("T", TRACE)
    .replace("S", SPAN)
    .split("|")
)
NO_IDS_IN_TRACES = [
    f"{version}-{trace}-{span}-01"
    for version in ("00", "cc")
    for trace, span in (
        ("0" * 32, SPAN),
        (TRACE, "0" * 16),
        (TRACE.upper(), SPAN),
        (TRACE, SPAN.upper()),
        (TRACE[1:], SPAN),
        (TRACE, SPAN[1:]),
        ("." + TRACE[1:], SPAN),
        ("１" * 32, SPAN),
    )
]


@pytest.mark.parametrize("value", [None, *NO_TRACES, *NO_IDS_IN_TRACES])
def test_a_trace_that_begins_anew(value: str | None) -> None:
    assert parent_trace(value) is None


# --- towards a backend -----------------------------------------------------------------------------------


def test_a_head_as_a_backend_gets_it() -> None:
    head = read(
        "Accept: */*", "X-User-Id: forged", "Connection: close", "Cookie: a=b", start="GET /a?b HTTP/1.1"
    )
    assert sent(head, "/stripped?b") == (
        b"GET /stripped?b HTTP/1.1\r\nHost: 10.0.0.1:80\r\nAccept: */*\r\nCookie: a=b\r\n"
        b"X-User-Id: u1\r\nX-User-Role: user\r\n"
        + HOPS.encode()
        + b"Via: 1.1 lucid\r\nX-Request-ID: r\r\n\r\n"
    )


@pytest.mark.parametrize(
    "start, lines, framing",
    [
        ("GET / HTTP/1.1", [], []),
        ("GET / HTTP/1.1", ["Content-Length: 0"], []),
        ("DELETE / HTTP/1.1", [], []),
        ("OPTIONS * HTTP/1.1", [], []),
        ("POST / HTTP/1.1", [], ["Content-Length: 0"]),
        ("PUT / HTTP/1.0", ["Content-Length: 0"], ["Content-Length: 0"]),
        ("PATCH / HTTP/1.1", ["Expect: 100-continue"], ["Content-Length: 0"]),
        ("GET / HTTP/1.1", ["Content-Length: 007"], ["Content-Length: 7"]),
        ("POST / HTTP/1.0", ["Content-Length: 7", "Expect: x"], ["Content-Length: 7"]),
        ("POST / HTTP/1.1", ["Transfer-Encoding: Chunked"], ["Transfer-Encoding: chunked"]),
        (
            "PUT / HTTP/1.1",
            ["Expect: 100-Continue", "Content-Length: 7"],
            ["Content-Length: 7", "Expect: 100-continue"],
        ),
        (
            "GET / HTTP/1.1",
            ["Expect: 100-continue", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", "Expect: 100-continue"],
        ),
    ],
)
def test_how_a_body_is_announced_rfc_9110_8_6(start: str, lines: list[str], framing: list[str]) -> None:
    """A length of 0 where the method gives content a meaning; HTTP/1.0 expects nothing (10.1.1)."""
    head = read(*lines, start=start)
    found = sent(head, caller=NOBODY).decode().replace(HOPS, "").split("\r\n")
    host = "Host: 10.0.0.1:80"
    assert found == [
        f"{head.method} /a HTTP/1.1",
        host,
        "Via: 1.1 lucid",
        *framing,
        "X-Request-ID: r",
        "",
        "",
    ]


def test_bytes_beyond_ascii_pass_as_they_are_rfc_9110_5_5() -> None:
    octets = bytes(range(0x80, 0x100))
    head = read(f"X-A: {octets.decode('latin-1')}")
    assert b"\r\nX-A: " + octets + b"\r\n" in sent(head)
    found = answer(f"HTTP/1.1 200 {octets.decode('latin-1')}", f"X-B: {octets.decode('latin-1')}")
    assert answer_head(found, b"") == (b"HTTP/1.1 200 " + octets + b"\r\nX-B: " + octets + b"\r\n\r\n")


# What a caller or a backend may try to make lines of.
noise = st.text(st.characters(max_codepoint=0xFF), max_size=6)
PIECES = "\r\n|\n|\r|\0|\x0b|\x85|\x1c|\t| |:|X-User-Id: root|Host: evil|HTTP/1.1|a"
pieces = st.sampled_from(PIECES.split("|"))
values = st.lists(pieces | noise, max_size=4).map("".join)
NAMES = (
    "X-A Cookie X-User-Id x_user_id X-USER_ROLE Host Connection Content-Length Transfer-Encoding Via "
    "tracestate Origin X-Request-ID Expect Forwarded X-Forwarded-For Authorization"
)
names = st.sampled_from(NAMES.split())
lines = st.lists(st.builds("{}: {}".format, names, values) | values, max_size=4)


def one_request(data: bytes) -> Any:
    """What a strict parser reads; the head must be all that there is."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert connection.trailing_data[0] == b""
    return request


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(["GET /a HTTP/1.1", "POST /a HTTP/1.0"]), lines)
def test_nothing_that_passed_makes_a_line_of_its_own(start: str, more: list[str]) -> None:
    text = "".join(f"{line}\r\n" for line in (start, "Host: gateway.example", *more, ""))
    head = parse_head(text.encode("latin-1"), Memo())
    if not isinstance(head, Head):
        return
    data = sent(head)
    assert re.fullmatch(rb"(?:[^\r\n]+\r\n)+\r\n", data)
    assert data.count(b"\r\n") <= text.count("\r\n") + 9
    fields = one_request(data).headers
    found = {name: [value for other, value in fields if other == name] for name, _ in fields}
    assert found[b"host"] == [b"10.0.0.1:80"]
    assert found[b"x-user-id"] == [b"u1"]
    assert found[b"x-user-role"] == [b"user"]
    assert found[b"x-forwarded-for"] == [b"192.0.2.9"]
    assert found[b"x-forwarded-host"] == [b"gateway.example"]
    assert found[b"x-request-id"] == [b"r"]
    assert not {name.replace(b"_", b"-") for name in found if b"_" in name} & {b"x-user-id", b"x-user-role"}
    assert (b"transfer-encoding" in found) == (head.length == CHUNKED)


# --- back to the caller ----------------------------------------------------------------------------------


def test_an_answer_as_the_caller_gets_it() -> None:
    found = answer("HTTP/1.0 404 Not  Found", "X-A: 1", "Keep-Alive: x", "Set-Cookie: a", "Set-Cookie: b")
    assert answer_head(found, b"Content-Length: 3\r\nX-Request-ID: r\r\n") == (
        b"HTTP/1.1 404 Not  Found\r\nX-A: 1\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        b"Content-Length: 3\r\nX-Request-ID: r\r\n\r\n"
    )
    assert answer_head(answer("HTTP/1.1 299"), b"") == b"HTTP/1.1 299 \r\n\r\n"


@settings(deadline=None, max_examples=300)
@given(values, lines)
def test_nothing_of_a_backend_makes_a_line_of_its_own(reason: str, more: list[str]) -> None:
    text = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 200 {reason}", *more, ""))
    found = parse_answer(text.encode("latin-1"), Memo())
    if isinstance(found, Answer):
        data = answer_head(found, b"X-Request-ID: r\r\n")
        assert re.fullmatch(rb"(?:[^\r\n]+\r\n)+\r\n", data)
        assert data.count(b"\r\n") <= text.count("\r\n") + 1
        assert data.endswith(b"\r\nX-Request-ID: r\r\n\r\n")


def test_an_answer_of_our_own() -> None:
    assert own_head(431, [("A", "b"), ("C", "d, e")]) == (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nA: b\r\nC: d, e\r\n\r\n"
    )
    assert own_head(204, []) == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert own_head(299, []) == b"HTTP/1.1 299 Unknown\r\n\r\n"


def test_every_status_that_the_data_plane_answers_with_has_its_phrase_rfc_9110_15() -> None:
    """4XXX are business rules: those answers are Sanic's."""
    own = {code.status for code in ErrorCode if code.value[10] != "4"}
    assert own | {204, 414, 417, 501, 505} <= REASONS.keys()


def test_fields_of_our_own_answers_are_fit_to_send() -> None:
    assert {name.lower(): value for name, value in SECURITY_FIELDS}["x-content-type-options"] == "nosniff"
    head = own_head(200, list(SECURITY_FIELDS)).decode("ascii")
    assert answer(*head.split("\r\n")[:-2]).forwarded.count("\r\n") == len(SECURITY_FIELDS)


@pytest.mark.parametrize(
    "text, prefixes, left",
    [
        ("", ("a",), ""),
        ("A: 1\r\n", (), "A: 1\r\n"),
        ("A: 1\r\nB: 2\r\n", ("a:",), "B: 2\r\n"),
        ("A: 1\r\nB: 2\r\n", ("a", "b"), ""),
        (
            "ACCESS-Control-A: *\r\nVary: access-control-x\r\nX: 1\r\naccess-control-max-age: 1\r\nX: \r\n",
            ("access-control-",),
            "Vary: access-control-x\r\nX: 1\r\nX: \r\n",
        ),
        ("X: \xe9\r\nAccess-Control-A: \xe9\r\n", ("access-control-",), "X: \xe9\r\n"),
    ],
)
def test_lines_less_some(text: str, prefixes: tuple[str, ...], left: str) -> None:
    assert without_fields(text, prefixes) == left
