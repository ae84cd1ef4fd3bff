"""Serving: one parent that holds the listening socket and keeps its workers alive.

Sanic's own manager is not used. It never restarts a dead worker, kills its whole process group when a start
fails, holds the port open while it drains so that new connections hang, and leaves its workers behind when
it is killed. What remains to do is little:

1. The parent binds the port once; each worker is a fresh interpreter (`lucid.worker`) that accepts from that
   socket. Connections that wait in its queue belong to all: a killed worker takes only its own with it.
2. A socket pair joins the parent to each worker. The settings go down it, so that a worker that comes back
   runs what the others run; `ready` or `failed: why` comes up. Its end of file means death, both ways.
3. A worker that dies is replaced at once, after a growing pause if it keeps dying young or cannot be started.
4. SIGTERM or SIGINT: the parent closes its copy of the socket, so that the port is free as soon as the
   workers have closed theirs, and passes SIGTERM on once. After `STOP_SECONDS`, or a second signal, it kills.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from lucid import logs
from lucid.settings import ServerSettings, Settings

FACTORY = "lucid.app:create_app"
PROTOCOL = "lucid.core.wire.protocol:GatewayProtocol"

BACKLOG = 2048
"""Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn, 4096 on Linux."""
START_SECONDS = 30.0
STOP_SECONDS = 20.0
"""Sanic gives open requests 15 s (GRACEFUL_SHUTDOWN_TIMEOUT); Kubernetes kills after 30."""
_IMPATIENT_SECONDS = 1.0
"""A second signal later than this kills. Sooner it is the first one again: timeout(1) sends each twice."""
_YOUNG_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 5.0


_log = logging.getLogger("lucid.server")


class StartError(Exception):
    """Serving cannot begin; the text is one line for people."""


def bind(server: ServerSettings) -> socket.socket:
    """The listening socket. Raises StartError, which names the variable to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and server.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else str(error)
        raise StartError(f"cannot listen on HOST {server.host}, PORT {server.port}: {reason}") from None


def serve(
    settings: Settings,
    *,
    listener: socket.socket | None = None,
    factory: str = FACTORY,
    protocol: str = PROTOCOL,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Serves until a signal, then returns the exit status.

    `factory` and `protocol` name, as `module:name`, what makes the Sanic app from the settings and the
    protocol class of its connections. `on_ready` is called from a thread, once, when every worker accepts.
    Raises StartError. Must be called from the main thread.
    """
    logs.set_up(settings.server)
    listener = listener or bind(settings.server)
    with listener, asyncio.Runner() as runner:
        return runner.run(_Supervisor(settings, listener, factory, protocol).run(on_ready))


class _Supervisor:
    def __init__(self, settings: Settings, listener: socket.socket, factory: str, protocol: str) -> None:
        self._settings = settings
        payload = msgspec.msgpack.encode(settings)
        self._greeting = len(payload).to_bytes(4, "big") + payload
        self._listener = listener
        self._command = (sys.executable, "-m", "lucid.worker", str(listener.fileno()), factory, protocol)
        self._workers: set[asyncio.subprocess.Process] = set()
        self._ready: list[asyncio.Event] = []
        self._stopping = asyncio.Event()
        self._failure = ""
        self._asked = 0.0

    async def run(self, on_ready: Callable[[], None] | None) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._ready = [asyncio.Event() for _ in range(self._settings.server.workers)]
        async with asyncio.TaskGroup() as tasks:
            for ready in self._ready:
                tasks.create_task(self._keep(ready))
            announcing = tasks.create_task(self._announce(on_ready))
            await self._stopping.wait()
            announcing.cancel()
            self._listener.close()
            for worker in self._workers:
                _send(worker, signal.SIGTERM)
            deadline = loop.call_later(STOP_SECONDS, self._kill)
        deadline.cancel()
        if self._failure:
            raise StartError(self._failure)
        return 0

    def _signalled(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._stopping.is_set():
            self._asked = now
            self._stopping.set()
        elif now - self._asked > _IMPATIENT_SECONDS:
            self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            _log.warning("worker %d did not stop and is killed", worker.pid)
            _send(worker, signal.SIGKILL)

    async def _announce(self, on_ready: Callable[[], None] | None) -> None:
        for ready in self._ready:
            await ready.wait()
        if on_ready:
            await asyncio.to_thread(on_ready)

    async def _keep(self, ready: asyncio.Event) -> None:
        """One worker after another, until the stop."""
        pause = 0.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self._stopping.is_set():
            born = loop.time()
            try:
                worker, ours = await self._spawn()
            except (OSError, RuntimeError) as error:
                # No process, memory or descriptor to be had (RuntimeError: no thread, which asyncio waits with on
                # 3.11). It passes, and it is no reason to end the workers that serve; only a start has an end.
                end = f"no worker can be started: {getattr(error, 'strerror', None) or error}"
                fatal = born - began > START_SECONDS and not any(each.is_set() for each in self._ready)
                then = "it is tried again"
            else:
                end = await self._live(worker, ours, ready)
                # Never served: the fault is in the settings or the code, and will not go away by itself.
                fatal = not ready.is_set()
                then = "another takes its place"
            if self._stopping.is_set():
                return
            if fatal:
                self._failure = self._failure or end
                self._stopping.set()
                return
            young = loop.time() - born < _YOUNG_SECONDS
            pause = min(max(0.1, pause * 2), _LONGEST_PAUSE_SECONDS) if young else 0.0
            _log.error("%s; %s", end, then)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                pass

    async def _spawn(self) -> tuple[asyncio.subprocess.Process, socket.socket]:
        """A new worker and our end of its socket. Raises OSError or RuntimeError, and then keeps neither."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # A group of its own: Ctrl-C at a terminal reaches the parent alone, which ends the workers once.
                worker = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=theirs.fileno(),
                    pass_fds=(self._listener.fileno(),),
                    process_group=0,
                )
        except BaseException:
            # Should there be a process all the same, this end of file is its end.
            ours.close()
            raise
        self._workers.add(worker)
        return worker, ours

    async def _live(
        self, worker: asyncio.subprocess.Process, ours: socket.socket, ready: asyncio.Event
    ) -> str:
        """The life of one worker; returns how it ended."""
        if self._stopping.is_set():
            # The others have been told. Never twice: a worker that drains has no handler any more.
            _send(worker, signal.SIGTERM)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(self._greeting)
            try:
                line = await asyncio.wait_for(reader.readline(), START_SECONDS)
            except TimeoutError:
                line = f"failed: was not ready within {START_SECONDS:.0f} s".encode()
                _send(worker, signal.SIGKILL)
            except (OSError, ValueError):
                line = b""
            if line == b"ready\n":
                ready.set()
            status = await worker.wait()
        finally:
            self._workers.discard(worker)
            writer.close()
        if line.startswith(b"failed: "):
            return line.removeprefix(b"failed: ").decode(errors="replace").strip()
        return f"worker {worker.pid} {_ending(status)}"


def _send(worker: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if worker.returncode is None:
        try:
            # Not worker.send_signal: it polls, and so takes the exit status away from asyncio's watcher.
            os.kill(worker.pid, number)
        except ProcessLookupError:
            pass


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
