"""Background tasks of a worker: named, never silently dead, ended together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

_log = logging.getLogger("lucid.tasks")

RESTART_SECONDS = 1.0


class Tasks:
    """Starts tasks and keeps them going. After `start`, `stop` must be awaited."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run to its end; what raises is logged and begun again after a second."""
        task = asyncio.get_running_loop().create_task(self._keep(name, run), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def every(self, name: str, seconds: float, do: Callable[[], object | Awaitable[object]]) -> None:
        """Call `do` again and again, `seconds` between an end and the next beginning."""

        async def run() -> None:
            while True:
                await asyncio.sleep(seconds)
                result = do()
                if isinstance(result, Awaitable):
                    await result

        self.start(name, run)

    async def _keep(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await run()
                return
            except Exception:
                _log.exception("the task %s failed and begins again", name)
                await asyncio.sleep(RESTART_SECONDS)

    async def stop(self) -> None:
        """Cancel all and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
