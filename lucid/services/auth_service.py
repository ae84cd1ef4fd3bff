"""Logging in, staying logged in, logging out; and who a credential belongs to.

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
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.gateway import LEARNED_TOKEN_SECONDS
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys as keys
from lucid.core.security import nonces
from lucid.core.security.jwt import REVOCATION_AHEAD_SECONDS, IssuedToken, TokenIssuer, issuer_of
from lucid.core.security.roles import PERMISSIONS, TIERS
from lucid.core.security.tron import verify as verify_wallet
from lucid.core.validation import (
    MAX_PASSWORD_CHARACTERS,
    HardwareWalletText,
    bad_field,
    checked_address,
    checked_email,
    normal_text,
)
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.documents import FamilyDocument, HardwareWallet, UserDocument, milliseconds
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import AWAY_RETRY_SECONDS, ErrorCode, GatewayError, away, rfc3339
from lucid.services.auth_cluster import AuthCluster
from lucid.services.challenges import Challenge, Challenges
from lucid.services.cluster_logins import ClusterLogins
from lucid.services.login_delays import Attempt, LoginDelays
from lucid.services.login_types import (
    AuthenticatedUser,
    Caller,
    Charge,
    Status,
    TokenPair,
    TokenReport,
    bad_refresh_token,
    login_failed,
    record,
    utc,
)
from lucid.services.look_ups import LookUps
from lucid.services.password_hashing import PasswordHashing
from lucid.services.revocations import Revocation, Revocations, of_user, user_moment
from lucid.services.unbroken import Unbroken
from lucid.services.user_service import effective_role
from lucid.settings import TokenSettings

__all__ = ["AuthService", "AuthenticatedUser", "Caller", "Charge", "Status", "TokenPair", "TokenReport"]

MOST_KEY_USES: Final = 10_000
_PASSWORD_TRIES: Final = 3
_BEHIND: Final = dt.timedelta(milliseconds=2)
"""A token of whoever has read `tokens_revoked_at` is issued one millisecond behind it, or later."""

_log: Final = logging.getLogger(__name__)


class AuthService:
    """One per worker. Its methods raise GatewayError, DEPENDENCY_AWAY wherever MongoDB or Redis is needed
    and away, BACKEND_... where the authentication cluster is.
    """

    def __init__(
        self,
        *,
        users: UserRepository,
        refresh_tokens: RefreshTokenRepository,
        api_keys: ApiKeyRepository,
        challenges: Challenges,
        revocations: Revocations,
        hashing: PasswordHashing,
        delays: LoginDelays,
        issuer: TokenIssuer,
        memory: TokenMemory,
        settings: TokenSettings,
        admin_addresses: frozenset[str],
        charge: Charge,
        cluster: AuthCluster | None = None,
        fetch_keys: Callable[[], Awaitable[object]] | None = None,
        remembered: KeyMemory | None = None,
        unbroken: Unbroken | None = None,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cluster` gives the tokens instead of `issuer`. `fetch_keys` fetches the key set anew, for a token that
        names a key which is not known here. `remembered` is what this worker was told about
        credentials lately. `monotonic` is the clock by which `memory` is asked.
        """
        self._users = users
        self._refresh_tokens = refresh_tokens
        self._api_keys = api_keys
        self._challenges = challenges
        self._revocations = revocations
        self._hashing = hashing
        self._delays = delays
        self._issuer = issuer
        self._memory = memory
        self._settings = settings
        self._admin_addresses = admin_addresses
        self._charge = charge
        self._cluster = cluster
        self._cluster_logins = (
            None
            if cluster is None
            else ClusterLogins(
                cluster,
                users=users,
                refresh_tokens=refresh_tokens,
                challenges=challenges,
                revocations=revocations,
                charge=charge,
                wall_clock=wall_clock,
            )
        )
        self._unbroken = unbroken or Unbroken()
        self._keys = remembered or KeyMemory()
        self._fetch_keys = fetch_keys
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._key_look_ups = LookUps(
            self._find_api_key,
            lambda: away("mongodb", "Too many API keys are being looked up"),
            generation=lambda: self._keys.generation,
        )
        self._token_look_ups = LookUps(self._find_token, _too_many_tokens)
        self._key_uses: dict[str, dt.datetime] = {}

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
        nonce = await self._challenges.find(tron_address, message)
        if nonce is None:
            raise login_failed(ErrorCode.UNKNOWN_CHALLENGE, caller, tron_address=tron_address)
        if not verify_wallet(tron_address, message.encode(), signature):
            raise login_failed(ErrorCode.BAD_SIGNATURE, caller, tron_address=tron_address)
        device = None
        if hardware_wallet is not None:
            device = HardwareWallet(hardware_wallet.type, normal_text(hardware_wallet.device_id))
        if self._cluster_logins is not None:
            body = {"tron_address": tron_address, "signature": signature, "message": message}
            if hardware_wallet is not None:
                body["hardware_wallet"] = msgspec.to_builtins(hardware_wallet)
            return await self._cluster_logins.login(body, nonce, device, caller)
        # The user first, the challenge then: with MongoDB away the challenge is still good afterwards.
        # Finding or making the user twice is harmless; it is the spending that only one of two logins can
        # do.
        user_id = (await self._users.upsert_by_tron_address(tron_address, nonces.new_id(), device)).user_id
        if not await self._challenges.spend(tron_address, nonce):
            raise login_failed(ErrorCode.UNKNOWN_CHALLENGE, caller, tron_address=tron_address)

        async def owner() -> UserDocument | None:
            user = await self._users.find_by_id(user_id)
            return user if user is not None and user.tron_address == tron_address else None

        pair = await self._begin_login(
            user_id, owner, caller, method="wallet", hardware_wallet=device.type if device else None
        )
        if pair is None:
            raise login_failed(ErrorCode.BAD_CREDENTIAL, caller, user_id=user_id)
        return pair

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
        if self._cluster_logins is not None:
            return await self._cluster_logins.refresh(refresh_token, caller)
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
        if self._cluster_logins is not None and self._is_clusters(caller.token):
            await self._cluster_logins.logout(principal, all_logins, until, caller)
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
            dead = milliseconds(utc(user_moment(self._wall_clock())))
            user = await self._users.find_by_id(principal.user_id)
            if user is not None and user.tokens_revoked_at is not None:
                # That may lie ahead of this worker's clock, and tokens were issued just behind it.
                dead = max(dead, user.tokens_revoked_at + _BEHIND)
            # Written to the user first, so that whoever logs in from now on is given tokens beyond that moment.
            await self._users.update(principal.user_id, {}, revoke_tokens_at=dead)
            everything = of_user(principal.user_id, dead.timestamp())
            await self._refresh_tokens.revoke_user(
                principal.user_id, dead, tokens_until=utc(everything.until)
            )
            revocations.append(everything)
        await self._revocations.revoke(*revocations)

    # --- whose a credential is -------------------------------------------------------------------------

    async def verify(self, token: str, asker: str = "") -> TokenReport:
        """Whether an access token is good at this moment, revocations included. `asker`: the caller's address, as
        limits count it. Raises BACKEND_... where the authentication cluster must be asked and does not answer.
        """
        verdict = self._memory.principal(token, self._monotonic())
        if verdict is None:
            digest = keys.digest(token)
            answer = self._keys.get(digest, self._monotonic())
            if answer is None:
                answer = await self.look_up_token(token, asker)
            if not isinstance(answer, Principal):
                self._keys.put(digest, answer, self._monotonic())
            else:
                self._memory.remember(token, answer, self._monotonic(), LEARNED_TOKEN_SECONDS)
                verdict = self._memory.principal(token, self._monotonic())
        if not isinstance(verdict, Principal):
            return TokenReport(active=False)
        issuer = issuer_of(token)
        return TokenReport(
            active=True,
            sub=verdict.user_id,
            role=verdict.role.label,
            sid=verdict.family,
            jti=verdict.token_id,
            iat=int(verdict.issued_at),
            exp=int(verdict.expires_at),
            iss=issuer,
            aud=self._settings.audience if issuer == self._settings.issuer else "",
            typ="access",
        )

    def status(self, principal: Principal) -> Status:
        """Who the caller is. From the credential alone: the user need not be stored here."""
        return Status(
            user_id=principal.user_id,
            role=principal.role.label,
            permissions=PERMISSIONS[principal.role],
            credential="api_key" if principal.via == "api_key" else "token",
            issued_at=_moment(principal.issued_at),
            expires_at=_moment(principal.expires_at),
        )

    async def look_up_api_key(self, digest: bytes, asker: str = "") -> Principal | ErrorCode:
        """Whose key has this digest: BAD_CREDENTIAL for an unknown one or one of a deleted user, CREDENTIAL_EXPIRED.

        It acts as its owner, with the key's role but never more than the owner has now. That it was used is noted;
        `flush_key_uses` writes it down. Raises DEPENDENCY_AWAY, also where too many others are being looked up.
        """
        answer = await self._key_look_ups(digest, asker)
        if isinstance(answer, Principal):
            self._note_key_use(answer.token_id, self._now())
        return answer

    async def look_up_token(self, token: str, asker: str = "") -> Principal | ErrorCode:
        """What others say of a token about which `TokenMemory.principal` says None: the authentication cluster, or
        the key set fetched anew. Equal ones are asked about once. Knows no revocations: hand the answer to
        `TokenMemory.remember`. Raises RATE_LIMITED, BACKEND_..., also where too many others are being looked up.
        """
        return await self._token_look_ups(token.encode("utf-8", "surrogatepass"), asker)

    async def flush_key_uses(self) -> None:
        """Write down when API keys were last used, all in one call. Call it now and then, and at the end. Without
        MongoDB they are kept for the next time.
        """
        uses, self._key_uses = self._key_uses, {}
        try:
            if uses:
                await self._api_keys.touch(uses)
        except GatewayError as error:
            _log.warning(
                "the last use of %d API keys is not written down yet: %s", len(uses), error.code.value
            )
            newer, self._key_uses = self._key_uses, uses
            for key_id, moment in newer.items():
                self._note_key_use(key_id, moment)

    def _note_key_use(self, key_id: str, moment: dt.datetime) -> None:
        self._key_uses.pop(key_id, None)
        if len(self._key_uses) >= MOST_KEY_USES:
            del self._key_uses[next(iter(self._key_uses))]
        self._key_uses[key_id] = moment

    async def _find_api_key(self, digest: bytes) -> Principal | ErrorCode:
        key = await self._api_keys.find_by_digest(digest)
        if key is None or key.role not in ROLES:
            return ErrorCode.BAD_CREDENTIAL
        if key.expires_at is not None and key.expires_at <= self._now():
            return ErrorCode.CREDENTIAL_EXPIRED
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

    async def _find_token(self, raw: bytes) -> Principal | ErrorCode:
        token = raw.decode("utf-8", "surrogatepass")
        if self._cluster is not None and self._cluster.issues(token):
            # Several requests may share this call; it bears the name of none.
            return await self._cluster.verify(token, "")
        if self._fetch_keys is not None:
            await self._fetch_keys()
        return self._memory.principal(token, self._monotonic()) or ErrorCode.BAD_CREDENTIAL

    # --- parts -----------------------------------------------------------------------------------------

    def _is_clusters(self, token: str) -> bool:
        return self._cluster is not None and self._cluster.issues(token)

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


def _too_many_tokens() -> GatewayError:
    return GatewayError(
        ErrorCode.BACKEND_UNAVAILABLE,
        "Too many tokens are being looked up",
        fields=(("Retry-After", str(AWAY_RETRY_SECONDS)),),
    )


def _moment(seconds: float) -> str | None:
    return rfc3339(utc(seconds)) if seconds else None
