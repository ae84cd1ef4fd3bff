"""The gateway in front of an authentication cluster: its tokens, its word on them, and what it may not do to us."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from lucid.dev.embedded import Secantus, Valkey, free_port
from tests.integration.conftest import Caller, clusters
from tests.integration.test_limits import token_for
from tests.support import auth_cluster
from tests.support.auth_cluster import ISSUER, AuthClusterServer, Fault
from tests.support.servers import (
    SECRET,
    Backend,
    GatewayProcess,
    Received,
    Reply,
    clean_environment,
    own_redis,
    until,
)
from tests.support.wallet import Wallet

WORKERS = 2
PROTECTED = "/api/v1/nodes/x"
PUBLIC = "/api/v1/meta/version"


class Somebody(Caller):
    """A caller that loads no certificates: there is no TLS here, and it takes longer than most of these tests."""

    def __post_init__(self) -> None:
        self.http = client(self.gateway)
        weakref.finalize(self, self.http.close)


def client(door: GatewayProcess) -> httpx.Client:
    return httpx.Client(base_url=door.url, timeout=10.0, verify=False, trust_env=False)


class Cluster(AuthClusterServer):
    """With the `/health` that the gateway's own check asks."""

    def __init__(self) -> None:
        super().__init__()
        respond = self.backend.respond
        self.backend.respond = lambda request: Reply(200) if request.target == "/health" else respond(request)

    def calls(self, operation: str) -> list[Received]:
        return [request for request in list(self.received) if request.target == f"/auth/{operation}"]


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def door(
    valkey: Valkey,
    secantus: Secantus,
    backend: Backend,
    server: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GatewayProcess]:
    """One gateway of two workers for this file."""
    folder = tmp_path_factory.mktemp("gateway")
    limits = ("PUBLIC", "AUTHENTICATED", "ADMIN", "LOGIN", "REFRESH")
    environment = clean_environment(
        HOST="127.0.0.1",
        PORT=str(free_port()),
        METRICS_PORT=str(free_port()),
        WORKERS=str(WORKERS),
        JWT_SECRET_KEY=SECRET,
        LOG_FORMAT="text",
        REDIS_URI=own_redis(valkey),
        MONGODB_URI=secantus.in_database(folder.name),
        AUTH_SERVICE_URL=server.url,
        AUTH_SERVICE_ISSUERS=ISSUER,
        CIRCUIT_RECOVERY_SECONDS="1",
        **{f"RATE_LIMIT_{name}": "off" for name in limits},
        **clusters(backend),
    )
    process = GatewayProcess(environment, folder, ("lucid", "serve"))
    process.wait_until_ready()
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log, process.log


@pytest.fixture
def cluster(server: Cluster) -> Cluster:
    """Honest and reachable."""
    server.received.clear()
    return server


@pytest.fixture(scope="module")
def everywhere(door: GatewayProcess) -> Iterator[list[httpx.Client]]:
    """A dozen connections: some of each worker's."""
    with ExitStack() as stack:
        yield [stack.enter_context(client(door)) for _ in range(12)]


@pytest.fixture
def failing(cluster: Cluster, everywhere: list[httpx.Client]) -> Iterator[Cluster]:
    """For tests that set `fault` or stop it: honest again afterwards, and the breakers of both workers closed."""
    yield cluster
    cluster.fault = None
    for connection in everywhere:
        until(lambda connection=connection: goes(connection), 10.0, "logins go again")  # type: ignore[misc]


def goes(connection: httpx.Client) -> bool:
    """Whether a login over this connection succeeds."""
    wallet = Wallet.generate()
    return connection.post("/api/v1/auth/login", json=signed(connection, wallet)).status_code == 200


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def as_admin() -> dict[str, str]:
    return bearer(token_for("operator", "super_admin"))


def stored(caller: Caller) -> list[dict[str, Any]]:
    """The live users with this caller's wallet."""
    path = f"/api/v1/users?tron_address={caller.wallet.address}"
    answer = caller.http.get(path, headers=as_admin())
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def signed(http: httpx.Client, wallet: Wallet) -> dict[str, str]:
    """The body of a login with a fresh challenge."""
    challenge = http.post("/api/v1/auth/challenge", json={"tron_address": wallet.address})
    message = challenge.json()["message"]
    return {"tron_address": wallet.address, "message": message, "signature": wallet.sign(message)}


def log_in(caller: Caller, body: dict[str, str]) -> httpx.Response:
    return caller.http.post("/api/v1/auth/login", json=body)


def error_code(answer: httpx.Response) -> tuple[int, str]:
    """Status and code; that it is the platform's envelope is asserted."""
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["service"]
    return answer.status_code, error["code"]


# --- its tokens ----------------------------------------------------------------------------------------


def test_a_login_passes_the_clusters_tokens_on_and_records_its_user(
    cluster: Cluster, door: GatewayProcess
) -> None:
    somebody = Somebody(door)
    cluster.roles[somebody.wallet.address] = "node_operator"
    body = signed(somebody.http, somebody.wallet)
    answer = log_in(somebody, body)
    told = somebody.take(answer)
    (call,) = cluster.calls("login")
    assert httpx.Response(200, content=call.body).json() == body, "the same body goes on"
    assert call.field("x-request-id") == answer.headers["x-request-id"]
    (family,) = [
        family
        for family, login in cluster.logins.items()
        if login.address == somebody.wallet.address and login.current == told["refresh_token"]
    ]
    user_id = cluster.users[somebody.wallet.address]
    assert family
    assert told["user"]["user_id"] == user_id
    assert (told["user"]["role"], told["token_type"], told["expires_in"]) == ("node_operator", "Bearer", 900)
    (user,) = stored(somebody)
    assert (user["user_id"], user["role"]) == (user_id, "node_operator")
    # The cluster is the authority: its next word on the role is what counts.
    cluster.roles[somebody.wallet.address] = "admin"
    somebody.login()
    assert [(user["user_id"], user["role"]) for user in stored(somebody)] == [(user_id, "admin")]


def test_its_token_opens_routes_with_its_user_and_role(
    cluster: Cluster, door: GatewayProcess, backend: Backend
) -> None:
    admin, user = Somebody(door), Somebody(door)
    cluster.roles[admin.wallet.address] = "admin"
    for caller, role, listing in ((admin, "admin", 200), (user, "user", 403)):
        user_id = caller.login()["user"]["user_id"]
        assert caller.get("/api/v1/chain/blocks", **{"X-User-Id": "somebody-else"}).status_code == 200
        received = backend.forwarded[-1]
        assert (received.field("x-user-id"), received.field("x-user-role")) == (user_id, role)
        assert received.field("authorization") is None
        assert caller.get("/api/v1/users").status_code == listing
        assert caller.get("/api/v1/users/me").json()["user_id"] == user_id
        status = caller.get("/api/v1/auth/status").json()
        assert (status["user_id"], status["role"]) == (user_id, role)
        report = caller.http.post(
            "/api/v1/auth/verify", json={"token": caller.access_token}, headers=caller.bearer
        ).json()
        assert (report["active"], report["sub"], report["iss"]) == (True, user_id, ISSUER)


def test_it_is_asked_once_about_a_token_by_each_worker(
    cluster: Cluster, door: GatewayProcess, everywhere: list[httpx.Client]
) -> None:
    somebody = Somebody(door)
    somebody.login()
    for _ in range(10):
        for connection in everywhere:
            assert connection.get(PROTECTED, headers=somebody.bearer).status_code == 200
            assert connection.get("/api/v1/auth/status", headers=somebody.bearer).status_code == 200
    assert 1 <= len(cluster.calls("verify")) <= WORKERS


def test_a_hundred_requests_at_once_with_an_unknown_token_ask_once_by_worker(
    failing: Cluster, door: GatewayProcess
) -> None:
    failing.fault = auth_cluster.slow(0.5)
    token = failing.token(Wallet.generate().address)
    barrier = threading.Barrier(100)

    def ask(_: int) -> int:
        with client(door) as http:
            barrier.wait(30.0)
            return http.get(PROTECTED, headers=bearer(token)).status_code

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(ask, range(100))) == [200] * 100
    assert 1 <= len(failing.calls("verify")) <= WORKERS


def test_a_token_minted_here_is_good_beside_it_and_no_business_of_the_clusters(
    cluster: Cluster, everywhere: list[httpx.Client], backend: Backend
) -> None:
    minted = token_for("operator-7", "admin")
    answer = everywhere[0].get(PROTECTED, headers=bearer(minted))
    assert answer.status_code == 200
    assert backend.forwarded[-1].field("x-user-id") == "operator-7"
    # Its own name over a signature that is not ours, and an issuer that nobody has.
    for forged in (token_for("operator-7", "admin")[:-4] + "AAAA", token_for("x", iss="somebody")):
        answer = everywhere[0].get(PROTECTED, headers=bearer(forged))
        assert error_code(answer) == (401, "LUCID_ERR_2003")
    assert not cluster.calls("verify")


def test_what_the_cluster_does_not_call_good_is_not(cluster: Cluster, door: GatewayProcess) -> None:
    somebody = Somebody(door)
    expired = cluster.token(somebody.wallet.address, exp=int(time.time()) - 60, iat=int(time.time()) - 600)
    # Its issuer, signed with our own key: the cluster is asked, and our key is none of its keys.
    ours = token_for("operator", "super_admin", iss=ISSUER)
    for bad in (expired, ours):
        assert error_code(somebody.http.get(PROTECTED, headers=bearer(bad)))[0] == 401
        assert somebody.http.get(PUBLIC, headers=bearer(bad)).status_code == 200
        before = len(cluster.calls("verify"))
        assert [somebody.http.get(PROTECTED, headers=bearer(bad)).status_code for _ in range(5)] == [401] * 5
        assert len(cluster.calls("verify")) == before, "a bad one is remembered too"


# --- its refresh and its logout ------------------------------------------------------------------------


def test_refresh_is_the_clusters(cluster: Cluster, door: GatewayProcess) -> None:
    somebody = Somebody(door)
    somebody.login()
    spent = somebody.refresh_token
    told = somebody.take(somebody.http.post("/api/v1/auth/refresh", json={"refresh_token": spent}))
    assert cluster.calls("refresh")
    assert told["refresh_token"] in {login.current for login in cluster.logins.values()}
    assert somebody.get(PROTECTED).status_code == 200
    for token in (spent, somebody.refresh_token, "invented"):  # the spent one ends its login, there
        answer = somebody.http.post("/api/v1/auth/refresh", json={"refresh_token": token})
        assert error_code(answer) == (401, "LUCID_ERR_2003")


@pytest.mark.parametrize("all_logins", [False, True])
def test_after_a_logout_the_token_is_dead_on_every_worker_within_a_second(
    cluster: Cluster, door: GatewayProcess, everywhere: list[httpx.Client], all_logins: bool
) -> None:
    somebody = Somebody(door)
    somebody.login()
    elsewhere = Somebody(door, somebody.wallet)
    elsewhere.login()
    for connection in everywhere:
        for caller in (somebody, elsewhere):
            assert connection.get(PROTECTED, headers=caller.bearer).status_code == 200
    answer = somebody.http.post(
        "/api/v1/auth/logout", headers=somebody.bearer, json={"all_logins": all_logins}
    )
    assert answer.status_code == 204
    deadline = time.monotonic() + 1.0
    (call,) = cluster.calls("logout")
    assert call.field("authorization") == f"Bearer {somebody.access_token}"
    assert httpx.Response(200, content=call.body).json() == {"all_logins": all_logins}
    for connection in everywhere:
        for caller in (somebody, elsewhere) if all_logins else (somebody,):
            while (answer := connection.get(PROTECTED, headers=caller.bearer)).status_code != 401:
                assert time.monotonic() < deadline, "a worker still takes the token"
            assert error_code(answer) == (401, "LUCID_ERR_2003")
    if not all_logins:
        assert elsewhere.get(PROTECTED).status_code == 200
    refreshed = somebody.http.post("/api/v1/auth/refresh", json={"refresh_token": somebody.refresh_token})
    assert error_code(refreshed) == (401, "LUCID_ERR_2003")
    until(lambda: Somebody(door, somebody.wallet).login() and True, 5.0, "one can log in again")


def test_a_minted_token_is_logged_out_here(cluster: Cluster, everywhere: list[httpx.Client]) -> None:
    minted = bearer(token_for("operator-8", sid="by-hand"))
    for connection in everywhere:
        assert connection.get(PROTECTED, headers=minted).status_code == 200
    assert everywhere[0].post("/api/v1/auth/logout", headers=minted, json={}).status_code == 204
    until(lambda: all(each.get(PROTECTED, headers=minted).status_code == 401 for each in everywhere), 1.0)
    assert not cluster.calls("logout")


def test_a_logout_that_the_cluster_did_not_take_can_be_tried_again(
    failing: Cluster, door: GatewayProcess
) -> None:
    somebody = Somebody(door)
    somebody.login()
    failing.fault = auth_cluster.answering(500)
    failed = somebody.http.post("/api/v1/auth/logout", headers=somebody.bearer, json={})
    assert error_code(failed) == (502, "LUCID_ERR_5001")
    failing.fault = None
    assert somebody.http.post("/api/v1/auth/logout", headers=somebody.bearer, json={}).status_code == 204


# --- what is not done here -----------------------------------------------------------------------------


def test_passwords_are_nobodys_business_here(cluster: Cluster, door: GatewayProcess) -> None:
    somebody = Somebody(door)
    somebody.login()
    account = {"email": "person@example.org", "password": "correct horse battery"}
    answers = [
        somebody.http.post("/api/v1/auth/login", json=account),
        somebody.http.post("/api/v1/users", json=account),
        somebody.http.patch("/api/v1/users/me", json=account, headers=somebody.bearer),
    ]
    assert [error_code(answer) for answer in answers] == [(501, "LUCID_ERR_5007")] * 3
    assert stored(somebody)[0]["email"] is None
    assert not cluster.calls("login")[1:]


# --- when it fails -------------------------------------------------------------------------------------


def test_the_cluster_away(failing: Cluster, door: GatewayProcess, everywhere: list[httpx.Client]) -> None:
    known, newcomer = Somebody(door), Somebody(door)
    known.login()
    for connection in everywhere:
        assert connection.get(PROTECTED, headers=known.bearer).status_code == 200
    unknown = failing.token(newcomer.wallet.address)
    body = signed(newcomer.http, newcomer.wallet)
    failing.stop()
    try:
        for connection in everywhere:  # more often than the breaker's threshold, on each worker
            answer = connection.get(PROTECTED, headers=bearer(unknown))
            assert error_code(answer) == (503, "LUCID_ERR_5002")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["details"] == {"dependency": "auth-service"}
            answer = connection.post("/api/v1/auth/login", json=body)
            assert error_code(answer) == (503, "LUCID_ERR_5002")
            assert int(answer.headers["retry-after"]) >= 1
            assert connection.get(PUBLIC, headers=bearer(unknown)).status_code == 200
            assert connection.get(PROTECTED, headers=known.bearer).status_code == 200
            assert connection.get(PROTECTED, headers=bearer(token_for("operator"))).status_code == 200
        ready = "/health/ready"
        until(
            lambda: all(c.get(ready).json()["missing"] == ["auth-service"] for c in everywhere),
            8.0,
            "readiness names it",
        )
        assert everywhere[0].get(ready).json()["status"] == "degraded"
        assert not stored(newcomer)
    finally:
        failing.start()
    until(lambda: all(c.get(ready).json()["missing"] == [] for c in everywhere), 8.0, "it is back")
    # A login that failed has spent nothing.
    until(lambda: log_in(newcomer, body).status_code == 200, 10.0, "the same signature is still good")
    assert error_code(log_in(newcomer, body)) == (401, "LUCID_ERR_2006"), "and good once"
    until(lambda: all(c.get(PROTECTED, headers=bearer(unknown)).status_code == 200 for c in everywhere), 10.0)


def test_a_slow_cluster_meets_a_deadline_and_holds_nobody_else(
    failing: Cluster, door: GatewayProcess, everywhere: list[httpx.Client]
) -> None:
    known, newcomer = Somebody(door), Somebody(door)
    known.login()
    for connection in everywhere:
        assert connection.get(PROTECTED, headers=known.bearer).status_code == 200
    unknown = [failing.token(Wallet.generate().address) for _ in range(4)]
    body = signed(newcomer.http, newcomer.wallet)
    failing.fault = auth_cluster.slow(8.0)

    def timed(call: Callable[[], httpx.Response]) -> tuple[tuple[int, str], float]:
        began = time.monotonic()
        answer = call()
        return error_code(answer), time.monotonic() - began

    def verify(token: str) -> httpx.Response:
        with client(door) as http:
            return http.get(PROTECTED, headers=bearer(token))

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(timed, lambda token=token: verify(token)) for token in unknown]  # type: ignore[misc]
        login = pool.submit(timed, lambda: log_in(newcomer, body))
        time.sleep(0.2)
        for connection in everywhere:
            began = time.monotonic()
            assert connection.get(PROTECTED, headers=known.bearer).status_code == 200
            # One that is held would wait for a deadline, as all the others do.
            assert time.monotonic() - began < 0.5 or not any(each.done() for each in waiting)
        for each in waiting:
            code, seconds = each.result()
            assert code == (504, "LUCID_ERR_5003")
            assert seconds < 3.0
        code, seconds = login.result()
        assert code == (504, "LUCID_ERR_5003")
        assert seconds < 6.0
    assert not stored(newcomer)
    failing.fault = None
    until(lambda: log_in(newcomer, body).status_code == 200, 10.0, "the challenge is not spent")


LIES: dict[str, Fault] = {
    "no JSON": auth_cluster.answering(200, b"<html>"),
    "empty": auth_cluster.answering(200),
    "a list": auth_cluster.answering(200, b"[]"),
    "another type": auth_cluster.of_type("text/html"),
    "no type": auth_cluster.of_type(""),
    "a redirect": auth_cluster.answering(302, b"", ("Location", "http://127.0.0.1:1/")),
    "created": auth_cluster.answering(201, b"{}"),
    "not found": auth_cluster.answering(404, b"{}"),
    "teapot": auth_cluster.answering(418, b"{}"),
    "500": auth_cluster.answering(500, b"{}"),
    "a proxy's 502": auth_cluster.bad_gateway,
    "hangs up": auth_cluster.hanging_up,
    "cut off": auth_cluster.cut_off,
    "promises a gigabyte": auth_cluster.promising(2**30),
    "two lengths": auth_cluster.with_fields(("Content-Length", "1"), ("Content-Length", "2")),
    "no token": auth_cluster.lying(access_token=None),
    "a token of a number": auth_cluster.lying(access_token=1),
    "a token with a line": auth_cluster.lying(access_token="a\r\nX-User-Role: admin"),
    "no refresh token": auth_cluster.lying(refresh_token=None),
    "another token type": auth_cluster.lying(token_type="mac"),
    "an endless life": auth_cluster.lying(expires_in=2**40),
    "no life": auth_cluster.lying(expires_in=0),
    "no user": auth_cluster.lying(user=None),
    "another wallet": auth_cluster.lying(user__tron_address=Wallet.generate().address),
    "another user than the token's": auth_cluster.lying(user__user_id="somebody-else"),
    "a user id that is none": auth_cluster.lying(user__user_id="a b\n"),
    "a role that is none": auth_cluster.lying(user__role="root"),
    "permissions that are none": auth_cluster.lying(user__permissions=["*"]),
}


def test_lies_at_a_login_are_a_502_and_store_nothing(failing: Cluster, door: GatewayProcess) -> None:
    somebody = Somebody(door)
    body = signed(somebody.http, somebody.wallet)
    for name, lie in LIES.items():
        failing.fault = lie
        answer = log_in(somebody, body)
        if error_code(answer)[0] == 503:  # the breaker, after five that broke off in a row
            failing.fault = None
            until(lambda: goes(somebody.http), 5.0)
            failing.fault = lie
            answer = log_in(somebody, body)
        assert error_code(answer) == (502, "LUCID_ERR_5001"), name
        assert answer.json()["error"]["details"] == {"dependency": "auth-service"}
    assert not stored(somebody)
    failing.fault = None
    until(lambda: log_in(somebody, body).status_code == 200, 5.0, "none of them has spent the challenge")


def test_an_endless_answer_is_cut_off(failing: Cluster, door: GatewayProcess) -> None:
    endless = auth_cluster.Endless()
    failing.fault = endless
    somebody = Somebody(door)
    assert error_code(log_in(somebody, signed(somebody.http, somebody.wallet))) == (502, "LUCID_ERR_5001")
    # Of 4,096 pieces: what the sockets between the two hold.
    assert endless.taken < 400
    assert not stored(somebody)


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422, 429])
def test_a_refusal_of_the_clusters_is_one_here(failing: Cluster, door: GatewayProcess, status: int) -> None:
    failing.fault = auth_cluster.answering(status, b"{}", ("Retry-After", "7"))
    somebody = Somebody(door)
    body = signed(somebody.http, somebody.wallet)
    answer = log_in(somebody, body)
    if status == 429:
        assert error_code(answer) == (429, "LUCID_ERR_3001")
        assert answer.headers["retry-after"] == "7"
    else:
        assert error_code(answer) == (401, "LUCID_ERR_2003")
    failing.fault = None
    assert log_in(somebody, body).status_code == 200, "the challenge is not spent"


VERIFY_LIES: dict[str, Fault] = {
    "no JSON": auth_cluster.answering(200, b"<html>"),
    "403: the gateway is not let in": auth_cluster.answering(403, b"{}"),
    "active of a text": auth_cluster.lying(active="yes"),
    "another user": auth_cluster.lying(sub="somebody-else"),
    "a role that is none": auth_cluster.lying(role="root"),
    "public": auth_cluster.lying(role=None),
    "no end": auth_cluster.lying(exp=None),
    "an endless life": auth_cluster.lying(exp=2**60),
    "another issuer": auth_cluster.lying(iss="lucid"),
    "another login": auth_cluster.lying(sid="somebody's"),
}


def test_lies_about_a_token_are_a_502_and_believed_by_nobody(
    failing: Cluster, door: GatewayProcess, backend: Backend
) -> None:
    somebody = Somebody(door)
    for name, lie in VERIFY_LIES.items():
        token = failing.token(somebody.wallet.address)
        failing.fault = lie
        answer = somebody.http.get(PROTECTED, headers=bearer(token))
        assert error_code(answer) == (502, "LUCID_ERR_5001"), name
        assert somebody.http.get(PUBLIC, headers=bearer(token)).status_code == 200, name
        failing.fault = None
        assert somebody.http.get(PROTECTED, headers=bearer(token)).status_code == 200, (
            f"{name}: nothing of it stays"
        )
    for received in backend.forwarded:
        assert received.field("x-user-id") == failing.users[somebody.wallet.address]
        assert received.field("x-user-role") == "user"
