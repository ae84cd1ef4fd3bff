"""The settings as the environment gives them. Every fault is found in one go, none is a traceback.

An empty variable counts as an absent one: that is what templates of deployments leave behind.
"""

import json
import os
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from lucid.core.exchange import RedisDown
from lucid.settings import (
    BackendSettings,
    CircuitSettings,
    LimitSettings,
    RateSettings,
    RouteSettings,
    ServerSettings,
    Settings,
    SettingsError,
    StoreSettings,
    TokenSettings,
    checks,
)

T = TypeVar("T")

_OWN = ("RATE_LIMIT_", "CIRCUIT_", "JWT_", "CORS_", "LUCID_")
"""Names that begin so are ours alone: what is not known there is a slip."""
# A Kubernetes service named lucid-api-gateway puts LUCID_API_GATEWAY_PORT=tcp://... into every pod beside it.
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST=.*|\w+_SERVICE_PORT(_\w+)?=.*"
    r"|\w+_PORT=(tcp|udp|sctp)://.*|\w+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*",
    re.DOTALL,
)

_ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----", re.DOTALL)
_MB = 1_048_576


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "process_cpu_count"):  # 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Environment:
    """Reads variables one by one; remembers which it was asked for, and what was wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._asked: set[str] = set()
        self.faults: list[str] = []

    def fault(self, name: str, must: str) -> None:
        self.faults.append(f"{name}: {must}")

    def secret(self, name: str) -> str:
        """As it is, spaces and all. Nothing about it may be shown but its length."""
        self._asked.add(name)
        return self._environ.get(name, "")

    def text(self, name: str, default: str = "") -> str:
        self._asked.add(name)
        return self._environ.get(name, "").strip() or default

    def value(self, name: str, default: T, check: Callable[[str], T]) -> T:
        text = self.text(name)
        if not text:
            return default
        try:
            return check(text)
        except ValueError as fault:
            self.fault(name, f"{fault}, not {checks.shown(text)}")
            return default

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        return self.value(name, default, lambda text: _integer(text, low, high))

    def choice(self, name: str, default: str, *choices: str) -> Any:
        def check(text: str) -> str:
            for choice in choices:
                if text.casefold() == choice.casefold():
                    return choice
            raise ValueError(f"must be one of {', '.join(choices)}")

        return self.value(name, default, check)

    def flag(self, name: str) -> bool:
        return bool(
            self.choice(name, "false", "true", "false", "1", "0", "yes", "no") in ("true", "1", "yes")
        )

    def limit(self, name: str, default: int) -> int:
        """Requests; 0 for `off`."""

        def check(text: str) -> int:
            if text.casefold() == "off":
                return 0
            try:
                return _integer(text, 1, 10**9)
            except ValueError:
                raise ValueError("must be an integer from 1, or off") from None

        return self.value(name, default, check)

    def many(self, name: str, check: Callable[[str], T]) -> tuple[T, ...]:
        """A comma list or a JSON list; each bad entry is a fault of its own."""
        text = self.text(name)
        entries: list[Any] = text.split(",")
        if text.startswith("["):
            try:
                entries = json.loads(text)
            except (ValueError, RecursionError):
                self.fault(name, f"must be a JSON list of strings or a comma list, not {checks.shown(text)}")
                return ()
        found = []
        for entry in entries:
            if entry == "" or (isinstance(entry, str) and not entry.strip()):
                continue
            try:
                if not isinstance(entry, str):
                    raise ValueError("must be a list of strings")
                found.append(check(entry.strip()))
            except ValueError as fault:
                self.fault(name, f"{fault}, not {checks.shown(entry)}")
        return tuple(dict.fromkeys(found))

    def unknown(self) -> list[str]:
        """Names in our part of the environment that nothing asked for."""
        return sorted(
            name
            for name, value in self._environ.items()
            if name.startswith(_OWN)
            and name not in self._asked
            and not _SERVICE_LINK.fullmatch(f"{name}={value}")
        )


def read(environ: Mapping[str, str], *, serve: bool) -> Settings:
    """See `lucid.settings.load_settings`."""
    env = _Environment(environ)
    server = _server(env)
    tokens = _tokens(env, serve)
    stores = StoreSettings(
        env.value("MONGODB_URI", StoreSettings().mongodb_uri, checks.mongodb_uri),
        env.value("REDIS_URI", StoreSettings().redis_uri, checks.redis_uri),
    )
    rates = _rates(env)
    circuit = CircuitSettings(
        env.integer("CIRCUIT_FAILURE_THRESHOLD", 5, 1, 1_000_000),
        env.value("CIRCUIT_RECOVERY_SECONDS", 30.0, lambda text: _number(text, 86_400.0)),
        env.integer("CIRCUIT_SUCCESS_THRESHOLD", 2, 1, 1_000_000),
    )
    auth_endpoints = env.many("AUTH_SERVICE_URL", checks.endpoint)
    auth_service = (
        BackendSettings("auth-service", auth_endpoints, health_path="/health") if auth_endpoints else None
    )
    issuers = env.many("AUTH_SERVICE_ISSUERS", str)
    if issuers and not env.text("AUTH_SERVICE_URL"):
        env.fault(
            "AUTH_SERVICE_ISSUERS", "must be empty without AUTH_SERVICE_URL, which verifies what they issue"
        )
    if tokens.issuer in issuers:
        env.fault(
            "AUTH_SERVICE_ISSUERS",
            f"must not name JWT_ISSUER ({tokens.issuer!r}), whose tokens are verified here",
        )
    backends, routes = _platform(env, rates)
    file = env.text("GATEWAY_CONFIG")
    if file:
        from lucid.settings.gateway_file import extend

        backends, routes = extend(Path(file), backends, routes, rates, env.faults)
    env.faults += [f"{name}: must not be set: no such setting" for name in env.unknown()]
    if env.faults:
        raise SettingsError(env.faults)
    return Settings(server, tokens, stores, rates, circuit, auth_service, issuers, backends, routes)


def _server(env: _Environment) -> ServerSettings:
    port = env.integer("PORT", 8080, 1, 65_535)
    metrics_port = env.integer("METRICS_PORT", 9090, 1, 65_535)
    if port == metrics_port:
        env.fault("METRICS_PORT", f"must differ from PORT, which is {port} too")
    cert, key = env.text("TLS_CERT_FILE"), env.text("TLS_KEY_FILE")
    _check_tls(env, cert, key)
    origins = env.many("CORS_ORIGINS", lambda text: text if text == "*" else checks.origin(text))
    credentials = env.flag("CORS_ALLOW_CREDENTIALS")
    if credentials and "*" in origins:
        env.fault("CORS_ORIGINS", "must name origins, not *, while CORS_ALLOW_CREDENTIALS is on")
    proxies = env.text("TRUSTED_PROXIES")
    hops = env.integer("TRUSTED_PROXIES", 0, 0, 32) if proxies.isdecimal() else 0
    return ServerSettings(
        host=env.text("HOST", "0.0.0.0"),
        port=port,
        metrics_port=metrics_port,
        workers=env.integer("WORKERS", cores(), 1, 256),
        log_level=env.choice("LOG_LEVEL", "INFO", "DEBUG", "INFO", "WARNING", "ERROR"),
        log_format=env.choice("LOG_FORMAT", "json", "json", "text"),
        public_origin=env.value(
            "PUBLIC_ORIGIN", f"{'https' if cert else 'http'}://127.0.0.1:{port}", checks.origin
        ),
        tls_cert_file=cert,
        tls_key_file=key,
        cors_origins=origins,
        cors_allow_credentials=credentials,
        trusted_networks=() if proxies.isdecimal() else env.many("TRUSTED_PROXIES", checks.network),
        trusted_hops=hops,
        admin_tron_addresses=frozenset(env.many("ADMIN_TRON_ADDRESSES", checks.tron_address)),
    )


def _check_tls(env: _Environment, cert: str, key: str) -> None:
    if bool(cert) != bool(key):
        missing, given = ("TLS_KEY_FILE", "TLS_CERT_FILE") if cert else ("TLS_CERT_FILE", "TLS_KEY_FILE")
        env.fault(missing, f"must be set together with {given}")
        return
    if not cert:
        return
    readable = True
    for name, path in (("TLS_CERT_FILE", cert), ("TLS_KEY_FILE", key)):
        if not os.access(path, os.R_OK) or not Path(path).is_file():
            env.fault(name, f"must be a file that can be read, not {checks.shown(path)}")
            readable = False
    if readable:
        try:
            # The answer to a passphrase is empty: without one OpenSSL would ask at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError):
            env.fault(
                "TLS_CERT_FILE",
                "must be a PEM certificate that fits the key, without passphrase, of TLS_KEY_FILE",
            )


def _tokens(env: _Environment, serve: bool) -> TokenSettings:
    algorithm = cast(
        Literal["HS256", "RS256", "ES256", "EdDSA"], env.choice("JWT_ALGORITHM", "HS256", *_ALGORITHMS)
    )
    secret, private, public = map(env.secret, ("JWT_SECRET_KEY", "JWT_PRIVATE_KEY", "JWT_PUBLIC_KEY"))
    jwks_url = env.value("JWKS_URL", "", checks.url)
    pairs = {"JWT_PRIVATE_KEY": private, "JWT_PUBLIC_KEY": public, "JWKS_URL": env.text("JWKS_URL")}
    given = [name for name, value in pairs.items() if value]
    known = len(env.faults)
    if algorithm == "HS256":
        for name in given:
            env.fault(
                name, "must not be set while JWT_ALGORITHM is HS256, which has one secret, JWT_SECRET_KEY"
            )
        if serve and not secret:
            env.fault(
                "JWT_SECRET_KEY", "must be set, 32 bytes at least: without a key no token can be verified"
            )
    else:
        if secret:
            env.fault(
                "JWT_SECRET_KEY", f"must not be set while JWT_ALGORITHM is {algorithm}, which has key pairs"
            )
        if serve and not given:
            env.fault("JWT_PRIVATE_KEY", "must be set, or, to verify only, JWT_PUBLIC_KEY or JWKS_URL")
        for name in given[1:]:
            env.fault(name, f"must not be set beside {given[0]}")
    tokens = TokenSettings(
        algorithm=algorithm,
        secret_key=secret,
        private_key=private,
        public_key=public,
        jwks_url=jwks_url,
        previous_keys=_previous_keys(env, algorithm),
        issuer=env.text("JWT_ISSUER", "lucid"),
        audience=env.text("JWT_AUDIENCE", "lucid"),
        leeway_seconds=env.integer("JWT_LEEWAY_SECONDS", 5, 0, 300),
        access_minutes=env.integer("TOKEN_EXPIRE_MINUTES", 15, 1, 1_440),
        refresh_days=env.integer("REFRESH_TOKEN_EXPIRE_DAYS", 7, 1, 365),
    )
    if len(env.faults) == known and (secret or given or tokens.previous_keys):
        from lucid.core.security.key_material import key_faults

        for fault in key_faults(tokens):
            env.fault(fault.field, fault.reason)
    return tokens


def _previous_keys(env: _Environment, algorithm: str) -> tuple[str, ...]:
    """Secrets as a comma or JSON list, public keys as PEM blocks one after the other or as a JSON list."""
    name = "JWT_PREVIOUS_KEYS"
    text = env.secret(name)
    if text.startswith("["):
        try:
            keys = json.loads(text)
        except (ValueError, RecursionError):
            keys = None
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            env.fault(name, "must be a JSON list of strings")
            return ()
    elif algorithm == "HS256":
        keys = text.split(",")
    else:
        keys = _PEM.findall(text)
        if text.strip() and not keys:
            env.fault(name, "must be public keys in PEM, one after the other")
    return tuple(key for key in keys if key)


def _rates(env: _Environment) -> RateSettings:
    default = RateSettings()
    return RateSettings(
        public=env.limit("RATE_LIMIT_PUBLIC", default.public),
        authenticated=env.limit("RATE_LIMIT_AUTHENTICATED", default.authenticated),
        admin=env.limit("RATE_LIMIT_ADMIN", default.admin),
        login=env.limit("RATE_LIMIT_LOGIN", default.login),
        refresh=env.limit("RATE_LIMIT_REFRESH", default.refresh),
        chain=env.limit("RATE_LIMIT_CHAIN", default.chain),
        window_seconds=env.integer("RATE_LIMIT_WINDOW_SECONDS", default.window_seconds, 1, 86_400),
        redis_down=cast(
            RedisDown, env.choice("RATE_LIMIT_REDIS_DOWN", default.redis_down, "safe", "strict", "open")
        ),
        fleet=env.integer("RATE_LIMIT_FLEET", default.fleet, 0, 100_000),
    )


def _platform(
    env: _Environment, rates: RateSettings
) -> tuple[tuple[BackendSettings, ...], tuple[RouteSettings, ...]]:
    """The three clusters behind the gateway and their rows."""
    clusters = (
        ("blockchain", "BLOCKCHAIN_SERVICE_URL", "http://blockchain-core:8084"),
        ("sessions", "SESSION_SERVICE_URL", "http://session-api:8087"),
        ("nodes", "NODE_SERVICE_URL", "http://node-management:8095"),
    )
    backends = tuple(
        BackendSettings(
            name,
            env.many(variable, checks.endpoint) or (checks.endpoint(default),),
            health_path="/health",  # as every cluster of the platform has it
        )
        for name, variable, default in clusters
    )
    chain = LimitSettings("chain", rates.chain, rates.window_seconds, "user", rates.redis_down)
    routes = (
        RouteSettings("/api/v1/chain/**", "blockchain", limits=(chain,) if rates.chain else ()),
        RouteSettings("/api/v1/nodes/**", "nodes"),
        RouteSettings("/api/v1/sessions/*/chunks/**", "sessions", max_body=10 * _MB),
        RouteSettings("/api/v1/sessions/*/manifest/**", "sessions"),
        RouteSettings("/api/v1/sessions/*/pipeline/**", "sessions"),
    )
    return backends, routes


def _integer(text: str, low: int, high: int) -> int:
    # int() also takes 1_000, +5 and other scripts' digits.
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and low <= int(text) <= high):
        raise ValueError(f"must be an integer from {low} to {high}")
    return int(text)


def _number(text: str, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= high:
        raise ValueError(f"must be a number of seconds above 0, at most {high:.0f}")
    return number
