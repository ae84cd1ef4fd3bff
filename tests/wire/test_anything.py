"""Whatever happens in whatever order: callers and backends that say, stall, read, leave and break off at random.

What must hold all the time: memory is bounded, everybody gets the answer to his own question, whole or visibly
broken off, a backend gets what was sent to it. At the end: what `World.check` asks for, and a pool in which
every connection is clean. A seed that fails fails again.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.support.transcript import Transcript
from tests.support.wire import Caller, FakeTransport, World, in_loop

STEPS = 250
MOST_UNREAD_BYTES = 65_536 + 400_000
"""The limit, and one piece of the largest size that is delivered here."""
SIZES = (0, 1, 10, 3_000, 66_000, 150_000)
PIECES = (1, 20, 1_000, 60_000, 200_000)
HEAD = b" HTTP/1.1\r\nHost: gw\r\n"


class Asked(NamedTuple):
    method: str
    path: str
    body: bytes
    status: int
    """What our own answer would be; 200: a backend's, or an echo."""


class Bodies(Transcript):
    """A transcript that keeps the bodies apart, and nothing else."""

    def __init__(self, methods: Callable[[], list[str]] | None) -> None:
        super().__init__(methods)
        self.bodies: list[str] = []

    def _step(self) -> bool:
        before, self.text = len(self.heads), ""
        went_on = super()._step()
        if len(self.heads) > before:
            self.bodies.append("")
        elif self.bodies:
            self.bodies[-1] += self.text.replace("<end>", "")
        self.raw = b""
        return went_on


class Player:
    """A caller with what it has asked and still wants to say."""

    def __init__(self, world: World, number: int) -> None:
        self.end = Caller(world, f"10.0.0.{number}")
        self.asked: list[Asked] = []
        self.log = self.end.transport.log = Bodies(lambda: [asked.method for asked in self.asked])
        self.unsaid = b""
        self.finished = False


class Game:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        breaker = {"failure_threshold": 10**9, "failure_rate": None}
        self.world = World(
            max_connections=self.dice.choice([1, 2, 4]), endpoints=self.dice.choice([1, 2]), breaker=breaker
        )
        self.players: list[Player] = []
        self.number = 0
        self.answering: dict[FakeTransport, tuple[bytes, str]] = {}
        """What a connection of a backend still has to say, and how it ends."""
        self.answered: dict[FakeTransport, int] = {}
        self.genuine_dial: Any = self.world.loop.dial
        self.world.loop.dial = self.dial

    async def dial(self, factory: Any, host: str, port: int) -> tuple[Any, Any]:
        if self.dice.random() < 0.05:
            raise ConnectionRefusedError(111, "refused")
        for _ in range(self.dice.choice([0, 0, 1, 5])):
            await asyncio.sleep(0)
        transport, protocol = await self.genuine_dial(factory, host, port)
        transport.log = Bodies(None)
        self.answered[transport] = 0
        return transport, protocol

    # --- moves

    def ask(self, player: Player) -> None:
        self.number += 1
        kind = self.dice.choice(["GET", "GET", "HEAD", "length", "chunks", "lost", "own", "user", "*"])
        method = kind if kind in ("GET", "HEAD") else "OPTIONS" if kind == "*" else "POST"
        places = {"lost": "/nowhere/", "user": "/user/", "own": "/own?", "*": "*"}
        path = places.get(kind, "/open/") + (str(self.number) if kind != "*" else "")
        body = b""
        if kind in ("length", "chunks", "own", "lost"):
            body = self.text(path, self.dice.choice(SIZES[:4] if kind == "own" else SIZES))
        framing = b"Content-Length: %d\r\n\r\n" % len(body)
        if kind == "chunks":
            framing = b"Transfer-Encoding: chunked\r\n\r\n"
        elif not body:
            framing = b"\r\n"
        expect = b"Expect: 100-continue\r\n" if body and self.dice.random() < 0.1 else b""
        said = f"{method} {path}".encode() + HEAD + expect + framing
        player.unsaid += said + (self.chunks(body) if kind == "chunks" else body)
        status = {"lost": 404, "user": 401, "*": 204}.get(kind, 200)
        player.asked.append(Asked(method, path, body, status))

    def text(self, path: str, size: int) -> bytes:
        return (path.encode() * (size // len(path) + 1))[:size]

    def chunks(self, body: bytes) -> bytes:
        coded = b""
        while body:
            size = self.dice.randint(1, len(body))
            coded += b"%x\r\n%b\r\n" % (size, body[:size])
            body = body[size:]
        return coded + b"0\r\n\r\n"

    def answer(self, transport: FakeTransport) -> None:
        log, number = transport.log, self.answered[transport]
        if transport not in self.answering and len(log.heads) > number:
            if not log.whole and self.dice.random() < 0.8:
                return
            self.answered[transport] += 1
            self.answering[transport] = self.invent(*log.heads[number][""].split(" ")[:2])
        if transport in self.answering:
            said, end = self.answering.pop(transport)
            size = self.dice.choice(PIECES)
            transport.deliver(said[:size])
            if said[size:]:
                self.answering[transport] = said[size:], end
            elif end == "close":
                transport.deliver_eof()
            elif end == "cut":
                transport.reset()

    def invent(self, method: str, path: str) -> tuple[bytes, str]:
        body = self.text(path, self.dice.choice(SIZES))
        head = f"HTTP/1.1 200 OK\r\nX-Path: {path}\r\nX-Size: {len(body)}\r\n".encode()
        content = body if method != "HEAD" else b""
        kind = self.dice.choice(["length", "length", "hints", "chunks", "close", "cut"])
        length = head + b"Content-Length: %d\r\n\r\n" % len(body) + content
        if kind == "chunks":
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + (self.chunks(body) if content else b""), ""
        if kind == "close":
            return head + b"\r\n" + content, "close"
        if kind == "cut":
            return length[: self.dice.randint(0, len(length) - 1)], "cut"
        hints = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        return hints + length if kind == "hints" else length, ""

    async def move(self) -> None:
        dice, players = self.dice, [one for one in self.players if not one.end.transport.closing]
        connections = [transport for transport in self.world.upstreams if not transport.closing]
        if not players or (dice.random() < 0.03 and len(self.players) < 6):
            self.players.append(Player(self.world, len(self.players)))
            return
        player = dice.choice(players)
        transport = player.end.transport
        what = dice.choices(
            ["ask", "say", "stall", "take", "leave", "finish", "time", "answer", "backend"],
            [12, 35, 3, 7, 1, 1, 2, 28, 2],
        )[0]
        if what == "ask" and not player.finished and len(player.unsaid) < 500_000:
            self.ask(player)
        elif what == "say" and not player.finished and len(transport._arrived) < 3:
            size = dice.choice(PIECES)
            transport.deliver(player.unsaid[:size])
            player.unsaid = player.unsaid[size:]
        elif what == "stall":
            transport.stalled = True
        elif what == "take":
            transport.take(dice.choice([None, 1_000, 30_000, 70_000]))
        elif what == "leave":
            transport.reset()
        elif what == "finish" and not player.finished:
            player.finished = True
            transport.deliver_eof()
        elif what == "time":
            await self.world.advance(dice.choice([0.5, 1.0, 5.0, 31.0]))
        elif what == "answer" and connections:
            one = dice.choice(connections)
            one.take(dice.choice([None, 20_000]))
            self.answer(one)
        elif what == "backend" and connections:
            one = dice.choice(connections)
            one.stalled = True
            if dice.random() < 0.3:
                one.reset()
        if dice.random() < 0.9:
            await self.world.settle()
        for each in self.players:
            assert len(each.end.door._buffer) + each.end.transport.buffered < MOST_UNREAD_BYTES

    # --- the end

    async def play(self) -> None:
        for _ in range(STEPS):
            await self.move()
        for player in self.players:
            if not player.end.transport.lost:
                player.end.transport.take()
        await self.world.settle_and_breathe()
        await self.world.advance(self.dice.choice([0.0, 200.0]))
        for player in self.players:
            await player.end.leave()
        await self.world.settle_and_breathe()
        self.world.check()
        for pool in self.world.pools:
            for upstream in pool._idle:
                transport: Any = upstream._transport
                assert transport.reading, "a connection waits in its pool, and nobody reads it"
                assert not transport.buffered, "a connection waits in its pool with a request unsent"
        self.compare()

    def compare(self) -> None:
        asked = {one.path: one for player in self.players for one in player.asked}
        for transport in self.answered:
            for head, body in zip(transport.log.heads, transport.log.bodies, strict=True):
                assert asked[head[""].split(" ")[1]].body.decode().startswith(body)
        for player in self.players:
            told = zip(player.log.heads, player.log.bodies, strict=True)
            final = [(head, body) for head, body in told if int(head[""][9:12]) >= 200]
            assert len(final) <= len(player.asked)
            for number, (head, body) in enumerate(final):
                self.compare_one(player.asked[number], head, body, whole=number < len(final) - 1)

    def compare_one(self, asked: Asked, head: dict[str, str], body: str, *, whole: bool) -> None:
        """`whole`: something came behind it on the same connection, so that it must be complete."""
        status = int(head[""][9:12])
        if status in (408, 499, 500, 502, 503, 504):
            assert status != 500
            return
        assert status == asked.status
        if status != 200:
            return
        expected = asked.body.decode()
        if "x-path" in head:
            assert head["x-path"] == asked.path, "somebody else's answer"
            expected = self.text(asked.path, int(head["x-size"])).decode() if asked.method != "HEAD" else ""
        assert expected.startswith(body)
        assert body == expected or not whole


@pytest.mark.parametrize("seeds", [range(400)])
@in_loop
async def test_anything(seeds: range) -> None:
    for seed in seeds:
        try:
            await Game(seed).play()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
