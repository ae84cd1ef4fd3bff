"""Access tokens: JWS compact (RFC 7515) with one algorithm, pinned by the settings.

PyJWT and cryptography do the mathematics. The few lines that read the compact form and the claims stand
here, because each step is stricter than a general library can be: the token is refused unread over 4,096
bytes, its base64url must be canonical, its `alg` must be *the* algorithm (RFC 8725, 3.1: no `none`, no
public key used as a secret), and the claims must have their exact types.
"""

import base64
import binascii
import re
import time
from collections.abc import Callable, Collection
from typing import Any, Final, Literal

import jwt
import msgspec
from jwt.algorithms import get_default_algorithms

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.security import nonces
from lucid.core.security.key_material import jwks_keys, signing_key, verification_keys
from lucid.core.security.roles import TIERS
from lucid.errors import ErrorCode, GatewayError
from lucid.settings import TokenSettings

MAX_TOKEN_BYTES: Final = 4_096
LONGEST_LIFE_MINUTES: Final = 366 * 24 * 60
"""Of a token minted by hand, the longest there is. Revoking all tokens of a user must last as long."""

REVOCATION_AHEAD_SECONDS: Final = 2.0
"""All tokens of a user are revoked up to this far ahead: a token that was issued meanwhile, by a worker that had read
the user before the change or whose clock is behind, is dead too. Who has read the change issues beyond it.
"""

FARTHEST_MOMENT_SECONDS: Final = 30.0
"""How far the moment in a token's id may be beyond its `iat`: what revocations add up to if several come in a row, on
clocks that differ. A foreign id of that form is believed no further.
"""

NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")
"""`sub` goes into X-User-Id and into Redis keys, `sid` and `jti` into channel messages: visible ASCII, bounded."""

_COMPACT: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_NEWEST_SECONDS: Final = float(2**53)


class IssuedToken(msgspec.Struct, frozen=True):
    """A signed access token and what the caller tells about it."""

    token: str
    token_id: str
    issued_at: float
    expires_at: int
    """Seconds since the epoch, both."""

    def __repr__(self) -> str:
        return f"IssuedToken(token_id={self.token_id!r}, token=***)"


class _Header(msgspec.Struct):
    alg: str
    kid: str | msgspec.UnsetType = msgspec.UNSET
    crit: Any = msgspec.UNSET
    b64: Any = msgspec.UNSET


class _Claims(msgspec.Struct):
    sub: str
    role: str
    sid: str
    jti: str
    iat: int | float
    exp: int | float
    iss: str
    aud: str | list[str]
    typ: Literal["access"]
    nbf: int | float = 0


class Claimed(msgspec.Struct, frozen=True):
    """What a token says of itself; nobody has verified it, and all but `iss` may be of any type."""

    iss: str
    sub: Any = None
    sid: Any = None
    jti: Any = None
    iat: Any = None


class _Named(msgspec.Struct):
    alg: str


class TokenIssuer:
    """Signs access tokens with the configured secret or private key.

    Raises `KeyMaterialError` when the key that the settings hold cannot be used. With keys that only verify
    it can be made, but `can_issue` is false and `issue` raises NOT_IMPLEMENTED.
    """

    def __init__(self, settings: TokenSettings) -> None:
        self._settings = settings
        self._key = signing_key(settings)

    @property
    def can_issue(self) -> bool:
        return self._key is not None

    @property
    def access_seconds(self) -> int:
        return self._settings.access_minutes * 60

    def issue(
        self,
        *,
        user_id: str,
        role: Role,
        family: str,
        now: float,
        minutes: int | None = None,
        after: float = 0.0,
    ) -> IssuedToken:
        """A new token that lives `minutes`, or as long as the settings say. `now`: seconds since the epoch.

        `after`: up to this moment the user's tokens are revoked, which whoever issues has read. It may lie ahead of
        `now`; the token's own moment is put beyond it.

        Raises ValueError for a `user_id` or `family` that is not 1 to 128 characters of visible ASCII, and for
        `minutes` outside 1 to LONGEST_LIFE_MINUTES.
        `jti` carries the moment in milliseconds (UUID version 7) because `iat` has whole seconds: a token
        issued in the second in which all earlier ones were revoked must be told from those.
        """
        if self._key is None:
            raise GatewayError(
                ErrorCode.NOT_IMPLEMENTED,
                "This gateway holds keys that verify tokens only; it cannot issue any",
            )
        if NAME.fullmatch(user_id) is None or NAME.fullmatch(family) is None:
            raise ValueError("a user id must be 1 to 128 characters of visible ASCII")
        if minutes is not None and not 1 <= minutes <= LONGEST_LIFE_MINUTES:
            raise ValueError(f"a token lives 1 to {LONGEST_LIFE_MINUTES} minutes, not {minutes}")
        settings = self._settings
        # A token's moment has whole milliseconds.
        token_id = nonces.timed_id(max(now, after + 0.0015))
        expires_at = int(now) + (self.access_seconds if minutes is None else minutes * 60)
        claims = {
            "sub": user_id,
            "role": role.label,
            "sid": family,
            "jti": token_id,
            "iat": int(now),
            "exp": expires_at,
            "iss": settings.issuer,
            "aud": settings.audience,
            "typ": "access",
        }
        token = jwt.encode(claims, self._key, algorithm=settings.algorithm)
        return IssuedToken(token, token_id, nonces.moment_of(token_id) or now, expires_at)


class TokenVerifier:
    """Says whose a token is. A bad token is a verdict, never an exception.

    Raises `KeyMaterialError` when made with unusable keys. With `jwks_url` it knows no key until
    `load_jwks` was called.
    """

    def __init__(
        self,
        settings: TokenSettings,
        wall_clock: Callable[[], float] = time.time,
        *,
        foreign_issuers: Collection[str] = (),
        may_fetch: Callable[[], bool] = lambda: False,
    ) -> None:
        """Tokens of `foreign_issuers` are verified elsewhere; `may_fetch`: whether the key set can be fetched anew
        at this moment, for a token that names a key which is not in it.
        """
        self._settings = settings
        self._foreign = frozenset(foreign_issuers)
        self._may_fetch = may_fetch
        self._wall_clock = wall_clock
        self._algorithm = get_default_algorithms()[settings.algorithm]
        self._fixed = verification_keys(settings)
        self._keys: tuple[tuple[str, Any], ...] = self._fixed
        self._decode_header = msgspec.json.Decoder(_Header).decode
        self._decode_claims = msgspec.json.Decoder(_Claims).decode

    def load_jwks(self, document: bytes) -> int:
        """Take the usable keys of a JWK set (RFC 7517, 5) beside the configured ones; how many were usable.

        Keys of another type, use or algorithm are passed over, as the RFC says. Raises `KeyMaterialError`
        for a text that is no JWK set or has no usable key: the keys held so far stay. Call
        `TokenMemory.forget` afterwards.
        """
        usable = jwks_keys(document, self._settings.algorithm)
        self._keys = (*self._fixed, *usable)
        return len(usable)

    def verify(self, token: str) -> Principal | ErrorCode | None:
        """The caller, or CREDENTIAL_EXPIRED, or BAD_CREDENTIAL for all else. Knows no revocations.

        None: others must be asked, its issuer, or for new keys.
        """
        if len(token) > MAX_TOKEN_BYTES:
            return ErrorCode.BAD_CREDENTIAL
        if self._foreign and issuer_of(token) in self._foreign:
            return None
        parts = _COMPACT.fullmatch(token)
        if parts is None:
            return ErrorCode.BAD_CREDENTIAL
        try:
            header = self._decode_header(_from_base64url(parts[1]))
            signature = _from_base64url(parts[3])
            if header.alg != self._settings.algorithm or header.crit is not msgspec.UNSET:
                return ErrorCode.BAD_CREDENTIAL
            if header.b64 is not msgspec.UNSET:
                return ErrorCode.BAD_CREDENTIAL
            if not self._signed(token, parts.end(2), signature, header.kid):
                return None if self._is_new(header.kid) else ErrorCode.BAD_CREDENTIAL
            claims = self._decode_claims(_from_base64url(parts[2]))
        except (ValueError, msgspec.DecodeError, RecursionError):
            return ErrorCode.BAD_CREDENTIAL
        return self._judge(claims)

    def _signed(self, token: str, signed_end: int, signature: bytes, kid: str | msgspec.UnsetType) -> bool:
        signed = token[:signed_end].encode("ascii")
        keys = self._keys
        if kid is not msgspec.UNSET and any(name == kid for name, _ in keys):
            keys = tuple(pair for pair in keys if pair[0] == kid)
        return any(self._algorithm.verify(signed, key, signature) for _, key in keys)

    def _is_new(self, kid: str | msgspec.UnsetType) -> bool:
        """Whether the key set may have a key of this name by now. Without a name every forged token would ask."""
        return (
            bool(self._settings.jwks_url)
            and kid is not msgspec.UNSET
            and all(name != kid for name, _ in self._keys)
            and self._may_fetch()
        )

    def _judge(self, claims: _Claims) -> Principal | ErrorCode:
        settings = self._settings
        now = self._wall_clock()
        role = ROLES.get(claims.role)
        audience = (claims.aud,) if isinstance(claims.aud, str) else claims.aud
        if (
            role is None
            or claims.iss != settings.issuer
            or settings.audience not in audience
            or NAME.fullmatch(claims.sub) is None
            or NAME.fullmatch(claims.sid) is None
            or NAME.fullmatch(claims.jti) is None
            or not (0 <= claims.iat <= now + settings.leeway_seconds)
            or not (0 <= claims.nbf <= now + settings.leeway_seconds)
            or not (claims.iat < claims.exp < _NEWEST_SECONDS)
        ):
            return ErrorCode.BAD_CREDENTIAL
        if now >= claims.exp + settings.leeway_seconds:
            return ErrorCode.CREDENTIAL_EXPIRED
        return Principal(
            role=role,
            tier=TIERS[role],
            identifier=claims.sub,
            user_id=claims.sub,
            family=claims.sid,
            token_id=claims.jti,
            issued_at=float(claims.iat),
            expires_at=float(claims.exp),
            via="token",
            moment=moment_of(claims.jti, claims.iat),
        )


def moment_of(token_id: str, issued_at: float) -> float:
    """The exact moment of a token that was issued in the second `issued_at`, if its id (UUID version 7) tells."""
    exact = nonces.moment_of(token_id)
    if exact is not None and int(issued_at) <= exact < int(issued_at) + FARTHEST_MOMENT_SECONDS:
        return exact
    return float(issued_at)


_decode_named = msgspec.json.Decoder(_Named).decode
_decode_claimed = msgspec.json.Decoder(Claimed).decode


def claimed(token: str) -> Claimed | None:
    """What a compact JWS (RFC 7515, 3.1) claims, unverified; None for all that is none or names no issuer.

    Never raises. Says who is to be asked about the token, nothing about whether it is good: the signature is not read.
    """
    parts = _COMPACT.fullmatch(token) if len(token) <= MAX_TOKEN_BYTES else None
    if parts is None:
        return None
    try:
        _decode_named(_from_base64url(parts[1]))
        return _decode_claimed(_from_base64url(parts[2]))
    except (ValueError, msgspec.DecodeError, RecursionError):
        return None


def issuer_of(token: str) -> str:
    """The `iss` that a token claims, not verified; empty for what is no token or names none."""
    told = claimed(token)
    return "" if told is None else told.iss


def _from_base64url(text: str) -> bytes:
    """Strict base64url without padding; ValueError for a second spelling of the same bytes.

    The last character may hold bits that belong to no byte (RFC 4648, 3.5); Python ignores them.
    """
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != text.encode("ascii"):
        raise binascii.Error("not canonical")
    return raw
