"""What a change of a user looks like, and who may change what about whom. Nothing here waits or remembers: the user as
stored now and the caller in; what may not be is raised.

    everybody      oneself: email, password, address, deletion; never the role
    admin          besides, users and node operators: email, role up to node_operator, deletion
    super_admin    besides, everybody: email, every role, deletion

To all others a user whom they may not touch is not there.

Credentials and roles are changed, and one's own account is deleted, with a token from a login only: else a leaked API
key would do to take an account over, to make an admin who stays one when the key is gone, or to end the account.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lucid.core.exchange import ROLES, Principal, Role, RoleName
from lucid.core.validation import (
    MAX_PASSWORD_CHARACTERS,
    ChallengeText,
    Email,
    Password,
    SignatureHex,
    TronAddress,
    bad_field,
    checked_address,
    checked_email,
    checked_password,
    is_user_id,
)
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError


class UserChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to change; what is absent stays. `current_password` goes with `password`, where one is set already;
    `signature` and `message` (a challenge for that address) with `tron_address`.
    """

    email: Email | UnsetType = UNSET
    password: Password | UnsetType = UNSET
    current_password: (
        Annotated[str, Meta(max_length=MAX_PASSWORD_CHARACTERS, extra_json_schema={"format": "password"})]
        | UnsetType
    ) = UNSET
    tron_address: TronAddress | UnsetType = UNSET
    signature: SignatureHex | UnsetType = UNSET
    message: ChallengeText | UnsetType = UNSET
    role: RoleName | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"UserChanges({', '.join(name for name in self.__struct_fields__ if self.names(name))})"

    def names(self, *fields: str) -> bool:
        """Whether it has one of these fields."""
        return any(getattr(self, field) is not UNSET for field in fields)


def effective_role(user: UserDocument, admin_addresses: frozenset[str]) -> Role:
    """The role that counts now: `super_admin` while the address is listed, else the stored one.

    Computed each time and never stored, so that taking an address off the list takes effect at the next
    refresh. A stored name that is no role gives the lowest.
    """
    if user.tron_address is not None and user.tron_address in admin_addresses:
        return Role.SUPER_ADMIN
    return ROLES.get(user.role, Role.USER)


def target(user_id: str, principal: Principal) -> str:
    """The id that a path names, if the caller may know of it: one's own (also as `me`), for admins any."""
    if user_id == "me":
        user_id = principal.user_id
    if not is_user_id(user_id) or (user_id != principal.user_id and principal.role < Role.ADMIN):
        raise no_such_user()
    return user_id


def check_shape(changes: UserChanges) -> None:
    """What can be said of `changes` alone. Raises BAD_FIELD."""
    if changes.password is UNSET and changes.current_password is not UNSET:
        raise bad_field("current_password", "belongs to a new password")
    if changes.tron_address is UNSET:
        for name in ("signature", "message"):
            if changes.names(name):
                raise bad_field(name, "belongs to a new tron_address")
    else:
        for name in ("signature", "message"):
            if not changes.names(name):
                raise bad_field(name, "is missing")
        checked_address(changes.tron_address)
    if changes.email is not UNSET:
        checked_email(changes.email)
    if changes.password is not UNSET:
        checked_password(changes.password)
    if not changes.names("email", "password", "tron_address", "role"):
        raise bad_field("body", "names nothing to change")


def check_rights(changes: UserChanges, principal: Principal, own: bool) -> None:
    """Which fields the caller may name; whoever gets here with another's id is an admin. Raises ROLE_TOO_LOW."""
    if changes.role is not UNSET:
        if own:
            raise forbidden("Nobody may change their own role")
        if ROLES[changes.role] > Role.NODE_OPERATOR and principal.role < Role.SUPER_ADMIN:
            raise forbidden("Only super admins may make others admins")
    if not own and changes.names("password", "tron_address"):
        raise forbidden("Password and address are changed by their owner only")
    if principal.via != "token":
        raise forbidden("Users are changed with a token from a login only")


def check_deletion(principal: Principal, own: bool) -> None:
    """Raises ROLE_TOO_LOW for a caller who would delete their own account with an API key."""
    if own and principal.via != "token":
        raise forbidden("One's own account is deleted with a token from a login only")


def check_rank(present: Role, principal: Principal, own: bool) -> None:
    """Whether the caller may touch somebody who is `present` now. Raises ROLE_TOO_LOW."""
    if not own and present >= Role.ADMIN and principal.role < Role.SUPER_ADMIN:
        raise forbidden("Only super admins may change or delete admins")


def no_such_user() -> GatewayError:
    return GatewayError(ErrorCode.NOT_FOUND, "No such user")


def conflict(*fields: str) -> GatewayError:
    """Another live user has what these fields name."""
    return GatewayError(ErrorCode.CONFLICT, details={"fields": list(fields)})


def forbidden(message: str) -> GatewayError:
    return GatewayError(ErrorCode.ROLE_TOO_LOW, message)
