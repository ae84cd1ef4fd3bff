"""What logging in takes and gives, whoever issues the tokens."""

import datetime as dt
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import msgspec

from lucid.core.exchange import RoleName
from lucid.core.rules.refusals import ClaimHolder
from lucid.core.validation import Moment
from lucid.errors import ErrorCode, GatewayError

Charge = Callable[[str, str, ClaimHolder | None], Awaitable[None]]
"""(limit name, identifier, whose answer shall show it): charge one request; raises GatewayError RATE_LIMITED
when over.
"""

_audit: Final = logging.getLogger("lucid.audit")


class Caller(msgspec.Struct, frozen=True):
    """From where a request came.

    `address` is the whole address, as the audit log tells it; whoever charges a limit counts an IPv6 one by its
    network. `exchange` is told what was charged on top; None: nobody shows it. `token` is the access token that
    the request came with, which the authentication cluster wants to see at a logout.
    """

    address: str
    request_id: str = ""
    exchange: ClaimHolder | None = None
    token: str = ""

    def __repr__(self) -> str:
        token = "***" if self.token else ""
        return f"Caller(address={self.address!r}, request_id={self.request_id!r}, token={token!r})"


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


class TokenReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a token is: its claims while it is active, `active` false alone otherwise."""

    active: bool
    sub: str = ""
    role: str = ""
    sid: str = ""
    jti: str = ""
    iat: int = 0
    exp: int = 0
    iss: str = ""
    aud: str = ""
    typ: str = ""


class Status(msgspec.Struct, frozen=True):
    """Who the caller is, and until when the credential is good; null: it does not expire."""

    user_id: str
    role: RoleName
    permissions: tuple[str, ...]
    credential: Literal["token", "api_key"]
    issued_at: Moment | None
    expires_at: Moment | None


def record(event: str, caller: Caller, **fields: Any) -> None:
    """One line in the audit log. What is secret does not come in: ids and codes only."""
    shown = {"address": caller.address, "request_id": caller.request_id, **fields}
    _audit.info(event, extra={"audit": {"event": event, **shown}})


def login_failed(code: ErrorCode, caller: Caller, message: str = "", **who: Any) -> GatewayError:
    """The error of a login that is refused, recorded."""
    record("login_failed", caller, code=code.value, **who)
    return GatewayError(code, message)


def bad_refresh_token() -> GatewayError:
    """The same whatever is wrong with it."""
    return GatewayError(ErrorCode.BAD_CREDENTIAL, "The refresh token is not valid")


def utc(seconds: float) -> dt.datetime:
    """Seconds since the epoch as the moment that is stored."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
