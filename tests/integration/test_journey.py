"""The main job on real servers: a wallet signs in and its requests reach the backends."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.integration.conftest import Caller, clusters
from tests.support.servers import SECRET, Backend, GatewayProcess, Reply, clean_environment, echo, until
from tests.support.wallet import Wallet


def several(stack: ExitStack, process: GatewayProcess, count: int) -> list[httpx.Client]:
    """Clients with a connection each: more of them than workers, so that every worker has some."""
    return [stack.enter_context(httpx.Client(base_url=process.url, trust_env=False)) for _ in range(count)]


def test_a_login_gives_tokens_that_reach_the_backend(caller: Caller, backend: Backend) -> None:
    backend.respond = echo
    answer = caller.get(
        "/api/v1/chain/blocks/latest?full=1", **{"X-User-Id": "somebody-else", "x_user_id": "again"}
    )
    assert answer.status_code == 200
    told = answer.json()
    fields = dict(told["fields"])
    status = caller.get("/api/v1/auth/status").json()
    assert told["target"] == "/api/v1/chain/blocks/latest?full=1"
    assert [value for name, value in told["fields"] if name == "x-user-id"] == [status["user_id"]]
    assert fields["x-user-role"] == "user"
    assert fields["x-request-id"] == answer.headers["x-request-id"]
    assert fields["traceparent"].split("-")[1] == fields["x-request-id"].replace("-", "")
    assert fields["x-forwarded-for"] == "127.0.0.1"
    assert not {"authorization", "x_user_id", "x-api-key"} & set(fields)


def test_the_answer_tells_where_the_caller_stands(caller: Caller) -> None:
    before = caller.get("/api/v1/nodes/list").headers
    assert before["x-ratelimit-limit"] == "1000"
    assert before["ratelimit-policy"] == '"authenticated";q=1000;w=60'
    chain = caller.get("/api/v1/chain/info").headers
    assert chain["x-ratelimit-limit"] == "500"
    assert '"chain";q=500;w=60' in chain["ratelimit-policy"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_chunk_of_ten_megabytes_streams_through(caller: Caller, backend: Backend, chunked: bool) -> None:
    backend.respond = echo
    content = hashlib.sha256(b"seed").digest() * (10 * 1_048_576 // 32)
    pieces = (content[at : at + 100_000] for at in range(0, len(content), 100_000))
    answer = caller.http.put(
        "/api/v1/sessions/0f8fad5b-d9cb-469f-a165-70867728950e/chunks/1",
        content=pieces if chunked else content,
        headers=caller.bearer,
    )
    assert answer.status_code == 200
    assert answer.json()["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "in mid-stream"])
def test_a_larger_chunk_is_refused(caller: Caller, backend: Backend, chunked: bool) -> None:
    content = bytes(10 * 1_048_576 + 1)
    pieces = (content[at : at + 65_536] for at in range(0, len(content), 65_536))
    answer = caller.http.put(
        "/api/v1/sessions/12345678/chunks/1", content=pieces if chunked else content, headers=caller.bearer
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "LUCID_ERR_1006"
    assert caller.get("/api/v1/nodes/list").status_code == 200


def test_an_answer_streams_back_chunk_by_chunk(caller: Caller, backend: Backend) -> None:
    pieces = [bytes([number]) * 70_000 for number in range(40)]
    backend.respond = lambda _: Reply(body=list(pieces))
    assert caller.get("/api/v1/chain/export").content == b"".join(pieces)


def test_refresh_makes_a_new_pair_and_a_spent_token_ends_the_login(caller: Caller) -> None:
    spent = caller.refresh_token
    answer = caller.http.post("/api/v1/auth/refresh", json={"refresh_token": spent})
    assert answer.status_code == 200
    caller.take(answer)
    assert caller.get("/api/v1/nodes/x").status_code == 200
    again = caller.http.post("/api/v1/auth/refresh", json={"refresh_token": spent})
    assert (again.status_code, again.json()["error"]["code"]) == (401, "LUCID_ERR_2003")
    assert (
        caller.http.post("/api/v1/auth/refresh", json={"refresh_token": caller.refresh_token}).status_code
        == 401
    )
    until(
        lambda: caller.get("/api/v1/nodes/x").status_code == 401, 1.0, "the access token dies with its family"
    )


def test_logout_reaches_every_worker_within_a_second(
    gateway: Callable[..., GatewayProcess], backend: Backend
) -> None:
    somebody = Caller(gateway(workers=3, env=clusters(backend)))
    somebody.login()
    with ExitStack() as stack:
        connections = several(stack, somebody.gateway, 12)
        for connection in connections:
            assert connection.get("/api/v1/nodes/x", headers=somebody.bearer).status_code == 200
        assert somebody.http.post("/api/v1/auth/logout", headers=somebody.bearer, json={}).status_code == 204
        deadline = time.monotonic() + 1.0
        for connection in connections:
            while (answer := connection.get("/api/v1/nodes/x", headers=somebody.bearer)).status_code != 401:
                assert time.monotonic() < deadline, "a worker still takes the token"
            assert answer.json()["error"]["code"] == "LUCID_ERR_2003"


def test_the_hundred_and_first_public_request_of_a_minute_is_refused(
    gateway: Callable[..., GatewayProcess], backend: Backend
) -> None:
    process = gateway(workers=3, env=clusters(backend))
    # A connection each, so that all workers share in the counting.
    statuses = [httpx.get(f"{process.url}/api/v1/meta/version", trust_env=False) for _ in range(105)]
    assert [answer.status_code for answer in statuses] == [200] * 100 + [429] * 5
    refused = statuses[-1]
    error = refused.json()["error"]
    assert error["code"] == "LUCID_ERR_3001"
    assert (error["details"]["limit"], error["details"]["window_seconds"]) == (100, 60)
    assert 1 <= int(refused.headers["retry-after"]) <= 62
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert httpx.get(f"{process.url}/health", trust_env=False).status_code == 200


def test_an_admin_resets_a_limit_on_every_worker(
    gateway: Callable[..., GatewayProcess], backend: Backend
) -> None:
    wallet = Wallet.generate()
    settings = {"ADMIN_TRON_ADDRESSES": wallet.address, "RATE_LIMIT_PUBLIC": "20"}
    somebody = Caller(gateway(workers=3, env={**clusters(backend), **settings}), wallet)
    assert somebody.login()["user"]["role"] == "super_admin"
    with ExitStack() as stack:
        clients = several(stack, somebody.gateway, 9)
        until(
            lambda: all(c.get("/api/v1/meta/info").status_code == 429 for c in clients), 5.0, "over the limit"
        )
        assert somebody.get("/api/v1/rate-limits/public/127.0.0.1").json()["remaining"] == 0
        reset = somebody.http.delete("/api/v1/rate-limits/public/127.0.0.1", headers=somebody.bearer)
        assert reset.status_code == 204
        until(lambda: all(c.get("/api/v1/meta/info").status_code == 200 for c in clients), 1.0, "it is reset")


def test_a_request_id_of_the_caller_is_kept_if_it_is_one(caller: Caller, backend: Backend) -> None:
    backend.respond = echo
    kept = caller.get("/api/v1/chain/x", **{"X-Request-ID": "my.request_1"})
    assert kept.headers["x-request-id"] == "my.request_1"
    assert dict(kept.json()["fields"])["x-request-id"] == "my.request_1"
    made = caller.get("/api/v1/chain/x", **{"X-Request-ID": "no good!"})
    assert made.headers["x-request-id"] != "no good!"


def test_first_logins_at_once_make_one_user(door: GatewayProcess) -> None:
    wallet = Wallet.generate()
    with ThreadPoolExecutor(8) as pool:
        logins = list(pool.map(lambda _: Caller(door, wallet).login(), range(16)))
    assert len({told["user"]["user_id"] for told in logins}) == 1
    assert len({told["refresh_token"] for told in logins}) == 16


def test_the_command_mints_tokens_that_serve(backend: Backend, caller: Caller) -> None:
    token = subprocess.run(
        [sys.executable, "-m", "lucid", "token", "--user", "operator-7", "--role", "admin"],
        env=clean_environment(JWT_SECRET_KEY=SECRET),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    answer = caller.http.get("/api/v1/nodes/x", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit"] == "10000"
    assert (backend.forwarded[-1].field("x-user-id"), backend.forwarded[-1].field("x-user-role")) == (
        "operator-7",
        "admin",
    )
