"""Every field's edges: what is taken is returned unaltered, what is refused names the field and a reason."""

import datetime as dt
import ipaddress
import json
import re
import shutil
import subprocess
import time
import typing
import unicodedata
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core import validation
from lucid.core.exchange import ROLES, RoleName
from lucid.core.urls import checked_ipv4, checked_ipv6, checked_url
from lucid.core.validation import (
    MAX_CHUNK_BYTES,
    MAX_FILE_BYTES,
    MAX_METADATA_BYTES,
    ChunkBytes,
    Email,
    FileBytes,
    Metadata,
    PageLimit,
    PageNumber,
    Password,
    Port,
    SessionId,
    SessionStatus,
    ShortText,
    SignatureHex,
    Timestamp,
    TronAddress,
    UserId,
    checked_address,
    checked_chunk_size,
    checked_email,
    checked_file_size,
    checked_future,
    checked_metadata,
    checked_password,
    checked_text,
    email_key,
    is_session_id,
    is_user_id,
)
from lucid.errors import ErrorCode, GatewayError

NOT_ABOUT_SPEED = settings(deadline=None)  # the machine may be busy


def refused(check: Callable[..., Any], *given: Any, **named: Any) -> tuple[str, str]:
    """The field and the reason."""
    with pytest.raises(GatewayError) as caught:
        check(*given, **named)
    error = caught.value
    assert error.code is ErrorCode.BAD_FIELD
    assert set(error.details) == {"field", "reason"}
    assert str(error) == f"{error.details['field']}: {error.details['reason']}"
    assert len(error.details["reason"]) < 160
    return error.details["field"], error.details["reason"]


def is_refused(check: Callable[..., Any], *given: Any, **named: Any) -> bool:
    try:
        told = check(*given, **named)
    except GatewayError as error:
        return error.code is ErrorCode.BAD_FIELD
    assert told == given[0]
    return False


def fits(kind: Any, value: Any) -> bool:
    """Whether msgspec takes `value`, sent as JSON."""
    try:
        assert msgspec.json.decode(msgspec.json.encode(value), type=kind) == value
    except msgspec.ValidationError:
        return False
    return True


# ---- e-mail

EMAILS = [
    "a@b.co",
    "ann.lee+tag@mail.example.org",
    "!#$%&'*+/=?^_`{|}~-@example.org",
    "x@xn--bcher-kva.example",
    "x@a--b.example",
    "1@2.example",
    "a" * 64 + "@example.org",
    "a@" + "b" * 63 + ".org",
    "aaa@" + ".".join(["b" * 61] * 4) + ".cc",
    "Ann@Example.ORG",
]
NO_EMAILS = {
    "empty": "",
    "no at": "example.org",
    "no local part": "@example.org",
    "no domain": "aaaaaa@",
    "two ats": "a@b@example.org",
    "one label": "root@localhost",
    "dot first": ".a@example.org",
    "dot last": "a.@example.org",
    "two dots": "a..b@example.org",
    "domain's dot first": "a@.example.org",
    "domain's dot last": "a@example.org.",
    "domain's two dots": "a@example..org",
    "hyphen first": "a@-b.org",
    "hyphen last": "a@b-.org",
    "underscore": "a@b_c.org",
    "quoted": '"a b"@example.org',
    "quoted plainly": '"ab"@example.org',
    "comment": "a(b)@example.org",
    "display name": "Ann <a@example.org>",
    "address literal": "a@[192.0.2.1]",
    "IPv6 literal": "a@[IPv6:2001:db8::1]",
    "bare IPv4": "a@192.0.2.1",
    "top-level of digits": "a@example.123",
    "top-level of one": "a@example.x",
    "port": "a@example.org:25",
    "space": "a b@example.org",
    "space before": " a@example.org",
    "line feed behind": "a@example.org\n",
    "a header inside": "a@example.org\r\nBcc: b@example.org",
    "NUL": "a\0@example.org",
    "local part beyond ASCII": "ä@example.org",
    "domain beyond ASCII": "a@bücher.example",
    "Cyrillic a": "\u0430nn@example.org",
    "full-width at": "a\uff20example.org",
    "ideographic dot": "a@example\u3002org",
    "local part of 65": "a" * 65 + "@example.org",
    "label of 64": "a@" + "b" * 64 + ".org",
    "255 in all": "aaa@" + ".".join(["b" * 61] * 4) + ".ccc",
    "backslash": "a\\@example.org",
    "comma": "a,b@example.org",
    "two addresses": "a@example.org,b@example.org",
    "percent hack": "a%b@c@example.org",
    "surrogate": "a\ud800@example.org",
}


@pytest.mark.parametrize("text", EMAILS)
def test_emails(text: str) -> None:
    assert len(text) <= 254
    assert checked_email(text) == text
    assert fits(Email, text)


@pytest.mark.parametrize("text", NO_EMAILS.values(), ids=NO_EMAILS.keys())
def test_no_emails(text: str) -> None:
    field, reason = refused(checked_email, text)
    assert field == "email"
    assert not text or text not in reason
    assert refused(checked_email, text, "contact")[0] == "contact"
    if "\ud800" not in text:
        assert not fits(Email, text)


@NOT_ABOUT_SPEED
@given(st.text(alphabet="aZ9.-_@+\n\u00e4 ", max_size=20) | st.emails())
def test_the_pattern_and_the_function_say_the_same(text: str) -> None:
    assert fits(Email, text) is not is_refused(checked_email, text)


def test_what_emails_are_compared_by() -> None:
    assert email_key("Ann@Example.ORG") == email_key("ann@example.org") == "ann@example.org"


# ---- passwords


@pytest.mark.parametrize(
    "password",
    [
        "correct horse battery staple",
        "xk7#Qp2!",
        "p" * 127 + "q",
        "пароль мой",
        "\U0001f511 is the key",
        " spaces count ",
        "no digits at all",
        "ann@example.org!",
    ],
)
def test_passwords_that_may_be_chosen(password: str) -> None:
    assert checked_password(password, "ann@example.org") == password
    assert fits(Password, password)


NO_PASSWORDS = {
    "empty": "",
    "seven": "xk7#Qp2",
    "129": "xk7#Qp2!" * 16 + "x",
    "line feed": "xk7#Qp2!\n",
    "NUL behind": "xk7#Qp2!\0",
    "escape": "xk7#\x1bQp2!",
    "C1": "xk7#\x9bQp2!",
    "surrogate": "xk7#\ud800Qp2!",
    "the address": "ann.marie@example.org",
    "the address in capitals": "ANN.MARIE@EXAMPLE.ORG",
    "its local part": "ann.marie",
    "its local part in another case": "Ann.Marie",
    "one character": "zzzzzzzz",
    "one character in two cases": "zZzZzZzZ",
    "one composed character": "e\u0301" * 8,
    "common": "password",
    "common in capitals": "PassW0rd",
    "common digits": "123456789",
    "common walk": "1qaz2wsx",
}


@pytest.mark.parametrize("password", NO_PASSWORDS.values(), ids=NO_PASSWORDS.keys())
def test_passwords_that_may_not_be_chosen(password: str) -> None:
    field, reason = refused(checked_password, password, "ann.marie@example.org")
    assert field == "password"
    assert password in ("", "password") or password not in reason
    assert (
        refused(checked_password, password, "ann.marie@example.org", field="new_password")[0]
        == "new_password"
    )


def test_without_an_address_nothing_is_compared_with_it() -> None:
    assert checked_password("ann.marie") == "ann.marie"
    assert checked_password("ann.marie", "annmarie@example.org") == "ann.marie"


def test_the_list_of_common_passwords_is_reached() -> None:
    common = validation._COMMON_PASSWORDS
    assert len(common) >= 60
    for password in common:
        assert 8 <= len(password) <= 128
        assert password == password.casefold()
        assert "common" in refused(checked_password, password)[1]


# ---- ids

UUID = str(uuid.UUID(int=0xABCDEF << 90))


@pytest.mark.parametrize(
    "text,user,session",
    [
        (UUID, True, True),
        (UUID.upper(), True, True),
        ("a", True, False),
        ("1234567", True, False),
        ("12345678", True, True),
        ("_-AZaz09", True, True),
        ("a" * 64, True, True),
        ("a" * 65, False, False),
        ("", False, False),
        ("12345678\n", False, False),
        ("1234567\n", False, False),
        ("1234.5678", False, False),
        ("../../../etc", False, False),
        ("12345678%00", False, False),
        ("1234 5678", False, False),
        ("{" + UUID + "}", False, False),
        ("urn:uuid:" + UUID, False, False),
        ("\u0661" * 8, False, False),
        ("äöüäöüäö", False, False),
        ("$ne_12345", False, False),
    ],
)
def test_ids(text: str, user: bool, session: bool) -> None:
    assert is_user_id(text) is user is fits(UserId, text)
    assert is_session_id(text) is session is fits(SessionId, text)


def test_a_wallets_address() -> None:
    good = "TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu"
    assert checked_address(good) == good
    assert fits(TronAddress, good[:-1] + "v")  # what only the checksum tells
    assert refused(checked_address, good[:-1] + "v") == (
        "tron_address",
        "must be an address whose checksum is right",
    )
    assert refused(checked_address, good.lower(), "wallet")[0] == "wallet"


# ---- texts

NO_TEXTS = {
    "empty": "",
    "too long": "a" * 129,
    "NUL": "a\0",
    "tab": "a\tb",
    "line feed behind": "a\n",
    "line feed alone": "\n",
    "carriage return": "a\rb",
    "escape": "\x1b[31m",
    "DEL": "\x7f",
    "C1": "a\x85b",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    **{f"U+{code:04X}": f"a{chr(code)}b" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))},
    **{f"U+{code:04X}": f"a{chr(code)}b" for code in range(0x2066, 0x206A)},
    **{f"U+{code:04X}": f"a{chr(code)}b" for code in (0xFDD0, 0xFDEF, 0xFFFE, 0xFFFF)},
}
ONLY_THE_FUNCTION_SEES = {
    "decomposed": "cafe\u0301",
    "a character that NFC replaces": "\u212b",
    "U+1FFFE": "a\U0001fffe",
    "U+10FFFF": "\U0010ffff",
}


@pytest.mark.parametrize(
    "text", ["a", " ", "a" * 128, "café", "Ann's laptop", "日本語", "👩‍👩‍👧", "עברית", "a\u00a0b", "\ufffd"]
)
def test_texts(text: str) -> None:
    assert checked_text(text, "name", 128) == text
    assert fits(ShortText, text)


@pytest.mark.parametrize("text", NO_TEXTS.values(), ids=NO_TEXTS.keys())
def test_no_texts(text: str) -> None:
    assert refused(checked_text, text, "name", 128)[0] == "name"
    assert not fits(ShortText, text)


@pytest.mark.parametrize("text", ONLY_THE_FUNCTION_SEES.values(), ids=ONLY_THE_FUNCTION_SEES.keys())
def test_no_texts_although_the_pattern_takes_them(text: str) -> None:
    assert refused(checked_text, text, "name", 128)[0] == "name"
    assert fits(ShortText, text)


def test_lone_surrogates_and_lengths() -> None:
    assert refused(checked_text, "a\ud800", "name", 128)[0] == "name"
    assert refused(checked_text, "\udfff", "name", 128)[0] == "name"
    assert checked_text("ab", "name", 2) == "ab"
    assert "1 to 2 " in refused(checked_text, "abc", "name", 2)[1]


@NOT_ABOUT_SPEED
@given(st.text(max_size=140))
def test_what_the_pattern_refuses_the_function_refuses_too(text: str) -> None:
    if not is_refused(checked_text, text, "name", 128):
        assert fits(ShortText, text)
        assert unicodedata.normalize("NFC", text) == text
        assert not {unicodedata.category(character) for character in text} & {"Cc", "Cs", "Zl", "Zp"}
        assert not {unicodedata.bidirectional(character) for character in text} & set(
            "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
        )


# ---- URLs

URLS = [
    "http://example.org",
    "HTTPS://Example.org/",
    "https://example.org:8443/a/b;c=d/%C3%A4?q=1&r=a:b/?@",
    "https://example.org?q",
    "https://xn--bcher-kva.example/",
    "https://example.org./",
    "http://8.8.8.8/",
    "http://8.8.8.8:65535",
    "http://[2606:4700::1111]:80/",
    "http://1.example.org/",
    "http://0x7f.example.org/",
    "http://localhost.example.org/",
    "http://internal.example.org/",
    "https://example.org/@user",
    "https://example.org/" + "a" * 2_028,
]
NO_URLS = {
    "empty": "",
    "no scheme": "example.org",
    "relative": "//example.org/",
    "path": "/a",
    "no slashes": "http:example.org",
    "one slash": "http:/example.org",
    "another scheme": "ftp://example.org/",
    "javascript": "javascript://example.org/%0aalert(1)",
    "file": "file:///etc/passwd",
    "data": "data:text/html,x",
    "no host": "http:///a",
    "port alone": "http://:80/",
    "user": "http://ann@example.org/",
    "user and password": "http://ann:x@example.org/",
    "empty user": "http://@example.org/",
    "host as a user": "http://example.org@127.0.0.1/",
    "fragment": "http://example.org/#a",
    "empty fragment": "http://example.org/#",
    "fragment hides the host": "http://127.0.0.1#@example.org/",
    "space": "http://example.org/a b",
    "space before": " http://example.org/",
    "tab inside": "ht\ttp://example.org/",
    "line feed behind": "http://example.org/\n",
    "line feed in the host": "http://exam\nple.org/",
    "a header": "http://example.org/\r\nX: y",
    "NUL": "http://example.org/\0",
    "backslash": "http://example.org\\@127.0.0.1/",
    "backslashes": "http:\\\\example.org\\",
    "beyond ASCII": "http://bücher.example/",
    "ideographic dots": "http://127\u30020\u30020\u30021/",
    "circled digits": "http://①②⑦.0.0.1/",
    "soft hyphen": "http://exam\u00adple.org/",
    "percent in the host": "http://%31%32%37.0.0.1/",
    "half an escape": "http://example.org/%4",
    "no escape": "http://example.org/%zz",
    "angle bracket": "http://example.org/<b>",
    "quote": 'http://example.org/"',
    "square bracket in the query": "http://example.org/?a[]=1",
    "port 0": "http://example.org:0/",
    "port 65536": "http://example.org:65536/",
    "port empty": "http://example.org:/",
    "port with a sign": "http://example.org:+80/",
    "port in other digits": "http://example.org:\u0668\u0660/",
    "port with a zero before": "http://example.org:080/",
    "port of a thousand digits": "http://example.org:" + "1" * 1_000,
    "two ports": "http://example.org:80:80/",
    "dot first": "http://.example.org/",
    "two dots": "http://example..org/",
    "two dots behind": "http://example.org../",
    "dots alone": "http://.../",
    "hyphen first": "http://-a.example/",
    "underscore": "http://a_b.example/",
    "label of 64": "http://" + "a" * 64 + ".org/",
    "name of 254": "http://" + ".".join(["a" * 49] * 5) + ".org.x/",
    "bracket open": "http://[2606:4700::1111/",
    "brackets empty": "http://[]/",
    "IPv4 in brackets": "http://[8.8.8.8]/",
    "zone": "http://[fe80::1%25eth0]/",
    "no IPv6": "http://[2606:4700::1111::1]/",
    "text behind the brackets": "http://[2606:4700::1111]x/",
    "IPv6 without brackets": "http://2606:4700::1111/",
    "256": "http://8.8.8.256/",
    "five numbers": "http://8.8.8.8.8/",
    "2,049 characters": "https://example.org/" + "a" * 2_029,
}
PRIVATE_URLS = [
    *(
        f"http://{host}/"
        for host in """
        localhost LOCALHOST localhost. a.localhost printer.local metadata.google.internal router.home.arpa
        a.localdomain redis mongodb
        0.0.0.0 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 127.0.0.1.
        169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1
        198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
        [::] [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:8.8.8.8] [::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b:1::1]
        [100::1] [fc00::1] [fd12::1] [fe80::1] [fec0::1] [ff02::1] [2001::1] [2001:db8::1] [2002:7f00:1::] [3fff::1]
        [4000::1]
        """.split()
    ),
    "http://127.0.0.1:8080/admin",
    "http://[::1]:8080/admin",
]
MISSPELT_IPV4 = [
    f"http://{host}/"
    for host in """
    2130706433 0x7f.1 017700000001 0x7f000001 0X7F000001 127.1 127.0.1 0177.0.0.1 127.0.0.01 0x7f.0x0.0x0.0x1 0 0x
    127.0x 134744072 0x08080808 010.8.8.8 8.8.8 4294967296 99999999999999999999 127.0.0.1.0 a.1 example.org.80 1e3.1
    """.split()
]


@pytest.mark.parametrize("url", URLS)
def test_urls(url: str) -> None:
    assert checked_url(url, "url") == url
    assert checked_url(url, "url", allow_private=True) == url


@pytest.mark.parametrize("url", [*NO_URLS.values(), *MISSPELT_IPV4], ids=[*NO_URLS.keys(), *MISSPELT_IPV4])
def test_no_urls(url: str) -> None:
    for private in (False, True):
        field, reason = refused(checked_url, url, "webhook", allow_private=private)
        assert field == "webhook"
        assert not url or url not in reason


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_private_urls(url: str) -> None:
    assert "private" in refused(checked_url, url, "url")[1]
    assert checked_url(url, "url", allow_private=True) == url


def test_schemes() -> None:
    assert checked_url("wss://example.org/", "url", ("ws", "wss")) == "wss://example.org/"
    assert "ws:// or wss://" in refused(checked_url, "https://example.org/", "url", ("ws", "wss"))[1]


@NOT_ABOUT_SPEED
@given(st.ip_addresses())
def test_no_special_address_is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """Python's own tables, as a second opinion: ours refuse at least what all of its releases call special."""
    host = str(address) if address.version == 4 else f"[{address}]"
    if not is_refused(checked_url, f"http://{host}/", "url"):
        assert not (address.is_private or address.is_loopback or address.is_link_local)
        assert not (address.is_multicast or address.is_reserved or address.is_unspecified)
    assert checked_url(f"http://{host}/", "url", allow_private=True)


# ---- addresses


@pytest.mark.parametrize("text", ["0.0.0.0", "127.0.0.1", "255.255.255.255", "198.51.100.7"])
def test_ipv4(text: str) -> None:
    assert checked_ipv4(text, "address") == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "1",
            "1.2.3",
            "1.2.3.4.5",
            "256.1.1.1",
            "01.2.3.4",
            "1.2.3.04",
            "00.0.0.0",
            "1.2.3.4 ",
            " 1.2.3.4",
        ),
        *(
            "1.2.3.4\n",
            "0x1.2.3.4",
            "+1.2.3.4",
            "-1.2.3.4",
            "1.2.3.",
            "1..3.4",
            "1.2.3.4/32",
            "1.2.3.4:80",
            "::1",
        ),
        *(
            "\u0661.2.3.4",
            "²55.1.1.1",
            "1.2.3.4\0",
            "1,2,3,4",
            "1.2.3.a",
            "1_0.2.3.4",
            "1.2.3." + "4" * 5_000,
        ),
    ],
)
def test_no_ipv4(text: str) -> None:
    assert refused(checked_ipv4, text, "address")[0] == "address"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "::",
            "::1",
            "2001:db8::1",
            "2001:DB8::A",
            "1:2:3:4:5:6:7:8",
            "0:0:0:0:0:0:0:1",
            "::ffff:192.0.2.1",
        ),
        "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255",
    ],
)
def test_ipv6(text: str) -> None:
    assert checked_ipv6(text, "address") == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            ":::",
            "1::2::3",
            "1:2:3:4:5:6:7",
            "1:2:3:4:5:6:7:8:9",
            "g::1",
            "12345::",
            "::1/128",
            "[::1]",
        ),
        *(
            "fe80::1%eth0",
            "fe80::1%",
            "::1%0",
            "2001:0db8::1",
            "::01",
            "00::1",
            "::ffff:192.0.2.01",
            "::ffff:1.2.3",
        ),
        *(" ::1", "::1 ", "::1\n", "::\u0661", "1.2.3.4", "::1\0", "1::" + "0" * 5_000, ":" * 5_000),
    ],
)
def test_no_ipv6(text: str) -> None:
    assert refused(checked_ipv6, text, "address")[0] == "address"


@NOT_ABOUT_SPEED
@given(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str), st.text(max_size=20))
def test_addresses_as_python_spells_them(v4: str, v6: str, text: str) -> None:
    assert checked_ipv4(v4, "a") == v4
    assert checked_ipv6(v6, "a") == v6
    assert is_refused(checked_ipv6, v4, "a")
    assert is_refused(checked_ipv4, v6, "a")
    assert is_refused(checked_ipv4, text, "a") or ipaddress.IPv4Address(text)
    assert is_refused(checked_ipv6, text, "a") or ipaddress.IPv6Address(text)


# ---- numbers, names, moments


@pytest.mark.parametrize(
    "kind,good,bad",
    [
        (Port, [1, 80, 65_535], [0, -1, 65_536, 2**64, 1.5, "80", True, None]),
        (PageNumber, [1, 1_000_000], [0, -1, 1_000_001, 1.5, "1", True, None]),
        (PageLimit, [1, 20, 100], [0, -1, 101, 1.5, "1", True, None]),
        (FileBytes, [1, 104_857_600], [0, -1, 104_857_601, 1.5, "1", True, None]),
        (ChunkBytes, [1, 10_485_760], [0, -1, 10_485_761, 1.5, "1", True, None]),
        (RoleName, ["user", "super_admin"], ["", "root", "public", "Admin", "admin ", "admin\n", 1, None]),
        (SessionStatus, ["INITIALIZING", "FAILED"], ["", "active", "PAUSED", "ACTIVE\0", 1, None]),
    ],
)
def test_numbers_and_names(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(kind, value) for value in good)
    assert not any(fits(kind, value) for value in bad)


def test_names_of_roles_are_those_of_the_roles() -> None:
    assert set(typing.get_args(RoleName)) == set(ROLES)
    assert len(typing.get_args(SessionStatus)) == 5


@pytest.mark.parametrize(
    "text", ["0", "-1", "01", "+1", " 1", "1 ", "1_0", "1.5", "0x1", "１", "", "1\0", "9" * 5_000]
)
def test_page_numbers_as_a_query_spells_them(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, PageNumber, strict=False)
    assert msgspec.convert("10", PageNumber, strict=False) == 10


def test_sizes() -> None:
    assert (MAX_FILE_BYTES, MAX_CHUNK_BYTES) == (104_857_600, 10_485_760)
    for check, most in ((checked_file_size, MAX_FILE_BYTES), (checked_chunk_size, MAX_CHUNK_BYTES)):
        assert check(1) == 1
        assert check(most) == most
        for bad in (0, -1, most + 1, 2**70, True, False):
            assert refused(check, bad) == ("size", f"must be from 1 to {most} bytes")
        assert refused(check, 0, "chunk_bytes")[0] == "chunk_bytes"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "2030-01-01T00:00:00",
            "2030-01-01",
            "2030-02-29T00:00:00Z",
            "2030-01-01T24:00:00Z",
            "2030-01-01T00:00:60Z",
        ),
        *(
            "2030-01-01T00:00Z",
            "2030-13-01T00:00:00Z",
            "1893456000",
            "",
            "tomorrow",
            "2030-01-01T00:00:00Z\n",
        ),
        *(
            "02030-01-01T00:00:00Z",
            "2030-01-01T00:00:00+24:00",
            "2030-W01-1T00:00:00Z",
            "0000-01-01T00:00:00Z",
        ),
    ],
)
def test_no_moments(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, Timestamp)


def test_moments_ahead() -> None:
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    second = dt.timedelta(seconds=1)
    assert checked_future(now + second, now) == now + second
    elsewhere = msgspec.convert("2030-01-01T01:00:01+01:00", Timestamp)
    assert checked_future(elsewhere, now) == now + second
    assert checked_future(elsewhere, now).tzinfo is dt.UTC
    for bad in (now, now - second, msgspec.convert("2030-01-01T00:30:00+01:00", Timestamp)):
        assert refused(checked_future, bad, now) == ("expires_at", "must lie in the future")
    for text in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"):
        assert "years" in refused(checked_future, msgspec.convert(text, Timestamp), now, "until")[1]


# ---- metadata


def nested(levels: int, inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = {"a": inner}
    return inner


GOOD_METADATA: dict[str, dict[str, Any]] = {
    "empty": {},
    "all kinds": {"a": None, "b": True, "c": -1, "d": 0.5, "e": "ä\n\t", "f": [1, [2]], "g": {}},
    "8 levels": nested(8),
    "8 levels of lists": {"a": [[[[[[[1]]]]]]]},
    "256 keys": {f"k{number}": number for number in range(256)},
    "key of 128": {"k" * 128: 1},
    "keys of all kinds": {"a b": 1, "a$": 1, "ключ": 1, "0": 1, "-": 1, "__proto__": 1},
    "ends of int64": {"a": 2**63 - 1, "b": -(2**63)},
    "ends of floats": {"a": 1.7976931348623157e308, "b": 5e-324, "c": -0.0},
    "16 KB": {"a": "x" * (MAX_METADATA_BYTES - 8)},
}
BAD_METADATA: dict[str, tuple[Any, str]] = {
    "a list": ([], "metadata"),
    "a text": ("{}", "metadata"),
    "null": (None, "metadata"),
    "9 levels": (nested(9), "metadata" + ".a" * 8),
    "9 levels of lists": ({"a": [[[[[[[[1]]]]]]]]}, "metadata.a" + "[0]" * 7),
    "9 levels, the last one empty": (nested(8, {}), "metadata" + ".a" * 8),
    "10,000 levels": (nested(10_000), "metadata" + ".a" * 8),
    "257 keys": ({f"k{number}": number for number in range(257)}, "metadata"),
    "257 keys in all": ({"a": {f"k{number}": number for number in range(256)}}, "metadata.a"),
    "257 keys in a list": ({"a": [{"k": 1}] * 256}, "metadata.a[255]"),
    "operator": ({"$where": "1"}, "metadata"),
    "operator deeper": ({"a": {"b": [0, {"$gt": ""}]}}, "metadata.a.b[1]"),
    "dollar alone": ({"$": 1}, "metadata"),
    "dot": ({"a.b": 1}, "metadata"),
    "dot alone": ({".": 1}, "metadata"),
    "NUL in a key": ({"a\0": 1}, "metadata"),
    "line feed in a key": ({"a\n": 1}, "metadata"),
    "direction in a key": ({"a\u202eb": 1}, "metadata"),
    "surrogate in a key": ({"a\ud800": 1}, "metadata"),
    "empty key": ({"": 1}, "metadata"),
    "key of 129": ({"k" * 129: 1}, "metadata"),
    "key that is no text": ({1: 1}, "metadata"),
    "NUL in a text": ({"a": {"b": "x\0"}}, "metadata.a.b"),
    "surrogate in a text": ({"a": ["\udc00"]}, "metadata.a[0]"),
    "2**63": ({"a": 2**63}, "metadata.a"),
    "below int64": ({"a": {"b": -(2**63) - 1}}, "metadata.a.b"),
    "infinite": ({"a": float("inf")}, "metadata.a"),
    "no number": ({"a": [0.0, float("nan")]}, "metadata.a[1]"),
    "a byte too much": ({"a": "x" * (MAX_METADATA_BYTES - 7)}, "metadata"),
    "large as UTF-8": ({"a": "ä" * 8_190}, "metadata"),
    "large as escapes": ({"a": "\x01" * 2_800}, "metadata"),
    "a megabyte of text": ({"a": "x" * 1_048_576}, "metadata.a"),
    "a million numbers": ({"a": [0] * 1_000_000}, "metadata"),
    "a million lists": ({"a": [[]] * 1_000_000}, "metadata"),
    "bytes": ({"a": b"x"}, "metadata.a"),
    "a moment": ({"a": dt.datetime.now(dt.UTC)}, "metadata.a"),
    "a tuple": ({"a": ()}, "metadata.a"),
    "a set": ({"a": {1}}, "metadata.a"),
}


@pytest.mark.parametrize("value", GOOD_METADATA.values(), ids=GOOD_METADATA.keys())
def test_metadata(value: dict[str, Any]) -> None:
    assert checked_metadata(value) is value
    assert fits(Metadata, value)


@pytest.mark.parametrize("value,field", BAD_METADATA.values(), ids=BAD_METADATA.keys())
def test_no_metadata(value: Any, field: str) -> None:
    assert refused(checked_metadata, value)[0] == field
    assert refused(checked_metadata, value, "body.meta")[0] == field.replace("metadata", "body.meta", 1)


def test_a_ring_ends() -> None:
    ring: list[Any] = []
    ring += [ring] * 100
    assert refused(checked_metadata, {"a": ring})[0].startswith("metadata")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@NOT_ABOUT_SPEED
@given(st.dictionaries(st.text(), JSON_VALUES))
def test_what_is_taken_survives_json(value: dict[str, Any]) -> None:
    if not is_refused(checked_metadata, value):
        assert msgspec.json.decode(msgspec.json.encode(value), type=Metadata) == value
        assert json.loads(json.dumps(value, allow_nan=False)) == value


# ---- length first, and patterns for everybody

MEGABYTE = 1_048_576
LONG_TEXTS = [
    "a" * MEGABYTE,
    "a." * (MEGABYTE // 2),
    "a@" + "a." * (MEGABYTE // 2),
    "a@" + "a-" * (MEGABYTE // 2),
    "http://" + "a." * (MEGABYTE // 2),
    "http://[" + ":" * MEGABYTE,
    "http://a/" + "%41" * (MEGABYTE // 3) + "%",
    "1" * MEGABYTE,
    "e\u0301" * (MEGABYTE // 2),
    "\ufdfa" * MEGABYTE,
]
CHECKS: list[Callable[[str], object]] = [
    checked_email,
    checked_password,
    lambda text: checked_password("xk7#Qp2!", text[:300]),
    is_user_id,
    is_session_id,
    lambda text: checked_text(text, "name", 128),
    lambda text: checked_url(text, "url"),
    lambda text: checked_ipv4(text, "a"),
    lambda text: checked_ipv6(text, "a"),
    lambda text: checked_metadata({"a": text}),
    *(
        lambda text, kind=kind: msgspec.convert(text, kind)
        for kind in (Email, Password, UserId, SessionId, ShortText, TronAddress, SignatureHex, Timestamp)
    ),
]


def test_a_megabyte_is_refused_unread() -> None:
    before = time.process_time()
    for check in CHECKS:
        for text in LONG_TEXTS:
            try:
                check(text)
            except (GatewayError, msgspec.ValidationError):
                pass
    assert time.process_time() - before < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "a@" + "a-" * 126,
        "a" * 253 + "@",
        "a@" + "a." * 126,
        "." * 254,
        "a." * 31 + "a@" + "-" * 190,
        "a@" + "a" * 63 + ("." + "a" * 61) * 3 + "-",
    ],
)
def test_no_text_within_the_bounds_makes_a_pattern_slow(text: str) -> None:
    before = time.process_time()
    for _ in range(100):
        assert not fits(Email, text)
        assert is_refused(checked_email, text)
    assert time.process_time() - before < 1.0


def patterns() -> dict[str, str]:
    found = {}
    for name, kind in vars(validation).items():
        for meta in getattr(kind, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.pattern is not None:
                found[name] = meta.pattern
    return found


def test_every_pattern_is_anchored_and_bounded() -> None:
    assert {"TronAddress", "SignatureHex", "Email", "UserId", "SessionId", "ShortText"} <= set(patterns())
    for name, pattern in patterns().items():
        assert pattern.startswith("^"), name
        assert "$" in pattern, name
        assert not re.search(r"\\[AZzpPbB]|\(\?P|\(\?<|\(\?#|\(\?[a-z]", pattern), name
        (meta,) = (meta for meta in getattr(validation, name).__metadata__ if meta.pattern)
        assert meta.max_length is not None, name


CASES: dict[str, list[str]] = {
    "Email": [*EMAILS, *(text for text in NO_EMAILS.values() if len(text) <= 254)],
    "ShortText": ["a", "café", "日本語", "👩‍👩‍👧", *NO_TEXTS.values()],
    "UserId": ["a", "a\n", "", "é", "_-"],
    "SessionId": ["12345678", "12345678\n", "1234.678"],
    "TronAddress": ["TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu", "TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsY0"],
    "SignatureHex": ["0" * 130, "0x" + "f" * 130, "0" * 131, "0" * 130 + "\n"],
}


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("flags", ["u", ""])
def test_another_languages_expressions_agree(flags: str) -> None:
    """What the OpenAPI document promises is what a client's generated check does: ECMA-262, by node."""
    cases = {
        name: [pattern, [text for text in CASES[name] if "\ud800" not in text]]
        for name, pattern in patterns().items()
        if name in CASES
    }
    assert set(cases) == set(CASES)
    script = (
        "const [flags, cases] = JSON.parse(require('fs').readFileSync(0, 'utf8')); const told = {};"
        "for (const [name, [pattern, texts]] of Object.entries(cases)) {"
        " const expression = new RegExp(pattern, flags); told[name] = texts.map(text => expression.test(text)); }"
        "console.log(JSON.stringify(told));"
    )
    done = subprocess.run(
        ["node", "-e", script],
        input=json.dumps([flags, cases]),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    ours = {
        name: [re.search(pattern, text) is not None for text in texts]
        for name, (pattern, texts) in cases.items()
    }
    assert json.loads(done.stdout) == ours


def test_the_document_shows_the_bounds() -> None:
    schemas, _ = msgspec.json.schema_components([Email, Password, SessionId, PageLimit, Timestamp, Metadata])
    email, password, session, limit, moment, metadata = schemas
    assert email["format"] == "email"
    assert email["maxLength"] == 254
    assert (password["format"], password["minLength"], password["maxLength"]) == ("password", 8, 128)
    assert (session["minLength"], session["maxLength"]) == (8, 64)
    assert (limit["minimum"], limit["maximum"]) == (1, 100)
    assert moment["format"] == "date-time"
    assert metadata["maxProperties"] == 256
