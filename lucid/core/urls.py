"""Where something is on the network, as a caller writes it: URLs and IP addresses, judged by their letters alone.

Nothing is resolved here: a name that passes may still lead to a private address. Whoever calls a URL that a caller gave
must look at the address that it connects to as well.
"""

import ipaddress
import re
from typing import Final

from lucid.core.validation import HOST_LABEL, MAX_HOST_CHARACTERS, bad_field

MAX_URL_CHARACTERS: Final = 2_048
_URL_CHARACTERS: Final = re.compile(r"[\x21-\x7e]+")
_URL_PARTS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)(.*)")
_URL_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([^:]*))?")
# RFC 3986, 3.3 and 3.4: what a path and a query are made of; all else is percent-encoded.
_URL_REST: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
# The WHATWG URL standard's "ends in a number": clients take such a host for an IPv4 address.
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_PRIVATE_NAMES: Final = (
    ".localhost",
    ".local",
    ".internal",
    ".localdomain",
    ".home.arpa",
)
"""RFC 6761 6.3, RFC 6762, ICANN's reservation of `internal`, what resolvers add, RFC 8375."""

# IANA's registry of special-purpose IPv4 addresses (RFC 6890), multicast (RFC 5771) and what is reserved (RFC
# 1112). Written out: Python's `is_global` says different things in its releases.
_SPECIAL_IPV4: Final = tuple(
    ipaddress.IPv4Network(text)
    for text in """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    """.split()
)
# Only 2000::/3 is given out (RFC 4291, 2.4): loopback, link-local, unique local, multicast, and the prefixes that
# carry an IPv4 address (mapped, NAT64) lie outside. Inside, not to be reached: protocols (Teredo among them),
# documentation (RFC 3849, RFC 9637), and 6to4, which carries an IPv4 address again.
_GLOBAL_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6: Final = tuple(
    ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)


def checked_url(
    text: str, field: str, schemes: tuple[str, ...] = ("http", "https"), *, allow_private: bool = False
) -> str:
    """`text` if it is an absolute URL of one of `schemes`, without user info and fragment, spelled so that no two
    programs read different hosts in it.

    Unless `allow_private`, its host must not be an address that is not for the internet, a name of the local
    network or a name without a dot. That is all that can be seen in the text: nothing is resolved here, and a
    public name may point anywhere. Whoever fetches it must look at the address that it connects to as well.
    """
    if not 1 <= len(text) <= MAX_URL_CHARACTERS:
        raise bad_field(field, f"must have 1 to {MAX_URL_CHARACTERS} characters")
    if _URL_CHARACTERS.fullmatch(text) is None or "\\" in text:
        raise bad_field(field, "must be in visible ASCII without a backslash; percent-encode all else")
    if "#" in text:
        raise bad_field(field, "must not have a fragment")
    parts = _URL_PARTS.fullmatch(text)
    if parts is None or parts[1].lower() not in schemes:
        raise bad_field(field, f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if "@" in parts[2]:
        raise bad_field(field, "must not have a user or password")
    if _URL_REST.fullmatch(parts[3]) is None:
        raise bad_field(field, "must have its path and query percent-encoded")
    place = _URL_HOST.fullmatch(parts[2])
    if place is None:
        raise bad_field(field, "must have a host: a name, an IPv4 address, or an IPv6 address in brackets")
    if place[2] is not None and (_PORT.fullmatch(place[2]) is None or int(place[2]) > 65_535):
        raise bad_field(field, "must have a port from 1 to 65535")
    if not _is_public_host(place[1], field) and not allow_private:
        raise bad_field(field, "must not lead into a private or special network")
    return text


def _is_public_host(host: str, field: str) -> bool:
    """Whether the host of a URL may be on the internet. Raises BAD_FIELD where it is none."""
    if host.startswith("["):
        ipv6 = ipaddress.IPv6Address(checked_ipv6(host[1:-1], field))
        return ipv6 in _GLOBAL_IPV6 and not any(ipv6 in network for network in _SPECIAL_IPV6)
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]) is not None:
        # 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to some programs and something else to others.
        ipv4 = ipaddress.IPv4Address(checked_ipv4(name, field))
        return not any(ipv4 in network for network in _SPECIAL_IPV4)
    if len(name) > MAX_HOST_CHARACTERS or any(HOST_LABEL.fullmatch(label) is None for label in labels):
        raise bad_field(field, "must have a host name of letters, digits, hyphens and single dots")
    # A name without a dot is completed from the resolver's search list: another service of the cluster.
    return len(labels) > 1 and not name.endswith(_PRIVATE_NAMES)


def checked_ipv4(text: str, field: str) -> str:
    """`text` if it is an IPv4 address: four decimal numbers and three dots, no leading zeros (which make octal
    numbers of them for inet_aton).
    """
    try:
        if len(text) <= 15:
            ipaddress.IPv4Address(text)
            return text
    except ValueError:
        pass
    raise bad_field(field, "must be an IPv4 address in dotted decimals, such as 198.51.100.7")


_LEADING_ZERO: Final = re.compile(r"(?:^|[:.])0[0-9A-Fa-f]")


def checked_ipv6(text: str, field: str) -> str:
    """`text` if it is an IPv6 address (RFC 4291, 2.2), without a zone, which means something on one machine only,
    and without leading zeros (RFC 5952, 4.1).
    """
    try:
        if len(text) <= 45 and "%" not in text and _LEADING_ZERO.search(text) is None:
            ipaddress.IPv6Address(text)
            return text
    except ValueError:
        pass
    raise bad_field(field, "must be an IPv6 address such as 2001:db8::1, no zone, no leading zeros")
