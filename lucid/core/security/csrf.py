"""Tokens against cross-site request forgery, for pages that log in with a cookie.

The gateway's own routes take no cookie, so they need none. OWASP's Cross-Site Request Forgery Prevention Cheat
Sheet calls this the *signed double submit cookie*: the token goes out in a cookie and in the page, comes back
in a field or header, and is signed together with the login it belongs to. Nothing is stored.

A token is base64url of: moment (8 bytes, whole seconds since the epoch), nonce (17), HMAC-SHA256 (32).
"""

import base64
import hmac
import re
import secrets
from typing import Final

MAX_AGE_SECONDS: Final = 3_600
TOKEN_CHARACTERS: Final = 76
_SKEW_SECONDS: Final = 5
"""By how much another machine's clock may run ahead of ours."""
_TIME_BYTES: Final = 8
_NONCE_BYTES: Final = 17
"""With 17 the whole is a multiple of three: its base64 has no padding and no second spelling."""
_BODY_BYTES: Final = _TIME_BYTES + _NONCE_BYTES

# What keeps a MAC made here from being taken for one made elsewhere with the same key, and the other way.
_TOKEN_LABEL: Final = b"lucid csrf token v1\0"
_KEY_SALT: Final = b"lucid api gateway"
_KEY_LABEL: Final = b"csrf key v1"

_SHAPE: Final = re.compile(rf"[A-Za-z0-9_-]{{{TOKEN_CHARACTERS}}}")


def csrf_key(secret: bytes) -> bytes:
    """The 32 bytes that sign these tokens, derived from a secret that also has another use, such as
    JWT_SECRET_KEY: HKDF-SHA256 (RFC 5869), of which 32 bytes need one round. Derive it once.
    """
    pseudorandom = hmac.digest(_KEY_SALT, secret, "sha256")
    return hmac.digest(pseudorandom, _KEY_LABEL + b"\x01", "sha256")


def make_csrf_token(key: bytes, family: str, now: float) -> str:
    """A new token for the login `family`, 76 characters that need no escaping in cookies, forms and headers.

    `key`: from `csrf_key`. `now`: seconds since the epoch. No two tokens are alike, so a page that is sent
    compressed does not give its token away by its length (BREACH).
    """
    body = int(now).to_bytes(_TIME_BYTES, "big") + secrets.token_bytes(_NONCE_BYTES)
    return base64.urlsafe_b64encode(body + _signature(key, family, body)).decode("ascii")


def check_csrf_token(
    key: bytes, family: str, token: str, now: float, max_age_seconds: float = MAX_AGE_SECONDS
) -> bool:
    """Whether `token` was made with `key` for this `family`, less than `max_age_seconds` ago. Never raises,
    whatever the token is.
    """
    if _SHAPE.fullmatch(token) is None:
        return False
    raw = base64.urlsafe_b64decode(token)
    body, signature = raw[:_BODY_BYTES], raw[_BODY_BYTES:]
    if not hmac.compare_digest(_signature(key, family, body), signature):
        return False
    age_seconds = now - int.from_bytes(body[:_TIME_BYTES], "big")
    return -_SKEW_SECONDS <= age_seconds < max_age_seconds


def _signature(key: bytes, family: str, body: bytes) -> bytes:
    # The part without a fixed length comes last, so that no two inputs read the same.
    return hmac.digest(key, _TOKEN_LABEL + body + family.encode("utf-8", "surrogatepass"), "sha256")
