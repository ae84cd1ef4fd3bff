"""Logging in, staying logged in, logging out; and who a credential belongs to.

A login with a wallet: `challenge` gives a text, the wallet signs it, `login_with_wallet` compares,
verifies, finds or makes the user, spends the challenge and starts a *family*: the login's line of refresh
tokens. Access tokens carry the family as `sid`. `refresh` replaces the pair, `logout` ends the family and
revokes its access tokens.
"""

import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.rules.refusals import ClaimHolder
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys as keys
from lucid.core.security import nonces, tron
from lucid.core.security.jwt import IssuedToken, TokenIssuer
from lucid.core.security.roles import PERMISSIONS, TIERS
from lucid.core.validation import HardwareWalletText, checked_address, normal_text
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.documents import FamilyDocument, HardwareWallet, UserDocument
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError, away, rfc3339
from lucid.services.challenges import Challenge, Challenges
from lucid.services.look_ups import LookUps
from lucid.services.revocations import Revocation, Revocations, of_user
from lucid.services.user_service import effective_role
from lucid.settings import TokenSettings

Charge = Callable[[str, str, ClaimHolder | None], Awaitable[None]]
"""(limit name, identifier, whose answer shall show it): charge one request; raises GatewayError RATE_LIMITED
when over.
"""

_audit: Final = logging.getLogger("lucid.audit")


class Caller(msgspec.Struct, frozen=True):
    """From where a request came.

    `address` is the whole address, as the audit log tells it; whoever charges a limit counts an IPv6 one by its
    network. `exchange` is told what was charged on top; None: nobody shows it.
    """

    address: str
    request_id: str = ""
    exchange: ClaimHolder | None = None


class AuthenticatedUser(msgspec.Struct, frozen=True):
    """The user part of a login's answer, as the authentication cluster spells it."""

    user_id: str
    tron_address: str | None
    role: str
    permissions: tuple[str, ...]


class TokenPair(msgspec.Struct, frozen=True):
    """The answer to a login and to a refresh. `expires_in`: seconds of the access token."""

    access_token: str
    refresh_token: str
    token_type: str
    expires_in: int
    user: AuthenticatedUser

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
    role: str
    permissions: tuple[str, ...]
    credential: str
    issued_at: str | None
    expires_at: str | None


class AuthService:
    """One per worker. Its methods raise GatewayError, DEPENDENCY_AWAY wherever MongoDB or Redis is needed
    and away.
    """

    def __init__(
        self,
        *,
        users: UserRepository,
        refresh_tokens: RefreshTokenRepository,
        api_keys: ApiKeyRepository,
        challenges: Challenges,
        revocations: Revocations,
        issuer: TokenIssuer,
        memory: TokenMemory,
        settings: TokenSettings,
        admin_addresses: frozenset[str],
        charge: Charge,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._users = users
        self._refresh_tokens = refresh_tokens
        self._api_keys = api_keys
        self._challenges = challenges
        self._revocations = revocations
        self._issuer = issuer
        self._memory = memory
        self._settings = settings
        self._admin_addresses = admin_addresses
        self._charge = charge
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._look_ups = LookUps(
            self._find_api_key, lambda: away("mongodb", "Too many API keys are being looked up")
        )

    async def challenge(self, tron_address: str) -> Challenge:
        """A text for this wallet to sign within five minutes. Raises BAD_FIELD for a wrong checksum."""
        return await self._challenges.make(checked_address(tron_address))

    async def login_with_wallet(
        self,
        tron_address: str,
        signature: str,
        message: str,
        hardware_wallet: HardwareWalletText | None,
        caller: Caller,
    ) -> TokenPair:
        """Tokens for the owner of this wallet, whose first login makes the user.

        Raises UNKNOWN_CHALLENGE (not given out, spent or expired, or changed in any character),
        BAD_SIGNATURE (which spends nothing), BAD_FIELD, NOT_IMPLEMENTED where this gateway's keys only
        verify.
        """
        self._require_issuer()
        checked_address(tron_address)
        nonce = await self._challenges.find(tron_address, message)
        if nonce is None:
            raise self._login_failed(ErrorCode.UNKNOWN_CHALLENGE, tron_address, caller)
        if not tron.verify(tron_address, message.encode(), signature):
            raise self._login_failed(ErrorCode.BAD_SIGNATURE, tron_address, caller)
        device = None
        if hardware_wallet is not None:
            device = HardwareWallet(hardware_wallet.type, normal_text(hardware_wallet.device_id))
        # The user first, the challenge then: with MongoDB away the challenge is still good afterwards.
        # Finding or making the user twice is harmless; it is the spending that only one of two logins can
        # do.
        user = await self._users.upsert_by_tron_address(tron_address, nonces.new_id(), device)
        if not await self._challenges.spend(tron_address, nonce):
            raise self._login_failed(ErrorCode.UNKNOWN_CHALLENGE, tron_address, caller)
        family = nonces.new_id()
        refresh_token = nonces.refresh_token()
        now = self._now()
        await self._refresh_tokens.start_family(
            family,
            user.user_id,
            keys.digest(refresh_token),
            now,
            now + dt.timedelta(days=self._settings.refresh_days),
        )
        role = effective_role(user, self._admin_addresses)
        issued = self._issue(user, role, family)
        self._record(
            "login",
            caller,
            user_id=user.user_id,
            role=role.label,
            family=family,
            hardware_wallet=device.type if device else None,
        )
        return self._pair(user, role, issued, refresh_token)

    async def login_with_password(self, email: str, password: str) -> TokenPair:
        """Not there yet, and says so."""
        raise GatewayError(
            ErrorCode.NOT_IMPLEMENTED, "Login with email and password is not available yet; use a TRON wallet"
        )

    async def refresh(self, refresh_token: str, caller: Caller) -> TokenPair:
        """A new pair for a good refresh token, which is spent by it. The login's first expiry stays.

        A token that comes back after it was spent has been in two hands: its family ends. Raises
        BAD_CREDENTIAL; RATE_LIMITED by the limit `refresh` of the user, for unknown tokens by `login` of
        the address.
        """
        self._require_issuer()
        spent = keys.digest(refresh_token)
        family = await self._refresh_tokens.find_family(spent, self._now())
        if family is None:
            await self._charge("login", caller.address, caller.exchange)
            raise _bad_refresh_token()
        await self._charge("refresh", family.user_id, caller.exchange)
        if family.revoked_at is not None:
            raise _bad_refresh_token()
        if family.current != spent:
            raise await self._reused(family, caller)
        user = await self._users.find_by_id(family.user_id)
        if user is None:
            await self._end_family(family)
            raise _bad_refresh_token()
        # Signed before the rotation: whoever revokes all of a user's tokens ends the families first, so a
        # rotation that still went through carries a token older than that revocation.
        role = effective_role(user, self._admin_addresses)
        issued = self._issue(user, role, family.family)
        fresh = nonces.refresh_token()
        if not await self._refresh_tokens.rotate(family, spent, keys.digest(fresh), self._now()):
            raise await self._reused(family, caller)
        return self._pair(user, role, issued, fresh)

    async def logout(self, principal: Principal, all_logins: bool, caller: Caller) -> None:
        """End the login that this token comes from, or every login of its user.

        MongoDB first, so that no new token can be had, then the access tokens that are out. Needs MongoDB and
        not Redis: without it this worker refuses the tokens at once, the others once it is back. Raises
        ROLE_TOO_LOW for a caller with an API key, which belongs to no login.
        """
        if principal.via != "token":
            raise GatewayError(ErrorCode.ROLE_TOO_LOW, "Only a token from a login can log out")
        await self._refresh_tokens.revoke_family(principal.family, self._now())
        revocations = [Revocation(family=principal.family, until=self._until(principal.expires_at))]
        if all_logins:
            await self._refresh_tokens.revoke_user(principal.user_id, self._now())
            revocations.append(of_user(principal.user_id, self._wall_clock()))
        await self._revocations.revoke(*revocations)
        self._record(
            "revocation",
            caller,
            user_id=principal.user_id,
            family=principal.family,
            all_logins=all_logins,
            reason="logout",
        )

    def verify(self, token: str) -> TokenReport:
        """Whether an access token is good at this moment, revocations included."""
        verdict = self._memory.principal(token, self._monotonic())
        if isinstance(verdict, ErrorCode):
            return TokenReport(active=False)
        return TokenReport(
            active=True,
            sub=verdict.user_id,
            role=verdict.role.label,
            sid=verdict.family,
            jti=verdict.token_id,
            iat=int(verdict.issued_at),
            exp=int(verdict.expires_at),
            iss=self._settings.issuer,
            aud=self._settings.audience,
            typ="access",
        )

    def status(self, principal: Principal) -> Status:
        """Who the caller is. From the credential alone: the user need not be stored here."""
        return Status(
            user_id=principal.user_id,
            role=principal.role.label,
            permissions=PERMISSIONS[principal.role],
            credential=principal.via,
            issued_at=_moment(principal.issued_at),
            expires_at=_moment(principal.expires_at),
        )

    async def look_up_api_key(self, digest: bytes) -> Principal | ErrorCode:
        """Whose key has this digest: BAD_CREDENTIAL for an unknown or expired one, or one of a deleted
        user.

        It acts as its owner, with the key's role but never more than the owner has now. Raises
        DEPENDENCY_AWAY, also where too many others are being looked up.
        """
        return await self._look_ups(digest)

    async def _find_api_key(self, digest: bytes) -> Principal | ErrorCode:
        key = await self._api_keys.find_by_digest(digest, self._now())
        if key is None or key.role not in ROLES:
            return ErrorCode.BAD_CREDENTIAL
        owner = await self._users.find_by_id(key.user_id)
        if owner is None:
            return ErrorCode.BAD_CREDENTIAL
        role = min(ROLES[key.role], effective_role(owner, self._admin_addresses))
        return Principal(
            role=role,
            tier=TIERS[role],
            identifier=owner.user_id,
            user_id=owner.user_id,
            token_id=key.key_id,
            issued_at=key.created_at.timestamp(),
            expires_at=0.0 if key.expires_at is None else key.expires_at.timestamp(),
            via="api_key",
        )

    def _require_issuer(self) -> None:
        if not self._issuer.can_issue:
            raise GatewayError(
                ErrorCode.NOT_IMPLEMENTED, "This gateway holds keys that verify tokens only; log in elsewhere"
            )

    def _issue(self, user: UserDocument, role: Role, family: str) -> IssuedToken:
        return self._issuer.issue(user_id=user.user_id, role=role, family=family, now=self._wall_clock())

    def _pair(self, user: UserDocument, role: Role, issued: IssuedToken, refresh_token: str) -> TokenPair:
        return TokenPair(
            access_token=issued.token,
            refresh_token=refresh_token,
            token_type="Bearer",  # noqa: S106
            expires_in=self._issuer.access_seconds,
            user=AuthenticatedUser(user.user_id, user.tron_address, role.label, PERMISSIONS[role]),
        )

    async def _reused(self, family: FamilyDocument, caller: Caller) -> GatewayError:
        if await self._end_family(family):
            self._record("refresh_reuse", caller, user_id=family.user_id, family=family.family)
        return _bad_refresh_token()

    async def _end_family(self, family: FamilyDocument) -> bool:
        """End a login and its access tokens; False where it had ended before."""
        if not await self._refresh_tokens.revoke_family(family.family, self._now()):
            return False
        await self._revocations.revoke(Revocation(family=family.family, until=self._until(0.0)))
        return True

    def _until(self, expires_at: float) -> float:
        """When no token of one login can be good any more: a token's life from now, or this one's if longer."""
        newest = self._wall_clock() + self._issuer.access_seconds
        return max(newest, expires_at) + self._settings.leeway_seconds + 1.0

    def _login_failed(self, code: ErrorCode, tron_address: str, caller: Caller) -> GatewayError:
        self._record("login_failed", caller, tron_address=tron_address, code=code.value)
        return GatewayError(code)

    def _record(self, event: str, caller: Caller, **fields: Any) -> None:
        """One line in the audit log. What is secret does not come in: ids and codes only."""
        shown = {"address": caller.address, "request_id": caller.request_id, **fields}
        _audit.info(event, extra={"audit": {"event": event, **shown}})

    def _now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self._wall_clock(), dt.UTC)


def _bad_refresh_token() -> GatewayError:
    return GatewayError(ErrorCode.BAD_CREDENTIAL, "The refresh token is not valid")


def _moment(seconds: float) -> str | None:
    return rfc3339(dt.datetime.fromtimestamp(seconds, dt.UTC)) if seconds else None
