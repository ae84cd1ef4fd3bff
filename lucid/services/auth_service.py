"""Logging in, staying logged in, logging out.

A login with a wallet: `challenge` gives a text, the wallet signs it, `login_with_wallet` compares,
verifies, finds or makes the user, spends the challenge and starts a *family*: the login's line of refresh
tokens. Access tokens carry the family as `sid`. `refresh` replaces the pair, `logout` ends the family and
revokes its access tokens. A login with email and password differs in how it finds the user, and in nothing else.

With an authentication cluster the challenge and the signature are looked at here all the same; the tokens, their
refresh and their logout are the cluster's.

*Against changes meanwhile.* Whoever changes a role or a password, or deletes a user, writes that and the moment up
to which the user's tokens are dead in one step, two seconds ahead (`user_moment`), and then ends the user's
families where that is due. Whoever issues a token takes its moment first and reads the user then:

- read before the change: the token's moment is earlier still, so it is among the dead ones, however long the read
  was on its way;
- read after it: the token has the new role, and a moment beyond the dead ones (`after=`).

A login starts its family first and reads the user then, for the same reason: read before the change, the family was
there when families were ended; read after it, the login sees the change and gives nothing out.

*A caller who hangs up* breaks off neither the end of a login, of whatever kind, nor the judgement of a password: half
of the one would leave tokens alive that the other half said were dead, and half of the other is a guess that no record
tells of. Whatever else breaks off gave nothing to anybody.
"""

import datetime as dt
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from lucid.core.exchange import Principal, Role
from lucid.core.security import api_keys as keys
from lucid.core.security import nonces
from lucid.core.security.jwt import REVOCATION_AHEAD_SECONDS, IssuedToken, TokenIssuer
from lucid.core.security.roles import PERMISSIONS
from lucid.core.validation import (
    MAX_PASSWORD_CHARACTERS,
    HardwareWalletText,
    bad_field,
    checked_address,
    checked_email,
    normal_text,
)
from lucid.database.documents import FamilyDocument, HardwareWallet, UserDocument
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller, record, utc
from lucid.services.challenges import Challenge, Challenges
from lucid.services.cluster_logins import ClusterLogins
from lucid.services.login_delays import Attempt, LoginDelays
from lucid.services.login_types import (
    AuthenticatedUser,
    Charge,
    TokenPair,
    bad_refresh_token,
    login_failed,
)
from lucid.services.password_hashing import PasswordHashing
from lucid.services.revocations import Revocation, Revocations, dead_until, of_user
from lucid.services.unbroken import Unbroken
from lucid.services.user_rules import effective_role
from lucid.settings import TokenSettings

_PASSWORD_TRIES: Final = 3


class AuthService:
    """One per worker. Its methods raise GatewayError, DEPENDENCY_AWAY wherever MongoDB or Redis is needed
    and away, BACKEND_... where the authentication cluster is.
    """

    def __init__(
        self,
        *,
        users: UserRepository,
        refresh_tokens: RefreshTokenRepository,
        challenges: Challenges,
        revocations: Revocations,
        hashing: PasswordHashing,
        delays: LoginDelays,
        issuer: TokenIssuer,
        settings: TokenSettings,
        admin_addresses: frozenset[str],
        charge: Charge,
        cluster: ClusterLogins | None = None,
        unbroken: Unbroken,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`cluster` gives the tokens instead of `issuer`."""
        self._users = users
        self._refresh_tokens = refresh_tokens
        self._challenges = challenges
        self._revocations = revocations
        self._hashing = hashing
        self._delays = delays
        self._issuer = issuer
        self._settings = settings
        self._admin_addresses = admin_addresses
        self._charge = charge
        self._cluster = cluster
        self._unbroken = unbroken
        self._wall_clock = wall_clock

    # --- logging in ------------------------------------------------------------------------------------

    async def challenge(self, tron_address: str, caller: Caller) -> Challenge:
        """A text for this wallet to sign within five minutes. Raises BAD_FIELD for a wrong checksum."""
        return await self._challenges.make(checked_address(tron_address), caller.address)

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
        BAD_SIGNATURE (which spends nothing), BAD_FIELD, BAD_CREDENTIAL (the user was deleted meanwhile, or the
        cluster refuses), NOT_IMPLEMENTED where this gateway's keys only verify.
        """
        if self._cluster is None:
            self._require_issuer()
        checked_address(tron_address)
        nonce = await self._challenges.signed(tron_address, message, signature)
        if isinstance(nonce, ErrorCode):
            raise _wallet_refused(nonce, caller, tron_address=tron_address)
        device = None
        if hardware_wallet is not None:
            device = HardwareWallet(hardware_wallet.type, normal_text(hardware_wallet.device_id))
        if self._cluster is not None:
            body = {"tron_address": tron_address, "signature": signature, "message": message}
            if hardware_wallet is not None:
                body["hardware_wallet"] = msgspec.to_builtins(hardware_wallet)
            return await self._cluster.login(body, nonce, device, caller)
        # The user first, the challenge then: with MongoDB away the challenge is still good afterwards.
        # Finding or making the user twice is harmless; it is the spending that only one of two logins can
        # do.
        user_id = await self._unbroken(self._find_or_make(tron_address, device, caller))
        if not await self._challenges.spend(tron_address, nonce):
            raise _wallet_refused(ErrorCode.UNKNOWN_CHALLENGE, caller, tron_address=tron_address)

        async def owner() -> UserDocument | None:
            user = await self._users.find_by_id(user_id)
            return user if user is not None and user.tron_address == tron_address else None

        pair = await self._begin_login(
            user_id, owner, caller, method="wallet", hardware_wallet=device.type if device else None
        )
        if pair is None:
            raise _wallet_refused(ErrorCode.BAD_CREDENTIAL, caller, user_id=user_id)
        return pair

    async def _find_or_make(self, tron_address: str, device: HardwareWallet | None, caller: Caller) -> str:
        """The id of the user whose wallet it is; recorded where this made the user."""
        offered = nonces.new_id()
        user = await self._users.upsert_by_tron_address(tron_address, offered, device)
        if user.user_id == offered:
            record("user_created", caller, user_id=user.user_id)
        return user.user_id

    async def login_with_password(self, email: str, password: str, caller: Caller) -> TokenPair:
        """Tokens for the user of this email.

        An unknown email, a user without a password and a wrong password are one: the same error after the same
        calls and the same hashing. Raises BAD_CREDENTIAL; RATE_LIMITED while too many failures make the account
        or the address wait (login_delays.py); BACKEND_UNAVAILABLE while too many passwords are being checked;
        BAD_FIELD; NOT_IMPLEMENTED with an authentication cluster, and where this gateway's keys only verify.
        """
        if self._cluster is not None:
            raise GatewayError(
                ErrorCode.NOT_IMPLEMENTED,
                "Users of this platform log in with a wallet, not with a password",
            )
        self._require_issuer()
        checked_email(email)
        if not 1 <= len(password) <= MAX_PASSWORD_CHARACTERS:
            raise bad_field("password", f"must have 1 to {MAX_PASSWORD_CHARACTERS} characters")
        try:
            attempt = await self._delays.admit(email, caller.address)
        except GatewayError as error:
            if error.code is ErrorCode.RATE_LIMITED:
                record("login_failed", caller, method="password", code=error.code.value)
            raise
        return await self._unbroken(self._judge_attempt(attempt, email, password, caller))

    async def _judge_attempt(self, attempt: Attempt, email: str, password: str, caller: Caller) -> TokenPair:
        try:
            pair = await self._login_with_password(email, password, caller)
        except GatewayError as error:
            if error.code is not ErrorCode.BAD_CREDENTIAL:
                await self._delays.withdrawn(attempt)
            raise
        await self._delays.succeeded(attempt)
        return pair

    async def _login_with_password(self, email: str, password: str, caller: Caller) -> TokenPair:
        """Again where the password was stored anew between the look and the login: by its change, or by a login at
        the same time that hashed it at today's cost. What was typed is then held against what is stored now.
        """
        user: UserDocument | None = None
        for _ in range(_PASSWORD_TRIES):
            user = await self._users.find_by_email(email)
            stored = None if user is None else user.password
            if not await self._hashing.verify(password, stored) or user is None or stored is None:
                break
            user_id, seen = user.user_id, {"password": stored, "email_key": user.email_key}
            changed: dict[str, Any] = {}
            if self._hashing.needs_rehash(stored):
                try:
                    changed["password"] = await self._hashing.hash(password)
                except GatewayError:
                    pass  # Too many others wait for theirs; the next login will do.

            # Records the login and looks whether it is still due, in one step: see the top of this module.
            async def owner(
                user_id: str = user_id, seen: dict[str, Any] = seen, changed: dict[str, Any] = changed
            ) -> UserDocument | None:
                change = {"last_login_at": self._now(), **changed}
                return await self._users.update(user_id, change, expected=seen)

            pair = await self._begin_login(user_id, owner, caller, method="password")
            if pair is not None:
                return pair
        raise login_failed(
            ErrorCode.BAD_CREDENTIAL,
            caller,
            "The email or the password is wrong",
            method="password",
            user_id=user.user_id if user is not None else None,
        )

    async def _begin_login(
        self,
        user_id: str,
        owner: Callable[[], Awaitable[UserDocument | None]],
        caller: Caller,
        **told: Any,
    ) -> TokenPair | None:
        """Start a family, then ask `owner` for the user as it is then; None, and no family, where it has none to
        give any more. The order is explained at the top of this module.
        """
        family, refresh_token = nonces.new_id(), nonces.refresh_token()
        moment = self._wall_clock()
        now = utc(moment)
        expires_at = now + dt.timedelta(days=self._settings.refresh_days)
        await self._refresh_tokens.start_family(family, user_id, keys.digest(refresh_token), now, expires_at)
        user = await owner()
        if user is None:
            await self._refresh_tokens.revoke_family(family, self._now())
            return None
        role = effective_role(user, self._admin_addresses)
        issued = self._issue(user, role, family, moment)
        record("login", caller, user_id=user_id, role=role.label, family=family, **told)
        return self._pair(user, role, issued, refresh_token)

    # --- staying logged in -----------------------------------------------------------------------------

    async def refresh(self, refresh_token: str, caller: Caller) -> TokenPair:
        """A new pair for a good refresh token, which is spent by it. The login's first expiry stays.

        A token that comes back after it was spent has been in two hands: its family ends. Raises
        BAD_CREDENTIAL; RATE_LIMITED by the limit `refresh` of the user, for unknown tokens by `login` of
        the address.
        """
        if self._cluster is not None:
            return await self._cluster.refresh(refresh_token, caller)
        self._require_issuer()
        spent = keys.digest(refresh_token)
        family = await self._refresh_tokens.find_family(spent, self._now())
        if family is None:
            await self._charge("login", caller.address, caller.exchange)
            raise bad_refresh_token()
        if family.revoked_at is None and family.current != spent:
            # Before anything is charged: a thief's and an owner's requests together may be over the limit.
            raise await self._unbroken(self._reused(family, caller))
        await self._charge("refresh", family.user_id, caller.exchange)
        if family.revoked_at is not None:
            raise bad_refresh_token()
        moment = self._wall_clock()
        user = await self._users.find_by_id(family.user_id)
        if user is None:
            await self._unbroken(self._end_family(family))
            raise bad_refresh_token()
        role = effective_role(user, self._admin_addresses)
        issued = self._issue(user, role, family.family, moment)
        fresh = nonces.refresh_token()
        if not await self._refresh_tokens.rotate(family, spent, keys.digest(fresh), self._now()):
            raise await self._unbroken(self._reused(family, caller))
        return self._pair(user, role, issued, fresh)

    # --- logging out -----------------------------------------------------------------------------------

    async def logout(self, principal: Principal, all_logins: bool, caller: Caller) -> None:
        """End the login that this token comes from, or every login of its user.

        MongoDB first, so that no new token can be had, then the access tokens that are out. Needs MongoDB and
        not Redis: without it this worker refuses the tokens at once, the others once it is back. A token of the
        authentication cluster's is logged out there first. Raises ROLE_TOO_LOW for a caller with an API key, which
        belongs to no login.
        """
        if principal.via != "token":
            raise GatewayError(ErrorCode.ROLE_TOO_LOW, "Only a token from a login can log out")
        await self._unbroken(self._logout(principal, all_logins, caller))

    async def _logout(self, principal: Principal, all_logins: bool, caller: Caller) -> None:
        # By the token's own issuer: tokens minted here by hand are good beside the cluster's.
        until = self._until(principal.expires_at)
        if self._cluster is not None and self._cluster.issues(caller.token):
            await self._cluster.logout(principal, all_logins, until, caller)
        else:
            await self._logout_here(principal, all_logins, until)
        record(
            "revocation",
            caller,
            user_id=principal.user_id,
            family=principal.family,
            all_logins=all_logins,
            reason="logout",
        )

    async def _logout_here(self, principal: Principal, all_logins: bool, until: float) -> None:
        await self._refresh_tokens.revoke_family(
            principal.family, self._now(), user_id=principal.user_id, expires_at=utc(until)
        )
        revocations = [Revocation(family=principal.family, until=until)]
        if all_logins:
            now = self._wall_clock()
            dead = dead_until(await self._users.find_by_id(principal.user_id), now)
            # Written to the user first, so that whoever logs in from now on is given tokens beyond that moment.
            await self._users.update(principal.user_id, {}, revoke_tokens_at=dead)
            everything = of_user(principal.user_id, dead.timestamp())
            await self._refresh_tokens.revoke_user(
                principal.user_id, dead, tokens_until=utc(everything.until)
            )
            revocations.append(everything)
        await self._revocations.revoke(*revocations)

    # --- parts -----------------------------------------------------------------------------------------

    def _require_issuer(self) -> None:
        if not self._issuer.can_issue:
            raise GatewayError(
                ErrorCode.NOT_IMPLEMENTED, "This gateway holds keys that verify tokens only; log in elsewhere"
            )

    def _issue(self, user: UserDocument, role: Role, family: str, moment: float) -> IssuedToken:
        """`moment` was taken before `user` was read. What was written since shows that it is later by now."""
        revoked = user.tokens_revoked_at
        after = 0.0 if revoked is None else revoked.timestamp()
        moment = max(moment, after - REVOCATION_AHEAD_SECONDS)
        return self._issuer.issue(user_id=user.user_id, role=role, family=family, now=moment, after=after)

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
            record("refresh_reuse", caller, user_id=family.user_id, family=family.family)
        return bad_refresh_token()

    async def _end_family(self, family: FamilyDocument) -> bool:
        """End a login and its access tokens; False where it had ended before."""
        until = self._until(0.0)
        if not await self._refresh_tokens.revoke_family(
            family.family, self._now(), user_id=family.user_id, expires_at=utc(until)
        ):
            return False
        await self._revocations.revoke(Revocation(family=family.family, until=until))
        return True

    def _until(self, expires_at: float) -> float:
        """When no token of one login can be good any more: a token's life from now, or this one's if longer."""
        newest = self._wall_clock() + self._issuer.access_seconds
        return max(newest, expires_at) + self._settings.leeway_seconds + 1.0

    def _now(self) -> dt.datetime:
        return utc(self._wall_clock())


def _wallet_refused(code: ErrorCode, caller: Caller, **who: str) -> GatewayError:
    return login_failed(code, caller, method="wallet", **who)
