"""The edges that test_tron.py and test_jwt.py leave: all of v, both roots of r, addresses' alphabet; key ids as
attackers write them, claims written twice, times at the ends of their range.
"""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import base58
import coincurve
import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.exchange import Principal, Role
from lucid.core.security import tron
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.errors import ErrorCode
from lucid.settings import TokenSettings
from tests.support.wallet import Wallet

N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
FIELD_PRIME = 2**256 - 2**32 - 977
KEY = coincurve.PrivateKey(bytes(31) + b"\x2a")
ADDRESS = tron.address_of(KEY.public_key)
MESSAGE = b"gateway.lucid.example wants you to sign in"


def signed_by(key: coincurve.PrivateKey, message: bytes) -> tuple[int, int, int]:
    """r, s and the recovery id."""
    raw = key.sign_recoverable(tron.message_hash(message), hasher=None)
    return int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:64], "big"), raw[64]


R, S, V = signed_by(KEY, MESSAGE)


def spelled(r: int, s: int, v: int) -> str:
    return f"{r:064x}{s:064x}{v:02x}"


# ---- signatures


def test_of_all_256_values_of_v_two_are_the_signers() -> None:
    taken = {v for v in range(256) if tron.verify(ADDRESS, MESSAGE, spelled(R, S, v))}
    assert taken == {V, V + 27}
    recovered = {v for v in range(256) if tron.recover_address(MESSAGE, spelled(R, S, v)) is not None}
    assert recovered == {0, 1, 27, 28}


def test_the_other_v_is_another_signer() -> None:
    other = tron.recover_address(MESSAGE, spelled(R, S, V ^ 1))
    assert other is not None
    assert other != ADDRESS


@pytest.mark.parametrize("r", [0, N, N + 1, FIELD_PRIME - 1, FIELD_PRIME, FIELD_PRIME + 1])
@pytest.mark.parametrize("v", [0, 1, 27, 28])
def test_r_beyond_the_order_for_every_v(r: int, v: int) -> None:
    """From n to p there are points whose x is r: v 2 and 3 would mean them, and nobody's wallet makes them."""
    assert tron.recover_address(MESSAGE, spelled(r, S, v)) is None


@pytest.mark.parametrize("s", [0, N // 2 + 1, N - 1, N, N + 1, 2**256 - 1])
@pytest.mark.parametrize("v", [0, 1, 27, 28])
def test_s_beyond_half_the_order_for_every_v(s: int, v: int) -> None:
    assert tron.recover_address(MESSAGE, spelled(R, s, v)) is None


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32).filter(lambda raw: 0 < int.from_bytes(raw, "big") < N))
def test_every_keys_signature_has_one_spelling(secret: bytes) -> None:
    """Of the four that (r, s), (r, n - s) and both parities make, one is this signer's."""
    key = coincurve.PrivateKey(secret)
    r, s, v = signed_by(key, MESSAGE)
    address = tron.address_of(key.public_key)
    taken = [
        (high, parity)
        for high in (False, True)
        for parity in (0, 1)
        if tron.verify(address, MESSAGE, spelled(r, N - s if high else s, parity))
    ]
    assert taken == [(False, v)]


def test_a_signature_of_the_bare_hash_is_none_of_the_message() -> None:
    """Neither Ethereum's prefix, nor the message itself, nor its SHA-256 is what TRON signs."""
    for hashed in (MESSAGE[:32], hashlib.sha256(MESSAGE).digest(), tron._keccak256(MESSAGE)):
        raw = KEY.sign_recoverable(hashed, hasher=None)
        assert not tron.verify(ADDRESS, MESSAGE, raw.hex())
    ethereum = b"\x19Ethereum Signed Message:\n" + str(len(MESSAGE)).encode() + MESSAGE
    raw = KEY.sign_recoverable(tron._keccak256(ethereum), hasher=None)
    assert not tron.verify(ADDRESS, MESSAGE, raw.hex())


GOOD = spelled(R, S, V)
SPELLINGS = {
    "0x, then short": "0x" + GOOD[2:],
    "0x inside": GOOD[:2] + "0x" + GOOD[4:],
    "00x": "00x" + GOOD,
    "x": "x" + GOOD,
    "\\x": "\\x" + GOOD,
    "space before": " " + GOOD,
    "space behind": GOOD + " ",
    "NUL behind": GOOD + "\0",
    "carriage return": GOOD + "\r\n",
    "no-break space": "\u00a0" + GOOD,
    "byte order mark": "\ufeff" + GOOD,
    "underscore": GOOD[:64] + "_" + GOOD[65:],
    "Arabic digits": "\u0660" * 130,
    "full-width letters": "\uff41" + GOOD[1:],
    "mathematical digits": "\U0001d7d8" + GOOD[1:],
    "base64": base64.b64encode(bytes.fromhex(GOOD)).decode(),
    "bytes of DER": encode_dss_signature(R, S).hex(),
    "compact, 64 bytes": GOOD[:128],
    "v first": GOOD[128:] + GOOD[:128],
    "s before r": spelled(S, R, V),
    "a megabyte": GOOD * 8_066,
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_other_spellings_of_a_signature(text: str) -> None:
    assert not tron.verify(ADDRESS, MESSAGE, text)


# ---- addresses


@pytest.mark.parametrize("letter", ["0", "O", "I", "l", "+", "/", "_", "-", " ", "\u0422", "\uff34"])
@pytest.mark.parametrize("place", [0, 1, 17, 33])
def test_letters_that_base58_lacks(letter: str, place: int) -> None:
    text = ADDRESS[:place] + letter + ADDRESS[place + 1 :]
    assert not tron.is_address(text)
    assert not tron.verify(text, MESSAGE, GOOD)


def test_of_all_256_versions_one_is_trons() -> None:
    account = base58.b58decode_check(ADDRESS)[1:]
    taken = {
        version
        for version in range(256)
        if tron.is_address(base58.b58encode_check(bytes([version]) + account).decode())
    }
    assert taken == {0x41}


@pytest.mark.parametrize("size", [18, 19, 21, 22, 32])
def test_accounts_of_another_length(size: int) -> None:
    assert not tron.is_address(base58.b58encode_check(b"\x41" + b"\xff" * size).decode())


def test_every_single_change_is_noticed() -> None:
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    changed = {
        ADDRESS[:place] + letter + ADDRESS[place + 1 :]
        for place in range(34)
        for letter in alphabet
        if letter != ADDRESS[place]
    }
    assert len(changed) == 34 * 57
    assert not any(tron.is_address(text) for text in changed)


@pytest.mark.parametrize("text", [ADDRESS.upper(), ADDRESS.swapcase(), "t" + ADDRESS[1:], "0x" + ADDRESS[2:]])
def test_the_case_counts(text: str) -> None:
    assert not tron.is_address(text)


@settings(deadline=None)
@given(st.binary(min_size=20, max_size=20))
def test_every_account_has_an_address_of_34_characters(account: bytes) -> None:
    text = base58.b58encode_check(b"\x41" + account).decode()
    assert len(text) == 34
    assert tron.is_address(text)


# ---- tokens

NOW = 1_893_456_000.0
SECRET = "k" * 32
EC_KEY = ec.generate_private_key(ec.SECP256R1())
BAD = ErrorCode.BAD_CREDENTIAL
HS256 = TokenSettings(secret_key=SECRET)
ES256 = TokenSettings(
    algorithm="ES256",
    private_key=EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
)
CLAIMS: dict[str, Any] = {
    "sub": "user-1",
    "role": "user",
    "sid": "family-1",
    "jti": "token-1",
    "iat": int(NOW),
    "exp": int(NOW) + 900,
    "iss": "lucid",
    "aud": "lucid",
    "typ": "access",
}


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def token_of(payload: bytes, header: bytes = b'{"alg":"HS256"}', secret: bytes = SECRET.encode()) -> str:
    start = f"{b64(header)}.{b64(payload)}"
    return f"{start}.{b64(hmac.digest(secret, start.encode(), 'sha256'))}"


def verdict(token: str, checked: TokenSettings = HS256, now: float = NOW) -> Principal | ErrorCode:
    return TokenVerifier(checked, lambda: now).verify(token)


def claimed(**changes: Any) -> bytes:
    return json.dumps({**CLAIMS, **changes}).encode()


SPELLINGS_OF_NONE = ["none", "None", "NONE", "nOnE", "none ", " none", "none\0", "", "null", "n\u043ene"]


@pytest.mark.parametrize("name", SPELLINGS_OF_NONE)
@pytest.mark.parametrize("checked", [HS256, ES256], ids=["HS256", "ES256"])
def test_no_spelling_of_none(name: str, checked: TokenSettings) -> None:
    start = f"{b64(json.dumps({'alg': name}).encode())}.{b64(claimed())}"
    for signature in ("", "AA", b64(bytes(32)), b64(bytes(64))):
        assert verdict(f"{start}.{signature}", checked) is BAD
    assert verdict(token_of(claimed(), json.dumps({"alg": name}).encode())) is BAD


def test_the_public_key_in_no_encoding_is_a_secret() -> None:
    """RFC 8725, 2.1, beyond PEM: DER, the point, its x."""
    public = EC_KEY.public_key()
    point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    secrets = [
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        point,
        point[1:33],
        public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint),
        b"",
    ]
    for secret in secrets:
        for alg in ("HS256", "ES256", "HS384"):
            header = json.dumps({"alg": alg}).encode()
            assert verdict(token_of(claimed(), header, secret), ES256) is BAD


KEY_IDS = {
    "path": "../../../../dev/null",
    "absolute path": "/dev/null",
    "file URL": "file:///dev/null",
    "URL": "http://127.0.0.1:1/key.pem",
    "SQL": "x' UNION SELECT 'k' -- ",
    "command": "| id",
    "template": "{{7*7}}",
    "NUL": "\0",
    "empty": "",
    "unknown": "no such key",
    "very long": "k" * 2_000,
    "beyond ASCII": "\U0001f511",
    "line feeds": "a\r\nX-User-Role: admin",
}


@pytest.mark.parametrize("kid", KEY_IDS.values(), ids=KEY_IDS.keys())
def test_a_key_id_opens_nothing(kid: str) -> None:
    """It only narrows the keys that are held: no file, no address, no empty secret behind it."""
    header = json.dumps({"alg": "HS256", "kid": kid}).encode()
    for secret in (b"", b"\0", b"k", b"k" * 31, kid.encode()):
        assert verdict(token_of(claimed(), header, secret)) is BAD
    assert isinstance(verdict(token_of(claimed(), header)), Principal)


KEYS_IN_THE_HEADER: dict[str, Any] = {
    "jku": "http://127.0.0.1:1/jwks",
    "x5u": "http://127.0.0.1:1/cert.pem",
    "x5c": ["MIIB"],
    "x5t": "AAAA",
    "jwk": {"kty": "oct", "k": b64(b"a" * 32)},
}


@pytest.mark.parametrize("name", KEYS_IN_THE_HEADER)
def test_a_key_that_the_token_brings_along(name: str) -> None:
    header = json.dumps({"alg": "HS256", name: KEYS_IN_THE_HEADER[name]}).encode()
    assert verdict(token_of(claimed(), header, b"a" * 32)) is BAD
    own = pyjwt.get_algorithm_by_name("ES256").to_jwk(
        ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True
    )
    attacker = ec.generate_private_key(ec.SECP256R1())
    theirs = pyjwt.encode(CLAIMS, attacker, algorithm="ES256", headers={name: own})
    assert verdict(theirs, ES256) is BAD


def test_the_last_of_two_claims_of_one_name_counts_and_is_judged() -> None:
    """RFC 7519, 4, allows to refuse them or to take the last. Both are signed, so nobody else put them there;
    what matters is that no check looks at one and the answer at the other.
    """
    told = verdict(token_of(claimed().replace(b'"role"', b'"role": "super_admin", "role"')))
    assert isinstance(told, Principal)
    assert told.role is Role.USER
    assert verdict(token_of(claimed()[:-1] + b', "role": "root"}')) is BAD
    assert verdict(token_of(claimed()[:-1] + b', "exp": 1}')) is BAD
    assert verdict(token_of(claimed()[:-1] + b', "typ": "refresh"}')) is BAD
    assert verdict(token_of(claimed(), b'{"alg":"HS256","alg":"none"}')) is BAD
    assert verdict(token_of(claimed(), b'{"alg":"none","alg":"none"}')) is BAD


@pytest.mark.parametrize("nested", [b"[" * 10_000, b'{"a":' * 10_000, b"[" * 10_000 + b"]" * 10_000])
def test_ten_thousand_levels(nested: bytes) -> None:
    """Longer than a token may be, so unread; and short of that bound, no stack is at stake either."""
    before = time.process_time()
    assert verdict(token_of(b'{"x":' + nested)) is BAD
    assert verdict(token_of(claimed(), b'{"alg":"HS256","x":' + nested + b"}")) is BAD
    assert verdict(token_of(b'{"x":' + nested[:2_800])) is BAD
    assert verdict(token_of(claimed(), b'{"x":' + nested[:2_700])) is BAD
    assert time.process_time() - before < 1.0


TIMES: dict[str, tuple[bytes, bytes]] = {
    "exp -0.0": (b'"exp": 1893456900', b'"exp": -0.0'),
    "exp negative and fractional": (b'"exp": 1893456900', b'"exp": -1.5'),
    "exp 2**53": (b'"exp": 1893456900', b'"exp": 9007199254740992'),
    "exp beyond 64 bits": (b'"exp": 1893456900', b'"exp": 18446744073709551616'),
    "exp of 400 digits": (b'"exp": 1893456900', b'"exp": ' + b"9" * 400),
    "exp NaN": (b'"exp": 1893456900', b'"exp": NaN'),
    "exp Infinity": (b'"exp": 1893456900', b'"exp": Infinity'),
    "exp 1e999": (b'"exp": 1893456900', b'"exp": 1e999'),
    "exp as its iat": (b'"exp": 1893456900', b'"exp": 1893456000'),
    "iat -0.5": (b'"iat": 1893456000', b'"iat": -0.5'),
    "iat NaN": (b'"iat": 1893456000', b'"iat": NaN'),
    "iat far ahead": (b'"iat": 1893456000', b'"iat": 1893456006'),
    "nbf far ahead": (b'"typ"', b'"nbf": 1893456006, "typ"'),
    "nbf huge": (b'"typ"', b'"nbf": 1e308, "typ"'),
}


@pytest.mark.parametrize("old,new", TIMES.values(), ids=TIMES.keys())
def test_times_at_the_ends_of_their_range(old: bytes, new: bytes) -> None:
    assert old in claimed()
    assert isinstance(verdict(token_of(claimed())), Principal)
    assert verdict(token_of(claimed().replace(old, new))) is BAD


@pytest.mark.parametrize("exp", [NOW + 0.5, NOW + 1e-3, 2.0**53 - 1])
def test_a_fractional_and_a_late_expiry_are_times_too(exp: float) -> None:
    told = verdict(token_of(claimed(exp=exp)))
    assert isinstance(told, Principal)
    assert told.expires_at == exp
    assert verdict(token_of(claimed(exp=NOW + 0.5)), now=NOW + 5.5) is ErrorCode.CREDENTIAL_EXPIRED


def test_a_signature_has_one_spelling_also_in_its_last_bits() -> None:
    """RFC 4648, 3.5: 32 bytes leave two bits over, 64 bytes four."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for checked in (HS256, ES256):
        token = TokenIssuer(checked).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
        taken = [letter for letter in alphabet if verdict(token[:-1] + letter, checked) is not BAD]
        assert taken == [token[-1]]


def test_es256_as_der_or_with_zeros() -> None:
    """RFC 7518, 3.4: r and s side by side, 32 bytes each; not the DER that libraries make."""
    start = ".".join((b64(b'{"alg":"ES256"}'), b64(claimed())))
    der = EC_KEY.sign(start.encode(), ec.ECDSA(SHA256()))
    r, s = decode_dss_signature(der)
    good = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    assert isinstance(verdict(f"{start}.{b64(good)}", ES256), Principal)
    for bad in (der, b"\0" + good, good + b"\0", bytes(64), good[:63], good[32:] + good[:32], b""):
        assert verdict(f"{start}.{b64(bad)}", ES256) is BAD
    # CVE-2022-21449: r and s of zero, and of the order, which is zero again.
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    assert verdict(f"{start}.{b64(order.to_bytes(32, 'big') * 2)}", ES256) is BAD


def test_a_wallets_signature_is_no_token() -> None:
    assert verdict(Wallet(bytes(31) + b"\x01").sign(MESSAGE)) is BAD
