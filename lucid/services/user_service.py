"""Who the platform's users are, as callers may see them."""

from typing import TYPE_CHECKING

import msgspec

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.security.roles import PERMISSIONS
from lucid.core.validation import is_user_id
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError, rfc3339

if TYPE_CHECKING:
    from lucid.database.user_repository import UserRepository


class UserView(msgspec.Struct, frozen=True):
    """A user as the API shows it."""

    user_id: str
    tron_address: str | None
    email: str | None
    role: str
    permissions: tuple[str, ...]
    created_at: str
    updated_at: str
    last_login_at: str | None


def effective_role(user: UserDocument, admin_addresses: frozenset[str]) -> Role:
    """The role that counts now: `super_admin` while the address is listed, else the stored one.

    Computed each time and never stored, so that taking an address off the list takes effect at the next
    refresh. A stored name that is no role gives the lowest.
    """
    if user.tron_address is not None and user.tron_address in admin_addresses:
        return Role.SUPER_ADMIN
    return ROLES.get(user.role, Role.USER)


class UserService:
    """Reads users. Raises NOT_FOUND for those who are not there and, alike, for those one may not see."""

    def __init__(self, users: "UserRepository", admin_addresses: frozenset[str]) -> None:
        self._users = users
        self._admin_addresses = admin_addresses

    async def get(self, user_id: str, principal: Principal) -> UserView:
        """The user of this id, or the caller for `me`."""
        if user_id == "me":
            user_id = principal.user_id
        if not is_user_id(user_id) or (user_id != principal.user_id and principal.role < Role.ADMIN):
            raise GatewayError(ErrorCode.NOT_FOUND, "No such user")
        user = await self._users.find_by_id(user_id)
        if user is None:
            raise GatewayError(ErrorCode.NOT_FOUND, "No such user")
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
