"""Passwords. A verification costs what it must, so there are few real ones here; the rest counts iterations."""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.security import passwords
from lucid.core.security.passwords import (
    ITERATIONS,
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    UNKNOWN,
    hash_password,
    needs_rehash,
    verify_password,
)

SALT = bytes(range(16))


def plain_pbkdf2(secret: bytes, salt: bytes, iterations: int) -> bytes:
    """RFC 8018, 5.2, for one block: written out, so that no library is asked about itself."""
    block = hmac.digest(secret, salt + b"\0\0\0\1", "sha256")
    total = int.from_bytes(block, "big")
    for _ in range(iterations - 1):
        block = hmac.digest(secret, block, "sha256")
        total ^= int.from_bytes(block, "big")
    return total.to_bytes(32, "big")


def stored(iterations: int, salt: bytes, derived: bytes) -> str:
    texts = [base64.b64encode(raw).decode().rstrip("=") for raw in (salt, derived)]
    return f"$pbkdf2-sha256$i={iterations}${texts[0]}${texts[1]}"


def test_the_reference_is_right() -> None:
    """RFC 7914, 11: the first half of each known answer."""
    first = "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
    assert plain_pbkdf2(b"passwd", b"salt", 1).hex() == first
    second = "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56"
    assert hashlib.pbkdf2_hmac("sha256", b"Password", b"NaCl", 80_000, 32).hex() == second


def test_a_stored_password() -> None:
    text = hash_password("correct horse")
    assert re.fullmatch(r"\$pbkdf2-sha256\$i=600000\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}", text)
    assert verify_password("correct horse", text)
    assert not verify_password("correct horsf", text)
    assert not needs_rehash(text)
    assert hash_password("correct horse") != text


def test_it_is_pbkdf2_as_the_standard_has_it() -> None:
    old = stored(1_000, SALT, plain_pbkdf2("pässwörd".encode(), SALT, 1_000))
    assert verify_password("pässwörd", old)
    assert needs_rehash(old)


def test_composed_and_decomposed_are_one_password() -> None:
    assert verify_password("cafe\u0301 noir", hash_password("caf\u00e9 noir"))


# ---- what is counted instead of run


class Counted:
    """In place of `pbkdf2_hmac`: gives what would differ for every input, and adds the iterations up."""

    def __init__(self) -> None:
        self.iterations = 0

    def __call__(self, name: str, secret: bytes, salt: bytes, iterations: int, size: int) -> bytes:
        assert (name, size) == ("sha256", 32)
        self.iterations += iterations
        return hashlib.sha256(b"%d %b %b" % (iterations, salt, secret)).digest()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counter = Counted()
    monkeypatch.setattr(passwords, "pbkdf2_hmac", counter)
    yield counter
    # Each test asks for something that costs.
    assert counter.iterations


def faked(iterations: int, password: str = "a password") -> str:
    return stored(iterations, SALT, Counted()("sha256", password.encode(), SALT, iterations, 32))


@pytest.mark.parametrize("iterations", [MIN_ITERATIONS, 310_000, ITERATIONS - 1, ITERATIONS])
def test_no_stored_password_answers_sooner_than_another(counted: Counted, iterations: int) -> None:
    assert verify_password("a password", faked(iterations))
    assert counted.iterations == ITERATIONS
    assert not verify_password("another", faked(iterations))
    assert counted.iterations == 2 * ITERATIONS
    assert needs_rehash(faked(iterations)) is (iterations < ITERATIONS)


def test_a_cost_to_come_is_honoured(counted: Counted) -> None:
    assert verify_password("a password", faked(MAX_ITERATIONS))
    assert counted.iterations == MAX_ITERATIONS
    assert not needs_rehash(faked(MAX_ITERATIONS))


GOOD = faked(ITERATIONS)
NONE_OF_OURS = {
    "empty": "",
    "the password itself": "a password",
    "no leading dollar": GOOD[1:],
    "another function": GOOD.replace("sha256", "sha512"),
    "in capitals": GOOD.replace("pbkdf2", "PBKDF2"),
    "a dollar more": GOOD + "$",
    "a line feed": GOOD + "\n",
    "padded": GOOD + "=",
    "short hash": GOOD[:-1],
    "long hash": GOOD + "A",
    "no hash": GOOD.rpartition("$")[0] + "$",
    "no salt": "$pbkdf2-sha256$i=600000$$" + GOOD.rpartition("$")[2],
    "url-safe alphabet": GOOD[:-1] + "_",
    "other digits": GOOD.replace("600000", "６00000"),
    "no iterations": GOOD.replace("600000", "0"),
    "negative": GOOD.replace("600000", "-600000"),
    "leading zero": GOOD.replace("600000", "0600000"),
    "a float": GOOD.replace("600000", "6e5"),
    "too cheap": faked(MIN_ITERATIONS - 1),
    "too dear": faked(MAX_ITERATIONS + 1),
    "absurd": faked(10**9),
    "digits without end": GOOD.replace("600000", "9" * 5_000),
    "a megabyte": GOOD + "A" * 1_048_576,
    "bcrypt": "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW",
}


@pytest.mark.parametrize("text", NONE_OF_OURS.values(), ids=NONE_OF_OURS.keys())
def test_what_is_none_of_ours_costs_the_same(counted: Counted, text: str) -> None:
    assert not verify_password("a password", text)
    assert counted.iterations == ITERATIONS
    assert needs_rehash(text)


@pytest.mark.parametrize("password", ["", "a", "a password", "\0" * 32, "\ud800"])
def test_unknown_belongs_to_nobody(counted: Counted, password: str) -> None:
    assert not verify_password(password, UNKNOWN)
    assert counted.iterations == ITERATIONS
    assert not needs_rehash(UNKNOWN)


def test_a_malformed_text_is_not_taken_for_the_hash_that_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even were somebody to find the password whose hash is zeros."""
    monkeypatch.setattr(passwords, "pbkdf2_hmac", lambda *_: bytes(32))
    assert verify_password("x", UNKNOWN)
    assert not verify_password("x", "")


@settings(deadline=None)  # the machine may be busy; nothing here is about speed
@given(st.text(), st.text())
def test_nothing_raises(password: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "pbkdf2_hmac", Counted())
        assert not verify_password(password, text)
        assert verify_password(password, hash_password(password))
        assert not verify_password(password + "x", hash_password(password))
