"""The one control channel between all workers of all pods, and the one registry of workers; both in Redis.

*Channel.* A stream: its ids are the versions. A worker that was away reads on from the last id it saw.
Continuity is proven, not assumed: while the entry seen last is still in the stream, nothing was missed;
otherwise (trimmed meanwhile, flushed, restored from an older copy, first attached) every
subscriber's `reload` is called, after the new position was taken, so that nothing falls in between. So it is, with
the position kept, when another server process has the stream (restarted, failed over): it may lack what was added
just before, and an older entry does not tell. A message
may come twice, when the fate of its sending was unknown: handlers must not mind.

*Registry.* One sorted set: a worker's own JSON, scored by Redis' clock at its last heartbeat. Who has not
been heard of for `DEAD_SECONDS` is dropped by whoever comes next.
"""

import asyncio
import contextlib
import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from lucid.core.wire.redis_link import AWAY_ERRORS, BLOCK_SECONDS, RedisLink, end_tasks

STREAM_KEY = "lucid:control"
WORKERS_KEY = "lucid:workers:{lucid:control}"
"""In a cluster it lies where the stream does: both are there, or neither."""

STREAM_LENGTH = 4_096
HEARTBEAT_SECONDS = 1.0
DEAD_SECONDS = 5.0
START_SECONDS = 1.0
OUTBOX_LENGTH = 1_000
ENTRIES_PER_READ = 256

# KEYS: the set. ARGV: the member ("" only reads), the milliseconds after which a silent one is dropped.
_BEAT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], 60 * ARGV[2])
return {now, redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')}
"""

# KEYS: the stream. ARGV: an entry's id. Whether it is there, and which server process says so ("": INFO is not
# permitted). A connection's own run_id would not do: a redirection may have answered from elsewhere.
_LOOK = """
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
return {#redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]), run}
"""

Handler = Callable[[Mapping[str, Any]], None]
Reload = Callable[[], Awaitable[None]]

_log = logging.getLogger("lucid.control")
_encode = msgspec.json.Encoder().encode
_decode_body = msgspec.json.Decoder(dict[str, Any]).decode


class ControlChannel:
    """Subscribe first, then `start`; `stop` leaves the registry. Who lists workers is shown `about`."""

    def __init__(self, redis: RedisLink, holder: str, *, about: Mapping[str, Any] | None = None) -> None:
        self.holder = holder
        self.fleet_size = 0
        """Live workers as of the last heartbeat that reached Redis, this one included; 0: never reached."""
        self._redis = redis
        member = {"holder": holder, "host": platform.node(), "pid": os.getpid(), "started": int(time.time())}
        self._member = _encode({**member, **(about or {})})
        self._handlers: dict[str, list[Handler]] = {}
        self._reloads: list[tuple[str, Reload]] = []
        self._to_reload: list[tuple[str, Reload]] = []
        self._outbox: deque[tuple[str, bytes]] = deque(maxlen=OUTBOX_LENGTH)
        self._heard = -math.inf
        """Up to when nothing was missed."""
        self._last = b""
        """The version seen last; empty: never attached."""
        self._run = b""
        """The server process that has it; empty: not told."""
        self._attached = False
        self._beating = False
        self._first_beat = asyncio.Event()
        self._first_load = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[dict[str, Any]] = []

    @property
    def connected(self) -> bool:
        """Whether messages come and go at present."""
        return self._attached and self._beating

    def silent_seconds(self) -> float:
        """For how long it has not been known that every message came: up to a read's length while all is well."""
        return time.monotonic() - self._heard

    def subscribe(self, kind: str, handler: Handler, reload: Reload | None = None) -> None:
        """`handler` gets each message of `kind`, this worker's own too; it must not block nor mind doubles.

        `reload` is awaited whenever messages may have been missed, the first time at the first attachment,
        and again each second until it does not raise.
        """
        self._handlers.setdefault(kind, []).append(handler)
        if reload is not None:
            self._reloads.append((kind, reload))

    async def publish(self, kind: str, body: Mapping[str, Any]) -> bool:
        """Sends to all workers. False: Redis is away; the message is kept and sent when it is back."""
        message = (kind, _encode(body))
        if self._outbox or not self.connected:
            self._keep(message)
            return False
        try:
            await self._add(message)
        except AWAY_ERRORS:
            self._keep(message)
            return False
        return True

    async def workers(self) -> list[dict[str, Any]]:
        """The live workers: what each says of itself, and `seen_seconds_ago`. Redis away: the last known."""
        with contextlib.suppress(*AWAY_ERRORS):
            await self._beat(b"")
        return list(self._workers)

    async def start(self) -> None:
        """Announces this worker, begins to listen, and has every `reload` called once. Never fails.

        It waits a second at most: while Redis answers, a worker that serves afterwards knows what was said
        before it came. Where Redis is away it knows nothing, and is told when Redis is back.
        """
        if self._tasks:
            return
        self._first_beat.clear()
        self._first_load.clear()
        self._tasks = [
            asyncio.create_task(self._beat_always(), name="lucid control heartbeat"),
            asyncio.create_task(self._read_always(), name="lucid control reader"),
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._first_beat.wait()
                await self._first_load.wait()

    async def stop(self) -> None:
        await end_tasks(self._tasks)
        self._tasks = []
        if self._beating:
            with contextlib.suppress(*AWAY_ERRORS):
                await self._redis.execute("ZREM", WORKERS_KEY, self._member)
        self._attached = self._beating = False

    # --- sending, and the registry

    def _keep(self, message: tuple[str, bytes]) -> None:
        if len(self._outbox) == OUTBOX_LENGTH:
            _log.error("control channel: the outbox is full, its oldest message is lost")
        self._outbox.append(message)

    async def _add(self, message: tuple[str, bytes]) -> bytes:
        kind, body = message
        entry_id = await self._redis.execute(
            "XADD",
            STREAM_KEY,
            "MAXLEN",
            "~",
            STREAM_LENGTH,
            "*",
            "kind",
            kind,
            "body",
            body,
            "from",
            self.holder,
        )
        return bytes(entry_id)

    async def _beat(self, member: bytes) -> None:
        now_ms, listed = await self._redis.execute(
            "EVAL", _BEAT, 1, WORKERS_KEY, member, int(DEAD_SECONDS * 1_000)
        )
        workers: list[dict[str, Any]] = []
        for told, seen_ms in zip(listed[::2], listed[1::2], strict=True):
            with contextlib.suppress(msgspec.MsgspecError):
                ago = round((now_ms - float(seen_ms)) / 1_000, 1)
                workers.append({**_decode_body(told), "seen_seconds_ago": ago})
        self._workers = workers
        self.fleet_size = len(workers)

    async def _beat_always(self) -> None:
        told = False
        while True:
            try:
                await self._beat(self._member)
                self._beating = True
                while self._outbox:
                    await self._add(self._outbox[0])
                    self._outbox.popleft()
                told = False
            except AWAY_ERRORS as error:
                self._beating = False
                if not told:
                    _log.warning("control channel: no heartbeat reaches Redis (%s)", error)
                told = True
            except Exception:  # noqa: BLE001 (logged once, not each second)
                self._beating = False
                if not told:
                    _log.exception("control channel: the heartbeat failed and goes on")
                told = True
            self._first_beat.set()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # --- listening

    async def _read_always(self) -> None:
        told = False
        verified = 0.0
        while True:
            try:
                if not self._attached or time.monotonic() - verified >= HEARTBEAT_SECONDS:
                    await self._attach()
                    verified = time.monotonic()
                if self._to_reload:
                    await self._reload()
                self._first_load.set()
                begun = time.monotonic()
                came = await self._read()
                if not self._to_reload:
                    # With nothing to bring, the server has waited before it answered; what had come, had ended that.
                    self._heard = begun + (0.0 if came else BLOCK_SECONDS)
                if told:
                    _log.info("control channel: attached again")
                told = False
            except AWAY_ERRORS as error:
                if not told:
                    _log.warning("control channel: lost, reading on when Redis is back (%s)", error)
                told = True
            except Exception:  # noqa: BLE001 (logged once, not each time)
                if not told:
                    _log.exception("control channel: the reader failed and goes on")
                told = True
            if told:
                self._first_load.set()
                self._attached = False
                await asyncio.sleep(HEARTBEAT_SECONDS / 4)

    async def _attach(self) -> None:
        """Proves continuity, or takes a new position and has everything reloaded."""
        if await self._continues():
            self._attached = True
            return
        if self._last:
            self._tell_gap()
        # An entry of its own is a position that surely exists in the stream.
        self._last = await self._add(("hello", b"{}"))
        self._to_reload = list(self._reloads)
        self._attached = True

    async def _continues(self) -> bool:
        """Whether the entry read last is still in the stream, so that nothing after it is missing. Where another server
        says so, everything is reloaded all the same.
        """
        there, run = await self._redis.execute("EVAL", _LOOK, 1, STREAM_KEY, self._last or "0-0")
        before, self._run = self._run, bytes(run)
        if there and before and self._run != before:
            _log.info("control channel: another server has it now, everything is loaded anew")
            self._to_reload = list(self._reloads)
        return bool(there)

    def _tell_gap(self) -> None:
        _log.warning("control channel: messages may have been missed, everything is loaded anew")

    async def _reload(self) -> None:
        pending: list[tuple[str, Reload]] = []
        for kind, reload in self._to_reload:
            try:
                await reload()
            except Exception:  # noqa: BLE001 (a subscriber's fault must not end the reader)
                _log.exception("control channel: loading %s anew failed, it is tried again", kind)
                pending.append((kind, reload))
        self._to_reload = pending

    async def _read(self) -> bool:
        """Whether anything came."""
        answer = await self._redis.wait(
            "XREAD",
            "COUNT",
            ENTRIES_PER_READ,
            "BLOCK",
            int(BLOCK_SECONDS * 1_000),
            "STREAMS",
            STREAM_KEY,
            self._last,
        )
        # Asked before anything is taken: a blocked read goes on over a flush, with the first entry of another
        # history, whose id would afterwards prove a continuity that there is not.
        if answer and not await self._continues():
            self._tell_gap()
            self._to_reload = list(self._reloads)
        for _, entries in answer or ():
            for entry_id, fields in entries:
                self._last = bytes(entry_id)
                self._dispatch(fields)
        return bool(answer)

    def _dispatch(self, fields: Mapping[bytes, bytes]) -> None:
        kind = fields.get(b"kind", b"").decode("utf-8", "replace")
        handlers = self._handlers.get(kind, ())
        if not handlers:
            return
        try:
            body = _decode_body(fields.get(b"body", b""))
        except msgspec.MsgspecError:
            _log.warning("control channel: a message of kind %s is not understood", kind)
            return
        for handler in handlers:
            try:
                handler(body)
            except Exception:  # noqa: BLE001 (as above)
                _log.exception("control channel: a handler of %s failed", kind)
