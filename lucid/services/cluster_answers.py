"""What the authentication cluster's answers to logins and to `verify` must be to be believed. Pure; the calls are made
in auth_cluster.py.

An answer is held against the token that it is about: one that belongs to somebody else would log one user in as
another.
"""

import re
from typing import Any, Final

import msgspec

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.security import jwt
from lucid.core.security.roles import PERMISSIONS, TIERS
from lucid.core.security.tron import is_address
from lucid.core.validation import is_user_id
from lucid.errors import ErrorCode

MAX_PERMISSIONS: Final = 256
CLOCK_SKEW_SECONDS: Final = 60.0
"""How far the cluster's clock may be ahead of this one before `iat` is taken for nonsense."""
ACCESS_TOKEN: Final = re.compile(rf"[\x21-\x7e]{{1,{jwt.MAX_TOKEN_BYTES}}}")
"""An access token must fit the Authorization field."""

_LONGEST_LIFE_SECONDS: Final = jwt.LONGEST_LIFE_MINUTES * 60
# A refresh token is VSCHAR (RFC 6749, appendix A.17).
_REFRESH: Final = re.compile(rf"[\x20-\x7e]{{1,{jwt.MAX_TOKEN_BYTES}}}")
_PERMISSION: Final = re.compile(r"[a-z0-9_.-]{1,64}:[a-z0-9_.-]{1,64}")


class Nonsense(Exception):
    """An answer that cannot be believed; its text says why, without any value from it."""


class ClusterTokens(msgspec.Struct, frozen=True):
    """A pair of the cluster's own tokens, to be passed through. `expires_in`: seconds of the access token."""

    access_token: str
    refresh_token: str
    token_type: str
    expires_in: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens=***)"


class ClusterLogin(ClusterTokens, frozen=True):
    """The pair and whose it is.

    `tron_address` is never None in the answer to a login, where it is the one that signed.
    """

    user_id: str
    tron_address: str | None
    role: Role
    permissions: tuple[str, ...]

    def __repr__(self) -> str:
        return f"ClusterLogin(user_id={self.user_id!r}, role={self.role!r}, tokens=***)"


class _User(msgspec.Struct):
    user_id: str
    role: str
    tron_address: str | None = None
    permissions: list[str] | None = None


class RawTokens(msgspec.Struct):
    """The answer to a login or a refresh as it came, before `checked_tokens`."""

    access_token: str
    refresh_token: str
    token_type: str
    expires_in: int
    user: _User | None = None


class RawVerified(msgspec.Struct):
    """The answer of `verify` as it came, before `principal_of`."""

    active: bool
    sub: str | None = None
    user_id: str | None = None
    role: str | None = None
    sid: str | None = None
    jti: str | None = None
    iat: int | float | None = None
    exp: int | float | None = None
    iss: str | None = None


def checked_tokens(answer: RawTokens) -> ClusterTokens:
    """The answer as what it claims to be. Raises Nonsense."""
    _require(ACCESS_TOKEN.fullmatch(answer.access_token), "access_token is no token")
    _require(_REFRESH.fullmatch(answer.refresh_token), "refresh_token is no token")
    # The name's case does not matter (RFC 6749, 5.1).
    _require(answer.token_type.lower() == "bearer", "token_type is not Bearer")
    _require(1 <= answer.expires_in <= _LONGEST_LIFE_SECONDS, "expires_in is out of bounds")
    pair = ClusterTokens(answer.access_token, answer.refresh_token, "Bearer", answer.expires_in)
    user = answer.user
    if user is None:
        return pair
    role = ROLES.get(user.role)
    claimed = jwt.claimed(answer.access_token)
    _require(is_user_id(user.user_id), "user.user_id is no user id")
    if role is None:
        raise Nonsense("user.role is unknown")
    _require(
        claimed is None or claimed.sub in (None, user.user_id), "user.user_id is not the access token's sub"
    )
    _require(user.tron_address is None or is_address(user.tron_address), "user.tron_address is no address")
    given = PERMISSIONS[role] if user.permissions is None else tuple(user.permissions)
    _require(
        len(given) <= MAX_PERMISSIONS and all(map(_PERMISSION.fullmatch, given)),
        "user.permissions are not of the form area:verb",
    )
    return ClusterLogin(
        pair.access_token,
        pair.refresh_token,
        pair.token_type,
        pair.expires_in,
        user.user_id,
        user.tron_address,
        role,
        given,
    )


def principal_of(answer: RawVerified, claimed: jwt.Claimed, now: float) -> Principal | ErrorCode:
    """Whom an active token names. Raises Nonsense where the answer cannot be about this token.

    What the answer leaves out is taken from the token, which the cluster has just called its own.
    """
    user_id = answer.sub or answer.user_id or ""
    _require(is_user_id(user_id), "sub is no user id")
    _require(answer.user_id in (None, user_id), "sub and user_id are two users")
    _require(claimed.sub in (None, user_id), "sub is not the token's")
    _require(answer.iss in (None, claimed.iss), "iss is not the token's")
    role = ROLES.get(answer.role or "")
    if role is None:
        raise Nonsense("role is unknown")
    if answer.exp is None:
        raise Nonsense("exp is missing")
    latest_issue = now + CLOCK_SKEW_SECONDS
    _require(0 < answer.exp <= latest_issue + _LONGEST_LIFE_SECONDS, "exp is out of bounds")
    issued_at = 0.0
    if answer.iat is not None:
        _require(0 <= answer.iat <= latest_issue and answer.iat < answer.exp, "iat is out of bounds")
        issued_at = float(answer.iat)
    elif type(claimed.iat) in (int, float) and 0 <= claimed.iat <= latest_issue:
        issued_at = float(claimed.iat)
    family = _name("sid", answer.sid, claimed.sid)
    token_id = _name("jti", answer.jti, claimed.jti)
    if now >= answer.exp:
        return ErrorCode.CREDENTIAL_EXPIRED
    return Principal(
        role=role,
        tier=TIERS[role],
        identifier=user_id,
        user_id=user_id,
        family=family,
        token_id=token_id,
        issued_at=issued_at,
        expires_at=float(answer.exp),
        via="token",
        moment=jwt.moment_of(token_id, issued_at),
    )


def _name(what: str, answered: str | None, claimed: Any) -> str:
    """`sid` and `jti` go into keys and channel messages. Empty: neither side names one."""
    own = claimed if isinstance(claimed, str) and jwt.NAME.fullmatch(claimed) else ""
    if not answered:
        return own
    _require(jwt.NAME.fullmatch(answered), f"{what} is no name")
    _require(own in ("", answered), f"{what} is not the token's")
    return answered


def _require(is_so: object, reason: str) -> None:
    if not is_so:
        raise Nonsense(reason)
