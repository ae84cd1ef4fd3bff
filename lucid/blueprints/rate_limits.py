"""`/api/v1/rate-limits`: where one stands; for admins, a look at a key and its reset."""

from typing import Annotated

from msgspec import Meta
from sanic import Request

from lucid.blueprints.coding import caller_of, exchange_of, principal_of
from lucid.blueprints.resource import Resource
from lucid.core.validation import bad_field
from lucid.errors import ErrorCode
from lucid.services.rate_limit_service import KeyView, RateLimitService, StandingsView

MAX_IDENTIFIER = 128

LimitName = Annotated[str, Meta(description="A tier (public, authenticated, admin) or a named limit")]
Identifier = Annotated[
    str, Meta(min_length=1, max_length=MAX_IDENTIFIER, description="A user's id, or a client address")
]


def resource(service: RateLimitService) -> Resource:
    """The routes; who may call them the gateway's table says."""
    routes = Resource("rate_limits", "/api/v1/rate-limits")
    key = {"name": LimitName, "identifier": Identifier}
    errors = (ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY)

    @routes.get("/me", answer=StandingsView)
    async def mine(request: Request) -> StandingsView:
        """Where the caller stands, from the memory of the worker that answers."""
        exchange = exchange_of(request)
        return service.standing(exchange.principal, exchange.claim)

    @routes.get("/{name}/{identifier}", parameters=key, answer=KeyView, errors=errors)
    async def look(_request: Request, name: str, identifier: str) -> KeyView:
        """A key of a tier or a named limit, as all workers share it."""
        return await service.look(name, _checked(identifier))

    @routes.delete("/{name}/{identifier}", parameters=key, errors=errors)
    async def reset(request: Request, name: str, identifier: str) -> None:
        """Clear what was spent of a key."""
        await service.reset(name, _checked(identifier), principal_of(request), caller_of(request))

    return routes


def _checked(identifier: str) -> str:
    if not identifier.isprintable() or not 1 <= len(identifier) <= MAX_IDENTIFIER:
        raise bad_field("identifier", f"must be 1 to {MAX_IDENTIFIER} printable characters")
    return identifier
