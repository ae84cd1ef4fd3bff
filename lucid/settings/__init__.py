"""One tree of frozen structs, read once from the environment and one optional TOML file."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from lucid.core.exchange import RedisDown, Role


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds; 0: none."""

    connect: float = 2.0
    head: float = 30.0
    idle: float = 60.0
    total: float = 0.0


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    requests: int
    window: int = 60
    per: Literal["user", "address"] = "user"
    redis_down: RedisDown = "safe"


class EndpointSettings(msgspec.Struct, frozen=True):
    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def label(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class BackendSettings(msgspec.Struct, frozen=True):
    name: str
    endpoints: tuple[EndpointSettings, ...]
    max_connections: int = 256
    """Per worker and endpoint."""
    health_path: str = ""
    """Empty: no active check."""


class RouteSettings(msgspec.Struct, frozen=True):
    path: str
    backend: str
    access: Role = Role.USER
    methods: tuple[str, ...] = ()
    """Empty: all. GET implies HEAD."""
    strip_prefix: str = ""
    max_body: int = 100 * 1_048_576
    """Bytes."""
    timeouts: Timeouts = Timeouts()
    websocket: bool = False
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    limits: tuple[LimitSettings, ...] = ()


class ServerSettings(msgspec.Struct, frozen=True):
    host: str = "0.0.0.0"
    port: int = 8080
    metrics_port: int = 9090
    workers: int = 1
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"
    public_origin: str = "http://127.0.0.1:8080"
    tls_cert_file: str = ""
    tls_key_file: str = ""
    cors_origins: tuple[str, ...] = ()
    cors_allow_credentials: bool = False
    trusted_networks: tuple[str, ...] = ()
    trusted_hops: int = 0
    admin_tron_addresses: frozenset[str] = frozenset()


class TokenSettings(msgspec.Struct, frozen=True):
    """Key material as given; `jwt.py` turns it into keys. Nothing here may reach a log: `repr` is masked."""

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = "HS256"
    secret_key: str = ""
    private_key: str = ""
    public_key: str = ""
    jwks_url: str = ""
    previous_keys: tuple[str, ...] = ()
    issuer: str = "lucid"
    audience: str = "lucid"
    leeway_seconds: int = 5
    access_minutes: int = 15
    refresh_days: int = 7

    def __repr__(self) -> str:
        return f"TokenSettings(algorithm={self.algorithm!r}, keys=***)"


class StoreSettings(msgspec.Struct, frozen=True):
    mongodb_uri: str = "mongodb://mongodb:27017/lucid"
    redis_uri: str = "redis://redis:6379/0"

    def __repr__(self) -> str:
        return "StoreSettings(***)"


class RateSettings(msgspec.Struct, frozen=True):
    """Requests per window; 0: off."""

    public: int = 100
    authenticated: int = 1_000
    admin: int = 10_000
    login: int = 10
    refresh: int = 60
    chain: int = 500
    window_seconds: int = 60
    redis_down: RedisDown = "safe"
    fleet: int = 0
    """Workers of all pods at most, for those that start while Redis is away; 0: not told."""


class CircuitSettings(msgspec.Struct, frozen=True):
    failure_threshold: int = 5
    recovery_seconds: float = 30.0
    success_threshold: int = 2


class Settings(msgspec.Struct, frozen=True):
    server: ServerSettings = ServerSettings()
    tokens: TokenSettings = TokenSettings()
    stores: StoreSettings = StoreSettings()
    rates: RateSettings = RateSettings()
    circuit: CircuitSettings = CircuitSettings()
    auth_service: BackendSettings | None = None
    """The authentication cluster; None: the gateway issues tokens itself."""
    auth_service_issuers: tuple[str, ...] = ()
    backends: tuple[BackendSettings, ...] = ()
    routes: tuple[RouteSettings, ...] = ()


class SettingsError(Exception):
    """The settings are wrong. `faults` has one line per fault: the field, and what it must be."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def load_settings(environ: Mapping[str, str], *, serve: bool = True) -> Settings:
    """The settings that `environ` and the file that it may name (`GATEWAY_CONFIG`) give.

    `serve`: a key is demanded, as nothing can be verified without one. Raises SettingsError with all faults, those
    of `not_served` among them: what is not served is refused by every command alike.
    """
    # The reader knows the route table, which knows these structs.
    from lucid.settings.environment import read

    settings = read(environ, serve=serve)
    if faults := not_served(settings):
        raise SettingsError(faults)
    return settings


def not_served(settings: Settings) -> list[str]:
    """What these settings ask for that this version does not do, one line each. It is refused rather than ignored."""
    return [
        f"GATEWAY_CONFIG: route {route.path}: websocket must be false, tunnels are not served by this version yet"
        for route in settings.routes
        if route.websocket
    ]
