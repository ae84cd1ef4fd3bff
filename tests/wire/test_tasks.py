"""Background tasks: kept going, never silently dead, ended together."""

import asyncio
import logging

import pytest

from lucid.core.wire.tasks import RESTART_SECONDS, Tasks
from tests.support.wire import in_loop


@in_loop
async def test_a_task_runs_to_its_end() -> None:
    tasks, ran = Tasks(), []

    async def run() -> None:
        ran.append(asyncio.current_task().get_name())  # type: ignore[union-attr]

    tasks.start("once", run)
    await asyncio.sleep(10.0)
    assert ran == ["once"]
    await tasks.stop()


def test_what_raises_is_logged_and_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    times: list[float] = []

    @in_loop
    async def play() -> None:
        tasks, loop = Tasks(), asyncio.get_running_loop()

        async def run() -> None:
            times.append(loop.time())
            if len(times) < 3:
                raise ValueError("broken")

        tasks.start("sweeper", run)
        await asyncio.sleep(10.0)
        await tasks.stop()

    with caplog.at_level(logging.ERROR, "lucid.tasks"):
        play()
    assert [later - times[0] for later in times] == pytest.approx([0.0, RESTART_SECONDS, 2 * RESTART_SECONDS])
    assert [record.getMessage() for record in caplog.records] == 2 * [
        "the task sweeper failed and begins again"
    ]
    assert all(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("awaits", [False, True])
@in_loop
async def test_every(awaits: bool) -> None:
    tasks, loop = Tasks(), asyncio.get_running_loop()
    times: list[float] = []

    async def slow() -> None:
        times.append(loop.time())
        await asyncio.sleep(1.0)

    tasks.every("tick", 2.0, slow if awaits else lambda: times.append(loop.time()))
    began = loop.time()
    await asyncio.sleep(10.5)
    await tasks.stop()
    # Between an end and the next beginning.
    expected = [2.0, 5.0, 8.0] if awaits else [2.0, 4.0, 6.0, 8.0, 10.0]
    assert [at - began for at in times] == pytest.approx(expected)


@in_loop
async def test_stop_waits_until_all_have_ended() -> None:
    tasks, ended = Tasks(), []

    async def run() -> None:
        try:
            await asyncio.sleep(1_000.0)
        finally:
            await asyncio.sleep(1.0)
            ended.append(True)

    tasks.start("one", run)
    tasks.start("two", run)
    await asyncio.sleep(1.0)
    await tasks.stop()
    assert ended == [True, True]
    assert len(asyncio.all_tasks()) == 1
