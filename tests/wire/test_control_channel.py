"""The control channel and the registry against a real Valkey: gaps, outages, restarts, the dead."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import redis

from lucid.core.wire import control_channel
from lucid.core.wire.control_channel import STREAM_KEY, WORKERS_KEY, ControlChannel
from lucid.core.wire.redis_link import RedisLink, end_tasks, new_holder
from tests.support.stores import RedisChild


class Worker:
    """A channel, what it heard, and how often it loaded everything anew."""

    def __init__(self, uri: str, **about: Any) -> None:
        self.link = RedisLink(uri)
        self.channel = ControlChannel(self.link, new_holder(), about=about)
        self.heard: list[Mapping[str, Any]] = []
        self.reloads = 0
        self.fail_reloads = 0
        self.channel.subscribe("news", self.heard.append, self._reload)

    async def _reload(self) -> None:
        if self.fail_reloads:
            self.fail_reloads -= 1
            raise OSError("the database is away")
        self.reloads += 1

    def numbers(self) -> list[int]:
        return [body["n"] for body in self.heard]


@contextlib.asynccontextmanager
async def workers(uri: str, count: int = 1) -> AsyncIterator[list[Worker]]:
    made = [Worker(uri, role=f"w{number}") for number in range(count)]
    try:
        for worker in made:
            await worker.channel.start()
        yield made
    finally:
        for worker in made:
            await worker.channel.stop()
            await worker.link.close()


async def until(true: Callable[[], bool], seconds: float = 6.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def attached(made: list[Worker]) -> None:
    await until(lambda: all(worker.channel.connected and worker.reloads for worker in made))


def test_everybody_hears_everything_in_order_the_sender_too(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri, 3) as made:
            await attached(made)
            for n in range(30):
                assert await made[n % 3].channel.publish("news", {"n": n})
            assert await made[0].channel.publish("else", {"n": 99})
            await until(lambda: all(len(worker.heard) == 30 for worker in made))
            assert all(worker.numbers() == list(range(30)) for worker in made)
            assert [worker.reloads for worker in made] == [1, 1, 1]

    asyncio.run(go())


def test_the_registry_counts_the_living(server: RedisChild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_channel, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(control_channel, "DEAD_SECONDS", 0.5)

    async def go() -> None:
        async with workers(server.uri, 3) as made:
            await until(lambda: [worker.channel.fleet_size for worker in made] == [3, 3, 3])
            listed = await made[0].channel.workers()
            assert {(one["role"], one["holder"]) for one in listed} == {
                (f"w{n}", worker.channel.holder) for n, worker in enumerate(made)
            }
            assert all(one["pid"] == os.getpid() and one["seen_seconds_ago"] < 0.5 for one in listed)
            # One leaves, one dies.
            await made[0].channel.stop()
            # Sooner than it could be taken for dead: it is not even listed.
            assert made[0].channel.holder not in {one["holder"] for one in await made[2].channel.workers()}
            await until(lambda: made[2].channel.fleet_size == 2)
            await end_tasks(made[1].channel._tasks)
            await until(lambda: made[2].channel.fleet_size == 1)
            assert [one["role"] for one in await made[2].channel.workers()] == ["w2"]

    asyncio.run(go())


def test_what_is_published_during_an_outage_arrives_after_it(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri, 2) as made:
            await attached(made)
            await until(lambda: made[0].channel.fleet_size == 2)
            assert await made[0].channel.publish("news", {"n": 0})
            server.stop()
            await until(lambda: not any(worker.channel.connected for worker in made))
            known = await made[0].channel.workers()
            assert len(known) == 2
            for n in (1, 2):
                assert not await made[0].channel.publish("news", {"n": n})
            server.start()
            await until(lambda: all(worker.numbers() == [0, 1, 2] for worker in made))
            await until(lambda: all(worker.channel.connected for worker in made))
            # The stream came back as it was, but another process cannot prove that nothing was added before it.
            assert [worker.reloads for worker in made] == [2, 2]
            assert await made[1].channel.publish("news", {"n": 3})
            await until(lambda: made[0].numbers() == [0, 1, 2, 3])

    asyncio.run(go())


def test_a_redis_that_comes_back_empty_is_a_gap(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri, 2) as made:
            await attached(made)
            with redis.Redis(port=server.port) as client:
                client.flushall()
            await until(lambda: all(worker.reloads == 2 for worker in made))
            assert await made[0].channel.publish("news", {"n": 1})
            await until(lambda: all(worker.numbers() == [1] for worker in made))
            await until(lambda: all(worker.channel.fleet_size == 2 for worker in made))

    asyncio.run(go())


def test_a_read_that_blocks_over_a_flush_is_a_gap_all_the_same(
    server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No check but that of the read itself.
    monkeypatch.setattr(control_channel, "HEARTBEAT_SECONDS", 60.0)

    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            with redis.Redis(port=server.port) as client:
                await until(lambda: client.info("clients")["blocked_clients"] == 1)
                with client.pipeline(transaction=True) as pipeline:
                    pipeline.flushall()
                    pipeline.xadd(STREAM_KEY, {"kind": "news", "body": '{"n": 1}'})
                    pipeline.execute()
            await until(lambda: made[0].numbers() == [1])
            await until(lambda: made[0].reloads == 2)

    asyncio.run(go())


def test_a_stream_of_another_history_is_a_gap(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            with redis.Redis(port=server.port) as client:
                client.delete(STREAM_KEY)
                client.xadd(STREAM_KEY, {"kind": "old", "body": "{}"}, id="1-1")
            await until(lambda: made[0].reloads == 2)
            assert await made[0].channel.publish("news", {"n": 1})
            await until(lambda: made[0].numbers() == [1])

    asyncio.run(go())


def test_a_worker_that_slept_reads_on_or_loads_anew_if_the_stream_was_trimmed(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            channel = made[0].channel
            reader = channel._tasks[1]

            async def sleep_while(act: Callable[[redis.Redis], None]) -> None:
                nonlocal reader
                await end_tasks([reader])
                channel._attached = False
                with redis.Redis(port=server.port) as client:
                    act(client)
                reader = channel._tasks[1] = asyncio.create_task(channel._read_always())

            def say(client: redis.Redis) -> None:
                client.xadd(STREAM_KEY, {"kind": "news", "body": '{"n": 7}'})

            await sleep_while(say)
            await until(lambda: made[0].numbers() == [7])
            assert made[0].reloads == 1

            def say_and_trim(client: redis.Redis) -> None:
                say(client)
                say(client)
                client.xtrim(STREAM_KEY, maxlen=1, approximate=False)

            await sleep_while(say_and_trim)
            await until(lambda: made[0].reloads == 2)

    asyncio.run(go())


def test_a_worker_that_has_started_has_loaded_everything(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            assert (made[0].channel.connected, made[0].reloads) == (True, 1)
        # One that fails is tried again afterwards; it does not hold the worker up.
        second = Worker(server.uri)
        second.fail_reloads = 1
        await second.channel.start()
        assert (second.channel.connected, second.reloads, second.fail_reloads) == (True, 0, 0)
        await until(lambda: second.reloads == 1)
        await second.channel.stop()
        await second.link.close()

    asyncio.run(go())


def test_a_reload_that_hangs_is_not_waited_for_any_longer(
    server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_channel, "START_SECONDS", 0.1)

    async def go() -> None:
        worker = Worker(server.uri)
        hanging = asyncio.Event()
        entered = asyncio.Event()

        async def reload() -> None:
            entered.set()
            await hanging.wait()

        worker.channel.subscribe("else", lambda _: None, reload)
        await worker.channel.start()  # without the bound the test would hang here
        assert not hanging.is_set()
        await until(entered.is_set)
        hanging.set()
        assert await worker.channel.publish("news", {"n": 1})
        await until(lambda: worker.numbers() == [1])
        await worker.channel.stop()
        await worker.link.close()

    asyncio.run(go())


def test_a_worker_starts_without_redis_and_attaches_later(server: RedisChild) -> None:
    async def go() -> None:
        server.stop()
        async with workers(server.uri) as made:
            channel = made[0].channel
            assert (channel.connected, channel.fleet_size, made[0].reloads) == (False, 0, 0)
            assert not await channel.publish("news", {"n": 1})
            server.start()
            await until(lambda: made[0].numbers() == [1])
            assert (channel.connected, channel.fleet_size) == (True, 1)
            # The first attachment loads everything: who knows what was said before.
            assert made[0].reloads == 1

    asyncio.run(go())


def test_a_redis_that_hangs_is_survived(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await until(lambda: not made[0].channel.connected)
                # Kept without asking Redis, so whoever publishes does not wait for it: no await inside can block.
                publishing = made[0].channel.publish("news", {"n": 1})
                with pytest.raises(StopIteration) as done:
                    publishing.send(None)
                assert done.value.value is False
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await until(lambda: made[0].numbers() == [1])
            assert made[0].reloads == 1

    asyncio.run(go())


def test_handlers_and_reloads_that_fail_do_not_end_the_reader(
    server: RedisChild, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)

            def fail(body: Mapping[str, Any]) -> None:
                raise KeyError("mine")

            made[0].channel.subscribe("bad", fail)
            with redis.Redis(port=server.port) as client:
                client.xadd(STREAM_KEY, {"kind": "news", "body": "no JSON"})
                client.xadd(STREAM_KEY, {"odd": "one"})
            assert await made[0].channel.publish("bad", {})
            assert await made[0].channel.publish("news", {"n": 1})
            await until(lambda: made[0].numbers() == [1])
            made[0].fail_reloads = 1
            with redis.Redis(port=server.port) as client:
                client.flushall()
            await until(lambda: made[0].reloads == 2)

    with caplog.at_level(logging.WARNING, "lucid.control"):
        asyncio.run(go())
    told = [record.message for record in caplog.records]
    assert sum("handler of bad failed" in text for text in told) == 1
    assert sum("kind news is not understood" in text for text in told) == 1
    assert sum("loading news anew failed" in text for text in told) == 1


def test_an_outage_is_told_once(
    server: RedisChild, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_channel, "HEARTBEAT_SECONDS", 0.1)

    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            failures = {"beat": 0, "read": 0}

            def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
                async def counting(*arguments: Any) -> Any:
                    try:
                        return await call(*arguments)
                    except Exception:
                        failures[name] += 1
                        raise

                return counting

            link: Any = made[0].link
            link.execute, link.wait = counted("beat", link.execute), counted("read", link.wait)
            server.stop()
            await until(lambda: failures["beat"] >= 8)
            server.start()
            await until(lambda: made[0].channel.connected)
            assert failures["beat"] + failures["read"] >= 8

    with caplog.at_level(logging.WARNING, "lucid.control"):
        asyncio.run(go())
    assert len(caplog.records) == 2  # the heartbeat, the reader


def test_the_outbox_is_bounded(server: RedisChild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_channel, "OUTBOX_LENGTH", 3)

    async def go() -> None:
        link = RedisLink(server.uri)
        channel = ControlChannel(link, new_holder())
        for n in range(5):
            assert not await channel.publish("news", {"n": n})
        assert [body for _, body in channel._outbox] == [b'{"n":2}', b'{"n":3}', b'{"n":4}']
        await link.close()

    asyncio.run(go())


def test_keys_are_under_lucid(server: RedisChild) -> None:
    async def go() -> None:
        async with workers(server.uri) as made:
            await attached(made)
            with redis.Redis(port=server.port) as client:
                assert {STREAM_KEY.encode(), WORKERS_KEY.encode()} <= set(client.keys())
                assert all(key.startswith(b"lucid:") for key in client.scan_iter())

    asyncio.run(go())
