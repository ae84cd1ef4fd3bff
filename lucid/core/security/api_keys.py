"""API keys: 256 random bits that begin with `lucid_`, shown once and kept as a digest."""

import hashlib
import re
import secrets
from typing import Final

PREFIX: Final = "lucid_"
_SHAPE: Final = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9_-]{43}")


def new_api_key() -> str:
    """A fresh key, 49 characters. Give it to its owner and keep only `digest(key)`."""
    return PREFIX + secrets.token_urlsafe(32)


def is_api_key(text: str) -> bool:
    """Whether `text` has the shape of a key. What has not is BAD_CREDENTIAL without a look-up."""
    return _SHAPE.fullmatch(text) is not None


def digest(secret: str) -> bytes:
    """SHA-256 of an API key or a refresh token, 32 bytes: what is stored and looked up. Both have 256 bits of
    entropy, so neither salt nor a slow hash would add anything, and the look-up by digest tells nothing
    through its timing.
    """
    return hashlib.sha256(secret.encode("utf-8")).digest()
