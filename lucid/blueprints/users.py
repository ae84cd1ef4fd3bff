"""`/api/v1/users`: who one is, and for admins who others are."""

from sanic import Request

from lucid.blueprints.coding import principal_of
from lucid.blueprints.resource import Resource
from lucid.errors import ErrorCode
from lucid.services.user_service import UserService, UserView


def resource(service: UserService) -> Resource:
    """The routes; `me` is the caller."""
    routes = Resource("users", "/api/v1/users")

    @routes.get("/{user_id}", answer=UserView, errors=(ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY))
    async def get(request: Request, user_id: str) -> UserView:
        """A user: oneself (`me`), for admins any."""
        return await service.get(user_id, principal_of(request))

    return routes
