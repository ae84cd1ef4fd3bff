"""The demo backends, spoken to directly: what they demand of the gateway and what they keep."""

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lucid.dev import backends
from lucid.dev.embedded import LOOPBACK, leashed
from tests.support.servers import clean_environment

ALICE = {"x-user-id": "alice"}
BOB = {"x-user-id": "bob"}


@pytest.fixture(scope="module")
def demo() -> Iterator[dict[str, httpx.Client]]:
    listeners = [socket.create_server((LOOPBACK, 0)) for _ in range(3)]
    numbers = [listener.fileno() for listener in listeners]
    ports = [listener.getsockname()[1] for listener in listeners]
    command = leashed([sys.executable, "-m", "lucid.dev.backends", *map(str, numbers)])
    process = subprocess.Popen(command, pass_fds=numbers, env=clean_environment())
    for listener in listeners:
        listener.close()
    clients = {
        name: httpx.Client(base_url=f"http://{LOOPBACK}:{port}", trust_env=False)
        for name, port in zip(("chain", "sessions", "nodes"), ports, strict=True)
    }
    yield clients
    for client in clients.values():
        client.close()
    process.terminate()
    assert process.wait(10.0) == 0


@pytest.mark.parametrize("name", ["chain", "sessions", "nodes"])
def test_each_cluster_is_healthy_and_asks_who_is_there(demo: dict[str, httpx.Client], name: str) -> None:
    assert demo[name].get("/health").json() == {"status": "healthy", "service": f"demo-{name}"}
    assert demo[name].get(f"/api/v1/{name}/info").status_code == 401
    other = "nodes" if name == "chain" else "chain"
    assert demo[name].get(f"/api/v1/{other}/info", headers=ALICE).status_code == 404


def test_the_chain_hangs_together(demo: dict[str, httpx.Client]) -> None:
    chain = demo["chain"]

    def get(path: str) -> Any:
        return chain.get(f"/api/v1/chain/{path}", headers=ALICE).json()

    info = get("info")
    assert info["chain"] == "lucid_blocks"
    block = get(f"blocks/{info['height']}")
    assert block["hash"] == info["head"]
    assert get(f"blocks/{info['height'] - 1}")["hash"] == block["previous"]
    assert get("blocks/latest")["height"] >= info["height"]
    assert chain.get(f"/api/v1/chain/blocks/{info['height'] + 100}", headers=ALICE).status_code == 404


def test_a_transaction_can_be_found_again(demo: dict[str, httpx.Client]) -> None:
    answer = demo["chain"].post("/api/v1/chain/transactions", json={"a": 1}, headers=ALICE)
    assert answer.status_code == 201
    entry = demo["chain"].get(answer.headers["location"], headers=BOB).json()
    assert (entry["from"], entry["payload"]) == ("alice", {"a": 1})
    assert demo["chain"].get("/api/v1/chain/transactions/none", headers=ALICE).status_code == 404


def test_chunks_come_back_as_they_were_and_to_their_owner_alone(demo: dict[str, httpx.Client]) -> None:
    sessions, base = demo["sessions"], "/api/v1/sessions/recording-1"
    data = bytes(range(256)) * 4_096
    digest = hashlib.sha256(data).hexdigest()

    def pieces() -> Iterator[bytes]:
        yield data[:1_000]
        yield data[1_000:]

    put = sessions.put(f"{base}/chunks/0", content=pieces(), headers=ALICE)
    assert (put.status_code, put.json()) == (200, {"number": 0, "size": len(data), "sha256": digest})
    assert sessions.post(f"{base}/chunks/1", content=b"tail", headers=ALICE).status_code == 201
    assert sessions.get(f"{base}/chunks/0", headers=ALICE).content == data
    assert sessions.get(f"{base}/chunks/9", headers=ALICE).status_code == 404
    assert [chunk["number"] for chunk in sessions.get(f"{base}/chunks", headers=ALICE).json()["items"]] == [
        0,
        1,
    ]
    assert len(sessions.get(f"{base}/manifest", headers=ALICE).json()["chunks"]) == 2
    assert sessions.get(f"{base}/pipeline", headers=ALICE).json()["state"] == "idle"
    assert sessions.post(f"{base}/pipeline/start", headers=ALICE).json()["state"] == "running"
    for path in ("chunks/0", "chunks", "manifest", "pipeline"):
        assert sessions.get(f"{base}/{path}", headers=BOB).status_code == 404
    assert sessions.put(f"{base}/chunks/0", content=b"x", headers=BOB).status_code == 404


def test_sessions_are_announced_and_terminated_as_the_gateway_does_it(demo: dict[str, httpx.Client]) -> None:
    sessions, path, name = demo["sessions"], "/api/v1/sessions", "announced-1"
    told = {"session_id": name, "user_id": "alice", "status": "INITIALIZING", "metadata": {}}

    def announce(key: str = "k-1", headers: dict[str, str] = ALICE, **changes: Any) -> int:
        body = {**told, **changes}
        return sessions.post(path, json=body, headers={**headers, "idempotency-key": key}).status_code

    assert sessions.delete(f"{path}/{name}", headers=ALICE).status_code == 404
    assert announce() == 201
    assert announce() == 200  # the same once more
    assert announce("k-2") == 409
    assert announce(headers=BOB) == 400
    assert announce(headers=BOB, user_id="bob") == 409
    assert announce(session_id="short") == announce(session_id=7) == announce(user_id=None) == 400
    assert sessions.post(path, json=told).status_code == 401
    assert sessions.post(path, json=[], headers=ALICE).status_code == 400

    # From then on it is the owner's, before a chunk was written.
    assert sessions.put(f"{path}/{name}/chunks/0", content=b"x", headers=BOB).status_code == 404
    assert sessions.put(f"{path}/{name}/chunks/0", content=b"x", headers=ALICE).status_code == 200
    assert sessions.delete(f"{path}/{name}", headers=BOB).status_code == 404
    for _ in range(2):
        assert sessions.delete(f"{path}/{name}", headers=ALICE).status_code == 204
    assert sessions.get(f"{path}/{name}/pipeline", headers=ALICE).json() == {
        "session_id": name,
        "state": "terminated",
        "chunks": 1,
    }
    # What was recorded stays, nothing is added, and an announcement that comes late brings nothing back to life.
    assert sessions.get(f"{path}/{name}/chunks/0", headers=ALICE).content == b"x"
    assert sessions.put(f"{path}/{name}/chunks/1", content=b"x", headers=ALICE).status_code == 409
    assert sessions.post(f"{path}/{name}/pipeline/start", headers=ALICE).status_code == 409
    assert announce() == 200
    assert sessions.get(f"{path}/{name}/pipeline", headers=ALICE).json()["state"] == "terminated"


def test_chunks_may_come_before_the_announcement(demo: dict[str, httpx.Client]) -> None:
    sessions, path = demo["sessions"], "/api/v1/sessions"
    assert sessions.put(f"{path}/early-bird/chunks/0", content=b"x", headers=ALICE).status_code == 200
    body = {"session_id": "early-bird", "user_id": "alice"}
    headers = {**ALICE, "idempotency-key": "k"}
    assert [sessions.post(path, json=body, headers=headers).status_code for _ in range(2)] == [201, 200]
    assert sessions.get(f"{path}/early-bird/chunks/0", headers=ALICE).content == b"x"


def test_nodes_register_and_report(demo: dict[str, httpx.Client]) -> None:
    nodes = demo["nodes"]
    answer = nodes.post("/api/v1/nodes", json={"name": "n1"}, headers=ALICE)
    assert answer.status_code == 201
    place = answer.headers["location"]
    assert nodes.get(place, headers=BOB).json()["name"] == "n1"
    seen = nodes.post(f"{place}/heartbeat", headers=ALICE).json()["last_seen"]
    assert seen >= answer.json()["last_seen"]
    assert nodes.post(f"{place}/heartbeat", headers=BOB).status_code == 404
    assert place.rpartition("/")[2] in json.dumps(nodes.get("/api/v1/nodes", headers=BOB).json())
    assert nodes.get("/api/v1/nodes/none", headers=BOB).status_code == 404


def test_what_they_keep_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_MOST_ENTRIES", 2)
    kept = backends.Bounded()
    for name in "abc":
        kept[name] = name
    assert list(kept) == ["b", "c"]


def test_forgotten_chunks_no_longer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever bound it is that makes a session go: a count that drifted would in the end evict everything."""
    monkeypatch.setattr(backends, "_MOST_ENTRIES", 3)
    monkeypatch.setattr(backends, "_MOST_CHUNK_BYTES", 100)
    recordings = backends.Recordings()
    for round_ in range(200):
        recording = backends._Recording("alice")
        recordings[f"session-{round_}"] = recording
        recordings.keep(recording, 0, bytes(30))
        recordings.keep(recording, 0, bytes(10 if round_ % 7 else 60))
        held = [len(data) for each in recordings.values() for data in each.chunks.values()]
        assert recordings.stored_bytes == sum(held) <= 100
        assert list(recordings)[-1] == f"session-{round_}"
    # Alone too big for the bound, it goes as well, and leaves nothing behind.
    recordings.keep(recording, 1, bytes(101))
    assert (len(recordings), recordings.stored_bytes) == (0, 0)
