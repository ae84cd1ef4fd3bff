"""Passwords beside the loop: how many at once, what is refused, what a caller who leaves takes along."""

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest

from lucid.core.security import passwords
from lucid.errors import ErrorCode, GatewayError
from lucid.services.password_hashing import MOST_AT_ONCE, MOST_WAITING, NICE, PasswordHashing


class Slow:
    """Works until it is let go; counts."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.lock = threading.Lock()
        self.begun = 0
        self.running = 0
        self.most = 0
        self.stored: list[str] = []

    def work(self) -> None:
        with self.lock:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.go.wait(10)
        with self.lock:
            self.running -= 1

    def hash_password(self, password: str) -> str:
        self.work()
        if password == "broken":
            raise ValueError(password)
        return f"hash of {password}"

    def verify_password(self, password: str, stored: str) -> bool:
        self.stored.append(stored)
        self.work()
        return True

    def needs_rehash(self, stored: str) -> bool:
        return stored == "old"


async def until(is_so: Callable[[], bool]) -> None:
    """What a thread does can only be looked at again and again."""
    for _ in range(2_000):
        if is_so():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came about")


def run(test: Callable[[Slow], Awaitable[None]]) -> None:
    async def main() -> None:
        slow = Slow()
        try:
            await test(slow)
        finally:
            slow.go.set()

    asyncio.run(main())


def test_few_at_once_and_no_queue_without_an_end() -> None:
    async def test(slow: Slow) -> None:
        hashing = PasswordHashing(slow)
        tasks = [
            asyncio.create_task(hashing.hash(str(number)))
            for number in range(MOST_AT_ONCE + MOST_WAITING + 10)
        ]
        await until(lambda: slow.begun == MOST_AT_ONCE)
        await until(lambda: sum(task.done() for task in tasks) == 10)
        with pytest.raises(GatewayError) as caught:
            await hashing.verify("x", "y")
        assert caught.value.code is ErrorCode.BACKEND_UNAVAILABLE
        assert caught.value.code.status == 503
        assert dict(caught.value.fields)["Retry-After"] == "5"
        slow.go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[: MOST_AT_ONCE + MOST_WAITING] == [
            f"hash of {number}" for number in range(MOST_AT_ONCE + MOST_WAITING)
        ]
        assert all(isinstance(outcome, GatewayError) for outcome in outcomes[MOST_AT_ONCE + MOST_WAITING :])
        assert slow.most == MOST_AT_ONCE
        # All places are free again.
        assert await asyncio.gather(*(hashing.hash("x") for _ in range(MOST_AT_ONCE + MOST_WAITING)))

    run(test)


def test_who_leaves_while_waiting_frees_the_place_and_makes_no_work() -> None:
    async def test(slow: Slow) -> None:
        hashing = PasswordHashing(slow, most_at_once=1, most_waiting=1)
        first = asyncio.create_task(hashing.hash("first"))
        await until(lambda: slow.begun == 1)
        left = asyncio.create_task(hashing.hash("left"))
        await asyncio.sleep(0)
        with pytest.raises(GatewayError):
            await hashing.hash("too many")
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        third = asyncio.create_task(hashing.hash("third"))
        await asyncio.sleep(0)
        slow.go.set()
        assert await asyncio.gather(first, third) == ["hash of first", "hash of third"]
        assert slow.begun == 2

    run(test)


def test_who_leaves_later_keeps_the_place_until_the_thread_is_done() -> None:
    async def test(slow: Slow) -> None:
        hashing = PasswordHashing(slow, most_at_once=1, most_waiting=1)
        left = asyncio.create_task(hashing.verify("x", "y"))
        await until(lambda: slow.begun == 1)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        waiting = asyncio.create_task(hashing.hash("waiting"))
        await asyncio.sleep(0)
        with pytest.raises(GatewayError):
            await hashing.hash("too many")
        assert slow.begun == 1
        slow.go.set()
        assert await waiting == "hash of waiting"
        assert slow.most == 1

    run(test)


def test_an_error_of_the_hasher_is_its_callers_alone() -> None:
    async def test(slow: Slow) -> None:
        slow.go.set()
        hashing = PasswordHashing(slow, most_at_once=1, most_waiting=0)
        with pytest.raises(ValueError, match="broken"):
            await hashing.hash("broken")
        assert await hashing.hash("good") == "hash of good"

    run(test)


@pytest.mark.skipif(sys.platform != "linux", reason="there alone a thread has a priority of its own")
def test_its_threads_step_back_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking(Slow):
        def work(self) -> None:
            self.stored.append(str(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    async def main() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        assert before < NICE
        asking = Asking()
        hashing = PasswordHashing(asking)
        await asyncio.gather(*(hashing.hash("x") for _ in range(6)))
        assert asking.stored == [str(NICE)] * 6
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        assert await asyncio.to_thread(lambda: os.getpriority(os.PRIO_PROCESS, 0)) == before

        def refused(*_: int) -> None:
            raise PermissionError

        # Where that is forbidden, it is hashed all the same.
        monkeypatch.setattr(os, "setpriority", refused)
        assert await PasswordHashing(asking).hash("x") == "hash of x"
        assert asking.stored[6] == str(before)

    asyncio.run(main())


def test_a_full_one_leaves_another_alone() -> None:
    async def test(slow: Slow) -> None:
        registrations, logins = PasswordHashing(slow, most_at_once=1, most_waiting=1), PasswordHashing(slow)
        waiting = [asyncio.create_task(registrations.hash(str(number))) for number in range(2)]
        await until(lambda: slow.begun == 1)
        with pytest.raises(GatewayError):
            await registrations.hash("too many")
        login = asyncio.create_task(logins.verify("x", "y"))
        await until(lambda: slow.begun == 2)
        slow.go.set()
        assert await login
        assert await asyncio.gather(*waiting) == ["hash of 0", "hash of 1"]

    run(test)


def test_closing_lets_a_thread_finish_and_ends_it() -> None:
    def threads() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name.startswith("lucid-password")]

    async def test(slow: Slow) -> None:
        others = threads()
        hashing = PasswordHashing(slow, most_at_once=1)
        running = asyncio.create_task(hashing.hash("x"))
        await until(lambda: slow.begun == 1)
        mine = [each for each in threads() if each not in others]
        assert len(mine) == 1
        hashing.close()
        hashing.close()
        slow.go.set()
        assert await running == "hash of x"
        await until(lambda: not mine[0].is_alive())
        with pytest.raises(RuntimeError):
            await hashing.hash("y")

    run(test)


def test_no_stored_password_is_work_and_never_right() -> None:
    async def test(slow: Slow) -> None:
        slow.go.set()
        hashing = PasswordHashing(slow)
        assert await hashing.verify("x", "stored") is True
        assert await hashing.verify("x", None) is False
        assert slow.stored == ["stored", passwords.UNKNOWN]
        assert (hashing.needs_rehash("old"), hashing.needs_rehash("new")) == (True, False)

    run(test)


def test_pbkdf2_at_its_real_cost() -> None:
    async def main() -> None:
        hashing = PasswordHashing()
        stored = await hashing.hash("correct horse")
        assert not hashing.needs_rehash(stored)
        assert await asyncio.gather(
            hashing.verify("correct horse", stored),
            hashing.verify("wrong horse", stored),
            hashing.verify("correct horse", None),
        ) == [True, False, False]

    asyncio.run(main())
