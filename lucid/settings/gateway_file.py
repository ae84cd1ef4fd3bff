"""The optional file: more backends and routes than the platform's own, in TOML.

    [backends.reports]
    endpoints = ["http://10.0.0.5:9000"]

    [[routes]]
    path = "/api/v1/reports/**"
    backend = "reports"

It adds to the platform's table or replaces a row by the same path. All faults are found in one go.
"""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lucid.core.exchange import ROLES, Role
from lucid.core.rules.routes import ALL_METHODS, Route, RouteTable, lies_under
from lucid.settings import (
    BackendSettings,
    EndpointSettings,
    LimitSettings,
    RateSettings,
    RouteSettings,
    Timeouts,
    checks,
)

T = TypeVar("T")
Check = Callable[[Any], T]

OWN_PATHS = (
    "/health",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/api/v1/meta",
    "/api/v1/auth",
    "/api/v1/users",
    "/api/v1/sessions",
    "/api/v1/rate-limits",
    "/api/v1/backends",
)
"""What the gateway answers itself. Below a session (`/api/v1/sessions/*/chunks`) the data is a backend's."""

DEPENDENCIES = frozenset({"auth-service", "mongodb", "redis", "revocations"})
"""The other names that readiness may list as missing."""

OWN_LIMITS = frozenset({"public", "authenticated", "admin", "login", "refresh"})
"""Their counters live under these names already. `chain` is a file limit like any other."""


class _Table:
    """One TOML table: hands out checked values by key, and reports what nobody asked for."""

    def __init__(self, where: str, data: object, faults: list[str]) -> None:
        self.where = where
        self._faults = faults
        self._data: dict[str, Any] = {}
        if isinstance(data, dict):
            self._data = dict(data)
        else:
            self.fault("", "must be a table")

    def fault(self, key: str, must: str) -> None:
        self._faults.append(f"{self.where}{'.' if key else ''}{key}: {must}")

    def take(self, key: str, check: Check[T], default: T) -> T:
        if key not in self._data:
            return default
        value = self._data.pop(key)
        try:
            return check(value)
        except ValueError as fault:
            self.fault(key, f"{fault}, not {checks.shown(value)}")
            return default

    def need(self, key: str, check: Check[T], default: T) -> T:
        if key not in self._data:
            self.fault(key, "must be set")
        return self.take(key, check, default)

    def many(self, key: str, check: Check[T]) -> tuple[T, ...]:
        """A list; each bad entry is a fault of its own."""
        value = self._data.pop(key, [])
        if not isinstance(value, list):
            self.fault(key, f"must be a list, not {checks.shown(value)}")
            return ()
        found = []
        for entry in value:
            try:
                found.append(check(entry))
            except ValueError as fault:
                self.fault(key, f"{fault}, not {checks.shown(entry)}")
        return tuple(dict.fromkeys(found))

    def some(self, key: str, check: Check[T]) -> tuple[T, ...]:
        """As `many`; a list that is there must not be empty, for empty would mean all."""
        if self._data.get(key) == []:
            self.fault(key, "must not be empty; absent, it means all")
        return self.many(key, check)

    def table(self, key: str) -> "_Table | None":
        return _Table(f"{self.where}.{key}", self._data.pop(key), self._faults) if key in self._data else None

    def tables(self, key: str) -> "list[_Table]":
        value = self._data.pop(key, [])
        if not isinstance(value, list):
            self.fault(key, "must be a list of tables")
            return []
        return [
            _Table(f"{self.where}.{key}[{place}]", entry, self._faults)
            for place, entry in enumerate(value, 1)
        ]

    def close(self) -> None:
        for key in sorted(self._data):
            self.fault(key, "must not be set: no such setting")


def extend(
    path: Path,
    backends: tuple[BackendSettings, ...],
    routes: tuple[RouteSettings, ...],
    rates: RateSettings,
    faults: list[str],
) -> tuple[tuple[BackendSettings, ...], tuple[RouteSettings, ...]]:
    """The platform's table with what the file adds and replaces; what is wrong is appended to `faults`.

    Rows of the file that share a path must share out its methods.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        faults.append(
            f"GATEWAY_CONFIG: must be a file that can be read, not {str(path)!r} ({error.strerror})"
        )
        return backends, routes
    except (ValueError, RecursionError) as error:
        faults.append(f"GATEWAY_CONFIG: must be TOML in UTF-8; {path.name}: {error}")
        return backends, routes
    known = len(faults)
    root = _Table(path.name, data, faults)
    declared = root.table("backends")
    merged = {backend.name: backend for backend in backends}
    if declared:
        for name in list(declared._data):
            merged[name] = _backend(declared, name, merged.get(name))
    rows = [_route(table, merged, rates) for table in root.tables("routes")]
    root.close()
    replaced = {row.path.removesuffix("/") for row in rows}
    table = (*(row for row in routes if row.path.removesuffix("/") not in replaced), *rows)
    if len(faults) == known:
        _check_whole(path.name, table, faults)
    return tuple(merged.values()), table


def _backend(declared: _Table, name: str, before: BackendSettings | None) -> BackendSettings:
    table = declared.table(name)
    assert table is not None
    try:
        checks.name(name)
        if name in DEPENDENCIES:
            raise ValueError(f"must not be {name}, as the health answers call what the gateway depends on")
    except ValueError as fault:
        table.fault("", f"the name {fault}")
    endpoints: tuple[EndpointSettings, ...] = table.many(
        "endpoints", lambda value: checks.endpoint(_text(value))
    )
    if not endpoints and before:
        # One of the platform's: its addresses stay those of its variable.
        endpoints = before.endpoints
    platform = before or BackendSettings(name, ())
    if not endpoints:
        table.fault("endpoints", 'must be a list of addresses such as "http://10.0.0.5:9000", one at least')
    connections = table.take("max_connections", _integer(1, 65_536), platform.max_connections)
    health = table.table("health")
    health_path = platform.health_path
    if health:
        health_path = health.need("path", _path, "")
        health.close()
    table.close()
    return BackendSettings(name, endpoints, connections, health_path)


def _route(table: _Table, backends: dict[str, BackendSettings], rates: RateSettings) -> RouteSettings:
    def backend(value: object) -> str:
        if _text(value) not in backends:
            raise ValueError(f"must be one of {', '.join(sorted(backends))}")
        return str(value)

    row = RouteSettings(
        path=table.need("path", _path, ""),
        backend=table.need("backend", backend, ""),
        access=table.take("access", _access, Role.USER),
        methods=table.some("methods", _method),
        strip_prefix=table.take("strip_prefix", _path, ""),
        max_body=table.take("max_body", _size, RouteSettings("", "").max_body),
        timeouts=_timeouts(table.table("timeouts")),
        websocket=table.take("websocket", _flag, False),
        allow=table.many("allow", lambda value: checks.network(_text(value))),
        deny=table.many("deny", lambda value: checks.network(_text(value))),
        limits=tuple(_limit(limit, rates) for limit in table.tables("limits")),
    )
    table.close()
    if row.path:
        _check_row(table, row)
    return row


def _check_row(table: _Table, row: RouteSettings) -> None:
    try:
        RouteTable.build([Route.from_settings(row)])
    except ValueError as fault:
        table.fault("path", str(fault).removeprefix(f"route {row.path}: "))
        return
    for own in OWN_PATHS:
        if lies_under(row.path, own) and not _is_session_data(row.path):
            table.fault(
                "path",
                f"must not lie under {own}, which the gateway answers itself, not {checks.shown(row.path)}",
            )


def _is_session_data(path: str) -> bool:
    """Whether only what lies below one session is taken: `/api/v1/sessions/*/chunks/**`, not `.../*/**`."""
    segments = path.removesuffix("/").split("/")[1:]
    return segments[:3] == ["api", "v1", "sessions"] and len(segments) >= 5 and segments[4] != "**"


def _check_whole(file: str, routes: tuple[RouteSettings, ...], faults: list[str]) -> None:
    try:
        RouteTable.build(map(Route.from_settings, routes))
    except ValueError as fault:
        faults.append(f"{file}.routes: {fault}")
    numbers: dict[str, LimitSettings] = {}
    for row in routes:
        if len({limit.name for limit in row.limits}) != len(row.limits):
            faults.append(f"{file}.routes: {row.path}: a limit must not stand twice on a route")
        for limit in row.limits:
            if numbers.setdefault(limit.name, limit) != limit:
                must = f"the limit {limit.name!r} must have the same numbers wherever it stands"
                faults.append(f"{file}.routes: {row.path}: {must}")


def _timeouts(table: _Table | None) -> Timeouts:
    default = Timeouts()
    if table is None:
        return default
    found = Timeouts(
        connect=table.take("connect", _seconds, default.connect),
        head=table.take("head", _seconds, default.head),
        idle=table.take("idle", _seconds, default.idle),
        total=table.take("total", _seconds, default.total),
    )
    table.close()
    return found


def _limit(table: _Table, rates: RateSettings) -> LimitSettings:
    found = LimitSettings(
        name=table.need("name", _limit_name, ""),
        requests=table.need("requests", _integer(1, 10**9), 1),
        window=table.take("window", _integer(1, 86_400), 60),
        per=table.take("per", _one_of("user", "address"), "user"),
        redis_down=table.take("redis_down", _one_of("safe", "strict", "open"), rates.redis_down),
    )
    table.close()
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def _path(value: object) -> str:
    if not _text(value).startswith("/"):
        raise ValueError("must begin with /")
    return _text(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _integer(low: int, high: int) -> Check[int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return value

    return check


def _seconds(value: object) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not (math.isfinite(value) and value >= 0)
    ):
        raise ValueError("must be a number of seconds, 0 for none")
    return float(value)


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return checks.size(value if isinstance(value, str) else "")


def _one_of(*choices: str) -> Check[Any]:
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return check


def _access(value: object) -> Role:
    label = _one_of(*(role.label for role in Role))(value)
    return ROLES.get(label, Role.PUBLIC)


def _method(value: object) -> str:
    return str(_one_of(*ALL_METHODS)(value))


def _limit_name(value: object) -> str:
    name = checks.name(_text(value))
    if name in OWN_LIMITS:
        raise ValueError(f"must not be one of the gateway's own ({', '.join(sorted(OWN_LIMITS))})")
    return name
