"""What logging in takes and gives, whoever issues the tokens."""

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from lucid.core.exchange import RoleName
from lucid.core.rules.refusals import ClaimHolder
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller, record

Charge = Callable[[str, str, ClaimHolder | None], Awaitable[None]]
"""(limit name, identifier, whose answer shall show it): charge one request; raises GatewayError RATE_LIMITED
when over.
"""


class AuthenticatedUser(msgspec.Struct, frozen=True):
    """The user part of a login's answer, as the authentication cluster spells it."""

    user_id: str
    tron_address: str | None
    role: RoleName
    permissions: tuple[str, ...]


class TokenPair(msgspec.Struct, frozen=True):
    """The answer to a login and to a refresh. `expires_in`: seconds of the access token.

    `user` is null only after a refresh by an authentication cluster that did not say whose the tokens are.
    """

    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"]
    expires_in: int
    user: AuthenticatedUser | None

    def __repr__(self) -> str:
        return f"TokenPair(user={self.user!r}, tokens=***)"


def login_failed(code: ErrorCode, caller: Caller, message: str = "", **who: Any) -> GatewayError:
    """The error of a login that is refused, recorded."""
    record("login_failed", caller, code=code.value, **who)
    return GatewayError(code, message)


def bad_refresh_token() -> GatewayError:
    """The same whatever is wrong with it."""
    return GatewayError(ErrorCode.BAD_CREDENTIAL, "The refresh token is not valid")
