"""Whose address a request came from, whom that address belongs to, and which forwarding fields to believe.

`X-Forwarded-For` is written by whoever wants to write it. Each proxy appends the peer that it saw, so the
right end is the newest, and only the part that our own proxies appended is evidence. Read from the right:

1. The peer of the connection is a fact.
2. A hop is trusted when it lies in a configured network, or is one of the first `hops`, the peer being the
   first of them.
3. Behind a trusted hop the entry that it appended is believed. The first untrusted hop is the client; what
   stands to the left of it was the client's own to invent, and is dropped.
4. An entry that is no address ends the walk at the last good one: a guess would be somebody else's quota.

Addresses have one spelling here: IPv4 for an IPv4-mapped IPv6 address (a dual-stack socket reports its
peers so), no zone, no port, and the compressed form of RFC 5952.
"""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_REMEMBERED = 4096
"""Entries per memo. `ipaddress` costs 3 to 11 us a call, a memo 0.1, and peers repeat."""
_LONGEST_REMEMBERED = 256
"""Characters of a field that is remembered; most are below 50. Full of these, the memo holds 2.7 MB."""
_LONGEST_CHAIN = 32
"""Hops that are looked at, whatever the field holds: it may be as long as a head."""
_IDENTITY_BITS = 64
"""What one IPv6 site or handset is given at least (RFC 6177); within it, addresses cost nothing."""

# `1.2.3.4:567`, `[::1]` and `[::1]:567`: what proxies write besides the plain address.
_WITH_PORT = re.compile(r"\[([^\[\]]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


def parse(text: str) -> _Address | None:
    """The address that an entry of a forwarding field, or a socket, names. None: it names none."""
    text = text.strip(" \t")
    match = _WITH_PORT.fullmatch(text)
    if match:
        text = match[1] or match[2]
    try:
        if ":" not in text:
            return ipaddress.IPv4Address(text)
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    if address.scope_id:
        address = ipaddress.IPv6Address(int(address))
    return address.ipv4_mapped or address


def network(text: str) -> _Network:
    """A configured network; a bare address is a network of one.

    Raises ValueError, with the text in it, for anything else, host bits among it: `10.0.0.1/8` is more
    often a slip for `/32` than meant.
    """
    found = ipaddress.ip_network(text)
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        if mapped:
            # Mapped addresses are IPv4 here, so a mapped network would silently hold none of them.
            return ipaddress.IPv4Network((int(mapped), found.prefixlen - 96))
    return found


@lru_cache(_REMEMBERED)
def identifier(address: str) -> str:
    """What limits are counted by: an IPv4 address itself, an IPv6 address by its /64 (`2001:db8::/64`).

    What is no address, such as a unix socket's peer, is its own identifier.
    """
    parsed = parse(address)
    if parsed is None:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    host_bits = 128 - _IDENTITY_BITS
    return f"{ipaddress.IPv6Address(int(parsed) >> host_bits << host_bits)}/{_IDENTITY_BITS}"


class TrustedProxies:
    """Which hops in front of the gateway may say where a request came from.

    `networks` and `hops` are alternatives in the settings; given both, a hop that either of them trusts is
    trusted. Neither: only the peer counts. Raises ValueError for a text that is no network or a negative
    count.
    """

    __slots__ = ("_hops", "_networks", "_peer", "_remembered", "is_trusted")

    def __init__(self, networks: Sequence[str] = (), hops: int = 0) -> None:
        if hops < 0:
            raise ValueError(f"trusted hops must not be negative, not {hops}")
        self._networks = tuple(network(text) for text in networks)
        self._hops = hops
        self.is_trusted = lru_cache(_REMEMBERED)(self._is_trusted)
        """Whether the peer of a connection is one of our proxies: `is_trusted(peer: str) -> bool`."""
        self._peer = lru_cache(_REMEMBERED)(_spell)
        self._remembered = lru_cache(_REMEMBERED)(self._chain)

    def _is_trusted(self, peer: str) -> bool:
        return self._hops > 0 or self._in_networks(parse(peer))

    def _in_networks(self, address: _Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def client(self, peer: str, received: Sequence[str] | None) -> str:
        """The address that the request counts for. `received`: the values of `X-Forwarded-For`, in order."""
        if not received or not self.is_trusted(peer):
            return self._peer(peer)
        return self._believed(peer, received)[0]

    def forwarded_for(self, peer: str, received: Sequence[str] | None) -> str:
        """The `X-Forwarded-For` to send on: the client first, then the trusted hops, the peer last."""
        if not received or not self.is_trusted(peer):
            return self._peer(peer)
        return self._believed(peer, received)[1]

    def _believed(self, peer: str, received: Sequence[str]) -> tuple[str, str]:
        """The client and the whole believed chain, for a trusted peer."""
        field = received[0] if len(received) == 1 else ",".join(received)
        walk = self._remembered if len(field) <= _LONGEST_REMEMBERED else self._chain
        return walk(peer, field)

    def _chain(self, peer: str, field: str) -> tuple[str, str]:
        entries = field.rsplit(",", _LONGEST_CHAIN)[-_LONGEST_CHAIN:]
        chain = [self._peer(peer)]
        for entry in reversed(entries):
            if not entry.strip(" \t"):
                continue  # RFC 9110 section 5.6.1.2: empty list elements are ignored.
            address = parse(entry)
            if address is None:
                break
            chain.append(str(address))
            if len(chain) > self._hops and not self._in_networks(address):
                break
        chain.reverse()
        return chain[0], ", ".join(chain)


def _spell(peer: str) -> str:
    address = parse(peer)
    return peer if address is None else str(address)


class Networks:
    """The addresses that a route is open to: `deny` is stronger, an empty `allow` is everybody.

    Raises ValueError for a text that is no network.
    """

    __slots__ = ("_allow", "_deny", "permits")

    def __init__(self, allow: Sequence[str] = (), deny: Sequence[str] = ()) -> None:
        self._allow = tuple(network(text) for text in allow)
        self._deny = tuple(network(text) for text in deny)
        self.permits = lru_cache(_REMEMBERED)(self._permits)
        """Whether the client's address may: `permits(address: str) -> bool`. What is no address may not."""

    def _permits(self, address: str) -> bool:
        parsed = parse(address)
        if parsed is None or any(parsed in network for network in self._deny):
            return False
        return not self._allow or any(parsed in network for network in self._allow)
