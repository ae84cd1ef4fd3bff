"""`/api/v1/rate-limits`: where one stands; for admins, a look at a key and its reset."""

from urllib.parse import unquote

from sanic import Blueprint, HTTPResponse, Request

from lucid.blueprints.coding import NO_STORE, answer, exchange_of, no_content, principal_of
from lucid.core.validation import bad_field
from lucid.services.rate_limit_service import RateLimitService

MAX_IDENTIFIER = 128


def blueprint(service: RateLimitService) -> Blueprint:
    """The routes; who may call them the gateway's table says."""
    routes = Blueprint("rate_limits", url_prefix="/api/v1/rate-limits")

    async def mine(request: Request) -> HTTPResponse:
        exchange = exchange_of(request)
        return answer(service.standing(exchange.principal, exchange.claim), headers=NO_STORE)

    async def look(request: Request, name: str, identifier: str) -> HTTPResponse:
        return answer(await service.look(name, _checked(identifier)), headers=NO_STORE)

    async def reset(request: Request, name: str, identifier: str) -> HTTPResponse:
        await service.reset(name, _checked(identifier), principal_of(request))
        return no_content()

    routes.add_route(mine, "/me", methods=["GET", "HEAD"])
    routes.add_route(look, "/<name:str>/<identifier:str>", methods=["GET", "HEAD"])
    routes.add_route(reset, "/<name:str>/<identifier:str>", methods=["DELETE"])
    return routes


def _checked(text: str) -> str:
    """The identifier in a segment of the path, where clients encode what an address has (`%3A%3A1`)."""
    identifier = unquote(text)
    if not identifier.isprintable() or not 1 <= len(identifier) <= MAX_IDENTIFIER:
        raise bad_field("identifier", f"must be 1 to {MAX_IDENTIFIER} printable characters")
    return identifier
