"""Attacks on tokens, for each algorithm. Time is a number here."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import jwt as pyjwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from lucid.core.exchange import Principal, Role
from lucid.core.security.jwt import (
    FARTHEST_MOMENT_SECONDS,
    MAX_TOKEN_BYTES,
    REVOCATION_AHEAD_SECONDS,
    Claimed,
    TokenIssuer,
    TokenVerifier,
    claimed,
    issuer_of,
)
from lucid.core.security.key_material import KeyMaterialError, key_faults
from lucid.errors import ErrorCode, GatewayError
from lucid.settings import TokenSettings

NOW = 1_893_456_000.25
SECRET = "k" * 32
BAD, EXPIRED = ErrorCode.BAD_CREDENTIAL, ErrorCode.CREDENTIAL_EXPIRED


def pem(key: Any) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_pem(key: Any) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


RSA_KEY = rsa.generate_private_key(65_537, 2_048)
OTHER_RSA_KEY = rsa.generate_private_key(65_537, 2_048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()

SETTINGS = {
    "HS256": TokenSettings(secret_key=SECRET),
    "RS256": TokenSettings(algorithm="RS256", private_key=pem(RSA_KEY)),
    "ES256": TokenSettings(algorithm="ES256", private_key=pem(EC_KEY)),
    "EdDSA": TokenSettings(algorithm="EdDSA", private_key=pem(ED_KEY)),
}
ALGORITHMS = pytest.mark.parametrize("algorithm", SETTINGS)
SIGNING_KEYS: dict[str, Any] = {"HS256": SECRET, "RS256": RSA_KEY, "ES256": EC_KEY, "EdDSA": ED_KEY}


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def verifier(settings: TokenSettings, now: float = NOW) -> TokenVerifier:
    return TokenVerifier(settings, Clock(now))


def claims(**changes: Any) -> dict[str, Any]:
    given = {
        "sub": "user-1",
        "role": "user",
        "sid": "family-1",
        "jti": "token-1",
        "iat": int(NOW),
        "exp": int(NOW) + 900,
        "iss": "lucid",
        "aud": "lucid",
        "typ": "access",
        **changes,
    }
    return {name: value for name, value in given.items() if value is not ...}


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def hs256(header: bytes, payload: bytes, secret: bytes = SECRET.encode()) -> str:
    """A token with any header and payload, correctly signed."""
    signed = f"{b64(header)}.{b64(payload)}"
    return f"{signed}.{b64(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


HEADER = b'{"alg":"HS256","typ":"JWT"}'


def signed(**changes: Any) -> str:
    return hs256(HEADER, json.dumps(claims(**changes)).encode())


def verdict(token: str, now: float = NOW) -> Principal | ErrorCode:
    return verifier(SETTINGS["HS256"], now).verify(token)


# ---- the good ones


@ALGORITHMS
def test_what_is_issued_verifies(algorithm: str) -> None:
    settings = SETTINGS[algorithm]
    issued = TokenIssuer(settings).issue(user_id="u-1", role=Role.ADMIN, family="f-1", now=NOW)
    assert verifier(settings).verify(issued.token) == Principal(
        role=Role.ADMIN,
        tier="admin",
        identifier="u-1",
        user_id="u-1",
        family="f-1",
        token_id=issued.token_id,
        issued_at=int(NOW),
        expires_at=int(NOW) + 900,
        via="token",
        moment=NOW,
    )
    assert issued.expires_at == int(NOW) + 900
    assert issued.issued_at == NOW


@ALGORITHMS
def test_another_library_agrees(algorithm: str) -> None:
    settings, key = SETTINGS[algorithm], SIGNING_KEYS[algorithm]
    public = key if algorithm == "HS256" else key.public_key()
    issued = TokenIssuer(settings).issue(user_id="u-1", role=Role.USER, family="f-1", now=NOW)
    no_time = {"verify_exp": False, "verify_iat": False}
    told = pyjwt.decode(issued.token, public, algorithms=[algorithm], audience="lucid", options=no_time)
    assert told == claims(sub="u-1", sid="f-1", jti=issued.token_id)
    theirs = pyjwt.encode(claims(), key, algorithm=algorithm, headers={"kid": "whatever"})
    assert isinstance(verifier(settings).verify(theirs), Principal)


def test_minutes_and_the_moment_in_the_id() -> None:
    issuer = TokenIssuer(TokenSettings(secret_key=SECRET, access_minutes=3))
    assert issuer.access_seconds == 180
    assert issuer.issue(user_id="u", role=Role.USER, family="f", now=NOW).expires_at == int(NOW) + 180
    token = issuer.issue(user_id="u", role=Role.USER, family="f", now=NOW, minutes=1)
    assert token.expires_at == int(NOW) + 60
    told = verdict(token.token)
    assert isinstance(told, Principal)
    assert (told.issued_at, told.moment) == (int(NOW), NOW)  # iat alone would say the whole second


def test_foreign_ids_do_not_move_the_moment() -> None:
    other_moment = TokenIssuer(SETTINGS["HS256"]).issue(
        user_id="u", role=Role.USER, family="f", now=NOW - 5_000
    )
    told = verdict(signed(jti=other_moment.token_id))
    assert isinstance(told, Principal)
    assert told.moment == told.issued_at == int(NOW)


def test_a_token_issued_in_the_knowledge_of_a_revocation_is_younger_than_it() -> None:
    issuer = TokenIssuer(SETTINGS["HS256"])
    for ahead in (-10.0, 0.0, 0.0004, 0.123, 1.0, REVOCATION_AHEAD_SECONDS, 3.3, FARTHEST_MOMENT_SECONDS - 1):
        revoked = NOW + ahead
        token = issuer.issue(user_id="u", role=Role.USER, family="f", now=NOW, after=revoked)
        told = verdict(token.token)
        assert isinstance(told, Principal)
        assert told.moment > revoked, ahead
        assert told.moment == token.issued_at
        assert told.expires_at == int(NOW) + 900
        # Its iat is no moment of the future: verifiers without leeway take it.
        assert pyjwt.decode(token.token, options={"verify_signature": False})["iat"] == int(NOW)


def test_tokens_of_other_issuers_are_for_others_to_judge() -> None:
    judge = TokenVerifier(SETTINGS["HS256"], Clock(), foreign_issuers=["cluster", "other"])
    foreign = hs256(b'{"alg":"RS256","kid":"x"}', json.dumps(claims(iss="cluster")).encode(), b"k" * 32)
    assert judge.verify(foreign) is None
    assert isinstance(judge.verify(signed()), Principal)
    assert judge.verify(signed(iss="stranger")) is ErrorCode.BAD_CREDENTIAL
    assert judge.verify(signed(iss="cluster", x="x" * 4_096)) is ErrorCode.BAD_CREDENTIAL, "refused unread"
    assert verdict(foreign) is ErrorCode.BAD_CREDENTIAL


def test_unknown_claims_and_header_fields_are_passed_over() -> None:
    payload = json.dumps(claims(scope="x", nested={"a": [1]}, nbf=int(NOW))).encode()
    header = b'{"alg":"HS256","typ":"at+jwt","x":[1],"kid":"k"}'
    assert isinstance(verdict(hs256(header, payload)), Principal)
    assert isinstance(verdict(signed(aud=["other", "lucid"])), Principal)
    assert isinstance(verdict(signed(iat=NOW - 1.5, exp=NOW + 0.5)), Principal)


@ALGORITHMS
def test_previous_keys(algorithm: str) -> None:
    old = SETTINGS[algorithm]
    token = TokenIssuer(old).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
    if algorithm == "HS256":
        new = TokenSettings(secret_key="n" * 32, previous_keys=("x" * 32, SECRET))
    else:
        makers: dict[str, Callable[[], Any]] = {
            "RS256": lambda: OTHER_RSA_KEY,
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
        }
        new = msgspec.structs.replace(
            old,
            private_key=pem(makers[algorithm]()),
            previous_keys=(public_pem(SIGNING_KEYS[algorithm]),),
        )
    assert isinstance(verifier(new).verify(token), Principal)
    assert verifier(msgspec.structs.replace(new, previous_keys=())).verify(token) is BAD
    fresh = TokenIssuer(new).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
    assert verifier(old).verify(fresh) is BAD  # signed with the current key, not with a previous one


# ---- time


def test_expiry_and_leeway() -> None:
    token, expiry = signed(), int(NOW) + 900
    assert isinstance(verdict(token, expiry + 4.99), Principal)
    assert verdict(token, expiry + 5.0) is EXPIRED
    assert verdict(token, expiry + 1e9) is EXPIRED


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_a_token_from_the_future(name: str) -> None:
    assert isinstance(verdict(signed(**{name: NOW + 5.0})), Principal)
    assert verdict(signed(**{name: NOW + 5.01})) is BAD


# ---- claims that are wrong

WRONG_CLAIMS: dict[str, dict[str, Any]] = {
    **{f"no {name}": {name: ...} for name in claims()},
    **{f"{name} null": {name: None} for name in claims()},
    **{f"{name} a list": {name: [1]} for name in claims()},
    **{f"{name} an object": {name: {}} for name in claims()},
    **{f"{name} true": {name: True} for name in claims()},
    **{f"{name} a number": {name: 7} for name in ("sub", "role", "sid", "jti", "iss", "aud", "typ")},
    **{f"{name} a text": {name: str(int(NOW) + 100)} for name in ("iat", "exp", "nbf")},
    **{f"{name} negative": {name: -1} for name in ("iat", "exp", "nbf")},
    **{f"{name} empty": {name: ""} for name in ("sub", "role", "sid", "jti", "iss", "aud", "typ")},
    "another issuer": {"iss": "lucid2"},
    "another audience": {"aud": "lucid2"},
    "audiences without ours": {"aud": ["a", "b"]},
    "no audience in the list": {"aud": []},
    "a refresh token": {"typ": "refresh"},
    "an unknown role": {"role": "root"},
    "no role at all": {"role": "public"},
    "a role in capitals": {"role": "ADMIN"},
    "expires before it was issued": {"exp": int(NOW) - 1, "iat": int(NOW)},
    "expires never": {"exp": 2**60},
    "expires in infinity": {"exp": 1e308},
    "sub that breaks a header": {"sub": "a\r\nX-User-Role: admin"},
    "sub with a space": {"sub": "a b"},
    "sub beyond ASCII": {"sub": "é"},
    "sub too long": {"sub": "a" * 129},
    "sid with a line feed": {"sid": "f\n"},
    "jti with NUL": {"jti": "\0"},
}


@pytest.mark.parametrize("changes", WRONG_CLAIMS.values(), ids=WRONG_CLAIMS.keys())
def test_wrong_claims(changes: dict[str, Any]) -> None:
    assert verdict(signed(**changes)) is BAD


PAYLOADS = {
    "nothing": b"",
    "no JSON": b"hello",
    "a list": b"[]",
    "null": b"null",
    "bad UTF-8": json.dumps(claims()).encode().replace(b"user-1", b"user\xff"),
    "infinite number": json.dumps(claims()).encode().replace(b'"exp"', b'"exp":1e999,"exp_"'),
    "nested beyond measure": b'{"x":' + b"[" * 2_900,
    "trailing text": json.dumps(claims()).encode() + b"x",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_payloads_that_are_none(payload: bytes) -> None:
    assert verdict(hs256(HEADER, payload)) is BAD


# ---- headers and the compact form

HEADERS = {
    "none": b'{"alg":"none"}',
    "None": b'{"alg":"None"}',
    "another case": b'{"alg":"hs256"}',
    "another hash": b'{"alg":"HS512"}',
    "another family": b'{"alg":"RS256"}',
    "no alg": b'{"typ":"JWT"}',
    "alg null": b'{"alg":null}',
    "alg a list": b'{"alg":["HS256"]}',
    "critical": b'{"alg":"HS256","crit":["exp"]}',
    "critical, empty": b'{"alg":"HS256","crit":[]}',
    "unencoded payload": b'{"alg":"HS256","b64":false}',
    "kid a number": b'{"alg":"HS256","kid":7}',
    "no JSON": b"x",
    "a list": b"[]",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_are_refused_although_the_signature_is_right(header: bytes) -> None:
    assert verdict(hs256(header, json.dumps(claims()).encode())) is BAD


def test_a_key_in_the_header_is_not_used() -> None:
    """RFC 8725, 3.10: `jwk` and `jku` are the attacker's."""
    attackers = b"a" * 32
    jwk = {"kty": "oct", "k": b64(attackers)}
    header = json.dumps({"alg": "HS256", "jwk": jwk, "jku": "http://127.0.0.1:1/keys"}).encode()
    assert verdict(hs256(header, json.dumps(claims()).encode(), attackers)) is BAD


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("alg", ["HS256", None])
def test_the_public_key_is_no_secret(algorithm: str, alg: str | None) -> None:
    """The confusion of RFC 8725, 2.1: signed as HS256 with the text of the public key."""
    header = json.dumps({"alg": alg or algorithm}).encode()
    for text in (public_pem(SIGNING_KEYS[algorithm]), public_pem(SIGNING_KEYS[algorithm]).strip()):
        token = hs256(header, json.dumps(claims()).encode(), text.encode())
        assert verifier(SETTINGS[algorithm]).verify(token) is BAD


@ALGORITHMS
def test_no_signature(algorithm: str) -> None:
    token = TokenIssuer(SETTINGS[algorithm]).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
    header, payload, signature = token.split(".")
    check = verifier(SETTINGS[algorithm])
    none = b64(b'{"alg":"none"}')
    for bad in (
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{none}.{payload}.",
        f"{none}.{payload}.{signature}",
        f"{header}..{signature}",
        f".{payload}.{signature}",
        f"{header}.{payload}.{b64(bytes(len(signature) * 3 // 4))}",
        f"{header}.{payload}.{b64(bytes(1))}",
    ):
        assert check.verify(bad) is BAD


@ALGORITHMS
def test_every_character_counts(algorithm: str) -> None:
    """No change of one character goes through: what is signed, and the spelling of the signature."""
    token = TokenIssuer(SETTINGS[algorithm]).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
    check = verifier(SETTINGS[algorithm])
    places = range(0, len(token), 7) if algorithm == "RS256" else range(len(token))
    for place in [*places, len(token) - 1]:
        for other in "AB_.":
            changed = token[:place] + other + token[place + 1 :]
            if changed != token:
                assert check.verify(changed) is BAD, place


@pytest.mark.parametrize("text", ["", ".", "..", "...", "a.b.c", "é.é.é", "\ud800.a.b", " ", "a" * 4_096])
def test_no_token_at_all(text: str) -> None:
    assert verdict(text) is BAD


def test_second_spellings_are_refused() -> None:
    token = signed()
    for bad in (
        token + "=",
        token + "\n",
        " " + token,
        token + ".",
        token + ".x",
        token.replace(".", "=.", 1),
    ):
        assert verdict(bad) is BAD


def test_the_longest_token() -> None:
    room = 0
    while len(signed(pad="x" * (room + 1))) <= MAX_TOKEN_BYTES:
        room += 1
    longest = signed(pad="x" * room)
    assert MAX_TOKEN_BYTES - len(longest) < 4
    assert isinstance(verdict(longest), Principal)
    assert verdict(signed(pad="x" * (room + 4))) is BAD


@run_settings(deadline=None)  # the machine may be busy; nothing here is about speed
@given(st.text(alphabet="abcAB01-_.=", max_size=120))
def test_nothing_raises(text: str) -> None:
    assert verdict(text) is BAD


@run_settings(deadline=None)
@given(st.binary(max_size=200))
def test_nothing_signed_raises(payload: bytes) -> None:
    assert verdict(hs256(HEADER, payload)) is BAD


# ---- keys


def test_keys_that_only_verify() -> None:
    for settings in (
        TokenSettings(algorithm="RS256", public_key=public_pem(RSA_KEY)),
        TokenSettings(algorithm="EdDSA", jwks_url="http://keys.example/jwks"),
        TokenSettings(previous_keys=(SECRET,)),
    ):
        issuer = TokenIssuer(settings)
        assert not issuer.can_issue
        with pytest.raises(GatewayError) as caught:
            issuer.issue(user_id="u", role=Role.USER, family="f", now=NOW)
        assert caught.value.code is ErrorCode.NOT_IMPLEMENTED
    token = TokenIssuer(SETTINGS["RS256"]).issue(user_id="u", role=Role.USER, family="f", now=NOW).token
    public = TokenSettings(algorithm="RS256", public_key=public_pem(RSA_KEY).replace("\n", "\\n"))
    assert isinstance(verifier(public).verify(token), Principal)


@pytest.mark.parametrize("name", ["user_id", "family"])
def test_a_name_that_no_verifier_would_take_is_not_signed(name: str) -> None:
    for bad in ("", "a b", "é", "a\n", "x" * 129):
        given = {"user_id": "u", "family": "f", name: bad}
        with pytest.raises(ValueError, match="visible ASCII"):
            TokenIssuer(SETTINGS["HS256"]).issue(role=Role.USER, now=NOW, **given)


WEAK_RSA = rsa.generate_private_key(65_537, 1_024)
FAULTS = {
    "no key": (TokenSettings(), "JWT_SECRET_KEY"),
    "no private key": (TokenSettings(algorithm="ES256"), "JWT_PRIVATE_KEY"),
    "short": (TokenSettings(secret_key="k" * 31), "JWT_SECRET_KEY"),
    "short previous": (TokenSettings(secret_key=SECRET, previous_keys=("x",)), "JWT_PREVIOUS_KEYS"),
    "PEM as a secret": (TokenSettings(secret_key=public_pem(RSA_KEY)), "JWT_SECRET_KEY"),
    "JWKS with secrets": (TokenSettings(secret_key=SECRET, jwks_url="http://x/"), "JWKS_URL"),
    "no PEM": (TokenSettings(algorithm="RS256", private_key="x"), "JWT_PRIVATE_KEY"),
    "no public PEM": (TokenSettings(algorithm="RS256", public_key="x"), "JWT_PUBLIC_KEY"),
    "private where public is due": (
        TokenSettings(algorithm="RS256", public_key=pem(RSA_KEY)),
        "JWT_PUBLIC_KEY",
    ),
    "weak RSA": (TokenSettings(algorithm="RS256", private_key=pem(WEAK_RSA)), "JWT_PRIVATE_KEY"),
    "RSA for ES256": (TokenSettings(algorithm="ES256", private_key=pem(RSA_KEY)), "JWT_PRIVATE_KEY"),
    "EC for RS256": (TokenSettings(algorithm="RS256", private_key=pem(EC_KEY)), "JWT_PRIVATE_KEY"),
    "EC for EdDSA": (TokenSettings(algorithm="EdDSA", private_key=pem(EC_KEY)), "JWT_PRIVATE_KEY"),
    "another curve": (
        TokenSettings(algorithm="ES256", private_key=pem(ec.generate_private_key(ec.SECP384R1()))),
        "JWT_PRIVATE_KEY",
    ),
    "Ed448": (
        TokenSettings(algorithm="EdDSA", private_key=pem(ed448.Ed448PrivateKey.generate())),
        "JWT_PRIVATE_KEY",
    ),
}


@pytest.mark.parametrize("settings,field", FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_field_and_show_no_key(settings: TokenSettings, field: str) -> None:
    faults = key_faults(settings)
    assert [fault.field for fault in faults] == [field]
    for key in (settings.secret_key, settings.private_key, settings.public_key, *settings.previous_keys):
        assert len(key) < 8 or key not in str(faults[0])


@ALGORITHMS
def test_good_settings_have_no_fault(algorithm: str) -> None:
    assert key_faults(SETTINGS[algorithm]) == []


def test_nothing_shows_a_token() -> None:
    issued = TokenIssuer(SETTINGS["HS256"]).issue(user_id="u", role=Role.USER, family="f", now=NOW)
    assert issued.token not in repr(issued)


# ---- JWK sets


def jwk(key: Any, algorithm: str, **more: Any) -> dict[str, Any]:
    made = pyjwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True)
    return {**made, **more}


JWKS_SETTINGS = TokenSettings(algorithm="RS256", jwks_url="http://keys.example/jwks")


def test_keys_from_a_set() -> None:
    check = verifier(JWKS_SETTINGS)
    first = pyjwt.encode(claims(), RSA_KEY, algorithm="RS256", headers={"kid": "one"})
    second = pyjwt.encode(claims(), OTHER_RSA_KEY, algorithm="RS256", headers={"kid": "two"})
    crossed = pyjwt.encode(claims(), OTHER_RSA_KEY, algorithm="RS256", headers={"kid": "one"})
    without = pyjwt.encode(claims(), OTHER_RSA_KEY, algorithm="RS256")
    unknown = pyjwt.encode(claims(), OTHER_RSA_KEY, algorithm="RS256", headers={"kid": "three"})
    assert check.verify(first) is BAD  # no key yet

    document = {
        "keys": [
            jwk(EC_KEY.public_key(), "ES256", kid="other type"),
            jwk(RSA_KEY.public_key(), "RS256", kid="encryption", use="enc"),
            jwk(RSA_KEY.public_key(), "RS256", kid="other algorithm", alg="RS512"),
            jwk(WEAK_RSA.public_key(), "RS256", kid="weak"),
            {"kty": "RSA", "n": "!", "e": "AQAB"},
            {"kty": "oct", "k": b64(SECRET.encode())},
            jwk(OTHER_RSA_KEY, "RS256", kid="private"),
            "text",
            jwk(RSA_KEY.public_key(), "RS256", kid="one"),
            jwk(OTHER_RSA_KEY.public_key(), "RS256", kid="two", alg="RS256", use="sig"),
        ]
    }
    assert check.load_jwks(json.dumps(document).encode()) == 2
    for good in (first, second, without, unknown):
        assert isinstance(check.verify(good), Principal)
    assert check.verify(crossed) is BAD

    # A set that can't be used changes nothing; a new one replaces the old.
    for bad in (b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[]}', json.dumps({"keys": [{}] * 33}).encode()):
        with pytest.raises(KeyMaterialError, match="JWKS_URL"):
            check.load_jwks(bad)
    assert isinstance(check.verify(first), Principal)
    only_second = {"keys": [jwk(OTHER_RSA_KEY.public_key(), "RS256", kid="two")]}
    assert check.load_jwks(json.dumps(only_second).encode()) == 1
    assert check.verify(first) is BAD


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA"])
def test_sets_of_other_kinds(algorithm: str) -> None:
    check = verifier(TokenSettings(algorithm=algorithm, jwks_url="http://keys.example/"))  # type: ignore[arg-type]
    key = SIGNING_KEYS[algorithm]
    check.load_jwks(json.dumps({"keys": [jwk(key.public_key(), algorithm)]}).encode())
    assert isinstance(check.verify(pyjwt.encode(claims(), key, algorithm=algorithm)), Principal)


# ---- what a token claims, unverified


def jws(header: bytes, payload: bytes, signature: bytes = b"s") -> str:
    return ".".join(map(b64, (header, payload, signature)))


def uncanonical(part: bytes) -> str:
    """A second spelling of these bytes: bits set that belong to none."""
    text = b64(part)
    assert len(text) % 4, "all bits of the last character are used"
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".index(text[-1])
    return text[:-1] + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[last + 1]


HEAD = b'{"alg":"HS256"}'
X = jws(HEAD, b'{"iss":"x"}')


@pytest.mark.parametrize(
    "token, issuer",
    [
        (jws(HEAD, b'{"iss":"auth-cluster"}'), "auth-cluster"),
        (jws(b'{"alg":"none","kid":7}', b'{"iss":"x","sub":[7]}'), "x"),
        (X, "x"),
        (X + "!", None),
        (X + ".", None),
        (X + "\n", None),
        (X.rpartition(".")[0], None),
        (X.rpartition(".")[0] + ".", None),
        (X.replace(".", ".=", 1), None),
        (jws(HEAD, b'{"iss":""}'), ""),
        (jws(HEAD, b'{"sub":"u"}'), None),
        (jws(HEAD, b'{"iss":7}'), None),
        (jws(HEAD, b'{"iss":null}'), None),
        (jws(HEAD, b'["iss"]'), None),
        (jws(HEAD, b'{"iss":"x"'), None),
        (jws(HEAD, b'{"iss":"\xff"}'), None),
        (jws(HEAD, b'{"iss":"x","y":' + b"[" * 2_000), None),
        (jws(b"{}", b'{"iss":"x"}'), None),
        (jws(b'{"alg":7}', b'{"iss":"x"}'), None),
        (jws(b'["alg"]', b'{"iss":"x"}'), None),
        (jws(b"no", b'{"iss":"x"}'), None),
        (".".join((uncanonical(HEAD + b" "), b64(b'{"iss":"x"}'), "x")), None),
        (".".join((b64(HEAD), uncanonical(b'{"iss":"x"}'), "x")), None),
        ("a.b.c", None),
        ("..", None),
        ("a.b", None),
        ("é.é.é", None),
        ("", None),
    ],
)
def test_the_issuer_that_a_token_claims(token: str, issuer: str | None) -> None:
    told = claimed(token)
    assert (None if told is None else told.iss) == issuer
    assert issuer_of(token) == (issuer or "")


def test_what_a_token_says_of_itself() -> None:
    assert claimed(jws(HEAD, b'{"iss":"x","sub":7,"sid":"s","jti":null,"iat":1.5,"exp":2}')) == Claimed(
        iss="x", sub=7, sid="s", jti=None, iat=1.5
    )


def test_a_token_longer_than_the_bound_is_not_read() -> None:
    short = jws(HEAD, b'{"iss":"x"}', b"")
    assert issuer_of(short + "a" * (MAX_TOKEN_BYTES - len(short))) == "x"
    assert issuer_of(short + "a" * (MAX_TOKEN_BYTES + 1 - len(short))) == ""


@given(st.text() | st.tuples(st.binary(), st.binary(), st.binary()).map(lambda parts: jws(*parts)))
def test_anything_claims_something_or_nothing(token: str) -> None:
    assert isinstance(claimed(token), Claimed | None)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_whatever_the_payload_says(said: Any) -> None:
    told = claimed(jws(HEAD, json.dumps({"iss": said}).encode()))
    assert told is None or told.iss == said
    assert (told is None) == (not isinstance(said, str))
