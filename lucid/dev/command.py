"""`lucid dev`: stores, demo backends and the gateway, started in this order and stopped in the other."""

import contextlib
import fcntl
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lucid.dev.embedded import LOOPBACK, EmbeddedError, EmbeddedServer, Secantus, Valkey, leashed
from lucid.server import StartError, bind, serve
from lucid.settings import Settings, load_settings

DEFAULT_DATA = Path(".lucid")
_SECRET_FILE = "jwt_secret"  # noqa: S105  the name of the file
_KEYS = ("JWT_SECRET_KEY", "JWT_PRIVATE_KEY", "JWT_PUBLIC_KEY", "JWKS_URL")
_CLUSTERS = ("BLOCKCHAIN_SERVICE_URL", "SESSION_SERVICE_URL", "NODE_SERVICE_URL")
_START_SECONDS = 20.0
_METRICS_PORT = 9090
Store = TypeVar("Store", bound=EmbeddedServer)


def run(environ: Mapping[str, str], *, host: str, port: int, workers: int, data: Path, demo: bool) -> int:
    """Runs until Ctrl-C or SIGTERM; returns the exit status. 0 for `port` or `workers`: the variable's.

    What the environment names (REDIS_URI, MONGODB_URI, a key, a cluster's address) is used instead of what
    would be started or made up. Raises SettingsError, StartError and EmbeddedError before anything runs.
    """
    env = dict(environ)
    env["HOST"] = host
    env["PORT"] = str(port or environ.get("PORT") or 8080)
    env["WORKERS"] = str(workers or environ.get("WORKERS") or 1)
    env["LOG_FORMAT"] = environ.get("LOG_FORMAT") or "text"
    if not env.get("METRICS_PORT"):
        env["METRICS_PORT"] = str(_metrics_port(env["PORT"]))
    env = with_kept_secret(env, data, make=True)
    settings = load_settings(env)  # Before anything is started: a fault is cheap here.

    asked_to_stop = False

    def on_signal(*_: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        raise KeyboardInterrupt

    def go_on() -> None:
        """Python drops what is raised while it runs a finalizer, so a Ctrl-C may have gone by unseen."""
        if asked_to_stop:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_one(data))
        listener = stack.enter_context(bind(settings.server))
        places = _start_stores(stack, env, data)
        go_on()
        if demo:
            places += _start_backends(stack, env)
        settings = load_settings(env)
        go_on()
        return serve(settings, listener=listener, on_ready=lambda: _announce(settings, places, data))


def with_kept_secret(environ: Mapping[str, str], data: Path, *, make: bool) -> dict[str, str]:
    """The environment, with the JWT secret of the data folder if it names no key itself.

    It is kept, so that a second start accepts the tokens of the first. `make`: made where there is none.
    """
    env = dict(environ)
    if any(env.get(name) for name in _KEYS) or env.get("JWT_ALGORITHM", "HS256") != "HS256":
        return env
    file = data / _SECRET_FILE
    if make and not file.exists():
        data.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_urlsafe(48))
    if file.exists():
        env["JWT_SECRET_KEY"] = file.read_text().strip()
    return env


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Two of us on one folder would write over each other's stores."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"another lucid dev uses {data}; give --data another folder") from None
        yield


def _start_stores(stack: contextlib.ExitStack, env: dict[str, str], data: Path) -> list[tuple[str, str]]:
    """Starts what the environment does not name, and names it there."""
    places = []
    for label, name, kind in (("Redis", "REDIS_URI", Valkey), ("MongoDB", "MONGODB_URI", Secantus)):
        if not env.get(name):
            server = kind(data.resolve() / kind.__name__.lower())
            env[name] = stack.enter_context(_running(server)).uri
            places.append((label, f"{env[name]}  (data in {data / server.data.name})"))
        else:
            places.append((label, f"{name} of the environment"))
    return places


@contextlib.contextmanager
def _running(server: Store) -> Iterator[Store]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _start_backends(stack: contextlib.ExitStack, env: dict[str, str]) -> list[tuple[str, str]]:
    """The demo backends for those clusters that the environment does not name, in one process."""
    listeners = [socket.create_server((LOOPBACK, 0)) for _ in _CLUSTERS]
    numbers = [listener.fileno() for listener in listeners]
    process = subprocess.Popen(
        leashed([sys.executable, "-m", "lucid.dev.backends", *map(str, numbers)]),
        stdin=subprocess.DEVNULL,
        pass_fds=numbers,
        process_group=0,
    )
    stack.callback(_stop, process)
    places = []
    for name, listener in zip(_CLUSTERS, listeners, strict=True):
        port = listener.getsockname()[1]
        listener.close()
        if env.get(name):
            places.append((name, env[name]))
            continue
        env[name] = f"http://{LOOPBACK}:{port}"
        places.append((name, f"{env[name]}  (demo)"))
        _wait_for_health(port, process)
    return places


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_health(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if health(LOOPBACK, port):
            return
        time.sleep(0.05)
    raise EmbeddedError("the demo backends do not start; --no-demo goes without them")


def health(host: str, port: int) -> bool:
    """Whether `GET /health` is answered with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _metrics_port(port: str) -> int:
    """9090, unless somebody has it: for looking around any port will do."""
    for candidate in (_METRICS_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, candidate))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
            if str(found) != port:
                return found
    return _METRICS_PORT


def _announce(settings: Settings, places: list[tuple[str, str]], data: Path) -> None:
    server = settings.server
    host = server.host if server.host not in ("0.0.0.0", "::") else LOOPBACK
    scheme = "https" if server.tls_cert_file else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"
    deadline = time.monotonic() + _START_SECONDS
    while scheme == "http" and not health(host, server.port):
        if time.monotonic() > deadline:
            print(f"lucid: {url}/health does not answer with 200", file=sys.stderr)
            return
        time.sleep(0.05)
    lines = [f"Lucid is ready on {url}", ""]
    lines += [f"  {label:<24}{place}" for label, place in places]
    token = f"{_own_name()} token --user demo{'' if data == DEFAULT_DATA else f' --data {data}'}"
    lines += ["", "A first request, from another terminal in this folder:", ""]
    lines += [
        f'  curl -H "Authorization: Bearer $({token})" {url}/api/v1/chain/info',
        "",
        "Ctrl-C stops all of it.",
    ]
    print("\n".join(lines), flush=True)


def _own_name() -> str:
    """How this program can be called again in the same folder."""
    if shutil.which("lucid"):
        return "lucid"
    script = Path(sys.executable).with_name("lucid")
    if not script.exists():
        return f"{sys.executable} -m lucid"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
