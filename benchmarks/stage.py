"""What every peer is given: a folder, two cores, a token and the nginx that stands in for the backends."""

import os
import secrets
import shutil
import sys
import time
from pathlib import Path

import jwt
import msgspec

from benchmarks.children import Child, Children, free_port
from benchmarks.load import MIB, head_fields

TOKEN_LIFE_S = 6 * 3600
BODY_65 = b'{"height":1234567,"hash":"0000000000000000001f3a9","tx_count":42}'

_BACKEND_CONF = """
daemon off; master_process off; worker_processes 1; error_log stderr crit; pid {folder}/backend.pid;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
    access_log off; default_type application/json; sendfile on; tcp_nodelay on;
    keepalive_timeout 3600; keepalive_requests 1000000000;
    client_max_body_size 0; client_body_buffer_size 2m;
    client_body_temp_path {folder}/backend-body; proxy_temp_path {folder}/backend-proxy;
    fastcgi_temp_path {folder}/backend-f; uwsgi_temp_path {folder}/backend-u;
    scgi_temp_path {folder}/backend-s;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /api/v1/chain/blob {{ alias {folder}/blob; }}
        location / {{
            # `return` alone would answer an upload before having read it.
            if ($request_method = POST) {{ rewrite ^ /whole last; }}
            return 200 '{body}';
        }}
        location /whole {{
            internal; proxy_pass http://unix:{folder}/whole.sock:/; proxy_method GET;
            proxy_pass_request_body off; proxy_pass_request_headers off;
        }}
    }}
    server {{ listen unix:{folder}/whole.sock; location / {{ return 200 '{body}'; }} }}
}}
"""


class Stage(msgspec.Struct, frozen=True):
    """`gateway_core` is for the peer alone; backend, stores and wrk share `load_core`."""

    folder: Path
    children: Children
    gateway_core: int
    load_core: int
    backend: Child
    backend_port: int
    secret: str
    token: str

    @property
    def backend_url(self) -> str:
        return f"http://127.0.0.1:{self.backend_port}"

    @property
    def fields(self) -> dict[str, str]:
        return head_fields(self.token)


def find_program(name: str) -> str | None:
    """Like `which`, also beside this interpreter and where Debian puts servers, outside plain users' PATH."""
    places = (os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/usr/local/sbin")
    return shutil.which(name, path=os.pathsep.join(places))


def mint_token(secret: str, now: int) -> str:
    """An access token with the claims that the gateway itself issues, HS256."""
    claims = {
        "sub": "6f1c1f0e-6a52-4c56-9c43-3f2b6a4d1e77",
        "role": "user",
        "sid": secrets.token_hex(16),
        "jti": secrets.token_hex(16),
        "iat": now,
        "exp": now + TOKEN_LIFE_S,
        "iss": "lucid",
        "aud": "lucid",
        "typ": "access",
    }
    return jwt.encode(claims, secret, algorithm="HS256")


def choose_cores(available: set[int]) -> tuple[int, int]:
    """Gateway's core and load's core: the first two that this process may use, or one for both."""
    ordered = sorted(available)
    return ordered[0], ordered[min(1, len(ordered) - 1)]


def set_stage(folder: Path, children: Children, gateway_core: int, load_core: int) -> Stage:
    """Start the backend; `children` ends it. Raises BenchError when it does not start."""
    folder.chmod(0o755)  # nginx started by root serves as another user
    (folder / "blob").write_bytes(os.urandom(MIB))
    port = free_port()
    conf = folder / "backend.conf"
    conf.write_text(_BACKEND_CONF.format(folder=folder, port=port, body=BODY_65.decode()))
    argv = [find_program("nginx") or "nginx", "-e", "stderr", "-p", str(folder), "-c", str(conf)]
    backend = children.start("backend", argv, core=load_core, port=port)
    secret = secrets.token_urlsafe(48)
    token = mint_token(secret, int(time.time()))
    return Stage(folder, children, gateway_core, load_core, backend, port, secret, token)
