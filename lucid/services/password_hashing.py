"""Hashing passwords beside the event loop: few at once, and no queue without an end.

PBKDF2 takes a core for as long as it is meant to (passwords.py), and hashlib lets go of the GIL meanwhile. So it
runs in threads, two at once in a worker: more would take the cores from the workers' event loops without being any
faster. Whoever comes when many wait is refused at once: a wait longer than a person has is worth nothing to them
and keeps the cores busy all the same.

On Linux these threads step back behind all others (nice 19, which there belongs to a thread: setpriority(2), sched(7)).
Beside two threads that hash without a pause on two cores, a login with a wallet takes 167 ms so, and 1,043 ms without;
35 ms where nobody hashes. In return hashing waits while the cores are busy with requests.

Each kind of work has an instance of its own: one for logins, a smaller one for what only makes new passwords, so that a
flood of registrations fills its own queue and not that of the logins.
"""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from lucid.core.security import passwords
from lucid.errors import AWAY_RETRY_SECONDS, ErrorCode, GatewayError

MOST_AT_ONCE: Final = 2
MOST_WAITING: Final = 32
NICE: Final = 19
"""The farthest that a thread can step back. It needs no right, and the way back needs one, so the threads are ours."""

T = TypeVar("T")


class Hasher(Protocol):
    """The functions of passwords.py, which is one; both of the first two are slow and run in a thread."""

    def hash_password(self, password: str) -> str: ...

    def verify_password(self, password: str, stored: str) -> bool: ...

    def needs_rehash(self, stored: str) -> bool: ...


class PasswordHashing:
    """One or more per worker, each with `most_at_once` threads. `hash` and `verify` raise BACKEND_UNAVAILABLE, 503
    with Retry-After, when too many wait: the platform's code for overload (5002), since nothing that the gateway
    depends on is away (5004). After use: `close`.

    Who leaves while waiting frees the place at once; who leaves later, when the thread is done, since no thread can
    be stopped.
    """

    def __init__(
        self,
        hasher: Hasher = passwords,
        *,
        most_at_once: int = MOST_AT_ONCE,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._hasher = hasher
        self._most = most_at_once + most_waiting
        self._taken = 0
        self._free = asyncio.Semaphore(most_at_once)
        self._running: set[asyncio.Task[object]] = set()
        # It starts its threads when they are needed.
        self._threads = ThreadPoolExecutor(most_at_once, "lucid-password", _step_back)

    async def hash(self, password: str) -> str:
        """The text to store for `password`."""
        return await self._run(lambda: self._hasher.hash_password(password))

    async def verify(self, password: str, stored: str | None) -> bool:
        """Whether `stored` was made from `password`. None, for an account that is not there or has no password:
        False after the same work.
        """
        known = passwords.UNKNOWN if stored is None else stored
        return await self._run(lambda: self._hasher.verify_password(password, known)) and stored is not None

    def needs_rehash(self, stored: str) -> bool:
        """Whether a password that has just matched `stored` should be hashed anew. Quick."""
        return self._hasher.needs_rehash(stored)

    def close(self) -> None:
        """End the threads, those that hash when they are done. Nothing can be hashed afterwards."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._taken >= self._most:
            raise GatewayError(
                ErrorCode.BACKEND_UNAVAILABLE,
                "Too many passwords are being checked",
                fields=(("Retry-After", str(AWAY_RETRY_SECONDS)),),
            )
        self._taken += 1
        try:
            await self._free.acquire()
        except BaseException:
            self._taken -= 1
            raise
        task: asyncio.Task[T] = asyncio.create_task(self._in_thread(work), name="lucid password")
        self._running.add(task)
        task.add_done_callback(self._done)
        # Shielded: a cancelled task would give its place back while its thread still has the core.
        return await asyncio.shield(task)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _done(self, task: asyncio.Task[T]) -> None:
        self._running.discard(task)
        self._taken -= 1
        self._free.release()
        if not task.cancelled():
            task.exception()  # Where its caller has left, nobody else asks, and asyncio would log it.


def _step_back() -> None:
    """At a thread's start. Elsewhere than on Linux this would be the whole process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
