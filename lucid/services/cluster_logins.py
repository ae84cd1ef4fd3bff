"""Logins whose tokens the authentication cluster issues: what this gateway does around its calls (auth_cluster.py).

The challenge and the signature were looked at before. The cluster's tokens are passed through as they are; their
refresh and their logout are its own.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from lucid.core.exchange import Principal
from lucid.core.security import api_keys as keys
from lucid.core.security.jwt import claimed
from lucid.core.validation import is_user_id
from lucid.database.documents import HardwareWallet
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from lucid.services.auth_cluster import AuthCluster
from lucid.services.callers import Caller, record, utc
from lucid.services.challenges import Challenges
from lucid.services.cluster_answers import ClusterLogin, ClusterTokens
from lucid.services.login_types import (
    AuthenticatedUser,
    Charge,
    TokenPair,
    bad_refresh_token,
    login_failed,
)
from lucid.services.revocations import Revocation, Revocations, of_user

MOST_REMEMBERED: Final = 10_000
"""Refresh tokens whose user is remembered: some 2 MB."""

_log: Final = logging.getLogger(__name__)


class ClusterLogins:
    """One per worker; its `AuthService` calls it. Its methods raise what the cluster's client raises, DEPENDENCY_AWAY
    where Redis is needed and away.
    """

    def __init__(
        self,
        cluster: AuthCluster,
        *,
        users: UserRepository,
        refresh_tokens: RefreshTokenRepository,
        challenges: Challenges,
        revocations: Revocations,
        charge: Charge,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._users = users
        self._refresh_tokens = refresh_tokens
        self._challenges = challenges
        self._revocations = revocations
        self._charge = charge
        self._wall_clock = wall_clock
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        """User ids by the digest of the refresh token, of those that this worker has passed on."""

    def issues(self, token: str) -> bool:
        """Whether this token is the cluster's, by what it says of its issuer."""
        return self._cluster.issues(token)

    async def login(
        self, body: dict[str, Any], nonce: str, device: HardwareWallet | None, caller: Caller
    ) -> TokenPair:
        """Tokens for a wallet whose challenge `nonce` has been compared, and its signature verified. `body` goes to
        the cluster as it is. Raises BAD_CREDENTIAL, UNKNOWN_CHALLENGE where another login was faster.
        """
        tron_address = body["tron_address"]
        try:
            login = await self._cluster.login(body, caller.request_id)
        except GatewayError as error:
            if error.code is ErrorCode.BAD_CREDENTIAL:
                raise login_failed(error.code, caller, method="wallet", tron_address=tron_address) from error
            raise
        await self._record_user(login, tron_address, device)
        if not await self._challenges.spend(tron_address, nonce):
            # The tokens of the slower one of two logins are given to nobody.
            raise login_failed(
                ErrorCode.UNKNOWN_CHALLENGE, caller, method="wallet", tron_address=tron_address
            )
        self._remember(login.refresh_token, login.user_id)
        record(
            "login",
            caller,
            user_id=login.user_id,
            role=login.role.label,
            method="wallet",
            hardware_wallet=device.type if device else None,
        )
        return _passed_on(login)

    async def refresh(self, refresh_token: str, caller: Caller) -> TokenPair:
        """The cluster's new pair. Raises BAD_CREDENTIAL, RATE_LIMITED.

        What is known of the user before the call is charged before it. What only the answer tells is charged behind
        it, and a limit that is over then refuses the next refresh and not this one: the cluster has spent the token,
        and a pair kept back would be a login lost.
        """
        spent = keys.digest(refresh_token)
        known = self._owners.get(spent)
        if known is not None:
            await self._charge("refresh", known, caller.exchange)
        try:
            tokens = await self._cluster.refresh(refresh_token, caller.request_id)
        except GatewayError as error:
            if error.code is not ErrorCode.BAD_CREDENTIAL:
                raise
            if known is None:
                await self._charge("login", caller.address, caller.exchange)
            raise bad_refresh_token() from error
        self._owners.pop(spent, None)
        owner = (
            tokens.user_id if isinstance(tokens, ClusterLogin) else _owner_of(tokens.access_token) or known
        )
        if owner is not None:
            self._remember(tokens.refresh_token, owner)
        if known is None:
            limit, identifier = ("login", caller.address) if owner is None else ("refresh", owner)
            try:
                # Not as part of this request, which is not refused whatever it says.
                await self._charge(limit, identifier, None)
            except GatewayError as error:
                if error.code is not ErrorCode.RATE_LIMITED:
                    raise
        return _passed_on(tokens)

    async def logout(self, principal: Principal, all_logins: bool, until: float, caller: Caller) -> None:
        """There first: were the token dead here already, nobody could try again after a failure there.

        What is done here makes it immediate: workers believe the cluster's word on a token for a minute. It needs
        no MongoDB, whose part is to tell workers that Redis does not reach, and that minute is their bound too.
        `until`: how long a token of this gateway would have to be refused.
        """
        await self._cluster.logout(caller.token, all_logins, caller.request_id)
        now = self._wall_clock()
        if principal.issued_at:
            # A newer token of this login lives as long as this one was made to.
            until = max(until, now + principal.expires_at - principal.issued_at)
        revocations = []
        if principal.family:
            revocations.append(Revocation(family=principal.family, until=until))
        elif principal.token_id:
            revocations.append(Revocation(token=principal.token_id, until=until))
        everything = of_user(principal.user_id, now)
        if all_logins:
            # Not ahead of time, as for tokens of this gateway: the cluster issues by its own clock and knows
            # nothing of that moment, so a login right afterwards would be dead from its beginning.
            revocations.append(everything)
        await self._revocations.revoke(*revocations)
        try:
            if principal.family:
                await self._refresh_tokens.revoke_family(
                    principal.family, utc(now), user_id=principal.user_id, expires_at=utc(until)
                )
            if all_logins:
                await self._refresh_tokens.revoke_user(
                    principal.user_id, utc(now), tokens_until=utc(everything.until)
                )
        except GatewayError as error:
            _log.warning("a logout is not kept in MongoDB: %s", error.code.value)

    async def _record_user(
        self, login: ClusterLogin, tron_address: str, device: HardwareWallet | None
    ) -> None:
        """Keep what the cluster said of its user. The tokens are good whether or not their user is stored here (the
        contract says so of every token), so nothing that MongoDB has to say undoes a login that the cluster has
        already made. The next login records it.
        """
        try:
            await self._users.upsert_from_cluster(login.user_id, tron_address, login.role.label, device)
        except GatewayError as error:
            if error.code is ErrorCode.CONFLICT:
                _log.error(
                    "the authentication cluster says that %s is user %s, but another user has that address here: the "
                    "login goes on, and is not recorded until one of the two is deleted",
                    tron_address,
                    login.user_id,
                )
            else:
                _log.warning("a login of user %s is not recorded: %s", login.user_id, error.code.value)

    def _remember(self, refresh_token: str, user_id: str) -> None:
        if len(self._owners) >= MOST_REMEMBERED:
            self._owners.popitem(last=False)
        self._owners[keys.digest(refresh_token)] = user_id


def _owner_of(access_token: str) -> str | None:
    """Whose a token is that the cluster has just given out, if it says so."""
    told = claimed(access_token)
    return told.sub if told is not None and isinstance(told.sub, str) and is_user_id(told.sub) else None


def _passed_on(tokens: ClusterTokens) -> TokenPair:
    """The cluster's answer, as this gateway gives it."""
    user = None
    if isinstance(tokens, ClusterLogin):
        user = AuthenticatedUser(tokens.user_id, tokens.tron_address, tokens.role.label, tokens.permissions)
    return TokenPair(tokens.access_token, tokens.refresh_token, "Bearer", tokens.expires_in, user)
