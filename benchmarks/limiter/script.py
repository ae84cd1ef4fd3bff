"""What the limiter costs Redis: bytes of a key, and time of a call, on each server program that is installed."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import redis

from benchmarks.limiter.figures import Part, Row
from benchmarks.limiter.ground import Ground, Server
from lucid.core.exchange import Limit
from lucid.core.rules.bucket import SLOTS, Answer, Call, Entry, Message, Op
from lucid.core.rules.key_lease import Shape
from lucid.core.rules.leases import MARKER
from lucid.core.rules.shards import Partition, Shard
from lucid.core.wire.lease_courier import read_script
from lucid.core.wire.redis_link import new_holder

LIMIT = Limit("authenticated", 1_000_000)
SHAPE = Shape.of(LIMIT)
HOLDERS = (1, 4, 16)
SHAPES = ((1, 1), (1, 4), (1, 16), (32, 4))
"""Keys in a call, holders of each."""
CALLS = 2_000
PIPELINED = 50
SPENT = 3
"""Tokens that a holder reports, and asks for again, in each call."""
WANT = 100


EMPTY = "return cmsgpack.pack({redis.call('TIME')[1]})"
"""What any script costs that reads the clock and answers: the floor."""


def programs() -> list[str]:
    """The server that Lucid's own tools use, and `redis-server` besides where that is another one."""
    other = shutil.which("redis-server")
    return ["", *([other] if other else [])]


class Speaker:
    """Workers that talk with the script about some keys: they report, keep and ask, each in its turn."""

    def __init__(self, client: "redis.Redis", keys: list[str], holders: int) -> None:
        self.client = client
        self.digest: Any = client.script_load(read_script())
        self.keys = keys
        self.holders = [new_holder() for _ in range(holders)]
        self.seq = 0
        self.known = ""
        self._last: dict[str, int] = dict.fromkeys(self.holders, 0)
        self._holds: dict[tuple[str, str], int] = {}

    def slot(self) -> int:
        seconds, microseconds = self.client.time()
        return (int(seconds) * 1_000 + int(microseconds) // 1_000) // SHAPE.slot_ms

    def fill(self) -> None:
        """Every slot of the ring charged (some 10,000 in all), a lease for every holder."""
        slot = self.slot()
        ring: list[Entry] = [(0, slot - back, 80, 0) for back in range(SLOTS, -1, -1)]
        for number, holder in enumerate(self.holders):
            self.send(holder, ring if number == 0 else [])
        for key in self.keys:
            charged = [field for field in self.client.hkeys(key) if field.isdigit()]
            if len(charged) != SLOTS + 1:
                raise RuntimeError(f"{len(charged)} slots of {key} are charged, not {SLOTS + 1}")

    def arguments(self, holder: str, journal: list[Entry]) -> list[Any]:
        self.seq += 1
        oldest, self._last[holder] = self._last[holder], self.seq
        messages = [
            Message(
                op=Op.SETTLE,
                limit=LIMIT.requests,
                slot_ms=SHAPE.slot_ms,
                long_ms=SHAPE.long_ms,
                seq=self.seq,
                keep=max(0, self._holds.get((holder, key), 0) - SPENT),
                want=WANT,
                life_ms=SHAPE.long_ms,
                short_ms=SHAPE.short_ms,
                oldest=oldest,
                journal=journal,
                share=LIMIT.requests // len(self.holders),
            )
            for key in self.keys
        ]
        call = Call("", self.known, f"{holder}.{self.seq}", holder, SLOTS, messages, fleet=len(self.holders))
        return [self.digest, *script_keys(self.keys), msgspec.msgpack.encode(call)]

    def take(self, holder: str, raw: bytes) -> Answer:
        answer = msgspec.msgpack.decode(raw, type=Answer)
        self.known = answer.epoch
        for key, each in zip(self.keys, answer.keys, strict=True):
            if each.status != 0:
                raise RuntimeError(f"the script did not take a message of the bench: status {each.status}")
            kept = max(0, self._holds.get((holder, key), 0) - SPENT)
            self._holds[holder, key] = kept + each.granted
        return answer

    def send(self, holder: str, journal: list[Entry]) -> Answer:
        return self.take(holder, self.client.execute_command("EVALSHA", *self.arguments(holder, journal)))  # type: ignore[no-untyped-call]

    def turns(self) -> Iterator[str]:
        while True:
            yield from self.holders

    def report(self, holder: str, slot: int) -> list[Entry]:
        """What was spent since this holder's last message."""
        return [(self._last[holder], slot, SPENT, 1)]


def script_keys(keys: list[str]) -> list[Any]:
    """`numkeys` and the names, as the script wants them."""
    every = [*Partition(MARKER, Shard()).heads, *keys]
    return [len(every), *every]


def _one_by_one(speaker: Speaker, calls: int) -> None:
    turns, slot = speaker.turns(), speaker.slot()
    for number in range(calls):
        if number % PIPELINED == 0:
            slot = speaker.slot()
        holder = next(turns)
        speaker.send(holder, speaker.report(holder, slot))


def _back_to_back(speakers: list[Speaker], calls: int) -> None:
    """Every holder of every speaker has one call under way at a time."""
    pairs = [(speaker, holder) for speaker in speakers for holder in speaker.holders]
    client = speakers[0].client
    for _ in range(-(-calls // len(pairs))):
        slot = speakers[0].slot()
        pipeline = client.pipeline(transaction=False)
        for speaker, holder in pairs:
            pipeline.execute_command("EVALSHA", *speaker.arguments(holder, speaker.report(holder, slot)))  # type: ignore[no-untyped-call]
        for (speaker, holder), raw in zip(pairs, pipeline.execute(), strict=True):
            speaker.take(holder, raw)


def _evalsha_us(server: Server, run: Callable[[], None]) -> tuple[float, int]:
    """Microseconds per call by Redis' own count, and how many calls there were."""
    before = server.calls().get("evalsha", (0, 0))
    run()
    after = server.calls()["evalsha"]
    return (after[1] - before[1]) / (after[0] - before[0]), after[0] - before[0]


def redis_bytes(ground: Ground, _: int) -> list[Row]:
    rows = []
    for program in programs():
        with Server(ground, program) as server, server.client() as client:
            for holders in HOLDERS:
                key = f"rate_limit:authenticated:{'0' * 36}-{holders}"
                Speaker(client, [key], holders).fill()
                size = client.memory_usage(key, samples=0)
                assert isinstance(size, int)
                rows.append(
                    Row(
                        f"{server.version()}, full ring, {holders} holders",
                        {"key_bytes": size},
                        aim=f"{1_100 + 50 * holders:,}",
                    )
                )
    return rows


def script_time(ground: Ground, _: int) -> list[Row]:
    rows = []
    for program in programs():
        with Server(ground, program) as server, server.client() as client:
            floor: Any = client.script_load(EMPTY)
            rows.append(_floor(server, client, floor))
            rows += [_script_row(server, client, keys, holders) for keys, holders in SHAPES]
    return rows


def _script_row(server: Server, client: "redis.Redis", keys: int, holders: int) -> Row:
    """Calls of `keys` keys each, from `holders` workers that all hold leases of them."""
    speakers = []
    for number in range(max(1, PIPELINED // holders // keys)):
        names = [f"rate_limit:authenticated:{keys}-{holders}-{number}-{each}" for each in range(keys)]
        speaker = Speaker(client, names, holders)
        speaker.fill()
        speakers.append(speaker)
    calls = max(200, CALLS // keys)
    _one_by_one(speakers[0], calls // 10)
    single_us, _count = _evalsha_us(server, lambda: _one_by_one(speakers[0], calls))
    hot_us, _count = _evalsha_us(server, lambda: _back_to_back(speakers, calls))
    return Row(
        f"{server.version()}, {keys} key{'s' * (keys > 1)}, {holders} holder{'s' * (holders > 1)}, full ring",
        {"hot_us": hot_us / keys, "single_us": single_us / keys, "call_us": hot_us},
        aim="10",
    )


def _floor(server: Server, client: "redis.Redis", digest: str) -> Row:
    def single() -> None:
        for _ in range(CALLS):
            client.evalsha(digest, 0)

    def hot() -> None:
        for _ in range(CALLS // PIPELINED):
            pipeline = client.pipeline(transaction=False)
            for _ in range(PIPELINED):
                pipeline.evalsha(digest, 0)
            pipeline.execute()

    single_us, _count = _evalsha_us(server, single)
    hot_us, _count = _evalsha_us(server, hot)
    values = {"hot_us": hot_us, "single_us": single_us, "call_us": hot_us}
    return Row(f"{server.version()}, a script that reads the clock", values)


REDIS_BYTES = Part(
    "redis_bytes",
    "Redis memory of one key (`MEMORY USAGE`), every slot of the ring charged",
    {"key_bytes": "bytes"},
    redis_bytes,
)
SCRIPT_TIME = Part(
    "script_time",
    "Redis' own time for the script (`INFO commandstats`, evalsha), a report of 3 and a renewal in each message",
    {
        "hot_us": "µs/key, calls back to back",
        "single_us": "µs/key, one call at a time",
        "call_us": "µs/call, back to back",
    },
    script_time,
)
