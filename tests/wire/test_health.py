"""What the monitor knows of dependencies."""

import asyncio
import logging

import pytest

from lucid.core.wire.health import INTERVAL_SECONDS, HealthMonitor
from tests.support.wire import in_loop


class Dependency:
    """Answers or raises `answer`; None: never answers."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.checks = 0

    async def __call__(self) -> bool:
        self.checks += 1
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    "answer, state, reason",
    [
        (True, "healthy", ""),
        (False, "unhealthy", "its check failed"),
        (1, "unhealthy", "its check failed"),
        (OSError("no route"), "unhealthy", "no route"),
        (ValueError(), "unhealthy", "ValueError"),
        (None, "unhealthy", "no answer in time"),
    ],
)
@in_loop
async def test_a_check(answer: object, state: str, reason: str) -> None:
    monitor = HealthMonitor({"redis": Dependency(answer)})
    assert monitor.dependencies() == {"redis": "unknown"}
    assert monitor.missing() == ["redis"]
    await monitor.check()
    assert monitor.dependencies() == {"redis": state}
    assert monitor.missing() == ([] if state == "healthy" else ["redis"])
    assert (await monitor._one(Dependency(answer)))[1] == (reason or "its check failed")


@in_loop
async def test_one_that_hangs_holds_up_no_other() -> None:
    loop = asyncio.get_running_loop()
    monitor = HealthMonitor({"b": Dependency(None), "a": Dependency(None), "c": Dependency(True)})
    began = loop.time()
    await monitor.check()
    assert loop.time() - began == pytest.approx(2.0)
    assert monitor.missing() == ["a", "b"]


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dependency = Dependency(True)

    @in_loop
    async def run() -> None:
        monitor = HealthMonitor({"redis": dependency})
        for answer in (True, True, False, False, True, True):
            dependency.answer = answer
            await monitor.check()

    with caplog.at_level(logging.INFO, "lucid.health"):
        run()
    assert [record.getMessage() for record in caplog.records] == [
        "redis is away: its check failed",
        "redis is back",
    ]


@in_loop
async def test_it_goes_on_checking() -> None:
    dependency = Dependency(True)
    task = asyncio.ensure_future(HealthMonitor({"redis": dependency}).run())
    await asyncio.sleep(10 * INTERVAL_SECONDS + 1.0)
    assert dependency.checks == 11
    task.cancel()
