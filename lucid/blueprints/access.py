"""The authorisation table of the gateway's own routes: every route that Sanic answers has its row here.

A request without a row never reaches Sanic (404), and a test fails where Sanic has a route that no row names.
Rows of backends come from the settings; all are judged by the one policy.
"""

from collections.abc import Mapping

from lucid.core.exchange import Limit, Role
from lucid.core.rules.routes import Route

MAX_BODY_BYTES = 65_536
"""Bodies of the gateway's own routes."""


def own_routes(limits: Mapping[str, Limit]) -> tuple[Route, ...]:
    """The rows. `limits` are the named limits that are on; a route keeps those of its limits that are."""

    def row(path: str, methods: str, access: Role, *names: str, counted: bool = True) -> Route:
        return Route(
            path,
            access=access,
            methods=frozenset(methods.split()),
            max_body=MAX_BODY_BYTES,
            limits=tuple(limits[name] for name in names if name in limits),
            counted=counted,
        )

    return (
        row("/health", "GET", Role.PUBLIC, counted=False),
        row("/health/ready", "GET", Role.PUBLIC, counted=False),
        row("/docs", "GET", Role.PUBLIC),
        row("/openapi.json", "GET", Role.PUBLIC),
        row("/api/v1/meta/info", "GET", Role.PUBLIC),
        row("/api/v1/meta/version", "GET", Role.PUBLIC),
        row("/api/v1/auth/challenge", "POST", Role.PUBLIC),
        row("/api/v1/auth/login", "POST", Role.PUBLIC, "login"),
        # `refresh` is charged by the service, once it knows whose token it is.
        row("/api/v1/auth/refresh", "POST", Role.PUBLIC),
        row("/api/v1/auth/logout", "POST", Role.USER),
        row("/api/v1/auth/verify", "POST", Role.USER),
        row("/api/v1/auth/status", "GET", Role.USER),
        row("/api/v1/users", "POST", Role.PUBLIC),
        row("/api/v1/users", "GET", Role.ADMIN),
        # Self or an admin, here and with sessions: the service answers 404 to everybody else.
        row("/api/v1/users/*", "GET PATCH DELETE", Role.USER),
        row("/api/v1/users/me/api-keys", "GET POST", Role.USER),
        row("/api/v1/users/me/api-keys/*", "DELETE", Role.USER),
        row("/api/v1/sessions", "GET POST", Role.USER),
        row("/api/v1/sessions/*", "GET PATCH DELETE", Role.USER),
        row("/api/v1/rate-limits/me", "GET", Role.PUBLIC),
        row("/api/v1/rate-limits/*/*", "GET DELETE", Role.ADMIN),
    )
