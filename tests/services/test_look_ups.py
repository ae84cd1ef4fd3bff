"""Look-ups whose keys strangers choose, with a database that answers when the test says so."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from lucid.errors import ErrorCode, GatewayError, away
from lucid.services.look_ups import LookUps


class Database:
    def __init__(self, at_once: int, waiting: int) -> None:
        self.asked: dict[bytes, asyncio.Future[str]] = {}
        self.asked_for: list[bytes] = []
        self.look_ups: LookUps[str] = LookUps(
            self._find, lambda: away("mongodb", "full"), most_at_once=at_once, most_waiting=waiting
        )

    async def _find(self, key: bytes) -> str:
        self.asked_for.append(key)
        self.asked[key] = asyncio.get_running_loop().create_future()
        return await self.asked[key]


def go(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


async def settle() -> None:
    """Lets everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_few_at_once_and_the_others_in_their_order() -> None:
    async def test() -> None:
        database = Database(2, 3)
        asking = [asyncio.create_task(database.look_ups(b"%d" % n)) for n in range(5)]
        await settle()
        assert database.asked_for == [b"0", b"1"]
        for n in range(5):
            database.asked[b"%d" % n].set_result(f"answer {n}")
            await settle()
            assert len(database.asked_for) == min(5, n + 3)
        assert [await task for task in asking] == [f"answer {n}" for n in range(5)]

    go(test)


def test_beyond_the_queue_is_an_overload_at_once_and_not_for_ever() -> None:
    async def test() -> None:
        database = Database(1, 1)
        asking = [asyncio.create_task(database.look_ups(key)) for key in (b"a", b"b")]
        await settle()
        with pytest.raises(GatewayError) as caught:
            await database.look_ups(b"c")
        assert (caught.value.code, caught.value.code.status) == (ErrorCode.DEPENDENCY_AWAY, 503)
        assert ("Retry-After", "5") in caught.value.fields
        # One that is on its way already costs nothing more.
        asking.append(asyncio.create_task(database.look_ups(b"b")))
        database_asked = database.asked
        await settle()
        database_asked[b"a"].set_result("A")
        await settle()
        asking.append(asyncio.create_task(database.look_ups(b"c")))
        database_asked[b"b"].set_result("B")
        await settle()
        database_asked[b"c"].set_result("C")
        assert await asyncio.gather(*asking) == ["A", "B", "B", "C"]
        assert database.asked_for == [b"a", b"b", b"c"]

    go(test)


def test_equal_keys_share_one_look_up_its_error_too_and_nothing_is_remembered() -> None:
    async def test() -> None:
        database = Database(8, 8)
        asking = [asyncio.create_task(database.look_ups(b"k")) for _ in range(100)]
        await settle()
        assert database.asked_for == [b"k"]
        database.asked[b"k"].set_exception(away("mongodb"))
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(outcome, GatewayError) for outcome in outcomes)
        again = asyncio.create_task(database.look_ups(b"k"))
        await settle()
        database.asked[b"k"].set_result("back")
        assert await again == "back"
        assert database.asked_for == [b"k", b"k"]

    go(test)


def test_a_caller_that_leaves_ends_nothing_for_the_others() -> None:
    async def test() -> None:
        database = Database(1, 1)
        first, second = (asyncio.create_task(database.look_ups(b"k")) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        database.asked[b"k"].set_result("here")
        assert await second == "here"
        # All have left: the slot is free again afterwards, and the error is nobody's.
        alone = asyncio.create_task(database.look_ups(b"j"))
        await settle()
        alone.cancel()
        database.asked[b"j"].set_exception(away("mongodb"))
        await settle()
        last = asyncio.create_task(database.look_ups(b"l"))
        await settle()
        database.asked[b"l"].set_result("free")
        assert await last == "free"

    go(test)


def test_one_asker_does_not_fill_the_queue_alone() -> None:
    async def test() -> None:
        database = Database(8, 32)
        greedy = [asyncio.create_task(database.look_ups(b"g%d" % n, "greedy")) for n in range(40)]
        await settle()
        refused = [task for task in greedy if task.done()]
        assert len(refused) == 40 - 20, "half of all places"
        assert all(isinstance(task.exception(), GatewayError) for task in refused)
        others = [asyncio.create_task(database.look_ups(b"o%d" % n, f"other {n}")) for n in range(20)]
        await settle()
        assert not any(task.done() for task in others)
        while any(not task.done() for task in (*greedy, *others)):
            for future in [each for each in database.asked.values() if not each.done()]:
                future.set_result("found")
            await settle()
        assert {await task for task in others} == {"found"}
        assert not database.look_ups._flying
        assert not database.look_ups._askers

    go(test)


def test_who_asks_after_a_change_does_not_get_the_answer_from_before_it() -> None:
    async def test() -> None:
        generation = 0
        found = "old"
        gate = asyncio.Event()

        async def find(_: bytes) -> str:
            seen = found
            await gate.wait()
            return seen

        look_ups: LookUps[str] = LookUps(find, lambda: away("mongodb"), generation=lambda: generation)
        before = [asyncio.create_task(look_ups(b"k")) for _ in range(2)]
        await settle()
        generation, found = 1, "new"
        after = asyncio.create_task(look_ups(b"k"))
        await settle()
        gate.set()
        assert ([await task for task in before], await after) == (["old", "old"], "new")

    go(test)
