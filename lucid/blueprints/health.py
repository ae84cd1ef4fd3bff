"""`/health`: for whoever starts, stops and watches the gateway. No I/O: background checks have looked."""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
from sanic import Blueprint, HTTPResponse, Request

from lucid import SERVICE_NAME, __version__
from lucid.blueprints.coding import answer
from lucid.errors import ErrorCode, GatewayError, rfc3339

Dependencies = Callable[[], Mapping[str, str]]
"""Name to "healthy", "unhealthy" or "unknown"."""
Readiness = Callable[[], tuple[bool, Sequence[str]]]
"""(ready, names of what is missing): not ready only while starting or draining."""

_NO_CACHE: Final = {"cache-control": "no-cache, no-store"}


class Health(msgspec.Struct, frozen=True):
    status: str
    service: str
    version: str
    timestamp: str
    dependencies: Mapping[str, str]


class Ready(msgspec.Struct, frozen=True):
    status: str
    missing: Sequence[str]


def blueprint(dependencies: Dependencies, readiness: Readiness) -> Blueprint:
    """Liveness and readiness. A missing dependency degrades, it never takes the gateway out of service."""
    routes = Blueprint("health", url_prefix="/health")

    async def health(_request: Request) -> HTTPResponse:
        return answer(
            Health(
                status="healthy",
                service=SERVICE_NAME,
                version=__version__,
                timestamp=rfc3339(dt.datetime.now(dt.UTC)),
                dependencies=dependencies(),
            ),
            headers=_NO_CACHE,
        )

    async def ready(_request: Request) -> HTTPResponse:
        is_ready, missing = readiness()
        if not is_ready:
            raise GatewayError(
                ErrorCode.DRAINING,
                "The gateway is starting or shutting down",
                details={"missing": list(missing)},
                fields=(("Retry-After", "1"),),
            )
        return answer(
            Ready(status="degraded" if missing else "ready", missing=list(missing)), headers=_NO_CACHE
        )

    routes.add_route(health, "/", methods=["GET", "HEAD"])
    routes.add_route(ready, "/ready", methods=["GET", "HEAD"])
    return routes
