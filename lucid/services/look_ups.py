"""Look-ups by a key that strangers choose: few at once, equal ones merged, and no queue without an end.

Whoever invents API keys makes one look-up with each. Unbounded, these would take the whole pool of connections
to the database from those who log in; and unless nobody may fill the queue alone, all others' keys would be refused.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from lucid.errors import GatewayError

MOST_AT_ONCE: Final = 8
MOST_WAITING: Final = 64
MOST_OF_ONE: Final = 16
"""Look-ups of one asker, once half of all places are taken. Until then an office whose keys are all new after a deploy
has as many as it needs.
"""

T = TypeVar("T")


class LookUps(Generic[T]):
    """`look_up(key)`, at most `most_at_once` under way and `most_waiting` behind them; more raise `overload()`.

    A key that is being looked up already is not looked up twice: all who ask share the answer, or the error. But for
    those who ask after `generation` has changed: the answer that is on its way may be from before the change. A
    caller that leaves ends nothing for the others.
    """

    def __init__(
        self,
        look_up: Callable[[bytes], Awaitable[T]],
        overload: Callable[[], GatewayError],
        *,
        generation: Callable[[], int] = lambda: 0,
        most_at_once: int = MOST_AT_ONCE,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._look_up = look_up
        self._overload = overload
        self._most = most_at_once + most_waiting
        self._free = asyncio.Semaphore(most_at_once)
        self._generation = generation
        self._flying: dict[tuple[int, bytes], asyncio.Task[T]] = {}
        self._askers: Counter[str] = Counter()

    async def __call__(self, key: bytes, asker: str = "") -> T:
        """`asker`: for whom, an address."""
        flight = (self._generation(), key)
        task = self._flying.get(flight)
        if task is None:
            taken = len(self._flying)
            if taken >= self._most or (2 * taken >= self._most and self._askers[asker] >= MOST_OF_ONE):
                raise self._overload()
            task = self._flying[flight] = asyncio.create_task(self._one(flight, asker), name="lucid look-up")
            self._askers[asker] += 1
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def _one(self, flight: tuple[int, bytes], asker: str) -> T:
        try:
            async with self._free:
                return await self._look_up(flight[1])
        finally:
            del self._flying[flight]
            self._askers[asker] -= 1
            if not self._askers[asker]:
                del self._askers[asker]


def _seen(task: asyncio.Task[T]) -> None:
    """An error whose callers have all left is nobody's: without this asyncio would log it."""
    if not task.cancelled():
        task.exception()
