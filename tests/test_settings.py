"""The settings: what the environment and the file may say, and one line for each thing that they may not."""

import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from lucid.blueprints.access import own_routes
from lucid.core.exchange import Limit, Role
from lucid.settings import (
    EndpointSettings,
    LimitSettings,
    RouteSettings,
    Settings,
    SettingsError,
    Timeouts,
    load_settings,
    not_served,
)
from lucid.settings.checks import mask_uri, shown
from lucid.settings.describe import columns, describe, route_rows
from lucid.settings.environment import read
from lucid.settings.limits import named_limits
from tests.support.certificates import pem, self_signed

KEY = {"JWT_SECRET_KEY": "k" * 32}
TRON = "TR7NHqjeKQxGTCi8q8ZY4pL8otSzgjLj6t"


def load(**environ: str) -> Settings:
    return load_settings({**KEY, **environ})


def parsed(**environ: str) -> Settings:
    """What is read, whether it is served yet or not."""
    return read({**KEY, **environ}, serve=True)


def faults(environ: Mapping[str, str], *, serve: bool = True) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, serve=serve)
    return caught.value.faults


def fault(**environ: str) -> str:
    (line,) = faults({**KEY, **environ})
    return line


# --- the environment ------------------------------------------------------------------------------


def test_with_a_key_alone_the_platform_is_there() -> None:
    settings = load()
    assert settings.server.host == "0.0.0.0"
    assert (settings.server.port, settings.server.metrics_port) == (8080, 9090)
    if hasattr(os, "sched_getaffinity"):
        assert settings.server.workers == len(os.sched_getaffinity(0))
    assert settings.server.public_origin == "http://127.0.0.1:8080"
    assert {backend.name: backend.endpoints for backend in settings.backends} == {
        "blockchain": (EndpointSettings("http", "blockchain-core", 8084),),
        "sessions": (EndpointSettings("http", "session-api", 8087),),
        "nodes": (EndpointSettings("http", "node-management", 8095),),
    }
    chain = LimitSettings("chain", 500, 60, "user", "safe")
    assert settings.routes == (
        RouteSettings("/api/v1/chain/**", "blockchain", limits=(chain,)),
        RouteSettings("/api/v1/nodes/**", "nodes"),
        RouteSettings("/api/v1/sessions/*/chunks/**", "sessions", max_body=10_485_760),
        RouteSettings("/api/v1/sessions/*/manifest/**", "sessions"),
        RouteSettings("/api/v1/sessions/*/pipeline/**", "sessions"),
    )


def test_everything_can_be_set() -> None:
    settings = parsed(
        HOST="::1",
        PORT="80",
        METRICS_PORT="81",
        WORKERS="3",
        LOG_LEVEL="debug",
        LOG_FORMAT="text",
        PUBLIC_ORIGIN="https://Gateway.Example:443",
        MONGODB_URI="mongodb://u:p@a:1,b:2/lucid?replicaSet=r",
        REDIS_URI="redis+sentinel://a,b:26380/master/0",
        TOKEN_EXPIRE_MINUTES="5",
        REFRESH_TOKEN_EXPIRE_DAYS="1",
        JWT_ISSUER="me",
        JWT_AUDIENCE="you",
        JWT_LEEWAY_SECONDS="0",
        JWT_PREVIOUS_KEYS=f"{'a' * 32},{'b' * 32}",
        AUTH_SERVICE_URL="http://auth-service:8089/",
        AUTH_SERVICE_ISSUERS="auth, other",
        BLOCKCHAIN_SERVICE_URL="https://one, http://[::1]:9000/",
        RATE_LIMIT_PUBLIC="off",
        RATE_LIMIT_CHAIN="OFF",
        RATE_LIMIT_ADMIN="1",
        RATE_LIMIT_WINDOW_SECONDS="10",
        RATE_LIMIT_REDIS_DOWN="strict",
        CIRCUIT_FAILURE_THRESHOLD="1",
        CIRCUIT_RECOVERY_SECONDS="0.5",
        CIRCUIT_SUCCESS_THRESHOLD="9",
        CORS_ORIGINS='["https://a.example", "http://b.example:3000"]',
        CORS_ALLOW_CREDENTIALS="true",
        TRUSTED_PROXIES="10.0.0.0/8, fd00::/8, 192.0.2.1",
        ADMIN_TRON_ADDRESSES=TRON,
    )
    server = settings.server
    assert (server.host, server.port, server.metrics_port, server.workers) == ("::1", 80, 81, 3)
    assert (server.log_level, server.log_format) == ("DEBUG", "text")
    assert server.public_origin == "https://gateway.example"
    assert server.cors_origins == ("https://a.example", "http://b.example:3000")
    assert server.cors_allow_credentials
    assert server.trusted_networks == ("10.0.0.0/8", "fd00::/8", "192.0.2.1/32")
    assert server.admin_tron_addresses == frozenset({TRON})
    assert settings.tokens.previous_keys == ("a" * 32, "b" * 32)
    assert (settings.tokens.issuer, settings.tokens.audience, settings.tokens.leeway_seconds) == (
        "me",
        "you",
        0,
    )
    assert (settings.tokens.access_minutes, settings.tokens.refresh_days) == (5, 1)
    assert settings.auth_service is not None
    assert [endpoint.label for endpoint in settings.auth_service.endpoints] == ["http://auth-service:8089"]
    assert settings.auth_service_issuers == ("auth", "other")
    assert [endpoint.label for endpoint in settings.backends[0].endpoints] == [
        "https://one:443",
        "http://[::1]:9000",
    ]
    assert (settings.rates.public, settings.rates.chain, settings.rates.admin) == (0, 0, 1)
    assert (settings.rates.window_seconds, settings.rates.redis_down) == (10, "strict")
    assert settings.circuit.recovery_seconds == 0.5
    assert settings.routes[0].limits == ()


def test_the_settings_survive_the_way_to_a_worker() -> None:
    settings = load(ADMIN_TRON_ADDRESSES=TRON, TRUSTED_PROXIES="2", CORS_ORIGINS="*")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=Settings) == settings


def test_an_empty_variable_is_an_absent_one() -> None:
    assert load(PORT="", REDIS_URI=" ", RATE_LIMIT_LOGIN="", CORS_ORIGINS="", TRUSTED_PROXIES="") == load()


@pytest.mark.parametrize(
    "name,value",
    [
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "8_080"),
        ("PORT", "+80"),
        ("PORT", "٨٠"),
        ("METRICS_PORT", "tcp://10.0.0.1:9090"),
        ("METRICS_PORT", "8080"),
        ("WORKERS", "0"),
        ("WORKERS", "-1"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("PUBLIC_ORIGIN", "gateway.example"),
        ("PUBLIC_ORIGIN", "https://gateway.example/"),
        ("PUBLIC_ORIGIN", "https://user@gateway.example"),
        ("MONGODB_URI", "http://mongodb"),
        ("MONGODB_URI", "mongodb://"),
        ("MONGODB_URI", "mongodb://u:p@h:70000/x"),
        ("MONGODB_URI", "mongodb://u:p%zz@h/x"),
        ("CORS_ORIGINS", "[" * 100_000),
        ("REDIS_URI", "redis://h:99999/0"),
        ("REDIS_URI", "redis://h:6379/0?socket_timeout=abc"),
        ("REDIS_URI", "redis:6379"),
        ("REDIS_URI", "redis+sentinel://a,b"),
        ("REDIS_URI", "redis+cluster://"),
        ("REDIS_URI", "redis+cluster://a,b/main"),
        ("REDIS_URI", "redis+cluster://a,b?db=1"),
        ("REDIS_URI", "redis+cluster://a:0,b"),
        ("REDIS_URI", "redis+cluster://a?ssl=maybe"),
        ("REDIS_URI", "redis://a?ssl=true"),
        ("JWT_ALGORITHM", "none"),
        ("JWT_ALGORITHM", "HS512"),
        ("JWT_PRIVATE_KEY", "x"),
        ("JWT_PUBLIC_KEY", "x"),
        ("JWKS_URL", "https://keys.example"),
        ("JWT_PREVIOUS_KEYS", "short"),
        ("JWT_PREVIOUS_KEYS", "[1]"),
        ("JWT_PREVIOUS_KEYS", "["),
        ("JWT_LEEWAY_SECONDS", "-1"),
        ("TOKEN_EXPIRE_MINUTES", "0"),
        ("REFRESH_TOKEN_EXPIRE_DAYS", "x"),
        ("AUTH_SERVICE_URL", "auth-service:8089"),
        ("AUTH_SERVICE_ISSUERS", "auth"),
        ("BLOCKCHAIN_SERVICE_URL", "blockchain-core:8084"),
        ("SESSION_SERVICE_URL", "ftp://session-api"),
        ("NODE_SERVICE_URL", "http://node:8095/path"),
        ("NODE_SERVICE_URL", "http://node:0"),
        ("NODE_SERVICE_URL", "http://node:"),
        ("NODE_SERVICE_URL", "http://node:99999"),
        ("NODE_SERVICE_URL", "http://[::zz]"),
        ("NODE_SERVICE_URL", "http://[v1.x]"),
        ("NODE_SERVICE_URL", "http://no de"),
        ("RATE_LIMIT_PUBLIC", "0"),
        ("RATE_LIMIT_AUTHENTICATED", "-5"),
        ("RATE_LIMIT_ADMIN", "many"),
        ("RATE_LIMIT_LOGIN", "1.5"),
        ("RATE_LIMIT_REFRESH", "on"),
        ("RATE_LIMIT_CHAIN", "1e3"),
        ("RATE_LIMIT_WINDOW_SECONDS", "0"),
        ("RATE_LIMIT_REDIS_DOWN", "closed"),
        ("CIRCUIT_FAILURE_THRESHOLD", "0"),
        ("CIRCUIT_RECOVERY_SECONDS", "0"),
        ("CIRCUIT_RECOVERY_SECONDS", "nan"),
        ("CIRCUIT_RECOVERY_SECONDS", "inf"),
        ("CIRCUIT_RECOVERY_SECONDS", "soon"),
        ("CIRCUIT_SUCCESS_THRESHOLD", "none"),
        ("CORS_ORIGINS", "a.example"),
        ("CORS_ORIGINS", "[1]"),
        ("CORS_ORIGINS", '["https://a.example"'),
        ("CORS_ALLOW_CREDENTIALS", "perhaps"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "proxy"),
        ("TRUSTED_PROXIES", "99"),
        ("ADMIN_TRON_ADDRESSES", "T" + "1" * 33),
        ("GATEWAY_CONFIG", "/nowhere/gateway.toml"),
        ("RATE_LIMIT_PUBLICK", "100"),
        ("CIRCUIT_TIMEOUT", "1"),
        ("JWT_SECRET", "x"),
        ("CORS_ORIGIN", "*"),
        ("LUCID_PORT", "1"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it_and_what_it_must_be(name: str, value: str) -> None:
    line = fault(**{name: value})
    assert line.startswith(f"{name}: must ")
    assert "\n" not in line
    assert len(line) < 300


def test_all_faults_are_told_at_once() -> None:
    found = faults({"PORT": "x", "RATE_LIMIT_PUBLIC": "y", "LUCID_NOPE": "z", "TRUSTED_PROXIES": "p,q"})
    assert [line.partition(":")[0] for line in found] == [
        "PORT",
        "TRUSTED_PROXIES",
        "TRUSTED_PROXIES",
        "JWT_SECRET_KEY",
        "RATE_LIMIT_PUBLIC",
        "LUCID_NOPE",
    ]


def test_what_kubernetes_injects_for_services_is_no_fault_of_ours() -> None:
    load(
        LUCID_API_GATEWAY_SERVICE_HOST="10.0.0.1",
        LUCID_API_GATEWAY_SERVICE_PORT="8080",
        LUCID_API_GATEWAY_SERVICE_PORT_HTTP="8080",
        LUCID_API_GATEWAY_PORT="tcp://10.0.0.1:8080",
        LUCID_API_GATEWAY_PORT_8080_TCP_ADDR="10.0.0.1",
        REDIS_PORT="tcp://10.0.0.2:6379",
        MONGODB_PORT_27017_TCP="tcp://10.0.0.3:27017",
    )


def test_trusted_proxies_may_be_a_number_of_hops() -> None:
    server = load(TRUSTED_PROXIES="2").server
    assert (server.trusted_hops, server.trusted_networks) == (2, ())


def test_credentials_for_every_origin_are_a_fault() -> None:
    assert load(CORS_ORIGINS="*").server.cors_origins == ("*",)
    assert fault(CORS_ORIGINS="*", CORS_ALLOW_CREDENTIALS="1").startswith("CORS_ORIGINS: must name origins")


def test_the_auth_service_may_not_issue_in_our_name() -> None:
    line = fault(AUTH_SERVICE_URL="http://auth", AUTH_SERVICE_ISSUERS="auth,lucid")
    assert line.startswith("AUTH_SERVICE_ISSUERS: must not name JWT_ISSUER")


@pytest.mark.parametrize("serve", [True, False])
def test_what_is_read_but_not_served_yet_is_a_fault(serve: bool, tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(row("/live", "websocket = true"))
    (line,) = faults({**KEY, "GATEWAY_CONFIG": str(file)}, serve=serve)
    assert line.startswith("GATEWAY_CONFIG: ")
    assert "must " in line
    assert line.endswith("not served by this version yet")
    assert not_served(parsed(GATEWAY_CONFIG=str(file))) == [line]


@pytest.mark.parametrize(
    "uri",
    [
        "redis+cluster://a,b,c",
        "redis+cluster://u:p%40@a:7000,[::1]:7001,b/?ssl=true&ssl_ca_certs=/ca.pem",
        "redis+cluster://a?db=0",
        "redis+sentinel://a,b/main/0?ssl=false",
    ],
)
def test_several_places_may_stand_for_one_redis(uri: str) -> None:
    assert load(REDIS_URI=uri).stores.redis_uri == uri


def test_the_fault_names_every_way_to_say_a_redis() -> None:
    line = fault(REDIS_URI="redis:6379")
    for scheme in ("redis", "rediss", "unix", "redis+cluster", "redis+sentinel"):
        assert f"{scheme}://" in line


# --- keys -----------------------------------------------------------------------------------------


def test_serving_needs_a_key_and_looking_does_not() -> None:
    assert faults({})[0].startswith("JWT_SECRET_KEY: must be set")
    assert faults({"JWT_ALGORITHM": "EdDSA"})[0].startswith("JWT_PRIVATE_KEY: must be set")
    assert load_settings({}, serve=False).tokens.secret_key == ""


def test_a_secret_has_32_bytes_and_is_never_shown() -> None:
    secret = "sesame-open-sesame-open-sesame!"
    (line,) = faults({"JWT_SECRET_KEY": secret})
    assert line.startswith("JWT_SECRET_KEY: must have at least 32 bytes")
    assert "sesame" not in line
    assert load_settings({"JWT_SECRET_KEY": "é" * 16}).tokens.secret_key == "é" * 16


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[str, str]]:
    return {
        "RS256": pem(rsa.generate_private_key(65_537, 2_048)),
        "ES256": pem(ec.generate_private_key(ec.SECP256R1())),
        "EdDSA": pem(ed25519.Ed25519PrivateKey.generate()),
    }


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_each_algorithm_takes_its_own_kind_of_key(pairs: dict[str, tuple[str, str]], algorithm: str) -> None:
    for kind, (private, public) in pairs.items():
        for name, key in (("JWT_PRIVATE_KEY", private), ("JWT_PUBLIC_KEY", public)):
            environ = {"JWT_ALGORITHM": algorithm, name: key.replace("\n", "\\n")}
            if kind == algorithm:
                load_settings(environ)
            else:
                (line,) = faults(environ)
                assert line.startswith(f"{name}: must be")


def test_previous_public_keys_follow_one_another(pairs: dict[str, tuple[str, str]]) -> None:
    private, public = pairs["EdDSA"]
    other = pem(ed25519.Ed25519PrivateKey.generate())[1]
    environ = {"JWT_ALGORITHM": "EdDSA", "JWT_PRIVATE_KEY": private}
    assert len(load_settings({**environ, "JWT_PREVIOUS_KEYS": public + other}).tokens.previous_keys) == 2
    assert (
        len(load_settings({**environ, "JWT_PREVIOUS_KEYS": json.dumps([public, other])}).tokens.previous_keys)
        == 2
    )
    assert faults({**environ, "JWT_PREVIOUS_KEYS": "x"})[0].startswith(
        "JWT_PREVIOUS_KEYS: must be public keys"
    )
    assert faults({**environ, "JWT_PREVIOUS_KEYS": pairs["ES256"][1]})[0].startswith(
        "JWT_PREVIOUS_KEYS: must be"
    )


def test_keys_that_do_not_go_together(pairs: dict[str, tuple[str, str]]) -> None:
    private, public = pairs["ES256"]
    asymmetric = {"JWT_ALGORITHM": "ES256"}
    assert faults({**asymmetric, "JWT_PRIVATE_KEY": private, "JWT_PUBLIC_KEY": public})[0].startswith(
        "JWT_PUBLIC_KEY"
    )
    both = faults({**asymmetric, "JWT_PUBLIC_KEY": public, "JWKS_URL": "https://keys.example"})
    assert both == ["JWKS_URL: must not be set beside JWT_PUBLIC_KEY"]
    assert faults({**asymmetric, **KEY, "JWT_PRIVATE_KEY": private})[0].startswith(
        "JWT_SECRET_KEY: must not be set"
    )
    assert load_settings({**asymmetric, "JWKS_URL": "https://keys.example/set"}).tokens.jwks_url


# --- TLS ------------------------------------------------------------------------------------------


def test_tls_needs_two_files_that_fit(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    other = tmp_path / "other.pem"
    other.write_text(pem(ec.generate_private_key(ec.SECP256R1()))[0])
    server = load(TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(key)).server
    assert server.public_origin == "https://127.0.0.1:8080"
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.tls_cert_file, server.tls_key_file)
    assert fault(TLS_CERT_FILE=str(cert)) == "TLS_KEY_FILE: must be set together with TLS_CERT_FILE"
    assert fault(TLS_KEY_FILE=str(key)) == "TLS_CERT_FILE: must be set together with TLS_KEY_FILE"
    assert fault(TLS_CERT_FILE=str(cert), TLS_KEY_FILE="/nowhere").startswith("TLS_KEY_FILE: must be a file")
    assert fault(TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(other)).startswith("TLS_CERT_FILE: must be a PEM")


# --- the file -------------------------------------------------------------------------------------

REPORTS = """
[backends.reports]
endpoints = ["http://10.0.0.5:9000", "https://reports.example"]
max_connections = 64
[backends.reports.health]
path = "/health"

[[routes]]
path = "/api/v1/reports/**"
backend = "reports"
access = "admin"
methods = ["GET", "POST"]
strip_prefix = "/api/v1"
max_body = "10MB"
timeouts = { connect = 1, head = 5.5, total = 0 }
websocket = true
allow = ["10.0.0.0/8"]
deny = ["10.1.0.0/16"]
limits = [{ name = "reports", requests = 500, window = 30, per = "address", redis_down = "open" }]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gateway.toml"


def file_fault(file: Path, text: str, **environ: str) -> str:
    file.write_text(text)
    return fault(GATEWAY_CONFIG=str(file), **environ)


def row(path: str, more: str = "") -> str:
    return f'[[routes]]\npath = "{path}"\nbackend = "nodes"\n{more}\n'


def test_the_file_adds_to_the_platform(file: Path) -> None:
    file.write_text(REPORTS)
    settings = parsed(GATEWAY_CONFIG=str(file))
    reports = settings.backends[-1]
    assert [endpoint.label for endpoint in reports.endpoints] == [
        "http://10.0.0.5:9000",
        "https://reports.example:443",
    ]
    assert (reports.max_connections, reports.health_path) == (64, "/health")
    assert len(settings.routes) == 6
    assert settings.routes[-1] == RouteSettings(
        path="/api/v1/reports/**",
        backend="reports",
        access=Role.ADMIN,
        methods=("GET", "POST"),
        strip_prefix="/api/v1",
        max_body=10_485_760,
        timeouts=Timeouts(connect=1.0, head=5.5, idle=60.0, total=0.0),
        websocket=True,
        allow=("10.0.0.0/8",),
        deny=("10.1.0.0/16",),
        limits=(LimitSettings("reports", 500, 30, "address", "open"),),
    )


def test_the_file_replaces_a_row_by_its_path(file: Path) -> None:
    file.write_text(row("/api/v1/nodes/**/".removesuffix("/"), 'access = "node_operator"'))
    routes = {route.path: route for route in load(GATEWAY_CONFIG=str(file)).routes}
    assert len(routes) == 5
    assert routes["/api/v1/nodes/**"].access is Role.NODE_OPERATOR


def test_rows_of_one_path_may_share_out_its_methods(file: Path) -> None:
    file.write_text(
        row("/reports", 'methods = ["GET"]') + row("/reports", 'methods = ["POST"]\naccess = "public"')
    )
    assert [route.access for route in load(GATEWAY_CONFIG=str(file)).routes[-2:]] == [Role.USER, Role.PUBLIC]


def test_the_file_may_say_more_about_a_cluster_and_keeps_its_address(file: Path) -> None:
    file.write_text('[backends.nodes]\nmax_connections = 8\n[backends.sessions.health]\npath = "/alive"\n')
    _, sessions, nodes = load(GATEWAY_CONFIG=str(file), NODE_SERVICE_URL="http://elsewhere:1").backends
    assert (sessions.max_connections, sessions.health_path) == (256, "/alive")
    assert (nodes.max_connections, nodes.health_path) == (8, "/health")
    assert [endpoint.label for endpoint in nodes.endpoints] == ["http://elsewhere:1"]


@pytest.mark.parametrize(
    "size,size_bytes", [("1B", 1), ("64kb", 65_536), ("10 MB", 10_485_760), ("1GB", 1 << 30)]
)
def test_sizes_have_units(file: Path, size: str, size_bytes: int) -> None:
    file.write_text(row("/x", f'max_body = "{size}"'))
    assert load(GATEWAY_CONFIG=str(file)).routes[-1].max_body == size_bytes


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health/ready",
        "/docs/**",
        "/openapi.json",
        "/metrics",
        "/api/v1/meta/**",
        "/api/v1/auth/login",
        "/api/v1/users/**",
        "/api/v1/sessions",
        "/api/v1/sessions/**",
        "/api/v1/sessions/*",
        "/api/v1/sessions/*/**",
        "/api/v1/rate-limits/me",
        "/api/v1/backends/",
    ],
)
def test_a_path_under_one_of_the_gateways_own_is_refused(file: Path, path: str) -> None:
    assert "must not lie under" in file_fault(file, row(path))


@pytest.mark.parametrize(
    "path", ["/", "/**", "/api/v1/sessions/*/notes/**", "/healthy", "/api/v1/usersx", "/api/**"]
)
def test_other_paths_are_not(file: Path, path: str) -> None:
    file.write_text(row(path))
    assert load(GATEWAY_CONFIG=str(file)).routes[-1].path == path


@pytest.mark.parametrize(
    "text,where",
    [
        ("routes = 1", "routes: must be a list of tables"),
        ("backends = 1", "backends: must be a table"),
        ("[other]", "other: must not be set"),
        ("[[", "GATEWAY_CONFIG: must be TOML"),
        ("[backends.x]", "backends.x.endpoints: must be a list"),
        ('[backends.X]\nendpoints = ["http://x"]', "backends.X: the name must"),
        ('[backends.mongodb]\nendpoints = ["http://x"]', "backends.mongodb: the name must not be mongodb"),
        ('[backends.x]\nendpoints = ["http://x"]\nretries = 1', "backends.x.retries: must not be set"),
        ('[backends.x]\nendpoints = ["http://x"]\nmax_connections = 0', "backends.x.max_connections: must"),
        ('[backends.x]\nendpoints = ["http://x"]\nmax_connections = true', "backends.x.max_connections"),
        ('[backends.x]\nendpoints = ["http://x"]\nhealth = {}', "backends.x.health.path: must be set"),
        ('[backends.x]\nendpoints = ["http://x"]\nhealth = {path = 1}', "backends.x.health.path: must"),
        ('[[routes]]\npath = "/x"', "routes[1].backend: must be set"),
        ('[[routes]]\nbackend = "nodes"', "routes[1].path: must be set"),
        ('[[routes]]\npath = "/x"\nbackend = "none"', "routes[1].backend: must be one of blockchain"),
        ('[[routes]]\npath = "/x"\nbackend = ["nodes"]', "routes[1].backend: must be a text"),
        (row("x"), "routes[1].path: must begin with /"),
        (row("/x//y"), "routes[1].path: "),
        (row("/**/x"), "routes[1].path: "),
        (row("/x*"), "routes[1].path: "),
        (row("/x", "method = 1"), "routes[1].method: must not be set"),
        (row("/x", 'methods = ["get"]'), "routes[1].methods: must be one of DELETE"),
        (row("/x", 'methods = ["BREW"]'), "routes[1].methods: must be one of DELETE"),
        (row("/x", 'methods = "GET"'), "routes[1].methods: must be a list"),
        (row("/x", 'access = "root"'), "routes[1].access: must be one of public"),
        (row("/x", 'strip_prefix = "/y"'), "routes[1].path: strip_prefix must"),
        (row("/x", 'max_body = "10 apples"'), "routes[1].max_body: must be a size"),
        (row("/x", "max_body = -1"), "routes[1].max_body: must be a size"),
        (row("/x", "timeouts = { read = 1 }"), "routes[1].timeouts.read: must not be set"),
        (row("/x", "timeouts = { head = -1 }"), "routes[1].timeouts.head: must be a number"),
        (row("/x", "timeouts = { head = nan }"), "routes[1].timeouts.head: must be a number"),
        (row("/x", "timeouts = 5"), "routes[1].timeouts: must be a table"),
        (row("/x", "websocket = 1"), "routes[1].websocket: must be true or false"),
        (row("/x", "methods = []"), "routes[1].methods: must not be empty"),
        (row("/x", 'allow = ["10.0.0.1/8"]'), "routes[1].allow: must be a network"),
        (row("/x", "deny = [1]"), "routes[1].deny: must be a text"),
        (row("/x", "limits = [{ requests = 1 }]"), "routes[1].limits[1].name: must be set"),
        (row("/x", 'limits = [{ name = "a" }]'), "routes[1].limits[1].requests: must be set"),
        (row("/x", 'limits = [{ name = "a", requests = 0 }]'), "routes[1].limits[1].requests: must"),
        (row("/x", 'limits = [{ name = "login", requests = 1 }]'), "routes[1].limits[1].name: must not"),
        (row("/x", 'limits = [{ name = "A B", requests = 1 }]'), "routes[1].limits[1].name: must begin"),
        (row("/x", 'limits = [{ name = "a", requests = 1, per = "ip" }]'), "routes[1].limits[1].per"),
        (row("/x") + row("/x/"), "routes: route /x/: a second row"),
        (
            row("/x", 'limits = [{ name = "chain", requests = 1 }]'),
            "routes: /x: the limit 'chain' must have the same numbers",
        ),
    ],
)
def test_a_fault_in_the_file_names_its_place(file: Path, text: str, where: str) -> None:
    line = file_fault(file, text)
    assert line.removeprefix("gateway.toml.").startswith(where)
    assert "\n" not in line


def test_a_limit_may_stand_on_many_rows(file: Path) -> None:
    shared = 'limits = [{ name = "chain", requests = 500 }, { name = "b", requests = 2 }]'
    file.write_text(row("/x", shared) + row("/y", shared))
    assert len(load(GATEWAY_CONFIG=str(file)).routes) == 7


def test_all_faults_of_the_file_are_told_at_once(file: Path) -> None:
    file.write_text(row("x", "a = 1") + row("/docs") + "[backends.y]\n")
    found = faults({**KEY, "GATEWAY_CONFIG": str(file), "PORT": "x"})
    assert len(found) == 5


# --- for people -----------------------------------------------------------------------------------


def test_no_secret_is_described() -> None:
    settings = load(
        REDIS_URI="redis://user:hush@redis:6379/0?password=hush",
        MONGODB_URI="mongodb://user:hush@mongodb/lucid",
        JWT_SECRET_KEY="hush" * 8,
        JWT_PREVIOUS_KEYS="hush" * 9,
    )
    text = columns([*describe(settings)]) + repr(settings)
    assert "hush" not in text
    assert "redis://user:***@redis:6379/0?password=***" in text


@pytest.mark.parametrize(
    "uri,masked",
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("mongodb://a:s3:cr@h,b/x", "mongodb://a:***@h,b/x"),
        ("unix:///p?db=1&password=x", "unix:///p?db=1&password=***"),
    ],
)
def test_a_password_in_a_uri_is_masked(uri: str, masked: str) -> None:
    assert mask_uri(uri) == masked


def test_a_refused_value_stays_on_one_short_line() -> None:
    assert "\n" not in shown("a\nb")
    assert len(shown("x" * 10_000)) <= 80


def test_the_route_table_shows_what_a_row_does(file: Path) -> None:
    file.write_text(REPORTS)
    table = columns(route_rows(parsed(GATEWAY_CONFIG=str(file))))
    (line,) = [line for line in table.splitlines() if "reports" in line]
    for part in (
        "GET,POST",
        "admin",
        "10MB",
        "reports 500/30s per address",
        "strips /api/v1",
        "deny 10.1.0.0/16",
    ):
        assert part in line


def test_the_gateways_own_rows_are_in_the_table_by_path(file: Path) -> None:
    limits = named_limits(load(RATE_LIMIT_LOGIN="3").rates)
    rows = route_rows(load(), own_routes(limits))[1:]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    table = {row[0]: row for row in rows}
    assert len(rows) == 5 + len(own_routes(limits))
    assert table["/api/v1/auth/login"][1:6] == (
        "POST",
        "public",
        "gateway",
        "64KB",
        "login 3/60s per address",
    )
    assert table["/api/v1/rate-limits/*/*"][1:4] == ("DELETE,GET", "admin", "gateway")
    assert table["/health"][-1] == "not counted"


def test_the_named_limits_are_those_that_are_on() -> None:
    rates = load(RATE_LIMIT_PUBLIC="off", RATE_LIMIT_LOGIN="3", RATE_LIMIT_WINDOW_SECONDS="9").rates
    limits = named_limits(rates)
    assert sorted(limits) == ["admin", "authenticated", "chain", "login", "refresh"]
    assert limits["login"] == Limit("login", 3, 9, "safe", "address")
    assert limits["chain"].per == "user"
