"""`/api/v1/users`: registering, oneself, and for admins all others."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sanic import Request

from lucid.blueprints.coding import caller_of, principal_of
from lucid.blueprints.resource import Resource
from lucid.core.exchange import RoleName
from lucid.core.validation import (
    DEFAULT_PAGE,
    DEFAULT_PAGE_LIMIT,
    Email,
    PageLimit,
    PageNumber,
    Password,
    TronAddress,
)
from lucid.errors import ErrorCode
from lucid.services.user_rules import UserChanges
from lucid.services.user_service import UserPage, UserService, UserView

PREFIX = "/api/v1/users"

UserIdOrMe = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern="^[A-Za-z0-9_-]+$(?!\\n)",
        description="A user's id, or `me` for the caller",
    ),
]


class RegistrationBody(msgspec.Struct, forbid_unknown_fields=True):
    email: Email
    password: Password

    def __repr__(self) -> str:
        return "RegistrationBody(***)"


class UserQuery(msgspec.Struct, forbid_unknown_fields=True):
    page: PageNumber = DEFAULT_PAGE
    limit: PageLimit = DEFAULT_PAGE_LIMIT
    # UNSET, not None: from a query string msgspec reads the text `null` as a None that is allowed.
    email: Email | UnsetType = UNSET
    tron_address: TronAddress | UnsetType = UNSET
    role: RoleName | UnsetType = UNSET


def resource(service: UserService) -> Resource:
    """The routes, each calling `service` once; `me` is the caller."""
    routes = Resource("users", PREFIX)
    one = {"user_id": UserIdOrMe}

    @routes.post(
        "",
        body=RegistrationBody,
        answer=UserView,
        location=lambda user: f"{PREFIX}/{user.user_id}",
        errors=(
            ErrorCode.CONFLICT,
            ErrorCode.NOT_IMPLEMENTED,
            ErrorCode.BACKEND_UNAVAILABLE,
            ErrorCode.DEPENDENCY_AWAY,
        ),
    )
    async def register(request: Request, body: RegistrationBody) -> UserView:
        """Register with email and password.

        What comes back is the user, not a login: log in with both.
        """
        return await service.register(body.email, body.password, caller_of(request))

    @routes.get("", query=UserQuery, answer=UserPage, errors=(ErrorCode.DEPENDENCY_AWAY,))
    async def list_users(request: Request, query: UserQuery) -> UserPage:
        """A page of the users, newest first; all filters that are given hold.

        `role` is the role that counts, which is `super_admin` for the addresses that the operator has listed.
        """
        return await service.list_users(
            query.page,
            query.limit,
            principal_of(request),
            email=query.email or None,
            tron_address=query.tron_address or None,
            role=query.role or None,
        )

    @routes.get(
        "/{user_id}",
        parameters=one,
        answer=UserView,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY),
    )
    async def get(request: Request, user_id: str) -> UserView:
        """A user: oneself (`me`), for admins any."""
        return await service.get(user_id, principal_of(request))

    @routes.patch(
        "/{user_id}",
        parameters=one,
        body=UserChanges,
        answer=UserView,
        errors=(
            ErrorCode.ROLE_TOO_LOW,
            ErrorCode.NOT_FOUND,
            ErrorCode.CONFLICT,
            ErrorCode.BAD_CREDENTIAL,
            ErrorCode.BAD_SIGNATURE,
            ErrorCode.UNKNOWN_CHALLENGE,
            ErrorCode.RATE_LIMITED,
            ErrorCode.NOT_IMPLEMENTED,
            ErrorCode.BACKEND_UNAVAILABLE,
            ErrorCode.DEPENDENCY_AWAY,
        ),
    )
    async def update(request: Request, user_id: str, body: UserChanges) -> UserView:
        """Change a user: all that the body names, or nothing; with a token from a login only.

        Oneself: `email`; `password`, with `current_password` where one is set; `tron_address`, with the `signature` of
        a fresh challenge (`message`) by that wallet. Others, for admins: `email` and `role`, up to `node_operator`;
        for super admins every role, and admins too. Nobody changes their own role. A change of role or password ends
        the user's access tokens, one of the password the logins too.
        """
        return await service.update(user_id, body, principal_of(request), caller_of(request))

    @routes.delete(
        "/{user_id}",
        parameters=one,
        errors=(ErrorCode.ROLE_TOO_LOW, ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY),
    )
    async def delete(request: Request, user_id: str) -> None:
        """Delete a user: oneself, for admins any who is no admin, for super admins any.

        The address and the email are free again, and all tokens, logins and API keys end.
        """
        await service.delete(user_id, principal_of(request), caller_of(request))

    return routes
