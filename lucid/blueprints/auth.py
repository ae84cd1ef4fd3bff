"""`/api/v1/auth`: challenge, login, refresh, logout, verify, status."""

from typing import Annotated

import msgspec
from sanic import Request

from lucid.blueprints.coding import caller_of, principal_of
from lucid.blueprints.resource import Resource
from lucid.core.rules.addresses import identifier
from lucid.core.validation import (
    MAX_PASSWORD_CHARACTERS,
    AccessTokenText,
    ChallengeText,
    Email,
    HardwareWalletText,
    RefreshTokenText,
    SignatureHex,
    TronAddress,
)
from lucid.errors import ErrorCode
from lucid.services.auth_service import AuthService
from lucid.services.challenges import Challenge
from lucid.services.credentials import Credentials, Status, TokenReport
from lucid.services.login_types import TokenPair

TypedPassword = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=MAX_PASSWORD_CHARACTERS,
        description="The password as it was chosen",
        extra_json_schema={"format": "password", "writeOnly": True},
    ),
]
"""Only compared: what may be chosen today says nothing of those that were chosen before."""

# What a call of the authentication cluster may end in.
_CLUSTER = (ErrorCode.BACKEND_BROKEN, ErrorCode.BACKEND_UNAVAILABLE, ErrorCode.BACKEND_TIMEOUT)


class ChallengeBody(msgspec.Struct, forbid_unknown_fields=True):
    tron_address: TronAddress


class WalletLoginBody(msgspec.Struct, forbid_unknown_fields=True):
    tron_address: TronAddress
    signature: SignatureHex
    message: ChallengeText
    hardware_wallet: HardwareWalletText | None = None

    def __repr__(self) -> str:
        return "WalletLoginBody(***)"


class PasswordLoginBody(msgspec.Struct, forbid_unknown_fields=True):
    email: Email
    password: TypedPassword

    def __repr__(self) -> str:
        return "PasswordLoginBody(***)"


class RefreshBody(msgspec.Struct, forbid_unknown_fields=True):
    refresh_token: RefreshTokenText

    def __repr__(self) -> str:
        return "RefreshBody(***)"


class LogoutBody(msgspec.Struct, forbid_unknown_fields=True):
    all_logins: bool = False


class VerifyBody(msgspec.Struct, forbid_unknown_fields=True):
    token: AccessTokenText

    def __repr__(self) -> str:
        return "VerifyBody(***)"


def resource(service: AuthService, credentials: Credentials) -> Resource:
    """The routes, each calling one of the two once."""
    routes = Resource("auth", "/api/v1/auth")

    @routes.post("/challenge", body=ChallengeBody, answer=Challenge, errors=(ErrorCode.DEPENDENCY_AWAY,))
    async def challenge(request: Request, body: ChallengeBody) -> Challenge:
        """A text for a wallet to sign within five minutes."""
        return await service.challenge(body.tron_address, caller_of(request))

    @routes.post(
        "/login",
        body=(WalletLoginBody, PasswordLoginBody),
        answer=TokenPair,
        errors=(
            ErrorCode.BAD_CREDENTIAL,
            ErrorCode.BAD_SIGNATURE,
            ErrorCode.UNKNOWN_CHALLENGE,
            ErrorCode.RATE_LIMITED,
            ErrorCode.CONFLICT,
            ErrorCode.NOT_IMPLEMENTED,
            ErrorCode.DEPENDENCY_AWAY,
            *_CLUSTER,
        ),
    )
    async def login(request: Request, body: WalletLoginBody | PasswordLoginBody) -> TokenPair:
        """Log in with a wallet's signature of a challenge, or with email and password.

        A wallet's first login makes its user. An email that nobody has and a wrong password are answered alike;
        after some failures of one account or address the next attempts must wait (429). Where an authentication
        cluster issues the tokens, there are no passwords (501).
        """
        caller = caller_of(request)
        if isinstance(body, PasswordLoginBody):
            return await service.login_with_password(body.email, body.password, caller)
        return await service.login_with_wallet(
            body.tron_address, body.signature, body.message, body.hardware_wallet, caller
        )

    @routes.post(
        "/refresh",
        body=RefreshBody,
        answer=TokenPair,
        errors=(
            ErrorCode.BAD_CREDENTIAL,
            ErrorCode.RATE_LIMITED,
            ErrorCode.NOT_IMPLEMENTED,
            ErrorCode.DEPENDENCY_AWAY,
            *_CLUSTER,
        ),
    )
    async def refresh(request: Request, body: RefreshBody) -> TokenPair:
        """A new pair of tokens; the refresh token is spent by it.

        A spent one that comes back ends its login.
        """
        return await service.refresh(body.refresh_token, caller_of(request))

    @routes.post(
        "/logout",
        body=LogoutBody,
        body_optional=True,
        errors=(
            ErrorCode.ROLE_TOO_LOW,
            ErrorCode.RATE_LIMITED,
            ErrorCode.DEPENDENCY_AWAY,
            *_CLUSTER,
        ),
    )
    async def logout(request: Request, body: LogoutBody) -> None:
        """End this login, or all logins of its user."""
        await service.logout(principal_of(request), body.all_logins, caller_of(request))

    @routes.post("/verify", body=VerifyBody, answer=TokenReport, errors=(ErrorCode.RATE_LIMITED, *_CLUSTER))
    async def verify(request: Request, body: VerifyBody) -> TokenReport:
        """Whether an access token is good at this moment, and its claims."""
        return await credentials.verify(body.token, identifier(caller_of(request).address))

    @routes.get("/status", answer=Status)
    async def status(request: Request) -> Status:
        """Who the caller is, and until when."""
        return credentials.status(principal_of(request))

    return routes
