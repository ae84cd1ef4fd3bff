"""One worker of a fleet: its own loop, lease store, control channel and place in the registry; and its callers.

`python -m benchmarks.limiter.worker`, started by `fleet`. A `Task` comes as a line on stdin; the worker says "ready",
is told the beginning (seconds of the machine's monotonic clock) in a second line, and writes a `Told` to a file when
it is done. The end of stdin before that ends it.
"""

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvloop

from lucid.core.exchange import Limit
from lucid.core.rules.leases import Claim, LimitSet, Take
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.redis_link import RedisLink, new_holder

MOST_AT_ONCE = 64
"""After so many requests without a pause the loop gets its turn."""

ROUNDING_SECONDS = 1e-6
"""A request that is due at the very beginning of the measured time belongs to it."""


class Task(msgspec.Struct, frozen=True):
    """All callers together ask `rate_per_s`; request n is user `n % users`, and goes round the workers.

    Measured from `warm_seconds` after the beginning, for `measured_seconds`.
    """

    uri: str
    out: str
    index: int
    workers: int
    limit: int
    window_seconds: int
    users: int
    rate_per_s: float
    warm_seconds: float
    measured_seconds: float


class Told(msgspec.Struct, frozen=True):
    """`admitted`: by user, times since the beginning, warm-up included; `whole` are the worker's counters from the
    beginning, the rest is of the measured time."""

    requests: int
    refused: int
    refused_ever: int
    calls: int
    cpu_s: float
    late_ms: float
    whole: dict[str, int]
    admitted: dict[int, list[float]]


def own_requests(task: Task) -> Iterator[tuple[float, int]]:
    """`(seconds since the beginning, user)` of the requests that come to this worker; each user meets all in turn."""
    total = round((task.warm_seconds + task.measured_seconds) * task.rate_per_s)
    for number in range(total):
        user, turn = number % task.users, number // task.users
        if (user + turn) % task.workers == task.index:
            yield number / task.rate_per_s, user


class Worker:
    def __init__(self, task: Task, store: LeaseStore, begin: float) -> None:
        self.task = task
        self.store = store
        self.begin = begin
        self.limits = LimitSet((Limit("authenticated", task.limit, task.window_seconds),))
        self.measuring = False
        self.requests = self.refused = self.refused_ever = 0
        self.admitted: dict[int, list[float]] = {}
        self.late = 0.0
        self._asking: set[asyncio.Task[None]] = set()

    def ask(self, user: int) -> None:
        claim = self.store.leases.claim(self.limits, f"user-{user}", "")
        verdict = claim.take(time.monotonic())
        if verdict is Take.WANTING:
            asking = asyncio.ensure_future(self._admit(claim, user, self.measuring))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
        else:
            self.count(user, verdict is Take.ADMITTED, self.measuring)
        self.requests += self.measuring

    async def _admit(self, claim: Claim, user: int, measured: bool) -> None:
        self.count(user, await self.store.admit(claim), measured)

    def count(self, user: int, admitted: bool, measured: bool) -> None:
        if admitted:
            self.admitted.setdefault(user, []).append(time.monotonic() - self.begin)
        else:
            self.refused_ever += 1
            self.refused += measured

    async def run(self) -> Told:
        task, store = self.task, self.store
        calls, cpu = store.counters.calls, time.process_time()
        at_once = 0
        for due, user in own_requests(task):
            now = time.monotonic() - self.begin
            while now < due:
                at_once = 0
                await asyncio.sleep(due - now)
                now = time.monotonic() - self.begin
            if not self.measuring and due >= task.warm_seconds - ROUNDING_SECONDS:
                self.measuring = True
                calls, cpu = store.counters.calls, time.process_time()
            self.late = max(self.late, now - due)
            self.ask(user)
            at_once += 1
            if at_once == MOST_AT_ONCE:
                at_once = 0
                await asyncio.sleep(0)
        end = self.begin + task.warm_seconds + task.measured_seconds
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        calls, cpu = store.counters.calls - calls, time.process_time() - cpu
        await asyncio.gather(*self._asking)
        return Told(
            requests=self.requests,
            refused=self.refused,
            refused_ever=self.refused_ever,
            calls=calls,
            cpu_s=cpu,
            late_ms=self.late * 1e3,
            whole={name: int(getattr(store.counters, name)) for name in ("degraded", "late")},
            admitted=self.admitted,
        )


def _end_with_parent() -> None:
    """Whoever started us says nothing more: when this returns it is gone."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


async def serve(task: Task) -> Told:
    holder = new_holder()
    link = RedisLink(task.uri)
    control = ControlChannel(link, holder)
    store = LeaseStore(link, holder, control, fleet_told=task.workers)
    await control.start()
    await store.start()
    try:
        print("ready", flush=True)
        begin = float(await asyncio.to_thread(sys.stdin.readline) or "nan")
        threading.Thread(target=_end_with_parent, daemon=True).start()
        gc.freeze()
        return await Worker(task, store, begin).run()
    finally:
        await store.stop()
        await control.stop()
        await link.close()


def main() -> None:
    # That Redis counted as away is in the row, by its count.
    logging.getLogger("lucid").setLevel(logging.ERROR)
    task = msgspec.json.decode(sys.stdin.readline(), type=Task)
    told = uvloop.run(serve(task))
    Path(task.out).write_bytes(msgspec.msgpack.encode(told))


if __name__ == "__main__":
    main()
