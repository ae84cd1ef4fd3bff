"""What the gateway depends on, checked in the background, so that answering about it needs no I/O."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

Check = Callable[[], Awaitable[bool]]

_log = logging.getLogger("lucid.health")

INTERVAL_SECONDS = 2.0
DEADLINE_SECONDS = 2.0


class HealthMonitor:
    """Knows of each dependency whether its last check was good. `run` it as a task.

    A check answers True (healthy), False, or raises: anything but True is unhealthy. Each change of state is one
    line in the log; none is repeated.
    """

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._states: dict[str, str] = dict.fromkeys(checks, "unknown")

    def dependencies(self) -> Mapping[str, str]:
        """Name to "healthy", "unhealthy" or "unknown" (not checked yet)."""
        return self._states

    def missing(self) -> list[str]:
        """The dependencies that are not known to be healthy, by name."""
        return sorted(name for name, state in self._states.items() if state != "healthy")

    async def run(self) -> None:
        while True:
            await self.check()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def check(self) -> None:
        """Check all once, side by side, each within its deadline."""
        results = await asyncio.gather(*(self._one(check) for check in self._checks.values()))
        for name, (healthy, reason) in zip(self._checks, results, strict=True):
            state = "healthy" if healthy else "unhealthy"
            before, self._states[name] = self._states[name], state
            if before == state or (before == "unknown" and healthy):
                continue
            if healthy:
                _log.info("%s is back", name)
            else:
                _log.warning("%s is away: %s", name, reason)

    async def _one(self, check: Check) -> tuple[bool, str]:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await check() is True, "its check failed"
        except TimeoutError:
            return False, "no answer in time"
        except Exception as error:  # noqa: BLE001 - whatever a check raises means that it failed
            return False, str(error) or type(error).__name__
