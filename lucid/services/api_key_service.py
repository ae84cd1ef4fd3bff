"""A user's own API keys: made, listed, ended, always with a token from a login.

A leaked key would otherwise make itself successors, and ending it would end nothing.
"""

import datetime as dt
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from lucid.core.exchange import ROLES, Principal, Role, RoleName
from lucid.core.security import api_keys as keys
from lucid.core.security import nonces
from lucid.core.validation import Moment, checked_future, checked_text, is_user_id
from lucid.database.documents import ApiKeyDocument, milliseconds
from lucid.errors import ErrorCode, GatewayError, rfc3339
from lucid.services.callers import Caller, record, utc
from lucid.services.pages import Page
from lucid.services.revocations import Revocations, of_key
from lucid.services.unbroken import Unbroken
from lucid.services.user_rules import effective_role

if TYPE_CHECKING:
    from lucid.database.api_key_repository import ApiKeyRepository
    from lucid.database.user_repository import UserRepository

MOST_KEYS: Final = 50
"""Of one user, neither ended nor expired."""
MAX_NAME_CHARACTERS: Final = 128


class ApiKeyView(msgspec.Struct, frozen=True):
    """A key as the API shows it; null: it does not expire, or was not used yet."""

    key_id: str
    name: str
    role: RoleName
    created_at: Moment
    expires_at: Moment | None
    last_used_at: Moment | None


class NewApiKey(ApiKeyView, frozen=True):
    """The answer to making one, the only one with the key itself."""

    key: str

    def __repr__(self) -> str:
        return f"NewApiKey(key_id={self.key_id!r}, key=***)"


class ApiKeyPage(Page[ApiKeyView], frozen=True):
    """One page of the caller's keys, newest first. `total`: how many there are on all pages."""


class ApiKeyService:
    """One per worker. Its methods raise GatewayError, ROLE_TOO_LOW for a caller with an API key."""

    def __init__(
        self,
        *,
        api_keys: "ApiKeyRepository",
        users: "UserRepository",
        revocations: Revocations,
        admin_addresses: frozenset[str],
        wall_clock: Callable[[], float],
        unbroken: Unbroken,
    ) -> None:
        self._api_keys = api_keys
        self._users = users
        self._revocations = revocations
        self._admin_addresses = admin_addresses
        self._wall_clock = wall_clock
        self._unbroken = unbroken

    async def create(
        self,
        name: str,
        role: str,
        expires_at: dt.datetime | None,
        principal: Principal,
        caller: Caller,
    ) -> NewApiKey:
        """A new key that acts as the caller with `role`.

        Raises BAD_FIELD (the name, an expiry that is past), ROLE_TOO_LOW for a role above the caller's, CONFLICT where
        there are `MOST_KEYS`, NOT_FOUND where the caller is not stored here, as `GET /users/me` does: a key opens
        nothing without its owner, so one for whoever holds a token that was minted by hand would be dead from birth.
        """
        self._require_login(principal)
        checked_text(name, "name", MAX_NAME_CHARACTERS)
        now = self._now()
        if expires_at is not None:
            expires_at = checked_future(expires_at, now)
        owner = await self._users.find_by_id(principal.user_id)
        if owner is None:
            raise GatewayError(ErrorCode.NOT_FOUND, "No such user")
        # The token's own role is a bound too: one that was minted with less than its owner has must not become more.
        if ROLES[role] > min(principal.role, effective_role(owner, self._admin_addresses)):
            raise GatewayError(ErrorCode.ROLE_TOO_LOW, "A key's role is no higher than its owner's")
        if await self._api_keys.count_live(owner.user_id, now) >= MOST_KEYS:
            raise _too_many()
        key = keys.new_api_key()
        document = ApiKeyDocument(
            key_id=nonces.new_id(),
            digest=keys.digest(key),
            user_id=owner.user_id,
            name=name,
            role=role,
            created_at=now,
            expires_at=None if expires_at is None else milliseconds(expires_at),
        )
        await self._api_keys.create(document)
        # Counted again, for those who asked at the same moment: each of them counts all that were stored, so there are
        # never more than there may be, if at times one fewer. Nobody has seen this key yet.
        if await self._api_keys.count_live(owner.user_id, now) > MOST_KEYS:
            await self._api_keys.revoke(owner.user_id, document.key_id, now)
            raise _too_many()
        record("api_key_created", caller, user_id=owner.user_id, key_id=document.key_id, role=role)
        return NewApiKey(**msgspec.structs.asdict(_view(document)), key=key)

    async def list_keys(self, page: int, limit: int, principal: Principal) -> ApiKeyPage:
        """A page, from 1, of the caller's keys: without the ended ones, and with those that expired lately."""
        self._require_login(principal)
        found, total = await self._api_keys.list_of_user(principal.user_id, (page - 1) * limit, limit)
        return ApiKeyPage([_view(key) for key in found], page, limit, total)

    async def revoke(self, key_id: str, principal: Principal, caller: Caller) -> None:
        """End a key of the caller's. Raises NOT_FOUND for an unknown one, somebody else's and one that is ended."""
        self._require_login(principal)
        if not is_user_id(key_id):  # an id is an id
            raise _no_such_key()
        await self._unbroken(self._revoke(key_id, principal, caller))

    async def _revoke(self, key_id: str, principal: Principal, caller: Caller) -> None:
        # MongoDB first: a worker that forgets the key must not find it there again.
        key = await self._api_keys.revoke(principal.user_id, key_id, self._now())
        if key is None:
            raise _no_such_key()
        await self._revocations.revoke(of_key(key.digest, self._wall_clock()))
        record("api_key_revoked", caller, user_id=principal.user_id, key_id=key_id)

    def _require_login(self, principal: Principal) -> None:
        if principal.via != "token":
            raise GatewayError(
                ErrorCode.ROLE_TOO_LOW, "API keys are managed with a token from a login, not with a key"
            )

    def _now(self) -> dt.datetime:
        return utc(self._wall_clock())


def _view(key: ApiKeyDocument) -> ApiKeyView:
    return ApiKeyView(
        key_id=key.key_id,
        name=key.name,
        role=ROLES.get(key.role, Role.USER).label,
        created_at=rfc3339(key.created_at),
        expires_at=None if key.expires_at is None else rfc3339(key.expires_at),
        last_used_at=None if key.last_used_at is None else rfc3339(key.last_used_at),
    )


def _too_many() -> GatewayError:
    return GatewayError(
        ErrorCode.CONFLICT, f"There are {MOST_KEYS} API keys; end one first", details={"limit": MOST_KEYS}
    )


def _no_such_key() -> GatewayError:
    return GatewayError(ErrorCode.NOT_FOUND, "No such API key")
