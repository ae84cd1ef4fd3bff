"""Passwords as they are stored: PBKDF2-HMAC-SHA256 (RFC 8018, 5.2) with a salt of its own for each.

The cost is what OWASP's Password Storage Cheat Sheet asks of this function: 600,000 iterations. What is stored
is a text in the manner of the PHC string format, which carries its own cost:
`$pbkdf2-sha256$i=600000$<salt, 22 characters>$<hash, 43 characters>`, base64 without padding.

`hash_password` and `verify_password` take some 0.2 s of a core, by design: call them in a thread, behind a
semaphore. hashlib lets go of the GIL meanwhile.
"""

import base64
import hmac
import re
import secrets
import unicodedata
from hashlib import pbkdf2_hmac
from typing import Final, NamedTuple

ITERATIONS: Final = 600_000
MIN_ITERATIONS: Final = 1_000
"""Of a stored text. NIST SP 800-132, 5.2, knows nothing cheaper."""
MAX_ITERATIONS: Final = 10 * ITERATIONS
"""Of a stored text. More is no cost that anybody chose: one such row would hold a thread for good."""
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32

UNKNOWN: Final = f"$pbkdf2-sha256$i={ITERATIONS}${'A' * 22}${'A' * 43}"
"""Belongs to no password (its hash is zeros) and costs what any other does. Verify a password against it where
there is no such account, or one without a password, so that the time of the answer does not tell.
"""

_STORED: Final = re.compile(r"\$pbkdf2-sha256\$i=([1-9][0-9]{3,7})\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})")


class _Stored(NamedTuple):
    iterations: int
    salt: bytes
    hash: bytes


def hash_password(password: str) -> str:
    """The text to store for `password`, at today's cost. Slow."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"$pbkdf2-sha256$i={ITERATIONS}${_base64(salt)}${_base64(_derived(password, salt, ITERATIONS))}"


def verify_password(password: str, stored: str) -> bool:
    """Whether `stored` was made from `password`. False, after the same work, for a text that is none of ours.
    Slow; never raises. Where it is true, ask `needs_rehash`.
    """
    read = _read(stored)
    known = read or _Stored(ITERATIONS, bytes(_SALT_BYTES), bytes(_HASH_BYTES))
    matches = hmac.compare_digest(_derived(password, known.salt, known.iterations), known.hash)
    if known.iterations < ITERATIONS:
        # An old, cheap hash answers no sooner than UNKNOWN (Django calls this `harden_runtime`).
        _derived(password, known.salt, ITERATIONS - known.iterations)
    return matches and read is not None


def needs_rehash(stored: str) -> bool:
    """Whether `stored` is cheaper than today's cost, or none of ours: store the password anew, now that it is at
    hand. Not where it costs more: while two versions run beside each other they would take turns.
    """
    read = _read(stored)
    return read is None or read.iterations < ITERATIONS


def _derived(password: str, salt: bytes, iterations: int) -> bytes:
    # NFC, because one keyboard types `é` as one code point and another as two (NIST SP 800-63B, 5.1.1.2, asks
    # for a stable form). Lone surrogates are refused where passwords are chosen; here nothing may raise.
    secret = unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")
    return pbkdf2_hmac("sha256", secret, salt, iterations, _HASH_BYTES)


def _read(stored: str) -> _Stored | None:
    found = _STORED.fullmatch(stored)
    if found is None or not MIN_ITERATIONS <= int(found[1]) <= MAX_ITERATIONS:
        return None
    return _Stored(int(found[1]), base64.b64decode(found[2] + "=="), base64.b64decode(found[3] + "="))


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).rstrip(b"=").decode("ascii")
