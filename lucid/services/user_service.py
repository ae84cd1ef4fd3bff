"""Who the platform's users are: registering, looking, changing, deleting.

A change is judged by the rules (user_rules.py), proven (user_proofs.py), and written in one
atomic operation that demands of the stored user what the judgement rested on. If that has changed meanwhile, the
judgement is made again.

What ends with a change of role or password, and with a deletion, is written by that same operation: the moment up to
which the user's access tokens are dead. Telling the workers comes after; should this process die in between, they read
it in MongoDB (revocation_watch.py). What a caller who leaves must not interrupt runs to its end in a task of its own.
"""

import asyncio
import datetime as dt
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import msgspec
from msgspec import UNSET

from lucid.core.exchange import Principal, Role, RoleName
from lucid.core.security import nonces
from lucid.core.security.roles import PERMISSIONS
from lucid.core.validation import (
    Moment,
    checked_address,
    checked_email,
    checked_password,
    email_key,
)
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError, rfc3339
from lucid.services.callers import Caller, record, utc
from lucid.services.pages import Page
from lucid.services.revocations import Revocations, dead_until, of_user
from lucid.services.unbroken import Unbroken
from lucid.services.user_proofs import Proven, UserProofs
from lucid.services.user_rules import (
    UserChanges,
    check_deletion,
    check_rank,
    check_rights,
    check_shape,
    conflict,
    effective_role,
    forbidden,
    no_such_user,
    target,
)

if TYPE_CHECKING:
    from lucid.database.api_key_repository import ApiKeyRepository
    from lucid.database.refresh_token_repository import RefreshTokenRepository
    from lucid.database.user_repository import UserRepository
    from lucid.services.password_hashing import PasswordHashing

MOST_JUDGEMENTS: Final = 5
"""How often one change is judged anew because the user was changed meanwhile."""

_JUDGED: Final = ("role", "tron_address", "password", "tokens_revoked_at")
"""What a change rests on: of the stored user these must be as they were read."""

_log: Final = logging.getLogger(__name__)


class UserView(msgspec.Struct, frozen=True):
    """A user as the API shows it."""

    user_id: str
    tron_address: str | None
    email: str | None
    role: RoleName
    permissions: tuple[str, ...]
    created_at: Moment
    updated_at: Moment
    last_login_at: Moment | None


class UserPage(Page[UserView], frozen=True):
    """One page of the users, newest first. `total`: how many there are on all pages."""


class UserService:
    """One per worker. `passwords` should not be the logins' own: registrations would fill its queue. Its methods raise
    GatewayError, NOT_FOUND for users who are not there and, alike, for those
    whom one may not see.

    `registration`: whether emails and passwords are this gateway's own; where the authentication cluster has them
    they are NOT_IMPLEMENTED.
    """

    def __init__(
        self,
        *,
        users: "UserRepository",
        refresh_tokens: "RefreshTokenRepository",
        api_keys: "ApiKeyRepository",
        revocations: Revocations,
        proofs: UserProofs,
        passwords: "PasswordHashing",
        admin_addresses: frozenset[str],
        wall_clock: Callable[[], float],
        registration: bool,
        unbroken: Unbroken,
    ) -> None:
        self._users = users
        self._refresh_tokens = refresh_tokens
        self._api_keys = api_keys
        self._revocations = revocations
        self._proofs = proofs
        self._passwords = passwords
        self._admin_addresses = admin_addresses
        self._wall_clock = wall_clock
        self._registration = registration
        self._registering: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unbroken = unbroken

    async def register(self, email: str, password: str, caller: Caller) -> UserView:
        """Make a user with the role `user`. Raises CONFLICT where the email is a live user's, BAD_FIELD."""
        if not self._registration:
            raise _elsewhere("Registration")
        checked_email(email)
        checked_password(password, email)
        # One at a time for one email: a hash costs a fifth of a second of a core, and of many registrations of one
        # email all but the first are conflicts. Between workers the unique index decides.
        async with self._registering.setdefault(email_key(email), asyncio.Lock()):
            if await self._users.find_by_email(email) is not None:
                raise conflict("email")
            hashed = await self._passwords.hash(password)
            return self._view(await self._unbroken(self._create(email, hashed, caller)))

    async def get(self, user_id: str, principal: Principal) -> UserView:
        """The user of this id, or the caller for `me`."""
        return self._view(await self._find(target(user_id, principal)))

    async def list_users(
        self,
        page: int,
        limit: int,
        principal: Principal,
        *,
        email: str | None = None,
        tron_address: str | None = None,
        role: str | None = None,
    ) -> UserPage:
        """For admins: a page, from 1, of the users to whom all filters apply. `role` is the one that counts."""
        if principal.role < Role.ADMIN:
            raise forbidden("Only admins may list users")
        if tron_address is not None:
            checked_address(tron_address)
        users, total = await self._users.list_users(
            (page - 1) * limit,
            limit,
            email=email,
            tron_address=tron_address,
            role=role,
            super_admin_addresses=self._admin_addresses,
        )
        return UserPage([self._view(user) for user in users], page, limit, total)

    async def update(
        self, user_id: str, changes: UserChanges, principal: Principal, caller: Caller
    ) -> UserView:
        """Apply all of `changes`, or none and raise.

        BAD_FIELD, NOT_FOUND, ROLE_TOO_LOW (whatever this caller may not do to this user), CONFLICT; what was to be
        proven and was not: BAD_CREDENTIAL (the current password; RATE_LIMITED after too many wrong ones),
        BAD_SIGNATURE, UNKNOWN_CHALLENGE; BACKEND_UNAVAILABLE where too many passwords are being checked. After a
        change of role or password the user's access tokens are dead, the caller's own too.
        """
        user_id = target(user_id, principal)
        own = user_id == principal.user_id
        check_shape(changes)
        check_rights(changes, principal, own)
        if changes.password is not UNSET and not self._registration:
            raise _elsewhere("A password")
        proven = Proven()
        for _ in range(MOST_JUDGEMENTS):
            user = await self._find(user_id)
            check_rank(effective_role(user, self._admin_addresses), principal, own)
            await self._proofs.check(user, changes, proven, caller)
            data = _differences(user, changes, proven)
            if not data:
                if changes.role is not UNSET and user.tokens_revoked_at is not None:
                    # Asked for again: whoever wrote it may have died before it could tell of it.
                    await self._revocations.revoke(of_user(user.user_id, user.tokens_revoked_at.timestamp()))
                return self._view(user)
            written = await self._unbroken(self._write(user, data, principal, caller))
            if written is not None:
                return self._view(written)
        raise _changing()

    async def delete(self, user_id: str, principal: Principal, caller: Caller) -> None:
        """Delete a user; the row stays for the record. Their address and email are free, their tokens dead at once."""
        user_id = target(user_id, principal)
        own = user_id == principal.user_id
        check_deletion(principal, own)
        for _ in range(MOST_JUDGEMENTS):
            user = await self._find(user_id)
            check_rank(effective_role(user, self._admin_addresses), principal, own)
            if await self._unbroken(self._delete(user, principal, caller)):
                return
        raise _changing()

    async def _create(self, email: str, hashed: str, caller: Caller) -> UserDocument:
        now = self._now()
        user = await self._users.create(
            UserDocument(
                user_id=nonces.new_id(),
                live=True,
                role=Role.USER.label,
                created_at=now,
                updated_at=now,
                email=email,
                password=hashed,
            )
        )
        record("user_created", caller, user_id=user.user_id)
        return user

    async def _write(
        self, user: UserDocument, data: dict[str, Any], principal: Principal, caller: Caller
    ) -> UserDocument | None:
        """Store `data` and end what must end with it; None where the user is not as judged any more."""
        before = effective_role(user, self._admin_addresses)
        after = effective_role(msgspec.structs.replace(user, **data), self._admin_addresses)
        ends_tokens = "role" in data or "password" in data or before is not after
        now = self._wall_clock()
        if "password" in data:
            # Before the write: if this process dies behind it, no login of the old password lives on. If the write
            # fails, the user has to log in again, which loses nothing.
            await self._refresh_tokens.revoke_user(user.user_id, utc(now))
        written = await self._users.update(
            user.user_id,
            data,
            expected=_as_judged(user),
            revoke_tokens_at=dead_until(user, now) if ends_tokens else None,
        )
        if written is None:
            return None
        if ends_tokens and written.tokens_revoked_at is not None:
            await self._revocations.revoke(of_user(user.user_id, written.tokens_revoked_at.timestamp()))
        if "password" in data:
            await self._end_logins(user.user_id)
        who = {"user_id": user.user_id, "by": principal.user_id, "via": principal.via}
        if "role" in data or before is not after:
            given = {} if written.role == after.label else {"stored": written.role}
            record("role_changed", caller, **who, **{"from": before.label, "to": after.label}, **given)
        for field, event in _EVENTS.items():
            if field in data:
                record(event, caller, **who)
        return written

    async def _delete(self, user: UserDocument, principal: Principal, caller: Caller) -> bool:
        """Delete and end what must end with it; False where the user is not as judged any more."""
        moment = dead_until(user, self._wall_clock())
        # The write alone is enough: without a live owner neither a refresh token nor an API key opens anything.
        if not await self._users.delete(user.user_id, expected=_as_judged(user), revoke_tokens_at=moment):
            return False
        await self._revocations.revoke(of_user(user.user_id, moment.timestamp()))
        await self._end_logins(user.user_id)
        try:
            # Should the authentication cluster bring the user back, the keys stay dead.
            await self._api_keys.revoke_all(user.user_id, self._now())
        except GatewayError:
            _log.warning("the API keys of the deleted user %s were not ended one by one", user.user_id)
        record("user_deleted", caller, user_id=user.user_id, by=principal.user_id, via=principal.via)
        return True

    async def _end_logins(self, user_id: str) -> None:
        """Behind a write: those that began with the old password while it was being written, all of a deleted user.

        What was asked for is done, and telling the caller otherwise would be wrong: who repeats it is refused.
        """
        try:
            await self._refresh_tokens.revoke_user(user_id, self._now())
        except GatewayError:
            _log.warning("logins of the user %s that began a moment ago were not ended", user_id)

    async def _find(self, user_id: str) -> UserDocument:
        user = await self._users.find_by_id(user_id)
        if user is None:
            raise no_such_user()
        return user

    def _view(self, user: UserDocument) -> UserView:
        role = effective_role(user, self._admin_addresses)
        return UserView(
            user_id=user.user_id,
            tron_address=user.tron_address,
            email=user.email,
            role=role.label,
            permissions=PERMISSIONS[role],
            created_at=rfc3339(user.created_at),
            updated_at=rfc3339(user.updated_at),
            last_login_at=None if user.last_login_at is None else rfc3339(user.last_login_at),
        )

    def _now(self) -> dt.datetime:
        return utc(self._wall_clock())


_EVENTS: Final = {"password": "password_changed", "email": "email_changed", "tron_address": "wallet_changed"}


def _differences(user: UserDocument, changes: UserChanges, proven: Proven) -> dict[str, Any]:
    """What is to be stored, the fields that are so already left out."""
    wanted = {"email": changes.email, "tron_address": changes.tron_address, "role": changes.role}
    data = {name: value for name, value in wanted.items() if value not in (UNSET, getattr(user, name))}
    if proven.hashed is not None:
        data["password"] = proven.hashed
    return data


def _as_judged(user: UserDocument) -> dict[str, Any]:
    return {name: getattr(user, name) for name in _JUDGED}


def _changing() -> GatewayError:
    return GatewayError(ErrorCode.CONFLICT, "This user is being changed by others; try again")


def _elsewhere(what: str) -> GatewayError:
    return GatewayError(ErrorCode.NOT_IMPLEMENTED, f"{what} is the authentication cluster's business")
