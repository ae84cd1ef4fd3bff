"""Callers who hang up in the middle of a service's work, at each place where it waits for a store."""

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any

import pytest


def audited(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The events that the audit log tells of. Ask at its level: `caplog.set_level(logging.INFO, "lucid.audit")`."""
    return [record.getMessage() for record in caplog.records if record.name == "lucid.audit"]


class HangUp:
    """The caller leaves while call number `at` of those to `places` has not begun; then the stores go on.

    `places` are attributes of services, whose values are stores: `(service, "_users")`.
    """

    def __init__(self, at: int, *places: tuple[Any, str]) -> None:
        self.calls: list[str] = []
        self._at = at
        self._places = [(service, name, getattr(service, name)) for service, name in places]
        self._reached = asyncio.Event()
        self._go_on = asyncio.Event()

    async def __call__(self, call: Coroutine[Any, Any, Any], service: Any) -> bool:
        """Whether there was a call of this number; False: `call`, one of `service`, came to its end. Returns when all
        that runs on is done.
        """
        for owner, name, store in self._places:
            setattr(owner, name, self._over(store))
        try:
            async with asyncio.timeout(10):
                request = asyncio.create_task(call)
                reached = asyncio.create_task(self._reached.wait())
                await asyncio.wait((request, reached), return_when=asyncio.FIRST_COMPLETED)
                reached.cancel()
                if request.done():
                    request.exception()
                    return False
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
                self._go_on.set()
                await service._unbroken.drain()
                return True
        finally:
            for owner, name, store in self._places:
                setattr(owner, name, store)

    def _over(self, store: Any) -> Any:
        hang_up = self

        class Stopping:
            def __getattr__(self, name: str) -> Any:
                method = getattr(store, name)
                if not inspect.iscoroutinefunction(method):
                    return method

                async def stopping(*arguments: Any, **named: Any) -> Any:
                    hang_up.calls.append(name)
                    if len(hang_up.calls) == hang_up._at:
                        hang_up._reached.set()
                        await hang_up._go_on.wait()
                    return await method(*arguments, **named)

                return stopping

        return Stopping()
