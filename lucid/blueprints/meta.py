"""`/api/v1/meta`: what this service is."""

import msgspec
from sanic import Blueprint, HTTPResponse, Request

from lucid import SERVICE_NAME, __version__
from lucid.blueprints.coding import answer


class Info(msgspec.Struct, frozen=True):
    service: str
    description: str
    version: str
    api_version: str
    chain: str


class Version(msgspec.Struct, frozen=True):
    service: str
    version: str
    api_version: str


def blueprint() -> Blueprint:
    """Two constant answers."""
    routes = Blueprint("meta", url_prefix="/api/v1/meta")
    info_answer = Info(
        service=SERVICE_NAME,
        description="Lucid API Gateway",
        version=__version__,
        api_version="v1",
        chain="lucid_blocks",
    )
    version_answer = Version(service=SERVICE_NAME, version=__version__, api_version="v1")

    async def info(_request: Request) -> HTTPResponse:
        return answer(info_answer)

    async def version(_request: Request) -> HTTPResponse:
        return answer(version_answer)

    routes.add_route(info, "/info", methods=["GET", "HEAD"])
    routes.add_route(version, "/version", methods=["GET", "HEAD"])
    return routes
