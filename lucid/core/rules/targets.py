"""A request target in its one canonical form: what is routed and judged is what is forwarded, byte for byte.

Two readers that disagree about a path are how `/public/..%2fadmin` gets past the first one. So whatever has
a second reading is refused instead of corrected (RFC 9112 section 3: autocorrection lets a crafted line past
the filters before it), and what has several spellings of one meaning gets one (RFC 3986 section 6.2.2).

1. Refused: anything but `/` at the start; `#`; a character that RFC 3986 does not allow in a path, `\\` among
   them; empty segments (`//`); dot segments however spelled; `%2F`, `%5C`, `%00`; a `%` without two hex
   digits; percent-encoding that does not decode to UTF-8 (overlong forms such as `%C0%AE` among it).
2. Rewritten: a percent-encoded unreserved character is decoded, all other hex digits become upper case.
   Decoding happens once: `%252E` stays, and is no dot.
3. The query is nobody's business here but the backend's: visible ASCII without `#`, otherwise untouched.
   Browsers send `[`, `{`, `|` and stray `%` there.
"""

import re
from urllib.parse import unquote_to_bytes

import msgspec

NOT_ORIGIN_FORM = "The target must begin with /"
FRAGMENT = "The target must not have a fragment"
BAD_QUERY = "The query has a character that is not allowed"
BACKSLASH = "The path must not have a backslash"
BAD_CHARACTER = "The path has a character that is not allowed"
BAD_PERCENT = "The path has a broken percent-encoding"
ENCODED_SEPARATOR = "The path must not have an encoded slash, backslash or NUL"
EMPTY_SEGMENT = "The path must not have an empty segment"
DOT_SEGMENT = "The path must not have a dot segment"
BAD_UTF8 = "The path is not UTF-8 once decoded"


class Target(msgspec.Struct, frozen=True, gc=False):
    """A canonical target. `path + query` is what is forwarded where no prefix is stripped."""

    path: str
    """Begins with `/`; no empty segment but a last one, which is a trailing slash."""
    query: str = ""
    """With its `?`, so that `/a?` and `/a` stay two things; empty: none."""


# RFC 3986 section 3.3: unreserved, sub-delims, `:` and `@` make a pchar.
_PCHAR = r"A-Za-z0-9\-._~!$&'()*+,;=:@"
_QUERY = r"\?[!\"$-~]*"
_plain = re.compile(rf"(/[{_PCHAR}/]*)({_QUERY})?").fullmatch
_ALLOWED_PATH = re.compile(rf"[{_PCHAR}/%]*")
_ALLOWED_QUERY = re.compile(rf"(?:{_QUERY})?")
# `..;x` is a dot segment to servers that cut path parameters off before they resolve dots (Tomcat does).
_DOTS = re.compile(r"/\.\.?(?:(?:;|%3B)[^/]*)?(?:/|$)")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRIPLET = re.compile(r"%([0-9A-Fa-f]{2})")
_SEPARATOR = re.compile(r"%(?:2F|5C|00)")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def canonical(target: str) -> Target | str:
    """The canonical form of an origin-form request target, or the reason why it has none (a 400).

    Pure, so that callers may remember its answers; the length of the target is theirs to bound. Applied to
    its own result it changes nothing.
    """
    match = _plain(target)
    if match is None:
        return _unusual(target)
    path, query = match.groups("")
    # The two substrings cost 40 ns, the search for dots 180, and almost no path needs it.
    if "//" in path or "/." in path:
        reason = _misread(path)
        if reason:
            return reason
    return Target(path, query)


def _misread(path: str) -> str:
    """The reason why readers disagree about the segments of this path; empty: they do not."""
    if "//" in path:
        return EMPTY_SEGMENT
    return DOT_SEGMENT if _DOTS.search(path) else ""


def _unusual(target: str) -> Target | str:
    """`canonical` for what has a `%` in its path or something wrong with it."""
    path, mark, rest = target.partition("?")
    query = mark + rest
    if not path.startswith("/"):
        return NOT_ORIGIN_FORM
    if "#" in target:
        return FRAGMENT
    if not _ALLOWED_QUERY.fullmatch(query):
        return BAD_QUERY
    if "\\" in path:
        return BACKSLASH
    if not _ALLOWED_PATH.fullmatch(path):
        return BAD_CHARACTER
    if _LONE_PERCENT.search(path):
        return BAD_PERCENT
    path = _TRIPLET.sub(_respell, path)
    if _SEPARATOR.search(path):
        return ENCODED_SEPARATOR
    reason = _misread(path)
    if reason:
        return reason
    try:
        unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return BAD_UTF8
    return Target(path, query)


def _respell(triplet: re.Match[str]) -> str:
    character = chr(int(triplet[1], 16))
    return character if character in _UNRESERVED else triplet[0].upper()
