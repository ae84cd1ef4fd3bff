"""nginx, one worker: `proxy_pass` with keep-alive, `limit_req`, no token check: the least a proxy costs."""

from benchmarks.peers.base import Peer, Running
from benchmarks.stage import Stage, find_program

_CONF = """
daemon off; worker_processes 1; error_log stderr crit; pid {folder}/peer.pid;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
    access_log off; tcp_nodelay on; keepalive_timeout 3600; keepalive_requests 1000000000;
    client_max_body_size 0; client_body_temp_path {folder}/peer-body; proxy_temp_path {folder}/peer-proxy;
    fastcgi_temp_path {folder}/peer-f; uwsgi_temp_path {folder}/peer-u; scgi_temp_path {folder}/peer-s;
    limit_req_zone $binary_remote_addr zone=callers:10m rate=1000000r/s;
    upstream backend {{ server 127.0.0.1:{backend_port}; keepalive 1024; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            limit_req zone=callers burst=1000000 nodelay;
            proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Authorization "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            # Streamed like the others', and with buffers larger than the stock 8 x 4 KB: no straw man.
            proxy_request_buffering off; client_body_buffer_size 256k; proxy_max_temp_file_size 0;
            proxy_buffer_size 16k; proxy_buffers 16 64k; proxy_busy_buffers_size 256k;
        }}
    }}
}}
"""


def _start(stage: Stage, port: int) -> Running:
    conf = stage.folder / "peer.conf"
    conf.write_text(_CONF.format(folder=stage.folder, port=port, backend_port=stage.backend_port))
    argv = [find_program("nginx") or "nginx", "-e", "stderr", "-p", str(stage.folder), "-c", str(conf)]
    return Running(stage.children.start("nginx", argv, core=stage.gateway_core, port=port))


PEER = Peer(
    name="nginx", title="nginx, `proxy_pass` + `limit_req`, no auth", start=_start, programs=("nginx",)
)
