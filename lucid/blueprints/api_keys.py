"""`/api/v1/users/me/api-keys`: the caller's own keys."""

from typing import Annotated

import msgspec
from msgspec import Meta
from sanic import Request

from lucid.blueprints.coding import caller_of, principal_of
from lucid.blueprints.resource import Resource
from lucid.core.exchange import RoleName
from lucid.core.validation import (
    DEFAULT_PAGE,
    DEFAULT_PAGE_LIMIT,
    ApiKeyName,
    PageLimit,
    PageNumber,
    Timestamp,
)
from lucid.errors import ErrorCode
from lucid.services.api_key_service import ApiKeyPage, ApiKeyService, NewApiKey

PREFIX = "/api/v1/users/me/api-keys"

KeyId = Annotated[
    str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_-]+$(?!\\n)", description="A key's id")
]


class ApiKeyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Without a `role` it is the lowest: nobody's full rights are given away by saying nothing."""

    name: ApiKeyName
    role: RoleName = "user"
    expires_at: Timestamp | None = None


class ApiKeyQuery(msgspec.Struct, forbid_unknown_fields=True):
    page: PageNumber = DEFAULT_PAGE
    limit: PageLimit = DEFAULT_PAGE_LIMIT


def resource(service: ApiKeyService) -> Resource:
    """The routes, each calling `service` once."""
    routes = Resource("api_keys", PREFIX)

    @routes.get(
        "", query=ApiKeyQuery, answer=ApiKeyPage, errors=(ErrorCode.ROLE_TOO_LOW, ErrorCode.DEPENDENCY_AWAY)
    )
    async def list_keys(request: Request, query: ApiKeyQuery) -> ApiKeyPage:
        """A page of the caller's API keys, newest first, without the keys themselves."""
        return await service.list_keys(query.page, query.limit, principal_of(request))

    @routes.post(
        "",
        body=ApiKeyBody,
        answer=NewApiKey,
        location=lambda key: f"{PREFIX}/{key.key_id}",
        errors=(
            ErrorCode.ROLE_TOO_LOW,
            ErrorCode.NOT_FOUND,
            ErrorCode.CONFLICT,
            ErrorCode.DEPENDENCY_AWAY,
        ),
    )
    async def create(request: Request, body: ApiKeyBody) -> NewApiKey:
        """Make an API key. The answer is the only one that shows it.

        It acts as the caller, with `role` but never more than the caller has when it is used. At most 50 at a time.
        """
        return await service.create(
            body.name, body.role, body.expires_at, principal_of(request), caller_of(request)
        )

    @routes.delete(
        "/{key_id}",
        parameters={"key_id": KeyId},
        errors=(ErrorCode.ROLE_TOO_LOW, ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY),
    )
    async def revoke(request: Request, key_id: str) -> None:
        """End an API key, at once and everywhere."""
        await service.revoke(key_id, principal_of(request), caller_of(request))

    return routes
