"""Conversations: what each side says and is told, played whole, cut at every boundary, and byte by byte."""

from typing import Any

import pytest

from tests.support.wire import PEER, Caller, World, in_loop

EOF, RESET = "EOF", "RESET"
Step = tuple[str, Any]
"""`("caller" or "backend", bytes, EOF or RESET)`: it says so. `("> caller" or "> backend", text)`: since the
last look it was told exactly this (see Transcript). `("time", seconds)`, `("drain", None)`,
`("outcomes", what the breaker was told so far)`."""


class Talk:
    """A conversation, with the world that it happens in."""

    def __init__(self, name: str, *steps: Step, warm: int = 1, loose: bool = False, **options: Any) -> None:
        """`warm` idle connections are there at the beginning; `options` are World's. `loose`: how much the
        backend heard before the end may differ from cut to cut."""
        self.name = name
        self.steps = steps
        self.warm = warm
        self.loose = loose
        self.options = options

    def cuts(self) -> list[tuple[int, int]]:
        """(step, position) of every boundary between two bytes of what comes in; of long steps forty.
        What is said again is not cut again."""
        every: list[tuple[int, int]] = []
        for index, (who, data) in enumerate(self.steps):
            repeated = (who, data) in self.steps[:index]
            if who in ("caller", "backend") and isinstance(data, bytes) and not repeated:
                stride = 1 if len(data) < 1_000 else len(data) // 40
                every += [(index, at) for at in range(1, len(data), stride)]
        return every

    async def play(self, cut: tuple[int, int] | None = None, *, bytewise: bool = False) -> tuple[str, str]:
        """What caller and backend were told in all. Expectations in between hold where nothing is cut."""
        world = World(**self.options)
        await world.warm(self.warm)
        caller = Caller(world, PEER)
        seen = {"> caller": 0, "> backend": 0}
        logs = {"> caller": caller.log, "> backend": world.backend}
        for index, (who, what) in enumerate(self.steps):
            if who in logs:
                if cut is None and not bytewise:
                    told = logs[who].text[seen[who] :]
                    assert told == what, f"step {index}: the {who[2:]} was told {told!r}"
                seen[who] = len(logs[who].text)
            elif who == "time":
                await world.advance(what)
            elif who == "outcomes":
                assert world.outcomes == what, world.outcomes
            elif who == "drain":
                world.wire.drain()
                await world.settle()
            else:
                transport = caller.transport if who == "caller" else world.upstreams[-1]
                if not isinstance(what, bytes):
                    transport.deliver_eof() if what == EOF else transport.reset()
                    await world.settle()
                    continue
                at = cut[1] if cut is not None and cut[0] == index else len(what)
                size = 1 if len(what) < 1_000 else 100
                pieces = [what[:at], what[at:]]
                if bytewise:
                    pieces = [what[n : n + size] for n in range(0, len(what), size)]
                for piece in filter(None, pieces):
                    transport.deliver(piece)
                    await world.settle()
        if cut is None and not bytewise:
            for who, log in logs.items():
                assert log.text[seen[who] :] == "", f"the {who[2:]} was told more: {log.text[seen[who] :]!r}"
        if not caller.transport.lost:
            await caller.leave()
        world.check()
        return caller.log.text, "" if self.loose else world.backend.text


def talks(*cases: Talk) -> Any:
    """Parametrize a test by conversations."""
    return pytest.mark.parametrize("talk", [pytest.param(case, id=case.name) for case in cases])


@in_loop
async def replay(talk: Talk) -> None:
    """Play it whole, cut at every boundary, and byte by byte: the output is the same."""
    whole = await talk.play()
    for cut in talk.cuts():
        assert await talk.play(cut) == whole, f"cut at {cut}"
    assert await talk.play(bytewise=True) == whole, "byte by byte"


@in_loop
async def perform(talk: Talk) -> None:
    """Play it once."""
    await talk.play()


# --- what is said most -------------------------------------------------------------------------------------

GET = b"GET /open/a HTTP/1.1\r\nHost: gw\r\n\r\n"
ASKED = "GET /open/a HTTP/1.1\nHost: core:8084\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
ANSWERED = "HTTP/1.1 200 OK\nContent-Length: 2\n\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LOST = b"GET /nowhere HTTP/1.1\r\nHost: gw\r\n\r\n"
NOT_FOUND = "HTTP/1.1 404 Not Found\n\n<LUCID_ERR_1004>"
POST = b"POST /open/a HTTP/1.1\r\nHost: gw\r\nContent-Length: 5\r\n\r\nhello"
POSTED = "POST /open/a HTTP/1.1\nHost: core:8084\nContent-Length: 5\n\nhello"
CODED = b"POST /open/a HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: Chunked\r\n\r\n"
TO_CODED = "POST /open/a HTTP/1.1\nHost: core:8084\nTransfer-Encoding: chunked\n\n"
EXPECTING = b"POST /open/a HTTP/1.1\r\nHost: gw\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n"
OWN = b"POST /own HTTP/1.1\r\nHost: gw\r\n"


def caller(data: bytes | str) -> Step:
    return "caller", data


def backend(data: bytes | str) -> Step:
    return "backend", data


def to_caller(text: str) -> Step:
    return "> caller", text


def to_backend(text: str) -> Step:
    return "> backend", text
