"""What a role gives: its rate tier, and the permissions that the login answer lists. One table each."""

from collections.abc import Mapping
from typing import Final, Literal

from lucid.core.exchange import Role

Tier = Literal["public", "authenticated", "admin"]

TIERS: Final[Mapping[Role, Tier]] = {
    Role.PUBLIC: "public",
    Role.USER: "authenticated",
    Role.NODE_OPERATOR: "authenticated",
    Role.ADMIN: "admin",
    Role.SUPER_ADMIN: "admin",
}

_USER = (
    "api_keys:manage",
    "chain:read",
    "nodes:read",
    "profile:read",
    "profile:write",
    "sessions:read",
    "sessions:write",
)
_NODE_OPERATOR = (*_USER, "nodes:operate")
_ADMIN = (
    *_NODE_OPERATOR,
    "backends:read",
    "backends:write",
    "rate_limits:read",
    "rate_limits:reset",
    "sessions:manage",
    "users:read",
    "users:write",
)
_SUPER_ADMIN = (*_ADMIN, "admins:write")

PERMISSIONS: Final[Mapping[Role, tuple[str, ...]]] = {
    Role.PUBLIC: (),
    Role.USER: tuple(sorted(_USER)),
    Role.NODE_OPERATOR: tuple(sorted(_NODE_OPERATOR)),
    Role.ADMIN: tuple(sorted(_ADMIN)),
    Role.SUPER_ADMIN: tuple(sorted(_SUPER_ADMIN)),
}
"""`area:verb`, sorted; each role holds all that the ones before it hold."""
