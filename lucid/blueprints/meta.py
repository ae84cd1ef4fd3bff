"""`/api/v1/meta`: what this service is."""

import msgspec
from sanic import Request

from lucid import SERVICE_NAME, __version__
from lucid.blueprints.resource import Resource


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


def resource() -> Resource:
    """Two constant answers."""
    routes = Resource("meta", "/api/v1/meta")
    info_answer = Info(
        service=SERVICE_NAME,
        description="Lucid API Gateway",
        version=__version__,
        api_version="v1",
        chain="lucid_blocks",
    )
    version_answer = Version(service=SERVICE_NAME, version=__version__, api_version="v1")

    @routes.get("/info", answer=Info)
    async def info(_request: Request) -> Info:
        """What this service is."""
        return info_answer

    @routes.get("/version", answer=Version)
    async def version(_request: Request) -> Version:
        """Which release this is."""
        return version_answer

    return routes
