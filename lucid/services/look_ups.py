"""Look-ups by a key that strangers choose: few at once, equal ones merged, and no queue without an end.

Whoever invents API keys makes one look-up with each. Unbounded, these would take the whole pool of connections
to the database from those who log in.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from lucid.errors import GatewayError

MOST_AT_ONCE: Final = 8
MOST_WAITING: Final = 64

T = TypeVar("T")


class LookUps(Generic[T]):
    """`look_up(key)`, at most `most_at_once` under way and `most_waiting` behind them; more raise `overload()`.

    A key that is being looked up already is not looked up twice: all who ask share the answer, or the error.
    A caller that leaves ends nothing for the others.
    """

    def __init__(
        self,
        look_up: Callable[[bytes], Awaitable[T]],
        overload: Callable[[], GatewayError],
        *,
        most_at_once: int = MOST_AT_ONCE,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._look_up = look_up
        self._overload = overload
        self._most = most_at_once + most_waiting
        self._free = asyncio.Semaphore(most_at_once)
        self._flying: dict[bytes, asyncio.Task[T]] = {}

    async def __call__(self, key: bytes) -> T:
        task = self._flying.get(key)
        if task is None:
            if len(self._flying) >= self._most:
                raise self._overload()
            task = self._flying[key] = asyncio.create_task(self._one(key), name="lucid look-up")
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def _one(self, key: bytes) -> T:
        try:
            async with self._free:
                return await self._look_up(key)
        finally:
            del self._flying[key]


def _seen(task: asyncio.Task[T]) -> None:
    """An error whose callers have all left is nobody's: without this asyncio would log it."""
    if not task.cancelled():
        task.exception()
