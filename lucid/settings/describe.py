"""The settings for people: what `lucid check` and `lucid routes` print. Secrets are masked here, once."""

import os
from collections.abc import Iterable

from lucid.core.rules.routes import Route
from lucid.settings import BackendSettings, RouteSettings, Settings
from lucid.settings.checks import mask_uri

_UNITS = (("GB", 1024**3), ("MB", 1024**2), ("KB", 1024))


def describe(settings: Settings) -> list[tuple[str, str]]:
    """The settings by the names of their variables. Safe to print."""
    server, tokens, rates, circuit = settings.server, settings.tokens, settings.rates, settings.circuit
    keys = (
        ("JWT_SECRET_KEY", _masked(tokens.secret_key)),
        ("JWT_PRIVATE_KEY", _masked(tokens.private_key)),
        ("JWT_PUBLIC_KEY", _masked(tokens.public_key)),
        ("JWKS_URL", tokens.jwks_url),
        ("JWT_PREVIOUS_KEYS", f"{len(tokens.previous_keys)} keys" if tokens.previous_keys else ""),
    )
    proxies = str(server.trusted_hops) if server.trusted_hops else ",".join(server.trusted_networks)
    rows = [
        ("HOST", server.host),
        ("PORT", str(server.port)),
        ("METRICS_PORT", str(server.metrics_port)),
        ("WORKERS", str(server.workers)),
        ("LOG_LEVEL", server.log_level),
        ("LOG_FORMAT", server.log_format),
        ("PUBLIC_ORIGIN", server.public_origin),
        ("TLS_CERT_FILE", server.tls_cert_file),
        ("TLS_KEY_FILE", server.tls_key_file),
        ("MONGODB_URI", mask_uri(settings.stores.mongodb_uri)),
        ("REDIS_URI", mask_uri(settings.stores.redis_uri)),
        ("JWT_ALGORITHM", tokens.algorithm),
        *keys,
        ("JWT_ISSUER", tokens.issuer),
        ("JWT_AUDIENCE", tokens.audience),
        ("JWT_LEEWAY_SECONDS", str(tokens.leeway_seconds)),
        ("TOKEN_EXPIRE_MINUTES", str(tokens.access_minutes)),
        ("REFRESH_TOKEN_EXPIRE_DAYS", str(tokens.refresh_days)),
        ("AUTH_SERVICE_URL", _endpoints(settings.auth_service) if settings.auth_service else ""),
        ("AUTH_SERVICE_ISSUERS", ",".join(settings.auth_service_issuers)),
        *((f"backend {backend.name}", _endpoints(backend)) for backend in settings.backends),
        ("RATE_LIMIT_PUBLIC", _limit(rates.public)),
        ("RATE_LIMIT_AUTHENTICATED", _limit(rates.authenticated)),
        ("RATE_LIMIT_ADMIN", _limit(rates.admin)),
        ("RATE_LIMIT_LOGIN", _limit(rates.login)),
        ("RATE_LIMIT_REFRESH", _limit(rates.refresh)),
        ("RATE_LIMIT_CHAIN", _limit(rates.chain)),
        ("RATE_LIMIT_WINDOW_SECONDS", str(rates.window_seconds)),
        ("RATE_LIMIT_REDIS_DOWN", rates.redis_down),
        ("RATE_LIMIT_FLEET", str(rates.fleet)),
        ("CIRCUIT_FAILURE_THRESHOLD", str(circuit.failure_threshold)),
        ("CIRCUIT_RECOVERY_SECONDS", f"{circuit.recovery_seconds:g}"),
        ("CIRCUIT_SUCCESS_THRESHOLD", str(circuit.success_threshold)),
        ("CORS_ORIGINS", ",".join(server.cors_origins)),
        ("CORS_ALLOW_CREDENTIALS", str(server.cors_allow_credentials).lower()),
        ("TRUSTED_PROXIES", proxies),
        ("ADMIN_TRON_ADDRESSES", ",".join(sorted(server.admin_tron_addresses))),
    ]
    return [(name, value) for name, value in rows if value]


def route_rows(settings: Settings, own: Iterable[Route] = ()) -> list[tuple[str, ...]]:
    """The route table with a heading, one tuple per row, by path. `own`: what the gateway answers itself."""
    rows = [
        (
            route.path,
            ",".join(route.methods) or "all",
            route.access.label,
            route.backend,
            _size(route.max_body),
            ",".join(_route_limit(each.name, each.requests, each.window, each.per) for each in route.limits)
            or "-",
            ",".join(_options(route)) or "-",
        )
        for route in settings.routes
    ]
    rows += [
        (
            route.pattern,
            # GET implies HEAD here as in the file's rows, which do not spell it out either.
            ",".join(sorted((route.methods or frozenset()) - {"HEAD"})) or "all",
            route.access.label,
            "gateway",
            _size(route.max_body),
            ",".join(
                _route_limit(each.name, each.requests, each.window_seconds, each.per) for each in route.limits
            )
            or "-",
            "-" if route.counted else "not counted",
        )
        for route in own
    ]
    rows.sort(key=lambda row: row[0])
    return [("path", "methods", "access", "backend", "max body", "limits", "options"), *rows]


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return os.linesep.join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _endpoints(backend: BackendSettings) -> str:
    return ",".join(endpoint.label for endpoint in backend.endpoints)


def _options(route: RouteSettings) -> list[str]:
    return [
        *([f"strips {route.strip_prefix}"] if route.strip_prefix else []),
        *(["websocket"] if route.websocket else []),
        *(f"allow {network}" for network in route.allow),
        *(f"deny {network}" for network in route.deny),
    ]


def _route_limit(name: str, requests: int, window_seconds: int, per: str) -> str:
    return f"{name} {requests}/{window_seconds}s per {per}"


def _limit(requests: int) -> str:
    return str(requests) if requests else "off"


def _masked(secret: str) -> str:
    return "***" if secret else ""


def _size(size_bytes: int) -> str:
    for unit, factor in _UNITS:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"
