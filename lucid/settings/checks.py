"""What a single value of the settings may be, shared by the environment and the optional file.

Each check takes what was written and returns what is meant, or raises ValueError whose text reads on after
the field's name: `must be ...`. A text never repeats a secret.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from lucid.core.rules.addresses import network as parse_network
from lucid.settings import EndpointSettings

T = TypeVar("T")
Check = Callable[[str], T]

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HOST = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,253}")
_SIZE = re.compile(r"([0-9]{1,12}) ?(B|KB|MB|GB)?")
_UNITS = {None: 1, "B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}
_HOST_PORT = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_AUTH = r"(?:[^@/?\s]*@)?"
_HOST_LIST = rf"{_HOST_PORT}(?:,{_HOST_PORT})*"
_REDIS = re.compile(
    rf"rediss?://{_AUTH}{_HOST_PORT}(?:/[0-9]*)?(?:\?\S*)?"
    rf"|unix://{_AUTH}/[^?\s]+(?:\?\S*)?"
    rf"|redis\+cluster://{_AUTH}{_HOST_LIST}/?(?:\?\S*)?"
    rf"|redis\+sentinel://{_AUTH}{_HOST_LIST}/[^/?\s]+(?:/[0-9]+)?(?:\?\S*)?"
)
_MONGODB = re.compile(
    rf"mongodb://{_AUTH}(?:{_HOST_LIST}|[^/?\s]+\.sock)(?:/\S*)?|mongodb\+srv://{_AUTH}[A-Za-z0-9.-]+(?:/\S*)?"
)
# Up to the last `@`: a password may hold what should have been escaped, and is to be masked all the more.
_SECRET_IN_URI = re.compile(
    r"(://[^:@/?\s]*):\S*@|([?&](?:password|authMechanismProperties)=)[^&\s]*", re.IGNORECASE
)


def shown(value: object) -> str:
    """A refused value, short enough for a line and on one."""
    text = repr(mask_uri(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:76] + "...'"


def mask_uri(uri: str) -> str:
    """The URI without the passwords in it."""
    return _SECRET_IN_URI.sub(lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", uri)


def name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("must begin with a letter and hold at most 32 of a-z, 0-9, _ and -")
    return text


def size(text: str) -> int:
    """`10MB` in bytes. 1 MB is 1,048,576 bytes."""
    found = _SIZE.fullmatch(text.upper())
    if not found:
        raise ValueError('must be a size such as "10MB" (B, KB, MB or GB)')
    return int(found[1]) * _UNITS[found[2]]


def network(text: str) -> str:
    try:
        return str(parse_network(text))
    except ValueError:
        raise ValueError(
            "must be a network such as 10.0.0.0/8 (no bits set right of the prefix), or an address"
        ) from None


def endpoint(text: str) -> EndpointSettings:
    """`http://10.0.0.5:9000`."""
    parts = _split(text, "must be http://host:port or https://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must be http://host:port or https://host:port, without a path")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return EndpointSettings(
        "https" if parts.scheme == "https" else "http", (parts.hostname or "").lower(), port
    )


def url(text: str) -> str:
    """An http or https address, with a path or without; without a slash at its end."""
    must = "must be an http:// or https:// address"
    if _split(text, must).fragment:
        raise ValueError(must)
    return text.rstrip("/")


def origin(text: str) -> str:
    """`https://gateway.example`, as browsers write it: in lower case, without the scheme's own port."""
    must = "must be an origin such as https://gateway.example (no path, no slash at the end)"
    parts = _split(text, must)
    if parts.path or parts.query or parts.fragment:
        raise ValueError(must)
    lower = text.lower()
    return lower.removesuffix(":443" if parts.scheme == "https" else ":80")


def redis_uri(text: str) -> str:
    if not _REDIS.fullmatch(text):
        raise ValueError(
            "must be redis://host:port/db, rediss://..., unix:///path, redis+cluster://a,b,c "
            "or redis+sentinel://a,b/master/0"
        )
    _check_places(text)
    several = text.startswith(("redis+cluster:", "redis+sentinel:"))
    options = dict(parse_qsl(urlsplit(text).query))
    unknown = sorted(set(options) - _REDIS_OPTIONS - ({"ssl"} if several else set()))
    if unknown:
        raise ValueError(f"must not have the option {unknown[0]}")
    if options.get("ssl", "true").lower() not in ("true", "false"):
        raise ValueError("must have the option ssl as true or false")
    if text.startswith("redis+cluster:") and options.get("db", "0") != "0":
        raise ValueError("must not name a database: a cluster has only one")
    return text


_REDIS_OPTIONS = frozenset(
    "db username password ssl_ca_certs ssl_certfile ssl_keyfile ssl_cert_reqs ssl_check_hostname".split()
)


def mongodb_uri(text: str) -> str:
    if not _MONGODB.fullmatch(text):
        raise ValueError("must be mongodb://host:port/database or mongodb+srv://...")
    _check_places(text)
    return text


def _check_places(uri: str) -> None:
    """What the drivers would stumble over later, without naming the variable."""
    _, _, rest = uri.partition("://")
    user, _, places = rest.partition("?")[0].rpartition("@")
    if re.search(r"%(?![0-9A-Fa-f]{2})", user):
        raise ValueError("must have the user and password percent-encoded")
    for place in places.partition("/")[0].split(","):
        port = place.rpartition(":")[2]
        if ":" in place and port.isdecimal() and not 1 <= int(port) <= 65_535:
            raise ValueError("must have ports from 1 to 65535")


def tron_address(text: str) -> str:
    from lucid.core.security.tron import is_address

    if not is_address(text):
        raise ValueError("must be T and 33 more characters of base58, with a right checksum")
    return text


def _split(text: str, must: str) -> SplitResult:
    """The parts of an http or https address that has a host and no user. Raises ValueError(must)."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(must) from None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or not text.isprintable() or " " in text:
        raise ValueError(must)
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError(must)
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(must) from None
    elif "[" in parts.netloc or not _HOST.fullmatch(host):
        raise ValueError(must)
    return parts
