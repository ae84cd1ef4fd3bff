"""`/api/v1/auth`: challenge, login, refresh, logout, verify, status."""

import msgspec
from sanic import Blueprint, HTTPResponse, Request

from lucid.blueprints.coding import (
    NO_STORE,
    Body,
    answer,
    caller_of,
    keys_of,
    no_content,
    principal_of,
)
from lucid.core.validation import (
    AccessTokenText,
    ChallengeText,
    HardwareWalletText,
    RefreshTokenText,
    SignatureHex,
    TronAddress,
)
from lucid.services.auth_service import AuthService


class ChallengeBody(msgspec.Struct, forbid_unknown_fields=True):
    tron_address: TronAddress


class WalletLoginBody(msgspec.Struct, forbid_unknown_fields=True):
    tron_address: TronAddress
    signature: SignatureHex
    message: ChallengeText
    hardware_wallet: HardwareWalletText | None = None


class PasswordLoginBody(msgspec.Struct, forbid_unknown_fields=True):
    email: str
    password: str


class RefreshBody(msgspec.Struct, forbid_unknown_fields=True):
    refresh_token: RefreshTokenText


class LogoutBody(msgspec.Struct, forbid_unknown_fields=True):
    all_logins: bool = False


class VerifyBody(msgspec.Struct, forbid_unknown_fields=True):
    token: AccessTokenText


def blueprint(service: AuthService) -> Blueprint:
    """The routes, each calling `service` once. Who may call them the gateway's table says."""
    routes = Blueprint("auth", url_prefix="/api/v1/auth")
    challenge_body = Body(ChallengeBody)
    wallet_body = Body(WalletLoginBody)
    password_body = Body(PasswordLoginBody)
    refresh_body = Body(RefreshBody)
    logout_body = Body(LogoutBody)
    verify_body = Body(VerifyBody)

    @routes.post("/challenge")
    async def challenge(request: Request) -> HTTPResponse:
        body = challenge_body.read(request.body)
        return answer(await service.challenge(body.tron_address), headers=NO_STORE)

    @routes.post("/login")
    async def login(request: Request) -> HTTPResponse:
        names = keys_of(request.body)
        if names & {"email", "password"} and "tron_address" not in names:
            password = password_body.read(request.body)
            return answer(await service.login_with_password(password.email, password.password))
        body = wallet_body.read(request.body)
        pair = await service.login_with_wallet(
            body.tron_address, body.signature, body.message, body.hardware_wallet, caller_of(request)
        )
        return answer(pair, headers=NO_STORE)

    @routes.post("/refresh")
    async def refresh(request: Request) -> HTTPResponse:
        body = refresh_body.read(request.body)
        return answer(await service.refresh(body.refresh_token, caller_of(request)), headers=NO_STORE)

    @routes.post("/logout")
    async def logout(request: Request) -> HTTPResponse:
        # All of its fields are optional, so is the body.
        body = logout_body.read(request.body) if request.body else LogoutBody()
        await service.logout(principal_of(request), body.all_logins, caller_of(request))
        return no_content()

    @routes.post("/verify")
    async def verify(request: Request) -> HTTPResponse:
        body = verify_body.read(request.body)
        return answer(service.verify(body.token), headers=NO_STORE)

    async def status(request: Request) -> HTTPResponse:
        return answer(service.status(principal_of(request)), headers=NO_STORE)

    routes.add_route(status, "/status", methods=["GET", "HEAD"])
    return routes
