"""The canonical form of a request target."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lucid.core.rules import targets
from lucid.core.rules.targets import Target, canonical

UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
PCHAR = UNRESERVED + b"!$&'()*+,;=:@"


DOTS = """
/. /.. /./ /../ /a/. /a/.. /a/../b /a/./b?c /%2e /%2E%2e /.%2E/a /a/%2e./b /...;/../a
/a/..;/b /a/..;x=y/b /.; /..%3b/b /%2e%2e%3Bx/b
"""
PIECES = r"/ . .. ; % %2 %2e %2F %5c %00 %41 %25 %c3%a9 %C0 %ff %3B \ ? # é a ~ * [ |"


def read_strictly(target: str) -> Target | None:
    """Row 15, character by character, written without a look at the module: None is a refusal."""
    path, mark, query = target.partition("?")
    if not path.startswith("/") or any(not "!" <= c <= "~" or c == "#" for c in query):
        return None
    spelled, decoded = "", b""
    at = 0
    while at < len(path):
        character = path[at]
        if character == "%":
            digits = path[at + 1 : at + 3]
            if len(digits) != 2 or not set(digits) <= set("0123456789abcdefABCDEF"):
                return None
            octet = int(digits, 16)
            if octet in b"/\\\0":
                return None
            spelled += chr(octet) if octet in UNRESERVED else f"%{octet:02X}"
            decoded += bytes([octet])
            at += 3
        elif ord(character) < 128 and (ord(character) in PCHAR or character == "/"):
            spelled += character
            decoded += character.encode()
            at += 1
        else:
            return None
    segments = decoded.split(b"/")[1:]
    if b"" in segments[:-1] or any(segment.split(b";")[0] in (b".", b"..") for segment in segments):
        return None
    try:
        decoded.decode()
    except UnicodeDecodeError:
        return None
    return Target(spelled, mark + query)


@pytest.mark.parametrize(
    "target, path, query",
    [
        ("/", "/", ""),
        ("/api/v1/users/me", "/api/v1/users/me", ""),
        ("/api/v1/users/", "/api/v1/users/", ""),
        ("/a?b=c&d=/../%2f//", "/a", "?b=c&d=/../%2f//"),
        ("/a?", "/a", "?"),
        ('/a?x=[{|}]^`\\"<>%&?%zz', "/a", '?x=[{|}]^`\\"<>%&?%zz'),
        ("/%41%7e%2D%5f%30", "/A~-_0", ""),
        ("/caf%c3%a9%20%3f?q=%41", "/caf%C3%A9%20%3F", "?q=%41"),
        ("/%252e%252e/x", "/%252e%252e/x", ""),
        ("/%25%34%31", "/%2541", ""),
        ("/.well-known/a..b/...", "/.well-known/a..b/...", ""),
        ("/%2ewell-known/x", "/.well-known/x", ""),
        ("/a;v=1/b:c@d!$&'()*+,=", "/a;v=1/b:c@d!$&'()*+,=", ""),
        ("/%0a%7f", "/%0A%7F", ""),
    ],
)
def test_what_a_target_becomes(target: str, path: str, query: str) -> None:
    assert canonical(target) == Target(path, query)


@pytest.mark.parametrize(
    "reason, spellings",
    [
        (targets.NOT_ORIGIN_FORM, ["", "*", "a/b", "http://host/", "?a", "%2fa", "host:443"]),
        (targets.FRAGMENT, ["/a#b", "/#", "/a?b#c"]),
        (targets.BAD_QUERY, ["/a?b c", "/a?\x00", "/a?\x7f", "/a?\n", "/a?é", "/a?\ud800"]),
        (targets.BACKSLASH, ["/a\\b", "/\\", "/..\\a", "/%41\\"]),
        (
            targets.BAD_CHARACTER,
            [
                "/a b",
                "/a\x00",
                "/a\t",
                "/a\n",
                "/a\x7f",
                "/é",
                "/１",
                "/a|b",
                "/{a}",
                '/"',
                "/<",
                "/[a]",
                "/^`",
            ],
        ),
        (targets.BAD_PERCENT, ["/%", "/%4", "/%4g", "/%u0041", "/%%41", "/a%?b", "/%+1", "/%4_"]),
        (targets.ENCODED_SEPARATOR, ["/a%2fb", "/a%2Fb", "/%5c", "/%5C", "/a%00", "/..%2fa", "/..%5ca"]),
        (targets.EMPTY_SEGMENT, ["//", "//a", "/a//", "/a//b", "//a/../b", "/%41//b", "//host/a"]),
        (
            targets.DOT_SEGMENT,
            DOTS.split(),
        ),
        (
            targets.BAD_UTF8,
            ["/%ff", "/%c3", "/%c3(", "/%c0%ae", "/%c0%af", "/%e0%80%af", "/%ed%a0%80", "/%80"],
        ),
    ],
)
def test_what_is_refused(reason: str, spellings: list[str]) -> None:
    assert {spelling: canonical(spelling) for spelling in spellings} == dict.fromkeys(spellings, reason)


_pieces = st.sampled_from([" ", "\n", "\x7f", *PIECES.split()])


@given(st.lists(_pieces, max_size=8).map(lambda pieces: "/" + "".join(pieces)) | st.text(max_size=8))
@example("/\ud800")
def test_it_reads_as_the_grammar_does(target: str) -> None:
    expected = read_strictly(target)
    found = canonical(target)
    assert found == expected if expected else isinstance(found, str)


@given(st.lists(_pieces, max_size=8).map(lambda pieces: "/" + "".join(pieces)))
def test_a_canonical_target_stays_as_it_is(target: str) -> None:
    found = canonical(target)
    if isinstance(found, Target):
        assert canonical(found.path + found.query) == found


@given(st.text(st.sampled_from(PCHAR.decode() + "/"), min_size=1), st.randoms(use_true_random=False))
def test_every_spelling_of_a_path_becomes_the_same(path: str, random: object) -> None:
    plain = canonical("/" + path)
    choose = random.random  # type: ignore[attr-defined]
    respelled = "/" + "".join(
        f"%{ord(c):02x}" if ord(c) in UNRESERVED and choose() < 0.5 else c for c in path
    )
    assert canonical(respelled) == plain


def test_a_long_target_costs_no_more_than_its_length() -> None:
    """Patterns that back up over and over would make 64 KB take minutes; this one would never end."""
    for unit in ("a/", "a", ".;", "/", "%41", "%"):
        assert isinstance(canonical("/" + unit * 32_768 + "#"), str)
