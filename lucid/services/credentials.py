"""Who a credential belongs to: what memory cannot say of a token or an API key, others are asked."""

import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from lucid.core.exchange import ROLES, LookUp, Principal, RoleName
from lucid.core.gateway import LEARNED_TOKEN_SECONDS
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys as keys
from lucid.core.security.jwt import issuer_of
from lucid.core.security.roles import PERMISSIONS, TIERS
from lucid.core.validation import Moment
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import AWAY_RETRY_SECONDS, ErrorCode, GatewayError, away, rfc3339
from lucid.services.auth_cluster import AuthCluster
from lucid.services.callers import utc
from lucid.services.look_ups import LookUps
from lucid.services.user_rules import effective_role
from lucid.settings import TokenSettings

MOST_KEY_USES: Final = 10_000

_log: Final = logging.getLogger(__name__)


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


class Credentials:
    """One per worker. Its methods raise GatewayError."""

    def __init__(
        self,
        *,
        users: UserRepository,
        api_keys: ApiKeyRepository,
        memory: TokenMemory,
        settings: TokenSettings,
        remembered: KeyMemory,
        admin_addresses: frozenset[str],
        cluster: AuthCluster | None = None,
        fetch_keys: Callable[[], Awaitable[object]] | None = None,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`remembered` is what this worker was told about credentials lately, the gateway's own memory of it. `cluster`
        is asked about the tokens that it issues. `fetch_keys` fetches the key set anew, for a token that names a key
        which is not known here. `monotonic` is the clock by which `memory` is asked.
        """
        self._users = users
        self._api_keys = api_keys
        self._memory = memory
        self._settings = settings
        self._admin_addresses = admin_addresses
        self._cluster = cluster
        self._fetch_keys = fetch_keys
        self._keys = remembered
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._key_look_ups = LookUps(
            self._find_api_key,
            lambda: away("mongodb", "Too many API keys are being looked up"),
            generation=lambda: self._keys.generation,
        )
        self._token_look_ups = LookUps(self._find_token, _too_many_tokens)
        self._key_uses: dict[str, dt.datetime] = {}

    async def verify(self, token: str, asker: str = "") -> TokenReport:
        """Whether an access token is good at this moment, revocations included. `asker`: the caller's address, as
        limits count it. Raises BACKEND_... where the authentication cluster must be asked and does not answer.
        """
        verdict = self._memory.principal(token, self._monotonic())
        if verdict is None:
            digest = keys.digest(token)
            answer = self._keys.get(digest, self._monotonic())
            if answer is None:
                answer = await self.look_up(LookUp(digest, token, asker))
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

    async def look_up(self, need: LookUp) -> Principal | ErrorCode:
        """Meet a need of the gateway's.

        A key acts as its owner, with the key's role but never more than the owner has now; BAD_CREDENTIAL for an
        unknown one or one of a deleted user, CREDENTIAL_EXPIRED. That it was used is noted; `flush_key_uses` writes
        it down. Raises DEPENDENCY_AWAY, also where too many others are being looked up.

        Of a token about which `TokenMemory.principal` says None: what others say, the authentication cluster, or the
        key set fetched anew. Equal ones are asked about once. Knows no revocations: hand the answer to
        `TokenMemory.remember`. Raises RATE_LIMITED, BACKEND_..., also where too many others are being looked up.
        """
        if need.token:
            return await self._token_look_ups(need.token.encode("utf-8", "surrogatepass"), need.asker)
        answer = await self._key_look_ups(need.digest, need.asker)
        if isinstance(answer, Principal):
            self._note_key_use(answer.token_id, self._now())
        return answer

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
