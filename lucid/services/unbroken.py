"""Work that a caller who leaves does not break off."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from lucid.errors import GatewayError

T = TypeVar("T")

DRAIN_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class Unbroken:
    """Runs what must not stop halfway because its caller left: a write, and what has to follow it. Await `drain` before
    what the work needs is closed.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work, name="lucid unbroken")
        # The loop itself holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_tell)
            raise

    async def drain(self) -> None:
        """Wait until all of it is done, `DRAIN_SECONDS` at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_SECONDS)


def _tell(task: asyncio.Task[Any]) -> None:
    """The outcome of work whose caller has left."""
    if task.cancelled():
        return
    error = task.exception()
    if isinstance(error, GatewayError):
        if error.code.status >= 500:
            _log.warning("a request whose caller had left ended in %s", error.code.value)
    elif error is not None:
        _log.error("a request whose caller had left failed", exc_info=error)
