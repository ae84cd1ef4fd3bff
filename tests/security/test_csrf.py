"""Tokens against forged requests. Time is a number here."""

import base64
import hmac
import re

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.security.csrf import (
    MAX_AGE_SECONDS,
    TOKEN_CHARACTERS,
    check_csrf_token,
    csrf_key,
    make_csrf_token,
)

NOW = 1_893_456_000.75
SECRET = b"k" * 32
KEY = csrf_key(SECRET)
TOKEN = make_csrf_token(KEY, "family-1", NOW)


def test_the_key_is_derived_as_the_standard_says() -> None:
    other = HKDF(SHA256(), 32, salt=b"lucid api gateway", info=b"csrf key v1").derive(SECRET)
    assert other == KEY
    assert KEY not in (SECRET, csrf_key(SECRET + b"k"))
    assert len(csrf_key(b"")) == len(csrf_key(b"x" * 1_000)) == 32


def test_a_token_and_its_shape() -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{76}", TOKEN)
    assert len(TOKEN) == TOKEN_CHARACTERS
    assert check_csrf_token(KEY, "family-1", TOKEN, NOW)
    assert len({make_csrf_token(KEY, "family-1", NOW) for _ in range(100)}) == 100


def test_it_belongs_to_one_login_and_one_key() -> None:
    for family in ("family-2", "", "family-1\0", "family-", "Family-1"):
        assert not check_csrf_token(KEY, family, TOKEN, NOW)
    for key in (csrf_key(b"x" * 32), SECRET, b"", KEY[:-1]):
        assert not check_csrf_token(key, "family-1", TOKEN, NOW)


def test_what_the_same_key_signs_elsewhere_is_no_token() -> None:
    body = base64.urlsafe_b64decode(TOKEN)[:25]
    unlabelled = base64.urlsafe_b64encode(body + hmac.digest(KEY, body + b"family-1", "sha256")).decode()
    assert len(unlabelled) == TOKEN_CHARACTERS
    assert not check_csrf_token(KEY, "family-1", unlabelled, NOW)


def test_its_life() -> None:
    made = float(int(NOW))
    assert check_csrf_token(KEY, "family-1", TOKEN, made + MAX_AGE_SECONDS - 0.001)
    assert not check_csrf_token(KEY, "family-1", TOKEN, made + MAX_AGE_SECONDS)
    assert not check_csrf_token(KEY, "family-1", TOKEN, made + 10, max_age_seconds=10)
    assert check_csrf_token(KEY, "family-1", TOKEN, made + 9.9, max_age_seconds=10)
    # Another machine's clock may be a little ahead, no more.
    assert check_csrf_token(KEY, "family-1", TOKEN, made - 5)
    assert not check_csrf_token(KEY, "family-1", TOKEN, made - 5.001)
    for never in (float("nan"), float("inf"), float("-inf")):
        assert not check_csrf_token(KEY, "family-1", TOKEN, never)


def test_every_bit_counts() -> None:
    raw = base64.urlsafe_b64decode(TOKEN)
    for place in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        text = base64.urlsafe_b64encode(changed).decode()
        # At the token's own moment as well as at the one that a changed time would make good.
        for now in (NOW, float(int.from_bytes(changed[:8], "big"))):
            assert not check_csrf_token(KEY, "family-1", text, now)


GARBAGE = {
    "empty": "",
    "one short": TOKEN[:-1],
    "one long": TOKEN + "A",
    "padded": TOKEN + "=",
    "line feed": TOKEN + "\n",
    "line feed for the last": TOKEN[:-1] + "\n",
    "space": " " + TOKEN[1:],
    "standard alphabet": TOKEN[:-1] + "+",
    "full-width": TOKEN[:-1] + "\uff21",
    "surrogate": TOKEN[:-1] + "\ud800",
    "NUL": TOKEN[:-1] + "\0",
    "zeros": "A" * 76,
    "a megabyte": TOKEN * 14_000,
}


@pytest.mark.parametrize("token", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(token: str) -> None:
    assert not check_csrf_token(KEY, "family-1", token, NOW)


@settings(deadline=None)  # the machine may be busy; nothing here is about speed
@given(st.text(), st.text(alphabet="abcAB01-_=", max_size=90), st.binary())
def test_nothing_raises(family: str, text: str, key: bytes) -> None:
    assert not check_csrf_token(key, family, text, NOW)
    assert check_csrf_token(key, family, make_csrf_token(key, family, NOW), NOW)
