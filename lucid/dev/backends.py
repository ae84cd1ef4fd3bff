"""Stand-ins for the three clusters behind the gateway, so that `lucid dev` has something to route to.

`python -m lucid.dev.backends FD FD FD`: listening sockets for chain, session data and nodes, in this order.
They behave as the clusters promise to: `/health`, everything else only for the `X-User-Id` that the gateway
writes. All state is in memory and bounded.
"""

import asyncio
import hashlib
import re
import signal
import socket
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from sanic import Blueprint, Request, Sanic, response
from sanic.exceptions import SanicException

App = Sanic[Any, Any]
Answer = response.HTTPResponse

BLOCK_SECONDS = 10
_MOST_ENTRIES = 10_000
_MOST_CHUNK_BYTES = 256 * 1_048_576
_TERMINATED = "terminated"
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class Bounded(OrderedDict[str, Any]):
    """A dict that forgets its oldest entry once it is full."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _MOST_ENTRIES:
            self.forget_oldest()

    def forget_oldest(self) -> None:
        self.popitem(last=False)


def chain() -> Blueprint:
    """The blockchain core: a chain that grows by a block every ten seconds, and a pool of transactions."""
    app = Blueprint("chain")
    begun = time.time()
    transactions = Bounded()

    def block(height: int) -> dict[str, Any]:
        return {"height": height, "hash": _digest("block", height), "previous": _digest("block", height - 1)}

    def head() -> int:
        return 1_000 + int(time.time() - begun) // BLOCK_SECONDS

    @app.get("/api/v1/chain/info")
    async def info(request: Request) -> Answer:
        return response.json({"chain": "lucid_blocks", "height": head(), "head": block(head())["hash"]})

    @app.get("/api/v1/chain/blocks/latest")
    async def latest(request: Request) -> Answer:
        return response.json(block(head()))

    @app.get("/api/v1/chain/blocks/<height:int>")
    async def one(request: Request, height: int) -> Answer:
        if not 0 <= height <= head():
            return _problem(404, "no such block")
        return response.json(block(height))

    @app.post("/api/v1/chain/transactions")
    async def submit(request: Request) -> Answer:
        name = uuid.uuid4().hex
        entry = {"transaction_id": name, "from": _user(request), "payload": request.json, "status": "pending"}
        transactions[name] = entry
        return response.json(entry, 201, {"location": f"/api/v1/chain/transactions/{name}"})

    @app.get("/api/v1/chain/transactions/<name>")
    async def transaction(request: Request, name: str) -> Answer:
        entry = transactions.get(name)
        return response.json(entry) if entry else _problem(404, "no such transaction")

    return app


class _Recording:
    """What was uploaded for one session, and by whom. `told_by`: the key of the request that announced it."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.told_by = ""
        self.chunks: dict[int, bytes] = {}
        self.pipeline = "idle"

    @property
    def terminated(self) -> bool:
        return self.pipeline == _TERMINATED

    def manifest(self) -> list[dict[str, Any]]:
        return [_chunk(number, data) for number, data in sorted(self.chunks.items())]


class Recordings(Bounded):
    """The recordings by session; the oldest are forgotten once there are too many, or too many bytes in them."""

    stored_bytes = 0

    def keep(self, recording: _Recording, number: int, data: bytes) -> None:
        """Puts a chunk into one of the recordings."""
        self.stored_bytes += len(data) - len(recording.chunks.get(number, b""))
        recording.chunks[number] = data
        while self.stored_bytes > _MOST_CHUNK_BYTES:
            self.forget_oldest()

    def forget_oldest(self) -> None:
        _, oldest = self.popitem(last=False)
        self.stored_bytes -= sum(map(len, oldest.chunks.values()))


def sessions() -> Blueprint:
    """Session management: chunks, manifest and pipeline of recorded sessions.

    The gateway announces its sessions and says which have ended, as `lucid.services.session_outbox` describes it.
    Chunks may come before the announcement: until then a session belongs to whoever writes first.
    """
    app = Blueprint("sessions")
    recordings = Recordings()
    base = "/api/v1/sessions/<session>"

    def find(request: Request, session: str) -> _Recording:
        recording = recordings.get(session)
        if recording is None or recording.owner != _user(request):
            raise SanicException("no such session", 404, quiet=True)
        return recording  # type: ignore[no-any-return]

    @app.post("/api/v1/sessions")
    async def announce(request: Request) -> Answer:
        told = request.json if isinstance(request.json, dict) else {}
        session, key = told.get("session_id"), str(request.headers.get("idempotency-key", ""))[:64]
        if not isinstance(session, str) or not _SESSION_ID.fullmatch(session):
            return _problem(400, "session_id is missing")
        if told.get("user_id") != _user(request):
            return _problem(400, "user_id and X-User-Id differ")
        recording = recordings.get(session)
        if recording is None:
            recording = recordings[session] = _Recording(_user(request))
        elif recording.owner != _user(request) or (recording.told_by and recording.told_by != key):
            return _problem(409, "this session is known already")
        status = 200 if recording.told_by else 201
        recording.told_by = key or session
        return response.json({"session_id": session, "state": recording.pipeline}, status)

    @app.delete(base)
    async def terminate(request: Request, session: str) -> Answer:
        find(request, session).pipeline = _TERMINATED
        return response.empty()

    @app.put(base + "/chunks/<number:int>", stream=True, name="replace")
    @app.post(base + "/chunks/<number:int>", stream=True, name="store")
    async def store(request: Request, session: str, number: int) -> Answer:
        data = bytearray()
        while True:
            piece = await request.stream.read()  # type: ignore[union-attr]
            if piece is None:
                break
            data += piece
        recording = recordings.get(session) or _Recording(_user(request))
        recordings[session] = recording
        recording = find(request, session)
        if recording.terminated:
            return _problem(409, "this session was terminated")
        recordings.keep(recording, number, bytes(data))
        status = 201 if request.method == "POST" else 200
        return response.json(_chunk(number, bytes(data)), status, {"location": request.path})

    @app.get(base + "/chunks/<number:int>")
    async def load(request: Request, session: str, number: int) -> Answer:
        data = find(request, session).chunks.get(number)
        return _problem(404, "no such chunk") if data is None else response.raw(data)

    @app.get(base + "/chunks")
    async def listing(request: Request, session: str) -> Answer:
        return response.json({"items": find(request, session).manifest()})

    @app.get(base + "/manifest")
    async def manifest(request: Request, session: str) -> Answer:
        chunks = find(request, session).manifest()
        whole = hashlib.sha256("".join(chunk["sha256"] for chunk in chunks).encode()).hexdigest()
        return response.json({"session_id": session, "chunks": chunks, "digest": whole})

    @app.get(base + "/pipeline")
    async def pipeline(request: Request, session: str) -> Answer:
        recording = find(request, session)
        return response.json(
            {"session_id": session, "state": recording.pipeline, "chunks": len(recording.chunks)}
        )

    @app.post(base + "/pipeline/start")
    async def start(request: Request, session: str) -> Answer:
        recording = find(request, session)
        if recording.terminated:
            return _problem(409, "this session was terminated")
        recording.pipeline = "running"
        return response.json({"session_id": session, "state": "running"})

    return app


def nodes() -> Blueprint:
    """Node management: nodes register and send heartbeats."""
    app = Blueprint("nodes")
    nodes = Bounded()

    @app.get("/api/v1/nodes")
    async def listing(request: Request) -> Answer:
        return response.json({"items": list(nodes.values()), "total": len(nodes)})

    @app.post("/api/v1/nodes")
    async def register(request: Request) -> Answer:
        given = request.json if isinstance(request.json, dict) else {}
        node_id = str(uuid.uuid4())
        name = str(given.get("name", ""))[:64]
        node = {"node_id": node_id, "name": name, "operator": _user(request), "last_seen": time.time()}
        nodes[node_id] = node
        return response.json(node, 201, {"location": f"/api/v1/nodes/{node_id}"})

    @app.get("/api/v1/nodes/<name>")
    async def one(request: Request, name: str) -> Answer:
        return response.json(nodes[name]) if name in nodes else _problem(404, "no such node")

    @app.post("/api/v1/nodes/<name>/heartbeat")
    async def heartbeat(request: Request, name: str) -> Answer:
        if name not in nodes or nodes[name]["operator"] != _user(request):
            return _problem(404, "no such node")
        nodes[name]["last_seen"] = time.time()
        return response.json(nodes[name])

    return app


def create_app(clusters: Mapping[int, str]) -> App:
    """All three in one app, as Sanic cannot start two in a process. `clusters`: each name by its port."""
    app: App = Sanic("lucid-demo", configure_logging=False)
    app.config.AUTO_EXTEND = False
    app.config.FALLBACK_ERROR_FORMAT = "json"
    app.blueprint([chain(), sessions(), nodes()])

    def cluster(request: Request) -> str:
        return clusters[request.conn_info.server_port] if request.conn_info else ""

    @app.get("/health")
    async def health(request: Request) -> Answer:
        return response.json({"status": "healthy", "service": f"demo-{cluster(request)}"})

    @app.on_request
    async def authorise(request: Request) -> Answer | None:
        if request.path == "/health":
            return None
        if not request.path.startswith(f"/api/v1/{cluster(request)}"):
            return _problem(404, "another cluster answers this path")
        return None if _user(request) else _problem(401, "who is asking? X-User-Id is missing")

    return app


def _user(request: Request) -> str:
    return str(request.headers.get("x-user-id", ""))


def _problem(status: int, message: str) -> Answer:
    return response.json({"error": message}, status)


def _chunk(number: int, data: bytes) -> dict[str, Any]:
    return {"number": number, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(*parts: object) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()


async def serve(listeners: list[socket.socket]) -> None:
    """Serves the three apps on these sockets until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    names = ("chain", "sessions", "nodes")
    app = create_app(
        {listener.getsockname()[1]: name for listener, name in zip(listeners, names, strict=True)}
    )
    for listener in listeners:
        server = await app.create_server(sock=listener, access_log=False, return_asyncio_server=True)
        assert server is not None
        if listener is listeners[0]:
            await server.startup()  # type: ignore[no-untyped-call]
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve([socket.socket(fileno=int(number)) for number in sys.argv[1:]]))
