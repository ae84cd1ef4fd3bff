"""Values that nobody can guess, from the system's generator."""

import secrets
import uuid

CHALLENGE_NONCE_CHARACTERS = 32
"""Lower-case hex: CAIP-122 allows letters and digits only."""


def challenge_nonce() -> str:
    """128 bits as hex."""
    return secrets.token_hex(CHALLENGE_NONCE_CHARACTERS // 2)


def refresh_token() -> str:
    """256 bits as base64url without padding, 43 characters."""
    return secrets.token_urlsafe(32)


def new_id() -> str:
    """A random UUID, the spelling of every id made here."""
    return str(uuid.uuid4())


def timed_id(now: float) -> str:
    """A UUID of version 7 (RFC 9562, 5.7): `now`, in milliseconds since the epoch, then 74 random bits."""
    value = int(now * 1000) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))


def moment_of(timed: str) -> float | None:
    """The seconds since the epoch inside a `timed_id`; None for any other text."""
    try:
        value = uuid.UUID(timed)
    except ValueError:
        return None
    return (value.int >> 80) / 1000 if value.version == 7 else None
