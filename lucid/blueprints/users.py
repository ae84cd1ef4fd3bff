"""`/api/v1/users`: who one is, and for admins who others are."""

from sanic import Blueprint, HTTPResponse, Request

from lucid.blueprints.coding import NO_STORE, answer, principal_of
from lucid.services.user_service import UserService


def blueprint(service: UserService) -> Blueprint:
    """The routes; `me` is the caller."""
    routes = Blueprint("users", url_prefix="/api/v1/users")

    async def get(request: Request, user_id: str) -> HTTPResponse:
        return answer(await service.get(user_id, principal_of(request)), headers=NO_STORE)

    routes.add_route(get, "/<user_id:str>", methods=["GET", "HEAD"])
    return routes
