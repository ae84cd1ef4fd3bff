"""Where messages begin and end: docs/http.md row by row, every cut, and the opinions of two other parsers.

Sections are RFC 9112's unless another RFC is named. Statuses are what the rows say, not what the module does.
In the tables `|` stands between cases and `¶` between the lines of one case.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, NamedTuple

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.rules.framing import (
    CHUNKED,
    LAST_CHUNK,
    UNTIL_CLOSE,
    Answer,
    Body,
    ChunkedBody,
    Fault,
    Fields,
    Head,
    LengthBody,
    Memo,
    UntilCloseBody,
    body_for,
    body_length,
    chunk,
    oversized_fault,
    parse_answer,
    parse_head,
    unfinished_fault,
)

GET = "GET / HTTP/1.1"
HOST = "Host: a.example"
CODED = "Transfer-Encoding: chunked"
OK = "HTTP/1.1 200 OK"


def raw(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def says(*lines: str, **said: Any) -> tuple[bytes, dict[str, Any]]:
    return raw(*lines), said


def starts(cases: str | Iterable[str], template: str = "{}") -> list[bytes]:
    cases = cases.split("|") if isinstance(cases, str) else cases
    return [raw(template.format(case), HOST) for case in cases]


def blocks(cases: str | Iterable[str], template: str = "{}", start: str = f"{GET}¶{HOST}") -> list[bytes]:
    cases = cases.split("|") if isinstance(cases, str) else cases
    return [raw(*f"{start}¶{template.format(case)}".split("¶")) for case in cases]


def judged(data: bytes) -> Head | Fault:
    return parse_head(data, Memo())


def passed(data: bytes) -> Head:
    found = judged(data)
    assert isinstance(found, Head), found
    return found


def record(value: Head | Fields | Fault) -> dict[str, Any]:
    """All that it says, to compare by."""
    said = {name: getattr(value, name) for name in type(value).__slots__}
    return {name: record(item) if isinstance(item, Fields) else item for name, item in said.items()}


def short(value: object) -> str:
    return repr(value)[:64]


def cuts(data: bytes) -> list[int]:
    """Every place to cut at; of long data, those around its ends and the limit of a line, and a sample."""
    size = len(data) + 1
    return [cut for cut in range(size) if cut < 600 or cut > size - 300 or cut % 97 == 0]


# --- heads that are refused ------------------------------------------------------------------------------

# fmt: off
CONTROLS = [chr(code) for code in (*range(9), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F)]
BAD_LENGTHS = (
    '|+5|-5|-0|0x5|5,5|5, 5|5,|,5|5 5|5.0|5e0|1_0|\xb2|\xb9|five|"5"|5;|5\xa0|\x855|'
    f"{1 << 63}|{(1 << 64) + 5}|{'9' * 19}|{'9' * 40}|{'1' * 5_000}"
)
ROW_1, ROW_2, ROW_3 = "row 1, section 2.2", "row 2, section 2.2", "row 3, sections 2.3 and 3"
ROW_4, ROW_5, ROW_6 = "row 4, section 3.2", "row 5, section 3.2.2", "row 6, section 5.1"
ROW_7, ROW_8, ROW_9 = "row 7, sections 5 and 5.2", "row 8, section 6.1", "row 9, section 6.2"
ROW_12, ONCE, EXPECT = "row 12, section 3", "RFC 9110 5.3", "RFC 9110 10.1.1"
REFUSED = [
    # The first empty line is the wire's to skip: what stands here is a second.
    (ROW_1, 400, [b"\r\n\r\n", *(first + raw(GET, HOST) for first in (b"\r\n", b"\n", b"\r", b" ", b"\t"))]),
    (ROW_1, 400, [raw(GET + end + HOST, "X: y") for end in ("\n", "\r", "\r\r\n", "\n\r", "\n\n")]),
    (ROW_1, 400, [raw(GET, HOST + end + "X: y") for end in ("\n", "\r", "\r\r\n", "\n\r", f"\n{CODED}\n")]),
    (ROW_1, 400, blocks("X: y\n|X: y\r|X:\ry|X\n: y|X\r: y") + starts("GET /\r HTTP/1.1|GET /\n HTTP/1.1")),
    (ROW_2, 400, blocks(" X: y|\tX: y| |\t| HTTP/1.1|  Host: a", start=GET)),
    (ROW_3, 400, starts("|GET|GET /|GET / |/ HTTP/1.1|GET  HTTP/1.1|GET  / HTTP/1.1|GET /  HTTP/1.1|"
                        "GET / HTTP/1.1 | GET / HTTP/1.1|GET\t/ HTTP/1.1|GET /\tHTTP/1.1|GET / x HTTP/1.1|"
                        "G(T / HTTP/1.1|GET: / HTTP/1.1|G\xc9T / HTTP/1.1|G\0T / HTTP/1.1|G/T / HTTP/1.1|"
                        "\x16\x03\x01 / HTTP/1.1|GET / HTTP/1.1\0")),
    (ROW_3, 400, starts("http/1.1|HTTP/1|HTTP/1.|HTTP/1.10|HTTP/1.1.1|HTTP/01.1|HTTP/1.\xb2|HTTP/x.1|"
                        "HTTP/-1.1|HTTPS/1.1|HTTP/1,1|HTTP1.1|HTTP/20.0|HTTP/.1|HTTP/", "GET / {}")),
    (ROW_3, 400, starts(["\t", *CONTROLS, *"\x80\xa0\xe9\xff#\\", "a#b"], "GET /{} HTTP/1.1")),
    (ROW_3, 505, [*starts("0.9|2.0|2.1|3.0|9.9", "GET / HTTP/{}"), raw("PRI * HTTP/2.0")]),
    (ROW_3, 414, starts(["a" * 8_192], "GET /{} HTTP/1.1")),
    (ROW_4, 400, blocks("|a,b|a, b|u@a|u:p@a|a/|a/b|http://a|a b|a\tb|a\\b|a?b|a#b|<a>|a\"b|a^b|a{b}|\xe9|"
                        "a\xa0|a%|a%4|a%zz|:80|a:x|a:-1|a:+80|a:65536|a:80:80|a:8 0|a:\xb2|::1|[::1|::1]|[]|"
                        "[::1]x|[::1]:x|[::1]@|a[::1]|[g::1]|[::1 ]|a;b,", "Host: {}", start=GET)),
    (ROW_4, 400, blocks("X: y|Host_: a|"
                        "X: y¶Connection: Host", start=GET) + blocks(f"{HOST}|HOST: b.example|hOsT:")),
    (ROW_4, 400, blocks(f"Host:|{HOST}¶{HOST}", start="GET / HTTP/1.0")),
    (ROW_5, 400, starts("*|**|a|a/b|?a|a.example|a.example:80|http:|http:/a.example/|http://|http:///x|"
                        "http://?x|http://b.example/|http://a.example:80/|http://u@a.example/|"
                        "http://u:p@a.example/|http://a.example:x/|http://a.example,b/|ftp://a.example/|"
                        "ws://a.example/|://a.example/|http//a.example/", "GET {} HTTP/1.1")),
    (ROW_5, 400, starts("GET * HTTP/1.1|HEAD * HTTP/1.1|options * HTTP/1.1|OPTIONS *x HTTP/1.1|"
                        "OPTIONS http://b.example HTTP/1.1|GET http://b.example/ HTTP/1.0")),
    (ROW_5, 501, starts("a.example:443|*|http://a.example/|/|/x?y", "CONNECT {} HTTP/1.1")),
    (ROW_6, 400, blocks("X : y|X\t: y|X  : y|: y|:|x|nonsense|X Y: z|X(y): z|X@y: z|X/y: z|X[y]: z|X{y}: z|"
                        "\0: y|X\"y\": z|X,y: z|X;y: z|X=y: z|X?y: z|X<y>: z|X\\y: z|\xfc: y|X\xe9: y|"
                        "X\x80: y|X\xa0: y|X\0: y|X\x0b: y|X\x7f: y|\x0bX: y|Content-Length : 5|"
                        "Transfer-Encoding : chunked|Host : a|Transfer-Encoding\x0b: chunked")),
    (ROW_7, 400, [data for c in CONTROLS for data in blocks(f"X:{c}|X: {c}a|X: a{c}b|X: a{c}|"
                                                            f"Content-Length: 5{c}")]),
    (ROW_7, 400, blocks("X: a¶ b|X: a¶\tb|X: a¶ |X: a¶\t|X: a¶ Y: z|Content-Length:¶ 5|"
                        "Transfer-Encoding:¶\tchunked")),
    (ROW_8, 400, blocks(f"{CODED}¶Content-Length: 5|Content-Length: 5¶{CODED}|Content-Length: 0¶{CODED}|"
                        f"{CODED}¶{CODED}|{CODED}¶transfer-encoding: identity|"
                        f"Transfer-Encoding: gzip¶{CODED}|"
                        "Transfer-Encoding: gzip, chunked¶Content-Length: 5")),
    (ROW_8, 400, blocks("|,|gzip|identity|chunked, gzip|chunked, identity|chunked, chunked|chunked,|,chunked|"
                        "chunked chunked|chunked;a=b|chunked;|\"chunked\"|xchunked|chunkedx|x chunked|chunke|"
                        "\xa0chunked|chunked\x85|gzip,,chunked|"
                        "chunked, gzip, chunked", "Transfer-Encoding: {}")),
    (ROW_8, 501, blocks("gzip, chunked|GZIP ,\tChunked|identity, chunked|"
                        "a,b,chunked", "Transfer-Encoding: {}")),
    (ROW_8, 400, blocks(f"{CODED}|{CODED}¶{HOST}|{CODED}¶Content-Length: 5", start="POST / HTTP/1.0")),
    (ROW_9, 400, blocks(BAD_LENGTHS, "Content-Length: {}")),
    (ROW_9, 400, blocks(BAD_LENGTHS, "Content-Length: {}", "GET / HTTP/1.0")),
    (ROW_9, 400, blocks("5|6||x", "Content-Length: 5¶content-length: {}")),
    (ROW_12, 431, [raw(GET, HOST, *["X: y"] * 100)]),
    (ROW_12, 431, blocks(f"X: {'y' * 8_193}|Cookie: {'y' * 8_193}|Authorization: {'y' * 8_193}")),
    (ROW_12, 431, blocks(f"{'x' * 8_193}: y|{'x' * 5_000}: {'y' * 5_000}")),
    (ONCE, 400, blocks("Authorization: a¶authorization: a|X-API-Key: a¶x-api-key: b|Origin: a¶origin: a")),
    (EXPECT, 417, blocks("Expect: x|Expect:|Expect: 100-continue, x|Expect: 100-continue;a|"
                         "Expect: 100-continue¶Expect: 100-continue")),
]
# fmt: on
BAD = [(row, status, data) for row, status, heads in REFUSED for data in heads]


@pytest.mark.parametrize("row, status, data", BAD, ids=short)
def test_refused(row: str, status: int, data: bytes) -> None:
    found = judged(data)
    assert isinstance(found, Fault), row
    assert found.status == status, found
    assert found.reason in repr(found)


# --- heads that pass -------------------------------------------------------------------------------------

# fmt: off
PASSED = [
    says(GET, HOST, method="GET", target="/", minor=1, host="a.example", length=0, keep_alive=True),
    says("GET / HTTP/1.0", minor=0, host="", keep_alive=False),
    says("GET / HTTP/1.0", "Connection: Keep-Alive", minor=0, keep_alive=True),
    says("GET / HTTP/1.0", "Connection: keep-alive, close", "Expect: x", keep_alive=False),
    says("GET / HTTP/1.2", HOST, "Connection: cLoSe", minor=1, keep_alive=False),
    says("GET / HTTP/1.9", HOST, "Connection: x", "Connection: y ,\tclose", minor=1, keep_alive=False),
    says("M-SEARCH /?%zz=[{|}]^`\"<>~!?/ HTTP/1.1", HOST, method="M-SEARCH", target="/?%zz=[{|}]^`\"<>~!?/"),
    says("!#$%&'*+-.^_`|~09azAZ // HTTP/1.1", HOST, method="!#$%&'*+-.^_`|~09azAZ", target="//"),
    says(f"GET /{'a' * 8_191} HTTP/1.1", HOST, target=f"/{'a' * 8_191}"),
    *(says(GET, f"hOST:{value}", host=value.strip(" \t")) for value in (
        "a", " \ta.example:8080 \t", "127.0.0.1", "[::1]", "[::ffff:1.2.3.4]:65535", "a_b:0", "%4A~!$&'()*+;",
    )),
    says("GET http://A.Example/x?y HTTP/1.1", HOST, target="/x?y", host="A.Example"),
    says("GET HTTPS://a.example?q HTTP/1.1", HOST, target="/?q", host="a.example"),
    says("GET http://[::1]:80 HTTP/1.0", target="/", host="[::1]:80"),
    says("OPTIONS * HTTP/1.1", HOST, target="*", method="OPTIONS"),
    says("OPTIONS http://a.example/x HTTP/1.1", HOST, target="/x"),
    *((data, {"length": CHUNKED}) for data in blocks("chunked|\tChunked |CHUNKED\t", "Transfer-Encoding:{}")),
    *(says("PUT / HTTP/1.1", HOST, f"content-LENGTH:{value}", length=int(value)) for value in (
        " 0", "7", " 007\t", str((1 << 63) - 1),
    )),
    says("POST / HTTP/1.0", "Content-Length: 3", length=3),
    says("PUT / HTTP/1.1", HOST, "Content-Length: 3", "Expect: 100-Continue", expect="100-continue"),
    says(GET, HOST, "Accept:*/*", "Cookie: a=b; c=\"d\"", "X:", "!#$%&'*+-.^_`|"
                                                                "~09azAZ: z", "Connection: y", "x_y: z",
         forwarded=["Accept: */*", "Cookie: a=b; c=\"d\"", "X: ", "!#$%&'*+-.^_`|~09azAZ: z", "x_y: z"]),
    says(GET, "X: \t a\tb  c \t ", HOST, "x:\x80\xff", "X: ,",
         forwarded=["X: a\tb  c", "x: \x80\xff", "X: ,"]),
    says(GET, HOST, *["X: y"] * 99, forwarded=["X: y"] * 99),
    says(GET, HOST, f"X: {'y' * 8_000}", "Z: a", forwarded=[f"X: {'y' * 8_000}", "Z: a"]),
    says(GET, HOST, "Connection: A ,b-B,,close", "a: 1", "B-b: 2", "B-c: 3", "Connection: d_d", "D_d: 4",
         "D-d: 5", forwarded=["B-c: 3", "D-d: 5"], keep_alive=False),
    says(GET, HOST, "Authorization: Bearer a", "X-Request-ID: r", "traceparent: t", "tracestate: a=1",
         "TraceState: b=2", "X-Forwarded-For: 1", "x-forwarded-for: 2, 3", "Origin: o",
         "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: x",
         authorization="Bearer a", request_id="r", traceparent="t", api_key=None, token="a",
         tracestate=("a=1", "b=2"), forwarded_for=("1", "2, 3"), origin="o", request_method="PUT",
         request_headers="x",
         forwarded=["Origin: o", "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: x"]),
    *(says(GET, HOST, f"Authorization: {value}", token=token) for value, token in (
        ("Bearer a.", "a."), ("bEARER  \ta ", "a"), ("Bearer a b", "a b"), ("Bearer", ""), ("Basic a", None),
        ("", None), ("Bearera", None), ("Bearer\ta", None), ("x Bearer a", None),
    )),
    says(GET, HOST, "X-API-Key: k", "X-Request-ID: a", "X-Request-ID: b", "traceparent: a", "traceparent: a",
         "Connection: X-API-Key", api_key="k", request_id="", traceparent="", forwarded=[]),
]
HOP_BY_HOP = """
    connection keep-alive proxy-connection te trailer transfer-encoding upgrade proxy-authorization
    proxy-authenticate sec-websocket-key sec-websocket-version sec-websocket-protocol sec-websocket-extensions
    sec-websocket-accept http2-settings
"""
OWN = """
    authorization x-api-key x-user-id x-user-role x-request-id traceparent tracestate forwarded
    x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port x-forwarded-prefix x-forwarded-server
    x-real-ip content-length expect host
"""
NEVER_PASS = (HOP_BY_HOP + OWN).split()
# fmt: on
HEADS = [data for data, _ in PASSED]


@pytest.mark.parametrize("data, said", PASSED, ids=short)
def test_passed(data: bytes, said: dict[str, Any]) -> None:
    found = record(passed(data))
    found = {**found.pop("fields"), **found}
    found["forwarded"] = found["forwarded"].split("\r\n")[:-1]
    assert {name: found[name] for name in said} == said
    assert found["size"] == len(data)


@pytest.mark.parametrize("name", NEVER_PASS)
def test_what_never_passes_under_any_spelling_rfc_9110_7_6_1(name: str) -> None:
    value = {"content-length": "5", "transfer-encoding": "chunked", "expect": "100-continue"}.get(name, "x")
    names = (name, name.replace("-", "_"), name.replace("-", "_", 1), name.replace("-", "."))
    for spelled in {change(name) for change, name in product((str.lower, str.upper, str.title), names)}:
        others = ["X-User: a"] if name == "host" else [HOST, "X-User: a"]
        found = passed(raw(GET, f"{spelled}: {value}", *others))
        assert found.fields.forwarded == "X-User: a\r\n"
        if {"_", "."} & {*spelled}:
            bare = record(passed(raw(GET, *others)))
            assert record(found) | {"size": bare["size"]} == bare, "it said something to the gateway itself"


# --- heads in pieces -------------------------------------------------------------------------------------


def test_a_good_head_cut_at_any_byte_is_waited_for() -> None:
    for data in [*HEADS, raw(GET, HOST, *["X: " + "y" * 4_000] * 4)[:16_383]]:
        for cut in cuts(data[:-1]):
            assert unfinished_fault(data[:cut]) is None, data[:cut]
            assert unfinished_fault(bytearray(data[:cut])) is None


def test_an_early_refusal_is_the_refusal_of_the_whole() -> None:
    for row, status, data in BAD:
        early = {fault.status for cut in cuts(data[:-1]) if (fault := unfinished_fault(data[:cut]))}
        assert early <= {status}, (row, data)


# fmt: off
EARLY = [
    *((400, bytes([first])) for first in b" \t\0\n\r\x16\x7f\x80\xff"),
    *((400, raw(GET).removesuffix(b"\r\n\r\n") + end) for end in (
        b"\n", b"\r\r", b"\rX", b"\r\nX: y\n", b"\r\nX: y\r\r", b"\r\nX: y\rZ", b"\r\nX: y\r\n\n",
    )),
    (414, b"GET /" + b"a" * 16_379), (414, b"G" * 16_384),
    (431, raw(GET, *["X: " + "y" * 4_000] * 5)[:16_384]),
]
# fmt: on


@pytest.mark.parametrize("status, data", EARLY, ids=short)
def test_refused_at_the_first_byte_that_cannot_be(status: int, data: bytes) -> None:
    found = unfinished_fault(data)
    assert found is not None
    assert found.status == status
    assert unfinished_fault(data[:-1]) is None


def test_row_12_section_3_a_whole_head_may_be_16_384_bytes() -> None:
    lines = (GET, HOST, "X: " + "y" * 8_000, "Y: " + "z" * 8_000)
    data = raw(*lines, "Z: " + "a" * (16_384 - len(raw(*lines, "Z: "))))
    assert oversized_fault(data) is None
    assert passed(data).size == 16_384
    for longer, status in ((data[:-4] + b"a\r\n\r\n", 431), (raw("G" * 16_400), 414)):
        fault = oversized_fault(longer)
        assert fault is not None
        assert fault.status == status


# --- the memo --------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_a_memo_is_exact_and_bounded(capacity: int, steps: list[tuple[bool, int]]) -> None:
    memo: Memo[int] = Memo(capacity)
    known: dict[str, int] = {}
    for version, (put, number) in enumerate(steps, 1):
        text = str(number)
        if put:
            memo.put(text, version)
            known[text] = version
        assert memo.get(text) in ([version] if put else [None, known.get(text)])
        assert len(memo) <= 2 * capacity


@given(st.integers(1, 4), st.lists(st.integers(0, 9), max_size=40))
def test_a_memo_holds_what_came_last(capacity: int, numbers: list[int]) -> None:
    memo: Memo[int] = Memo(capacity)
    for number in numbers:
        memo.put(str(number), number)
    for number in list(dict.fromkeys(reversed(numbers)))[:capacity]:
        assert memo.get(str(number)) == number


def test_a_flood_pushes_out_what_is_not_used_and_no_more() -> None:
    memo: Memo[int] = Memo(8)
    memo.put("used", 1)
    memo.put("unused", 2)
    for number in range(1_000):
        memo.put(f"flood {number}", 3)
        assert number % 6 or memo.get("used") == 1
    assert memo.get("unused") is None
    memo.put("a" * 2_048, 4)
    memo.put("b" * 2_049, 5)
    assert (memo.get("a" * 2_048), memo.get("b" * 2_049)) == (4, None)


OTHER_STARTS = (
    "GET / HTTP/1.1|POST /x HTTP/1.0|GET / HTTP/1.2|GET / HTTP/2.0|GET /||OPTIONS * HTTP/1.1|"
    "CONNECT a:1 HTTP/1.1|GET http://b.example/ HTTP/1.1|GET http://a.example/ HTTP/1.0|G\0T / HTTP/1.1"
)


def test_what_is_remembered_equals_what_is_read_afresh() -> None:
    for memo in (Memo[Fields](), Memo[Fields](1)):
        for data, line in product([*HEADS, *(data for _, _, data in BAD)], OTHER_STARTS.split("|")):
            data = line.encode() + b"\r\n" + data.partition(b"\r\n")[2]
            if data.find(b"\r\n\r\n") == len(data) - 4:
                assert record(parse_head(data, memo)) == record(judged(data)), data[:200]


def test_a_known_block_is_not_read_again() -> None:
    memo: Memo[Fields] = Memo()
    first, second = (parse_head(raw(start, HOST, "X: y"), memo) for start in (GET, "PUT /z HTTP/1.0"))
    assert isinstance(first, Head)
    assert isinstance(second, Head)
    assert first.fields is second.fields
    assert len(memo) == 1


# --- bodies ----------------------------------------------------------------------------------------------


class Drunk(NamedTuple):
    content: bytes
    rest: bytes = b""
    done: bool = False
    fault: str = ""


def drink(body: Body, *pieces: bytes) -> Drunk:
    """Feed the pieces as the wire does: until the body is done or lost."""
    content = b""
    for number, piece in enumerate(pieces, 1):
        content += body.feed(piece)
        if body.done or body.fault:
            rest = body.rest + b"".join(pieces[number:]) if body.done else body.rest
            return Drunk(content, rest, body.done, body.fault)
    return Drunk(content, body.rest)


# fmt: off
T_8184 = b"".join(b"T: %b\r\n" % (b"x" * 119) for _ in range(66))
X_128 = (b"1;" + b"a" * 127 + b"\r\nx\r\n") * 128  # 16,384 bytes of extensions
CHUNKS = [  # as it arrives, its content, what stands behind it
    (b"0\r\n\r\n", b"", b""), (b"000\r\n\r\nGET", b"", b"GET"),
    (b"5\r\nhello\r\n0\r\n\r\n\r\n", b"hello", b"\r\n"), (b"3\r\n0\r\n\r\n00\r\n\r\n", b"0\r\n", b""),
    (b"1\r\n\r\r\n2\r\n\r\n\r\n1\r\n\n\r\n0\r\n\r\n", b"\r\r\n\n", b""),
    (b"aB\r\n" + b"x" * 0xAB + b"\r\n0\r\n\r\nx", b"x" * 0xAB, b"x"), (X_128 + b"0\r\n\r\n", b"x" * 128, b""),
    (b"0000000000000003\r\nabc\r\n0000000000000000\r\n\r\n", b"abc", b""),
    (b'3;a\r\nabc\r\n0;b=c;d="e\\" ;"\r\n\r\n', b"abc", b""),
    (b'3 \t; a\t=\t"\xff";b\r\nabc\r\n0\r\n\r\n', b"abc", b""),
    (b"3\r\nabc\r\n0\r\nX: y\r\nContent-Length: 5\r\nZ:\r\nTE: chunked\r\n\r\n0", b"abc", b"0"),
    (b"1;" + b"a" * 254 + b"\r\nx\r\n0\r\n\r\n", b"x", b""),
    (b"0\r\nT: " + b"x" * 8_187 + b"\r\n\r\n", b"", b""),
    (b"0\r\n" + T_8184 + b"T: xx\r\n\r\n", b"", b""), (b"0\r\n" + T_8184 + b"T: xxx\r\n\r\n", b"", b""),
]
BAD_SIZES = (
    "|0x5|x5|+5|-5|-1|5 |5\t| 5|\t5|5 5|\xb2|5_|1_0|5h|g|5.|5,|;a|5\r|5\0|\r\n5|\n5|5;\0|5;a\nb|5;a\rb|"
    f"5;\x7f|5;|5;;a|5;=a|5;a=|5;a b|5;a=\"b|5;a=\"\\\"|5;a=b;|5;\xe9|{'0' * 16}5|{'F' * 17}|5;{'a' * 255}|"
    f"{'0' * 300}|\xef\xbc\x95|\xff\x15"
)
BAD_CODING = (
    "5\nhello\r\n0\r\n\r\n|5\rhello\r\n0\r\n\r\n|5hello\r\n0\r\n\r\n|5\r\nhello0\r\n\r\n|"
    "5\r\nhello\n0\r\n\r\n|5\r\nhello\r0\r\n\r\n|5\r\nhello\n\r0\r\n\r\n|5\r\nhello!\r\n0\r\n\r\n|"
    "5\r\nhelloXX0\r\n\r\n|5\r\nhello\r\n\r\n0\r\n\r\n|5\r\nhello\r\n0\n\r\n|0\r\n\n|"
    "5\r\nhello\r\n-0\r\n\r\n|0 \r\n\r\n|0\n\n|0\r\nX: y\n\r\n|0\r\nX\r\n\r\n|0\r\nX : y\r\n\r\n|"
    "0\r\n X: y\r\n\r\n|0\r\n: y\r\n\r\n|0\r\nX: a\nb\r\n\r\n|0\r\nX: a\rb\r\n\r\n|0\r\nX: \0\r\n\r\n|"
    "0\r\nX\xe9: y\r\n\r\n|0\r\nX: a\r\n b\r\n\r\n|0\r\n\rX: y\r\n\r\n"
)
BAD_CHUNKS = [
    *(f"{size}\r\nhello\r\n0\r\n\r\n".encode("latin-1") for size in BAD_SIZES.split("|")),
    *BAD_CODING.encode("latin-1").split(b"|"),
    *(b"0\r\n" + T_8184 + b"T: " + b"x" * count + b"\r\n\r\n" for count in (4, 5, 6, 7, 20)),
    b"0\r\nT: " + b"x" * 8_188 + b"\r\n\r\n", b"0\r\nT: " + b"x" * 9_000, X_128 + b"1;a\r\nx\r\n0\r\n\r\n",
]
# fmt: on


@pytest.mark.parametrize("data, content, rest", CHUNKS, ids=short)
def test_rows_10_and_11_section_7_1_chunked(data: bytes, content: bytes, rest: bytes) -> None:
    assert drink(ChunkedBody(), data) == Drunk(content, rest, True)


@pytest.mark.parametrize("data", BAD_CHUNKS, ids=short)
def test_rows_10_and_11_section_7_1_chunked_refused(data: bytes) -> None:
    body = ChunkedBody()
    assert drink(body, data).fault
    assert (body.done, body.rest) == (False, b"")
    assert (body.feed(b"5\r\nhello\r\n0\r\n\r\n"), body.done) == (b"", False), "it goes on behind its fault"


@pytest.mark.parametrize("data", [*(data for data, _, _ in CHUNKS), *BAD_CHUNKS], ids=short)
def test_row_10_section_7_1_chunked_is_the_same_however_it_is_cut(data: bytes) -> None:
    whole = drink(ChunkedBody(), data)
    for cut in cuts(data):
        assert drink(ChunkedBody(), data[:cut], data[cut:]) == whole, cut
    assert drink(ChunkedBody(), *[data[at : at + 1] for at in range(len(data))]) == whole


@pytest.mark.parametrize(
    "data", [b"5\r\nhello!", b"5\r\nhello\n", b"z\r\n", b"\n", b"5\n", b"a" * 258], ids=short
)
def test_row_10_section_7_1_what_is_lost_is_not_waited_for(data: bytes) -> None:
    assert drink(ChunkedBody(), data).fault
    assert not drink(ChunkedBody(), data[:-1]).fault


token = st.text(st.sampled_from("!#$%&'*+-.^_`|~09azAZ"), min_size=1, max_size=5)
text = st.text(st.sampled_from("a Z;=:,\t~\x80\xa0\xff"), max_size=5)
space = st.sampled_from(["", "", " ", "\t "])
value = token | text.map('"{}"'.format) | st.just('"\\"\\\\"')
extension = token | st.builds("{1}{0}={0}{2}".format, space, token, value)
extensions = st.lists(st.builds("{0};{0}{1}".format, space, extension), max_size=3).map("".join)
trailers = st.lists(st.builds("{}:{}{}\r\n".format, token, space, text), max_size=3).map("".join)


@st.composite
def coded_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body in the chunked coding, and its content."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    coded = b""
    for piece in [*pieces, b""]:
        size = f"{len(piece):x}".zfill(draw(st.integers(0, 16)))
        line = draw(st.sampled_from([size, size.upper()])) + draw(extensions)
        coded += line.encode("latin-1") + b"\r\n" + (piece + b"\r\n" if piece else b"")
    return coded + draw(trailers).encode("latin-1") + b"\r\n", b"".join(pieces)


def cut_up(data: bytes, places: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(at)]


places = st.lists(st.integers(0), max_size=8)


@settings(deadline=None)
@given(coded_bodies(), st.binary(max_size=8), places)
def test_row_10_section_7_1_chunked_there_and_back(
    coded: tuple[bytes, bytes], rest: bytes, at: list[int]
) -> None:
    data, content = coded
    assert drink(ChunkedBody(), *cut_up(data + rest, at)) == Drunk(content, rest, True)
    for end in cuts(data[:-1]):
        body = ChunkedBody()
        assert not drink(body, data[:end]).done
        body.eof()
        assert body.fault
    body = ChunkedBody()
    assert drink(body, (chunk(content) if content else b"") + LAST_CHUNK) == Drunk(content, b"", True)
    body.eof()
    assert body.fault == ""


@given(st.binary(max_size=20), st.binary(max_size=8), places)
def test_section_6_3_a_body_of_known_length(content: bytes, rest: bytes, at: list[int]) -> None:
    body = LengthBody(len(content))
    assert (body.left, body.done) == (len(content), not content)
    assert drink(body, *cut_up(content + rest, at)) == Drunk(content, rest, True)
    body.eof()
    assert (body.left, body.fault) == (0, "")
    for end in range(len(content)):
        body = LengthBody(len(content))
        assert drink(body, content[:end]) == Drunk(content[:end])
        assert body.left == len(content) - end
        body.eof()
        assert body.fault


def test_section_6_3_a_body_that_ends_with_its_connection_and_which_decoder_is_for_which_length() -> None:
    body = UntilCloseBody()
    assert drink(body, b"a", b"", b"\0\r\n") == Drunk(b"a\0\r\n")
    body.eof()
    assert (body.done, body.fault, body.left) == (True, "", -1)
    decoders = [type(body_for(length)) for length in (0, 7, CHUNKED, UNTIL_CLOSE)]
    assert decoders == [LengthBody, LengthBody, ChunkedBody, UntilCloseBody]


# --- answers ---------------------------------------------------------------------------------------------

# fmt: off
ANSWERS = [
    says(OK, minor=1, status=200, reason="OK", length=UNTIL_CLOSE, keep_alive=True, has_date=False),
    says("HTTP/1.0 404 Not  Found\t", "Content-Length: 5", minor=0, reason="Not  Found\t", keep_alive=False),
    says("HTTP/1.1 599", "content-LENGTH:\t007 ", reason="", length=7, length_line=b"Content-Length: 7\r\n"),
    says("HTTP/1.3 100 ", minor=1, reason=""),
    says("HTTP/1.1 500 \xe9\xff", "X: \x80", start=b"HTTP/1.1 500 \xe9\xff\r\nX: \x80\r\n"),
    says(OK, "transfer-encoding:Chunked\t", length=CHUNKED, length_line=b"", start=b"HTTP/1.1 200 OK\r\n"),
    says(OK, f"Content-Length: {(1 << 63) - 1}", length=(1 << 63) - 1),
    says("HTTP/1.0 200 OK", "Connection: Keep-Alive", keep_alive=True),
    says("HTTP/1.0 200 OK", "Connection: x", keep_alive=False),
    says("HTTP/1.0 200 OK", "Connection: keep-alive, close", keep_alive=False),
    says(OK, "Connection: x", "connection: CLOSE ,y", "X: 1", "y: 2", "Z: 3", forwarded="Z: 3\r\n"),
    says("HTTP/1.1 200 OK", "Connection: x", "connection: CLOSE ,y", keep_alive=False, forwarded=""),
    says(OK, "Date: now", "Set-Cookie: a=b", "set-cookie:c=d \t", "Trailer: x", "Upgrade: h2c", "TE: x",
         "X-Request-ID: r", "RateLimit: 1", "RateLimit-Policy: x", "X-RateLimit-Limit: 5", "Keep-Alive: x",
         "X-RateLimit-Remaining: 5", "X-RateLimit-Reset: 5", "Proxy-Authenticate: x", "Content-Length: 0",
         "Sec-WebSocket-Accept: x", has_date=True, length=0,
         forwarded="Date: now\r\nSet-Cookie: a=b\r\nset-cookie: c=d\r\n"),
    says(OK, "Date: now", "Connection: date", has_date=False, forwarded=""),
    # RFC 9110 8.6: content was announced where none may follow: where the next answer begins is not certain.
    says("HTTP/1.1 204", CODED, keep_alive=False),
    says("HTTP/1.1 204", "Content-Length: 5", keep_alive=False),
    says("HTTP/1.1 204 x", "Content-Length: 0", keep_alive=True),
    says("HTTP/1.1 304", "Content-Length: 5", keep_alive=True),
]
BAD_ANSWERS = [
    *starts("|HTTP/1.1|HTTP/1.1 200\tOK|HTTP/1.1  200 OK| HTTP/1.1 200 OK|HTTP/1.1 20 OK|HTTP/1.1 2000 OK|"
            "HTTP/1.1 099 x|HTTP/1.1 600 x|HTTP/1.1 999 x|HTTP/1.1 2x0 OK|HTTP/1.1 \xb200 OK|HTTP/1.1 +20 OK|"
            "HTTP/1.1 200OK|http/1.1 200 OK|HTTP/2.0 200 OK|HTTP/0.9 200 OK|HTTP/1.10 200 OK|HTTP/1 200 OK|"
            "ICY 200 OK|HTTP/1.1 200 O\0K|HTTP/1.1 200 O\nK|HTTP/1.1 200 O\rK|HTTP/1.1 200 \x7f|"
            "GET / HTTP/1.1"), b"\r\n\r\n", b"\r\n" + raw(OK), raw(f"{OK}\nX: y"), raw(f"{OK}\rX: y"),
    *blocks("X : y| X: y|X: a¶ b|X: a¶\tb|X|: y|X\xe9: y|X: a\0|X: a\nb|X: a\rb|X: \x7f|Content-Length : 5|"
            f"{CODED}¶Content-Length: 5|Content-Length: 0¶{CODED}|{CODED}¶{CODED}|"
            "Content-Length: 5¶content-length: 5", start=OK),
    *blocks(BAD_LENGTHS, "Content-Length: {}", OK), raw("HTTP/1.0 200 OK", CODED),
    *blocks("|gzip|gzip, chunked|chunked, gzip|chunked, chunked|chunked,|identity|"
            "chunked;a=b", "Transfer-Encoding: {}", OK),
]
# fmt: on


@pytest.mark.parametrize("data, said", ANSWERS, ids=short)
def test_an_answer_that_passes(data: bytes, said: dict[str, Any]) -> None:
    memo: Memo[Answer] = Memo()
    found = parse_answer(data, memo)
    assert isinstance(found, Answer), found
    assert {name: getattr(found, name) for name in said} == said
    assert parse_answer(data, memo) is found


@pytest.mark.parametrize("data", BAD_ANSWERS, ids=short)
def test_an_answer_that_is_refused(data: bytes) -> None:
    memo: Memo[Answer] = Memo()
    found = parse_answer(data, memo)
    assert isinstance(found, Fault)
    assert (found.status, len(memo)) == (502, 0)


@pytest.mark.parametrize(
    "status", [100, 101, 103, 199, 200, 203, 204, 205, 206, 299, 300, 303, 304, 305, 404, 500]
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "head", "OPTIONS"])
def test_section_6_3_what_follows_an_answer(method: str, status: int) -> None:
    bare = method == "HEAD" or status // 100 == 1 or status in {204, 304}
    for line, length in (("Content-Length: 5", 5), (CODED, CHUNKED), ("X: y", UNTIL_CLOSE)):
        found = parse_answer(raw(f"HTTP/1.1 {status} x", line), Memo())
        assert isinstance(found, Answer)
        assert body_length(found, method) == (0 if bare else length)


# --- two other opinions ----------------------------------------------------------------------------------

Role = type[h11.CLIENT] | type[h11.SERVER]


class Reading(NamedTuple):
    """What a parser makes of a message: its first line and minor version, its content so far, its fields."""

    start: tuple[bytes, ...]
    minor: int
    content: bytes
    done: bool
    fields: list[tuple[bytes, bytes]]


def by_h11(data: bytes, role: Role) -> Reading:
    connection = h11.Connection(role, max_incomplete_event_size=1 << 20)
    if role is h11.CLIENT:
        connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head: Any = connection.next_event()
    start = (head.method, head.target) if role is h11.SERVER else (b"%d" % head.status_code, head.reason)
    content, done = b"", isinstance(head, h11.InformationalResponse)
    while not done and (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        content += event.data if isinstance(event, h11.Data) else b""
        done = isinstance(event, h11.EndOfMessage)
    return Reading(start, min(1, int(head.http_version[2:])), content, done, list(head.headers))


def by_llhttp(data: bytes, role: Role) -> Reading:
    start: list[bytes] = []
    fields: list[tuple[bytes, bytes]] = []
    in_head: list[int] = []  # how many fields there were when the head ended; more of them are trailers
    content: list[bytes] = []
    done: list[bool] = []
    seen = SimpleNamespace(
        on_url=start.append,
        on_status=start.append,
        on_header=lambda name, value: fields.append((name.lower(), value.strip(b" \t"))),
        on_headers_complete=lambda: in_head.append(len(fields)),
        on_body=content.append,
        on_message_complete=lambda: done.append(True),
    )
    parser: Any = (httptools.HttpRequestParser if role is h11.SERVER else httptools.HttpResponseParser)(seen)
    with suppress(httptools.HttpParserUpgrade):  # it stops there: what follows is for another parser
        parser.feed_data(data)
    first = parser.get_method() if role is h11.SERVER else b"%d" % parser.get_status_code()
    minor = int(parser.get_http_version()[2:])
    return Reading((first, b"".join(start)), minor, b"".join(content), bool(done), fields[: in_head[0]])


# What llhttp cannot be asked: other methods than those that somebody registered, other minor versions than 0
# and 1, and a tab behind `chunked`, which is no whitespace to it though RFC 9110 5.6.3 says so.
METHODS = """
    DELETE GET HEAD POST PUT OPTIONS TRACE COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND REBIND
    UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PATCH PURGE MKCALENDAR
    LINK UNLINK QUERY
"""
LLHTTP_KNOWS = re.compile(rf"((?:{'|'.join(METHODS.split())}) \S+ )?HTTP/1\.[01]\b".encode())
LLHTTP_DOUBTS = re.compile(rb"(?i)\r\nTransfer-Encoding:[^\r]*\t\r")


def opinions(data: bytes, role: Role, length: int) -> Iterable[Reading]:
    """How others read this head with a body of 64 bytes at most; without who cannot be asked (why: below)."""
    coded, content = b"2\r\nab\r\n1\r\nc\r\n0\r\nT: u\r\n\r\n", b"abc"
    if length != CHUNKED:
        coded = content = b"x" * (64 if length < 0 else min(length, 64))
    done = length in {CHUNKED, len(content)}
    for read in (by_h11, by_llhttp):
        if read is by_llhttp and (LLHTTP_DOUBTS.search(data) or not LLHTTP_KNOWS.match(data)):
            continue
        reading = read(data + coded, role)
        assert (reading.content, reading.done) == (content, done), "the body"
        yield reading


# llhttp reads no whitespace around `;` and `=` and h11 none before `;`, though 7.1.1 has us read it; and both
# judge a trailer as if it were a field of the head, where we drop it (7.1.2).
BODIES_APART = re.compile(rb"(?i)[ \t][;=]|[;=][ \t]|(content-length|transfer-encoding):")
NASTY = "00 09 0a 0d 0d0a 0d0a20 20 2020 22 23 25 2c 2f 3a 3a20 3b 3f 40 5b 5c 5d 5f 7f 80 a0 ff 30 31 2b 2a"


@st.composite
def spoilt(draw: st.DrawFn, corpus: list[bytes]) -> bytes:
    """A message with up to three small changes: other bytes, or a line repeated or taken from another one."""
    corpus = [data for data in corpus if len(data) < 600]
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            at = draw(st.integers(0, len(data)))
            new = draw(st.sampled_from(NASTY.split()).map(bytes.fromhex) | st.binary(max_size=3))
            data = data[:at] + new + data[at + draw(st.integers(0, 3)) :]
        else:
            lines = data.split(b"\r\n")
            others = lines if draw(st.booleans()) else draw(st.sampled_from(corpus)).split(b"\r\n")
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(others)))
            data = b"\r\n".join(lines)
    return data


def spoilt_heads(table: list[tuple[bytes, dict[str, Any]]]) -> st.SearchStrategy[bytes]:
    heads = [data for data, _ in table]
    whole = spoilt(heads).map(lambda data: data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    return st.sampled_from(heads) | whole


MEMO: Memo[Fields] = Memo(32)


@settings(deadline=None, max_examples=600)
@given(spoilt_heads(PASSED))
def test_a_head_that_passes_is_read_alike_by_others(data: bytes) -> None:
    found = judged(data)
    assert record(parse_head(data, MEMO)) == record(found)
    if isinstance(found, Fault):
        return
    assert not any(unfinished_fault(data[:cut]) for cut in cuts(data))
    method, target, _ = data.partition(b"\r\n")[0].split(b" ")
    ours = found.target.encode()
    if target[:1] not in {b"/", b"*"}:  # absolute-form: the path may be empty there
        authority = found.host.encode()
        assert target.partition(b"://")[2] in {authority + ours, authority + ours[1:]}
        ours = target
    lines = [line.partition(": ") for line in found.fields.forwarded.split("\r\n")[:-1]]
    forwarded = [(name.lower().encode(), value.encode("latin-1")) for name, _, value in lines]
    for reading in opinions(data, h11.SERVER, found.length):
        assert (reading.start, reading.minor) == ((method, ours), found.minor)
        assert reading.start == (found.method.encode(), target)
        values = b",".join(value for name, value in reading.fields if name == b"connection")
        named = {option.strip(b" \t").lower() for option in values.split(b",")}
        dropped = {name.encode() for name in NEVER_PASS}
        kept = [
            (n, value)
            for n, value in reading.fields
            if re.sub(rb"[^a-z0-9]", b"-", n) not in dropped and n not in named
        ]
        assert kept == forwarded
        hosts = [value.decode() for name, value in reading.fields if name == b"host"]
        assert hosts == ([] if found.fields.host is None else [found.fields.host])


@settings(deadline=None, max_examples=400)
@given(spoilt_heads(ANSWERS))
def test_an_answer_that_passes_is_read_alike_by_others(data: bytes) -> None:
    found = parse_answer(data, Memo())
    if isinstance(found, Answer):
        for reading in opinions(data, h11.CLIENT, body_length(found, "GET")):
            assert reading.start == (b"%d" % found.status, found.reason.encode("latin-1"))
            assert reading.minor == found.minor


@settings(deadline=None, max_examples=400)
@given(spoilt([data for data, _, _ in CHUNKS]))
def test_a_body_that_passes_is_read_alike_by_others(data: bytes) -> None:
    found = drink(ChunkedBody(), data)
    if found.done and not BODIES_APART.search(data):
        message = raw("POST / HTTP/1.1", HOST, CODED) + data.removesuffix(found.rest)
        for read in (by_h11, by_llhttp):
            assert read(message, h11.SERVER)[2:4] == (found.content, True)
