"""Work whose caller leaves goes on, and its failures are told once."""

import asyncio
import logging

import pytest

from lucid.errors import ErrorCode, GatewayError
from lucid.services.unbroken import Unbroken


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_caller_gets_the_answer_or_the_error() -> None:
    async def main() -> None:
        unbroken = Unbroken()

        async def answer() -> int:
            return 7

        async def fail() -> None:
            raise GatewayError(ErrorCode.CONFLICT)

        assert await unbroken(answer()) == 7
        with pytest.raises(GatewayError):
            await unbroken(fail())
        await unbroken.drain()

    asyncio.run(main())


@pytest.mark.parametrize(
    "error",
    [None, GatewayError(ErrorCode.CONFLICT), GatewayError(ErrorCode.DEPENDENCY_AWAY), KeyError("oops")],
)
def test_what_a_caller_has_left_is_done_all_the_same(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        unbroken = Unbroken()
        gate = asyncio.Event()
        done: list[int] = []

        async def work() -> None:
            await gate.wait()
            done.append(1)
            if error is not None:
                raise error

        caller = asyncio.create_task(unbroken(work()))
        await settle()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not done
        draining = asyncio.create_task(unbroken.drain())
        await settle()
        assert not draining.done()
        gate.set()
        await draining
        await settle()
        assert done == [1]

    caplog.set_level(logging.INFO)
    asyncio.run(main())
    told = [(record.levelname, record.exc_info is not None) for record in caplog.records]
    match error:
        case GatewayError(code=ErrorCode.DEPENDENCY_AWAY):
            assert told == [("WARNING", False)]
        case KeyError():
            assert told == [("ERROR", True)]
        case _:
            assert told == [], "it went well, or ended as callers' mistakes do"
