"""Processes that a bench starts: each in a session of its own, pinned, and ended by pid whatever happens."""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks import procfs

PR_SET_PDEATHSIG = 1  # prctl(2): the kernel sends the signal when this harness dies, even by SIGKILL
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
GROUP_TIMEOUT_S = (
    0.5  # dead ones that init has not collected yet still count as members: do not wait for init
)


class BenchError(Exception):
    """A peer that cannot be measured: the reason in words; `log` may name paths and is only shown."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Child:
    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:].strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Children:
    """Starts processes and, as a context manager, ends those that still run, the last started first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Child] = []
        self._count = 0

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        core: int,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> Child:
        """Start, pin to a core and, where a port is given, wait until this very child listens on it.

        Raises BenchError, with the end of its log, if it dies or does not listen within 30 s.
        """
        self._count += 1
        log = self._folder / f"{self._count}-{name}.log"
        with log.open("wb") as sink:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env={**os.environ, **(env or {})},
                    # Its own session: Ctrl-C reaches the harness alone, and Sanic, which kills its whole
                    # process group when start-up fails, takes nobody along.
                    start_new_session=True,
                    preexec_fn=_prepare(core),  # noqa: PLW1509 (the harness has one thread)
                )
            except OSError as error:
                raise BenchError(f"{name} cannot be started: {error.strerror}") from error
        child = Child(name, process, log)
        self._running.append(child)
        if port is not None:
            self._await_port(child, port)
        return child

    def _await_port(self, child: Child, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not procfs.owns_port(procfs.tree(child.pid), port):
            if child.process.poll() is not None:
                raise BenchError(f"{child.name} ended with {child.process.returncode}", child.tail())
            if time.monotonic() > deadline:
                raise BenchError(f"{child.name} does not listen after {START_TIMEOUT_S:.0f} s", child.tail())
            time.sleep(0.02)

    def stop_all(self, keep: Child | None = None) -> None:
        """End all that run, the last started first, but for one."""
        for child in reversed(self._running[:]):
            if child is not keep:
                self._stop(child)

    def _stop(self, child: Child) -> None:
        with suppress(ProcessLookupError):
            child.process.terminate()
        try:
            child.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        finally:
            self._running.remove(child)
            _end_group(child.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()


def _end_group(group: int) -> None:
    """Kill workers that outlived their main process, and see them gone before a peer gets their core."""
    deadline = time.monotonic() + GROUP_TIMEOUT_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)


def _prepare(core: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None)

    def prepare() -> None:  # runs in the child, between fork and exec
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.sched_setaffinity(0, {core})

    return prepare
