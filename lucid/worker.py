"""One worker: `python -m lucid.worker FD FACTORY PROTOCOL`, started by `lucid.server` and by nobody else.

FD is the inherited listening socket, standard input a socket to the parent (see there for what is said).
"""

import logging
import os
import pkgutil
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from sanic import Sanic

from lucid.server import BACKLOG
from lucid.settings import ServerSettings, Settings


def main(listener_fd: int, factory: str, protocol: str) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    parent = _take_standard_input()
    settings = msgspec.msgpack.decode(_greeting(parent), type=Settings)
    threading.Thread(target=_die_with, args=(parent,), daemon=True, name="parent-watch").start()
    try:
        _serve(
            settings, socket.socket(fileno=listener_fd), factory, protocol, lambda: parent.sendall(b"ready\n")
        )
    except Exception as error:  # noqa: BLE001  whatever it is, the parent says it in one line
        reason = " ".join(str(error).split()) or "no reason given"
        parent.sendall(f"failed: {type(error).__name__}: {reason}\n".encode()[:4096])
        return 1
    return 0


def _serve(
    settings: Settings, listener: socket.socket, factory: str, protocol: str, ready: Callable[[], None]
) -> None:
    app: Sanic[Any, Any] = pkgutil.resolve_name(factory)(settings)
    server = settings.server

    serving = False

    async def tell_parent(_: Sanic[Any, Any]) -> None:
        nonlocal serving
        serving = True
        ready()

    # Registered last and so called last: by then the socket is accepted from, and SIGTERM is a drain.
    app.register_listener(tell_parent, "after_server_start")
    app.prepare(
        sock=listener,
        ssl=_tls(server) if server.tls_cert_file else None,
        protocol=pkgutil.resolve_name(protocol),
        backlog=BACKLOG,
        access_log=False,
        motd=False,
        single_process=True,
    )
    if server.log_level != "DEBUG":
        # The parent prints the reason; the traceback is for whoever asks for it.
        logging.getLogger("sanic.error").addFilter(lambda record: serving or record.exc_info is None)
    Sanic.serve_single(primary=app)


def _tls(server: ServerSettings) -> ssl.SSLContext:
    """Ours, as Sanic's refuses a certificate that has no subjectAltName."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(server.tls_cert_file, server.tls_key_file)
    return context


def _take_standard_input() -> socket.socket:
    """The socket to the parent, off descriptor 0, where anything that reads standard input would drain it."""
    parent = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return parent


def _greeting(parent: socket.socket) -> bytes:
    with parent.makefile("rb") as file:
        return file.read(int.from_bytes(file.read(4), "big"))


def _die_with(parent: socket.socket) -> None:
    """Waits for the parent's death, however it died, so that its port is free for the next one."""
    try:
        while parent.recv(1):
            pass
    except OSError:
        pass
    os._exit(1)


if __name__ == "__main__":
    os.environ["SANIC_IGNORE_PRODUCTION_WARNING"] = "true"
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:4]))
