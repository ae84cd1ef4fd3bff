"""`/health`: for whoever starts, stops and watches the gateway. No I/O: background checks have looked."""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
from sanic import Request

from lucid import SERVICE_NAME, __version__
from lucid.blueprints.resource import Resource
from lucid.core.validation import Moment
from lucid.errors import ErrorCode, GatewayError, rfc3339

Dependencies = Callable[[], Mapping[str, str]]
"""Name to "healthy", "unhealthy" or "unknown"."""
Readiness = Callable[[], tuple[bool, Sequence[str]]]
"""(ready, names of what is missing): not ready only while starting or draining."""


class Health(msgspec.Struct, frozen=True):
    status: Literal["healthy"]
    service: str
    version: str
    timestamp: Moment
    dependencies: Mapping[str, str]


class Ready(msgspec.Struct, frozen=True):
    status: Literal["ready", "degraded"]
    missing: Sequence[str]


def resource(dependencies: Dependencies, readiness: Readiness) -> Resource:
    """Liveness and readiness. A missing dependency degrades, it never takes the gateway out of service."""
    routes = Resource("health", "/health")

    @routes.get("", answer=Health)
    async def health(_request: Request) -> Health:
        """The process lives."""
        return Health(
            status="healthy",
            service=SERVICE_NAME,
            version=__version__,
            timestamp=rfc3339(dt.datetime.now(dt.UTC)),
            dependencies=dependencies(),
        )

    @routes.get("/ready", answer=Ready, errors=(ErrorCode.DRAINING,))
    async def ready(_request: Request) -> Ready:
        """Whether to send requests here, and what is missing behind it."""
        is_ready, missing = readiness()
        if not is_ready:
            raise GatewayError(
                ErrorCode.DRAINING,
                "The gateway is starting or shutting down",
                details={"missing": list(missing)},
                fields=(("Retry-After", "1"),),
            )
        return Ready(status="degraded" if missing else "ready", missing=list(missing))

    return routes
