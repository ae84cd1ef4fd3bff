"""Limits under load while things die: two pods over one Redis, callers that note when they asked, and what of it is
over or under in which window.

*From the requests' own times.* An admission happened between a request's sending and the first byte of its answer. So
one counts for a window [a, a + W) only where the whole of that interval lies inside: what is counted was surely
admitted there, and a bound needs no tolerance.
"""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from redis import Redis

from lucid.dev.embedded import LOOPBACK, free_port
from tests.integration.test_faults import ports_of
from tests.support import markers
from tests.support.servers import SECRET, START_SECONDS, GatewayProcess, clean_environment
from tests.support.stores import RedisChild

SLOTS = 120
WORKERS = 2
"""Of each pod."""
PODS = 2
STARTING = 6
"""So many pods start at the same time: a start is work for a processor, and has its own time limit."""
ANSWER_SECONDS = 10.0
LOG_SECONDS = 0.05
"""By so much the log may tell of a change later than it was decided by: a line is written after the fact."""

Span = tuple[float, float]


class Asked(NamedTuple):
    """One request; `status` 0: the connection ended without an answer."""

    sent: float
    answered: float
    status: int


@dataclass(frozen=True)
class Sizes:
    """What follows from a window (design/limiter.md), in seconds."""

    window: int

    @property
    def slot(self) -> float:
        return -(-self.window * 1_000 // SLOTS) / 1_000

    @property
    def counted(self) -> float:
        """How long a spend counts at the most: K + 1 slots."""
        return (SLOTS + 1) * self.slot

    @property
    def life(self) -> float:
        """The longest life of a lease."""
        return min(10.0, self.window / 6)

    @property
    def hold(self) -> float:
        """How long nothing is granted after a loss of data, from the first call on."""
        return self.counted + self.slot + self.life


# --- windows


def admitted(asked: Iterable[Asked]) -> list[Asked]:
    """What was let through, by the time of sending."""
    return sorted(each for each in asked if each.status and each.status != 429)


def within(those: Sequence[Asked], begin: float, end: float) -> int:
    """How many of `those` (sorted) have their whole interval in [begin, end)."""
    count = 0
    for index in range(bisect_left(those, (begin,)), len(those)):
        if those[index].sent >= end:
            break
        count += those[index].answered < end
    return count


def most(those: Sequence[Asked], window: float, spans: Iterable[Span]) -> tuple[int, float]:
    """The most that any window holds whose begin lies in one of `spans` (closed), and that begin; exact.

    A window that moves right loses nothing before its begin meets the sending of one that it holds, or the end of its
    span: these are all begins that need a look.
    """
    best = (0, 0.0)
    for first, last in spans:
        begins = [each.sent for each in those if first <= each.sent <= last]
        for begin in [*begins, last] if first <= last else ():
            best = max(best, (within(those, begin, begin + window), begin))
    return best


def least(
    those: Sequence[Asked], window: float, spans: Iterable[Span], every: Sequence[Asked] = (), enough: int = 0
) -> tuple[int, float]:
    """The least that a window holds which begins in one of `spans`, looked at 20 times a second: (-1, …) if there is
    none. Left out are those in which fewer than `enough` of `every` request (sorted) was made.
    """
    found = []
    for first, last in spans:
        for step in range(int((last - first) * 20) + 1 if last >= first else 0):
            begin = first + step / 20
            if within(every, begin, begin + window) >= enough:
                found.append((within(those, begin, begin + window), begin))
    return min(found, default=(-1, 0.0))


def outside(spans: Sequence[Span], first: float, last: float) -> list[Span]:
    """What of [first, last] none of `spans` covers."""
    free = []
    for begin, end in sorted(spans):
        if begin > first:
            free.append((first, min(begin, last)))
        first = max(first, end)
    if first < last:
        free.append((first, last))
    return [(begin, end) for begin, end in free if end > begin]


# --- callers


@dataclass
class Caller:
    """Asks `rate` times a second at random moments, a connection each, any pod; `limit` per window is its quota."""

    name: str
    limit: int
    rate: float
    path: str
    fields: str = ""
    asked: list[Asked] = field(default_factory=list)
    left_out: int = 0
    """Not asked because too many were unanswered."""

    async def run(self, ports: Sequence[int], seconds: float, dice: random.Random) -> None:
        """Those with a rate of 0 are left to the fault."""
        if not self.rate:
            return
        head = f"GET {self.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{self.fields}\r\n".encode()
        under_way: set[asyncio.Task[None]] = set()
        moment = time.monotonic()
        end = moment + seconds
        while (moment := moment + dice.expovariate(self.rate)) < end:
            await asyncio.sleep(max(0.0, moment - time.monotonic()))
            if len(under_way) >= 200:
                self.left_out += 1
                continue
            task = asyncio.create_task(self._ask(dice.choice(ports), head))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _ask(self, port: int, head: bytes) -> None:
        exchange = _Exchange(head)
        transport = None
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                transport, _ = await asyncio.get_running_loop().create_connection(
                    lambda: exchange, LOOPBACK, port
                )
                await exchange.over.wait()
        if transport is not None:
            transport.abort()
        self.asked.append(
            Asked(exchange.sent, exchange.answered or time.monotonic(), int(exchange.data[9:12] or b"0"))
        )


class _Exchange(asyncio.Protocol):
    def __init__(self, head: bytes) -> None:
        self._head = head
        self.sent = time.monotonic()
        self.answered = 0.0
        self.data = b""
        self.over = asyncio.Event()

    # uvloop's transports are not derived from asyncio's.
    def connection_made(self, transport: Any) -> None:
        self.sent = time.monotonic()
        transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        if not self.data:
            self.answered = time.monotonic()
        self.data += data

    def connection_lost(self, _: Exception | None) -> None:
        self.over.set()


class Line:
    """A connection that is kept, and so stays with one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.port = int(writer.get_extra_info("sockname")[1])

    @classmethod
    async def opened(cls, port: int) -> "Line":
        """Returns when somebody has taken the connection and answered."""
        line = cls(*await asyncio.open_connection(LOOPBACK, port))
        await line.get("/health", "")
        return line

    async def ask(self, caller: Caller, count: int) -> None:
        """One request after the other."""
        for _ in range(count):
            sent = time.monotonic()
            status = await self.get(caller.path, caller.fields)
            caller.asked.append(Asked(sent, time.monotonic(), status))

    async def get(self, path: str, fields: str) -> int:
        """The status. `fields`: lines with their ends."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
        async with asyncio.timeout(ANSWER_SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            await self._reader.readexactly(int(length[1]) if length else 0)
        return int(head[9:12])

    def close(self) -> None:
        self._writer.close()


# --- what is there, and what happens to it


@dataclass
class World:
    """Two pods over one Redis of their own. Times are of `time.monotonic`."""

    redis: RedisChild
    pods: list[GatewayProcess]
    sizes: Sizes
    dice: random.Random
    faults: list[Span] = field(default_factory=list)
    """From just before Redis was stopped or killed until just after it went on or answered."""
    stood_still: list[Span] = field(default_factory=list)
    """The surely silent part of each: from just after until just before."""
    lost_data: bool = False
    """Whether the server that came back was another one: the limiter then holds back."""
    kills: list[float] = field(default_factory=list)
    """When a worker was killed."""

    @contextmanager
    def paused_redis(self) -> Iterator[None]:
        begin = time.monotonic()
        os.kill(self.redis.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            yield
        finally:
            self.stood_still.append((stopped, time.monotonic()))
            os.kill(self.redis.pid, signal.SIGCONT)
            self.faults.append((begin, time.monotonic()))

    async def pause_redis(self, seconds: float) -> None:
        with self.paused_redis():
            await asyncio.sleep(seconds)

    async def restart_redis(self, seconds: float, *, empty: bool) -> None:
        begin = time.monotonic()
        await asyncio.to_thread(self.redis.kill)
        stopped = time.monotonic()
        await asyncio.sleep(seconds)
        if empty:
            shutil.rmtree(self.redis.data)
        self.lost_data = True
        self.stood_still.append((stopped, time.monotonic()))
        await asyncio.to_thread(self.redis.start)
        self.faults.append((begin, time.monotonic()))

    async def kill_worker(self, pod: int) -> None:
        workers = await asyncio.to_thread(self.pods[pod].workers)
        if workers:
            self.kill(self.dice.choice(workers))

    def kill(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)
        self.kills.append(time.monotonic())

    async def lines(self, known: Mapping[int, "Line"] | None = None) -> dict[int, "Line"]:
        """A connection to each worker that is not `known`, by its process id (Linux). It goes on until all have one:
        which worker takes a connection is not for its caller to choose.
        """
        lines: dict[int, Line] = {}
        for pod in self.pods:
            deadline = time.monotonic() + START_SECONDS
            while True:
                missing = set(await asyncio.to_thread(pod.workers)) - lines.keys() - (known or {}).keys()
                if not missing:
                    break
                assert time.monotonic() < deadline, f"no connection reaches {missing}"
                line = await Line.opened(pod.port)
                taken = {worker for worker in missing if line.port in ports_of(worker)}
                if taken:
                    lines[taken.pop()] = line
                else:
                    line.close()
                    await asyncio.sleep(0.02)
        return lines


Fault = Callable[[World], Awaitable[None]]


@dataclass
class Scenario:
    """`fault` runs beside the load from its begin on and sleeps as it likes; `seconds`: how long the load lasts."""

    name: str
    redis_down: str
    sizes: Sizes
    fault: Fault
    seconds: float
    callers: list[Caller]
    pods: int = PODS
    seed: int = 1


@dataclass
class Run:
    """What happened."""

    scenario: Scenario
    world: World
    begin: float
    end: float
    logs: list[str]
    wall_offset: float
    """Wall clock minus monotonic."""

    @property
    def asked(self) -> list[Asked]:
        return [each for caller in self.scenario.callers for each in caller.asked]

    def caller(self, name: str) -> Caller:
        return next(caller for caller in self.scenario.callers if caller.name == name)

    @property
    def lines(self) -> list[str]:
        """What the limiters told."""
        return [line for log in self.logs for line in log.splitlines() if "limiter: " in line]

    def absences(self) -> list[Span]:
        """When some worker did without Redis, by the logs: one span per worker and time."""
        gone: list[float] = []
        back: list[Span] = []
        for line in self.lines:
            moment = datetime.fromisoformat(line.split(" ", 1)[0]).timestamp() - self.wall_offset
            if found := re.search(r"answers, after ([\d.]+) s", line):
                back.append((moment - float(found[1]), moment))
            elif "away" in line:
                gone.append(moment)
        spans = []
        for moment in gone:
            # The duration is told to 0.1 s; whose line it is is not, and does not matter.
            match = min(back, key=lambda span: abs(span[0] - moment), default=None)
            if match is not None and abs(match[0] - moment) < 0.2:
                back.remove(match)
                spans.append((moment - LOG_SECONDS, match[1] + LOG_SECONDS))
            else:  # it was killed, or the load ended before it came back
                later = [kill for kill in self.world.kills if kill > moment]
                spans.append((moment - LOG_SECONDS, min(later, default=self.end)))
        return sorted(spans)

    def away_together(self) -> Span | None:
        """While all workers that were there at its beginning did without Redis in the (one) fault."""
        if not self.world.faults:
            return None
        begin, end = self.world.faults[0]
        killed = [kill for kill in self.world.kills if begin < kill < end]
        early = min(killed, default=end)
        through = [span for span in self.absences() if span[0] < early and span[1] > end - LOG_SECONDS]
        if len(through) < self.scenario.pods * WORKERS - len(killed):
            return None
        return max(first for first, _ in through), min(last for _, last in through)

    def disturbed(self) -> list[Span]:
        """When anybody decided without Redis, or could: faults, absences, and the hold after a loss of data."""
        spans = [*self.world.faults, *self.absences()]
        if self.world.lost_data:
            hold, first = self.scenario.sizes.hold, self.world.faults[0][0]
            spans += [(begin, end + hold + LOG_SECONDS) for begin, end in spans if end > first]
        return spans


def environment(redis: RedisChild, mongodb_uri: str, **more: str) -> dict[str, str]:
    return clean_environment(
        HOST=LOOPBACK,
        PORT=str(free_port()),
        METRICS_PORT=str(free_port()),
        WORKERS=str(WORKERS),
        JWT_SECRET_KEY=SECRET,
        LOG_FORMAT="text",
        MONGODB_URI=mongodb_uri,
        REDIS_URI=redis.uri,
        **more,
    )


@contextmanager
def worlds(
    scenarios: Sequence[Scenario], folder: Path, settings: Callable[[Scenario, RedisChild], Mapping[str, str]]
) -> Iterator[list[World]]:
    """A world for each scenario, all ready at the same time; each ends with its scenario's file."""
    with ExitStack() as stack:
        made = []
        starting: list[GatewayProcess] = []
        for scenario in scenarios:
            home = folder / scenario.name
            # What a killed server has written is kept by the kernel: no need to wait for the disk with each write.
            redis = RedisChild(str(home / "redis"), "--appendfsync", "no")
            redis.start()
            stack.callback(redis.kill)
            with Redis(port=redis.port) as client:
                markers.plant(client)
            pods = []
            for number in range(scenario.pods):
                (home / str(number)).mkdir(parents=True)
                pod = GatewayProcess(settings(scenario, redis), home / str(number), ("lucid", "serve"))
                stack.callback(pod.stop)
                pods.append(pod)
                starting.append(pod)
                if len(starting) >= STARTING:
                    starting.pop(0).wait_until_ready()
            made.append(World(redis, pods, scenario.sizes, random.Random(scenario.seed)))
        for pod in starting:
            pod.wait_until_ready()
        try:
            yield made
        finally:
            for world in made:
                for pod in world.pods:
                    pod.process.terminate()  # all at once: `stop` then only waits


async def perform(scenario: Scenario, world: World) -> Run:
    """The load and the fault, side by side."""
    begin = time.monotonic()
    offset = time.time() - begin
    ports = [pod.port for pod in world.pods]
    dice = random.Random(scenario.seed)
    await asyncio.gather(
        scenario.fault(world),
        *(caller.run(ports, scenario.seconds, random.Random(dice.random())) for caller in scenario.callers),
    )
    logs = [pod.log for pod in world.pods]
    return Run(scenario, world, begin, time.monotonic(), logs, offset)


def perform_all(scenarios: Sequence[Scenario], made: Sequence[World]) -> list[Run]:
    """All at the same time, in this process."""

    async def together() -> list[Run]:
        return await asyncio.gather(*map(perform, scenarios, made))

    # By uvloop: the callers' part of the processor counts where few of them must do for many pods.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(together())
