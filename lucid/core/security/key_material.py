"""Settings and key sets turned into keys, each held against what its algorithm needs."""

import json
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from lucid.settings import TokenSettings

MIN_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: an HS256 key has at least the size of its hash."""
MIN_RSA_BITS: Final = 2_048
"""RFC 7518, 3.3."""
MAX_JWKS_KEYS: Final = 32

_KEY_TYPES: Final = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}


class KeyMaterialError(ValueError):
    """Key material that cannot be used. `field` is the environment's name for it; no key is in the text."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def key_faults(settings: TokenSettings) -> list[KeyMaterialError]:
    """What is wrong with the key material, for the settings' own check; empty when it can be used."""
    faults: list[KeyMaterialError] = []
    for make in (signing_key, verification_keys):
        try:
            make(settings)
        except KeyMaterialError as fault:
            if str(fault) not in [str(known) for known in faults]:
                faults.append(fault)
    return faults


def signing_key(settings: TokenSettings) -> Any:
    """The configured secret or private key; None: there are keys that verify only. Raises `KeyMaterialError`."""
    if settings.algorithm == "HS256":
        return _secret("JWT_SECRET_KEY", settings.secret_key) if settings.secret_key else None
    if settings.private_key:
        return _private_key("JWT_PRIVATE_KEY", settings.private_key, settings.algorithm)
    return None


def verification_keys(settings: TokenSettings) -> tuple[tuple[str, Any], ...]:
    """Every configured key that verifies, the current one first, each with an empty key id.

    Empty with `jwks_url` alone. Raises `KeyMaterialError`.
    """
    algorithm = settings.algorithm
    keys: list[Any] = []
    if algorithm == "HS256":
        if settings.jwks_url:
            raise KeyMaterialError(
                "JWKS_URL", "must be empty with JWT_ALGORITHM=HS256, whose keys are secrets"
            )
        if settings.secret_key:
            keys.append(_secret("JWT_SECRET_KEY", settings.secret_key))
        keys += [_secret("JWT_PREVIOUS_KEYS", text) for text in settings.previous_keys]
    else:
        if settings.private_key:
            keys.append(_private_key("JWT_PRIVATE_KEY", settings.private_key, algorithm).public_key())
        if settings.public_key:
            keys.append(_public_key("JWT_PUBLIC_KEY", settings.public_key, algorithm))
        keys += [_public_key("JWT_PREVIOUS_KEYS", text, algorithm) for text in settings.previous_keys]
    if not keys and not settings.jwks_url:
        wanted = "JWT_SECRET_KEY" if algorithm == "HS256" else "JWT_PRIVATE_KEY"
        raise KeyMaterialError(wanted, f"must be given: no key for {algorithm}")
    return tuple(("", key) for key in keys)


def jwks_keys(document: bytes, algorithm: str) -> tuple[tuple[str, Any], ...]:
    """The usable keys of a JWK set (RFC 7517, 5) and their ids, "" for none. Keys of another type, use or algorithm
    are passed over, as the RFC says.

    Raises `KeyMaterialError` for a text that is no JWK set or has no usable key.
    """
    try:
        entries = json.loads(document)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeyMaterialError("JWKS_URL", "did not answer with a JWK set") from error
    if not isinstance(entries, list) or len(entries) > MAX_JWKS_KEYS:
        raise KeyMaterialError("JWKS_URL", f"must answer with at most {MAX_JWKS_KEYS} keys")
    usable: list[tuple[str, Any]] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("kty") != _KEY_TYPES.get(algorithm):
            continue
        if entry.get("use", "sig") != "sig" or entry.get("alg", algorithm) != algorithm or "d" in entry:
            continue
        try:
            key = jwt.PyJWK(entry, algorithm=algorithm).key
            _check_kind("JWKS_URL", key, algorithm)
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
        name = entry.get("kid", "")
        usable.append((name if isinstance(name, str) else "", key))
    if not usable:
        raise KeyMaterialError("JWKS_URL", f"answered with no usable key for {algorithm}")
    return tuple(usable)


def _secret(field: str, text: str) -> bytes:
    secret = text.encode("utf-8")
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyMaterialError(field, f"must have at least {MIN_SECRET_BYTES} bytes")
    if b"-----BEGIN " in secret:
        raise KeyMaterialError(field, "must be a secret with HS256, not a key file")
    return secret


def _pem(text: str) -> bytes:
    # Environments that hold one line per variable carry a PEM with its line ends escaped.
    return text.replace("\\n", "\n").strip().encode("utf-8")


def _private_key(field: str, text: str, algorithm: str) -> Any:
    try:
        key = load_pem_private_key(_pem(text), password=None)
    except (ValueError, TypeError) as error:
        raise KeyMaterialError(field, "must be an unencrypted private key in PEM") from error
    _check_kind(field, key.public_key(), algorithm)
    return key


def _public_key(field: str, text: str, algorithm: str) -> Any:
    try:
        key = load_pem_public_key(_pem(text))
    except ValueError as error:
        raise KeyMaterialError(field, "must be a public key in PEM") from error
    _check_kind(field, key, algorithm)
    return key


def _check_kind(field: str, key: Any, algorithm: str) -> None:
    """Raises `KeyMaterialError` unless this public key is one for `algorithm` (RFC 7518, 3.3 and 3.4; RFC
    8037, 3.1).
    """
    if algorithm == "RS256":
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < MIN_RSA_BITS:
            raise KeyMaterialError(field, f"must be an RSA key of at least {MIN_RSA_BITS} bits for RS256")
    elif algorithm == "ES256":
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise KeyMaterialError(field, "must be a key on the curve P-256 for ES256")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise KeyMaterialError(field, "must be an Ed25519 key for EdDSA")
