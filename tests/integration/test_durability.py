"""Kill -9 of the database and of workers at any moment: what was acknowledged stays, and nothing is half done.

Every caller here keeps a ledger: what an answer of 2xx has told is certain; what got a 503, or no answer at all, may
have happened or not, and both must be whole. Redis lives: what is lost with it is not promised (revocations.py).
"""

import asyncio
import datetime as dt
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pymongo
import pytest

from lucid.dev.embedded import free_port
from tests.integration.conftest import clusters
from tests.integration.test_limits import token_for
from tests.support.servers import SECRET, Backend, GatewayProcess, Received, clean_environment, until
from tests.support.stores import MongoChild, RedisChild, mongodb, valkey
from tests.support.wallet import Wallet

SEED = 20_240
PEOPLE = 8
REGISTRATIONS = 6
MOST_KEYS = 20
ANSWER_SECONDS = 30.0
SPREAD_SECONDS = 2.0
"""A revocation reaches every worker within one; the other is for a machine that others use too."""
TOLD_SECONDS = 15.0
T = TypeVar("T")
AWAY = {"LUCID_ERR_5002", "LUCID_ERR_5004"}


@dataclass
class World:
    """A gateway of two workers over stores of its own."""

    gateway: GatewayProcess
    mongo: MongoChild

    def kill_a_worker(self, rng: random.Random) -> None:
        workers = self.gateway.workers()
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)

    def wait_until_whole(self) -> None:
        """Both workers serve, and miss nothing."""
        told: list[object] = []

        def whole() -> bool:
            told[:] = [self.gateway.workers()]
            if len(self.gateway.workers()) != 2:
                return False
            told[1:] = [http.get("/health/ready").json() for _ in range(4)]
            return all(answer == {"status": "ready", "missing": []} for answer in told[1:])

        one_answer_each = {"Connection": "close"}
        try:
            with httpx.Client(base_url=self.gateway.url, headers=one_answer_each, trust_env=False) as http:
                until(whole, 30.0, "the gateway is whole again")
        except AssertionError:
            pytest.fail(f"the gateway is not whole: {told}\n{self.gateway.log[-5_000:]}")


@pytest.fixture(scope="module")
def world(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("gateway")
    with mongodb() as mongo, valkey() as redis:
        process = GatewayProcess(_environment(backend, mongo, redis), folder, ("lucid", "serve"))
        process.wait_until_ready()
        yield World(process, mongo)
        assert process.stop() == 0
        assert "Traceback" not in process.log, process.log


def _environment(backend: Backend, mongo: MongoChild, redis: RedisChild) -> dict[str, str]:
    names = ("PUBLIC", "AUTHENTICATED", "ADMIN", "LOGIN", "REFRESH")
    return clean_environment(
        HOST="127.0.0.1",
        PORT=str(free_port()),
        METRICS_PORT=str(free_port()),
        WORKERS="2",
        JWT_SECRET_KEY=SECRET,
        LOG_FORMAT="text",
        # SecantusDB 0.7 says that it remembers which writes it has made, and a crash makes it forget: a write that the
        # driver sends again would be done twice, or be refused because of itself.
        MONGODB_URI=mongo.in_database("lucid"),
        REDIS_URI=redis.uri,
        **{f"RATE_LIMIT_{name}": "off" for name in names},
        **clusters(backend),
    )


class Asker:
    """Asks the gateway, and judges every answer: `wrong` is what should never have been said."""

    def __init__(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        self._http = http
        self._rng = rng
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self.away = 0
        self.lost = 0

    async def ask(
        self, what: str, method: str, path: str, *right: int, json: Any = None, **fields: str
    ) -> httpx.Response | None:
        """The answer, one of the statuses `right`; None: nobody knows whether it was done, or it was not right."""
        # Now and then another connection, so that a worker that has come back gets its share.
        close = {"Connection": "close"} if self._rng.random() < 0.15 else {}
        try:
            answer = await self._http.request(method, path, json=json, headers={**fields, **close})
        except httpx.TimeoutException as error:
            self.wrong.append(f"{what}: {error!r}")
            return None
        except httpx.ConnectError as error:
            self.wrong.append(f"{what}: the listening socket is the parent's, which lives: {error!r}")
            return None
        except httpx.TransportError:
            self.lost += 1
            answer = None
        if answer is not None and answer.status_code in right:
            self.done[what] += 1
            return answer
        if answer is not None and not _is_away(answer):
            self.wrong.append(f"{what}: {answer.status_code} {answer.text}")
            return None
        if answer is not None:
            self.away += 1
        # What the dead worker has sent the database may still be on its way; a person is slower than that anyway.
        await asyncio.sleep(0.2 + 0.3 * self._rng.random())
        return None

    async def surely(
        self, what: str, method: str, path: str, *right: int, json: Any = None, **fields: str
    ) -> httpx.Response:
        """The answer, when nothing is killed any more: now only a right one will do."""
        answer = await self._http.request(method, path, json=json, headers=fields)
        assert answer.status_code in right, f"{what}: {answer.status_code} {answer.text}"
        return answer


def _is_away(answer: httpx.Response) -> bool:
    """The platform's envelope of a 503, with the time after which to come back."""
    if answer.status_code != 503 or not answer.headers.get("retry-after", "").isdigit():
        return False
    error = answer.json()["error"]
    return error["code"] in AWAY and error["request_id"] == answer.headers["x-request-id"]


@asynccontextmanager
async def asker(world: World, rng: random.Random, connections: int = 8) -> AsyncIterator[Asker]:
    bounds = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(
        base_url=world.gateway.url, timeout=ANSWER_SECONDS, limits=bounds, trust_env=False
    ) as http:
        yield Asker(http, rng)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def as_admin() -> dict[str, str]:
    return bearer(token_for("operator", "super_admin"))


@contextmanager
def beside(load: Coroutine[Any, Any, T]) -> Iterator[Future[T]]:
    """Runs `load` in a thread with a loop of its own; this one may kill and start meanwhile.

    Not the other way round: a server ends with the thread that started it (`leash`).
    """
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(asyncio.run, load)


async def users_of(asking: Asker, **filters: str) -> list[dict[str, Any]]:
    """All live users to whom these filters apply."""
    found: list[dict[str, Any]] = []
    while True:
        query = httpx.QueryParams({**filters, "limit": 100, "page": len(found) // 100 + 1})
        page = (await asking.surely("list", "GET", f"/api/v1/users?{query}", 200, **as_admin())).json()
        found += page["items"]
        if len(page["items"]) < 100:
            assert len(found) == page["total"]
            return found


# --- one email, two hundred times ----------------------------------------------------------------------


def kill_nothing(_: World) -> None:
    pass


def kill_the_database(world: World) -> None:
    world.mongo.kill()
    world.mongo.start()


def kill_a_worker(world: World) -> None:
    world.kill_a_worker(random.Random(SEED))


@pytest.mark.parametrize("kill", [kill_nothing, kill_the_database, kill_a_worker])
def test_of_two_hundred_registrations_of_one_email_one_makes_a_user(
    world: World, kill: Callable[[World], None]
) -> None:
    world.wait_until_whole()
    email = f"{kill.__name__}@example.org"
    path = "/api/v1/users"

    async def register_all() -> tuple[Asker, list[int]]:
        async with asker(world, random.Random(SEED), connections=200) as asking:

            async def register(number: int) -> int:
                # A password each: the one that logs in tells whose registration it was.
                body = {"email": email.upper() if number % 2 else email, "password": f"a secret of {number}!"}
                answer = await asking.ask("register", "POST", path, 201, 409, json=body)
                return 0 if answer is None else answer.status_code

            return asking, await asyncio.gather(*(register(number) for number in range(200)))

    with beside(register_all()) as running:
        # The first hash takes some tenths of a second: now, while it is made and stored.
        time.sleep(0.3)
        kill(world)
        asking, statuses = running.result()
    assert not asking.wrong, asking.wrong[:5]
    made = [number for number, status in enumerate(statuses) if status == 201]
    assert len(made) <= 1, made
    if kill is kill_nothing:
        assert len(made) == 1
        assert asking.lost == 0
    world.wait_until_whole()

    async def look() -> None:
        async with asker(world, random.Random(SEED)) as asking:
            again = {"email": email, "password": "another secret!"}
            late = await asking.surely("register", "POST", path, 201, 409, json=again)
            if made:
                assert late.status_code == 409, "what was acknowledged is gone"
            assert len(await users_of(asking, email=email)) == 1
            if made or late.status_code == 201:
                password = f"a secret of {made[0]}!" if made else str(again["password"])
                login = {"email": email, "password": password}
                await asking.surely("login", "POST", "/api/v1/auth/login", 200, json=login)
                login["password"] = "a secret of nobody!"
                await asking.surely("login", "POST", "/api/v1/auth/login", 401, json=login)

    asyncio.run(look())


# --- everything at once --------------------------------------------------------------------------------


class Person:
    """Somebody with a wallet who does all that one can do, in a random order, and remembers what was acknowledged."""

    def __init__(self, asking: Asker, rng: random.Random) -> None:
        self.asking = asking
        self.rng = rng
        self.wallet = Wallet.generate()
        self.user_id = ""
        self.roles = {"user"}
        """Those that it may have: one, unless the fate of a change is unknown."""
        self.access = ""
        self.refresh_token = ""
        self.spent: list[str] = []
        """Spent or unclear; whether they open anything is not to be asked before the end: it ends their login."""
        self.dead: list[tuple[float, str]] = []
        """Access tokens with the moment at which their end was acknowledged."""
        self.dead_refresh_tokens: list[str] = []
        self.sessions: dict[str, set[str]] = {}
        self.orphans: dict[str, set[str]] = {}
        """Sessions of a deleted user, which stay as they are."""
        self.begun: list[str] = []
        self.terminated: list[str] = []
        self.keys: dict[str, str] = {}
        self.unclear_keys: dict[str, str] = {}
        self.dead_keys: list[tuple[float, str]] = []
        self.deleted: list[str] = []
        self.perhaps_deleted = False

    async def live(self, is_over: Callable[[], bool]) -> None:
        actions: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.begin_session, 5),
            (self.move_session, 4),
            (self.terminate_session, 4),
            (self.make_key, 3),
            (self.use_key, 2),
            (self.revoke_key, 2),
            (self.refresh, 4),
            (self.log_out, 2),
            (self.log_in, 1),
            (self.try_what_is_dead, 4),
            (self.change_role, 1),
            (self.be_deleted, 1),
        ]
        names, weights = zip(*actions, strict=True)
        # Everything once, so that there is something of each kind to lose; then as it comes.
        tour = [action for action, _ in actions if action != self.be_deleted or self.rng.random() < 0.5]
        while not is_over():
            if self.perhaps_deleted:
                await self.find_out()
            elif not self.access:
                await (self.refresh() if self.refresh_token else self.log_in())
            else:
                await (tour.pop(0) if tour else self.rng.choices(names, weights)[0])()
            await asyncio.sleep(0.02 * self.rng.random())

    # --- logins ---

    async def log_in(self) -> None:
        address = self.wallet.address
        challenge = await self.asking.ask(
            "challenge", "POST", "/api/v1/auth/challenge", 200, json={"tron_address": address}
        )
        if challenge is None:
            return
        message = challenge.json()["message"]
        body = {"tron_address": address, "message": message, "signature": self.wallet.sign(message)}
        answer = await self.asking.ask("login", "POST", "/api/v1/auth/login", 200, json=body)
        if answer is None:
            return
        user = answer.json()["user"]
        if user["user_id"] in self.deleted or (self.user_id and user["user_id"] != self.user_id):
            self.asking.wrong.append(f"{address} was {self.user_id} and is {user['user_id']}")
        self.user_id = user["user_id"]
        self.take(answer)

    async def refresh(self) -> None:
        body = {"refresh_token": self.refresh_token}
        answer = await self.asking.ask("refresh", "POST", "/api/v1/auth/refresh", 200, json=body)
        self.spent.append(self.refresh_token)
        if answer is None:
            self.access = self.refresh_token = ""
        else:
            self.take(answer)

    def take(self, answer: httpx.Response) -> None:
        told = answer.json()
        self.access, self.refresh_token = told["access_token"], told["refresh_token"]
        if told["user"]["role"] not in self.roles:
            self.asking.wrong.append(f"the role is {told['user']['role']}, not one of {self.roles}")

    async def log_out(self) -> None:
        everywhere = self.rng.random() < 0.3
        answer = await self.asking.ask(
            "logout",
            "POST",
            "/api/v1/auth/logout",
            204,
            json={"all_logins": everywhere},
            **bearer(self.access),
        )
        if answer is not None:
            self.dead.append((time.monotonic(), self.access))
            self.dead_refresh_tokens.append(self.refresh_token)
            if everywhere:
                self.dead_refresh_tokens += self.spent
                self.spent = []
        else:
            self.spent.append(self.refresh_token)
        self.access = self.refresh_token = ""

    async def try_what_is_dead(self) -> None:
        known = time.monotonic() - SPREAD_SECONDS
        dead = [bearer(token) for moment, token in self.dead[-20:] if moment < known]
        dead += [{"X-API-Key": key} for moment, key in self.dead_keys[-20:] if moment < known]
        if dead:
            await self.asking.ask(
                "a dead credential", "GET", "/api/v1/auth/status", 401, **self.rng.choice(dead)
            )

    # --- sessions ---

    async def begin_session(self) -> None:
        answer = await self.asking.ask(
            "session", "POST", "/api/v1/sessions", 201, json={}, **bearer(self.access)
        )
        if answer is not None:
            session_id = answer.json()["session_id"]
            self.begun.append(session_id)
            self.sessions[session_id] = {"INITIALIZING"}

    async def move_session(self) -> None:
        session_id = await self.one_of({"INITIALIZING", "ACTIVE"})
        if session_id is None:
            return
        status = "ACTIVE" if self.sessions[session_id] == {"INITIALIZING"} else "COMPLETED"
        await self.move(session_id, status, "PATCH", {"status": status}, 200)

    async def terminate_session(self) -> None:
        session_id = await self.one_of({"INITIALIZING", "ACTIVE"})
        if session_id is not None and await self.move(session_id, "TERMINATED", "DELETE", None, 204):
            self.terminated.append(session_id)

    async def move(self, session_id: str, status: str, method: str, body: Any, right: int) -> bool:
        answer = await self.asking.ask(
            f"session {status}",
            method,
            f"/api/v1/sessions/{session_id}",
            right,
            json=body,
            **bearer(self.access),
        )
        if answer is None:
            self.sessions[session_id] |= {status}
        else:
            self.sessions[session_id] = {status}
        return answer is not None

    async def one_of(self, statuses: set[str]) -> str | None:
        """A session in one of these; one whose status is unclear is looked at first."""
        able = [each for each, known in self.sessions.items() if known & statuses]
        if not able:
            return None
        session_id = self.rng.choice(able)
        if len(self.sessions[session_id]) > 1:
            answer = await self.asking.ask(
                "session", "GET", f"/api/v1/sessions/{session_id}", 200, **bearer(self.access)
            )
            if answer is None:
                return None
            status = answer.json()["status"]
            if status not in self.sessions[session_id]:
                self.asking.wrong.append(
                    f"a session is {status} and should be one of {self.sessions[session_id]}"
                )
            self.sessions[session_id] = {status}
        return session_id if self.sessions[session_id] <= statuses else None

    # --- API keys ---

    async def make_key(self) -> None:
        if len(self.keys) >= MOST_KEYS:
            return
        answer = await self.asking.ask(
            "key", "POST", "/api/v1/users/me/api-keys", 201, json={"name": "k"}, **bearer(self.access)
        )
        if answer is not None:
            self.keys[answer.json()["key_id"]] = answer.json()["key"]

    async def use_key(self) -> None:
        if self.keys:
            key = self.rng.choice([*self.keys.values()])
            await self.asking.ask("use of a key", "GET", "/api/v1/auth/status", 200, **{"X-API-Key": key})

    async def revoke_key(self) -> None:
        unclear = bool(self.unclear_keys) and self.rng.random() < 0.5
        keys = self.unclear_keys if unclear else self.keys
        if not keys:
            return
        key_id = self.rng.choice([*keys])
        key = keys.pop(key_id)
        right = (204, 404) if unclear else (204,)
        answer = await self.asking.ask(
            "end of a key", "DELETE", f"/api/v1/users/me/api-keys/{key_id}", *right, **bearer(self.access)
        )
        if answer is None:
            self.unclear_keys[key_id] = key
        else:
            self.dead_keys.append((time.monotonic(), key))

    # --- what happens to the user ---

    async def change_role(self) -> None:
        role = "user" if "node_operator" in self.roles else "node_operator"
        answer = await self.asking.ask(
            "role", "PATCH", f"/api/v1/users/{self.user_id}", 200, json={"role": role}, **as_admin()
        )
        if answer is None:
            self.roles = self.roles | {role}
        else:
            if role not in self.roles:  # one that it may have had already ends no token
                self.dead.append((time.monotonic(), self.access))
            self.roles = {role}
        self.access = ""

    async def be_deleted(self) -> None:
        answer = await self.asking.ask("deletion", "DELETE", "/api/v1/users/me", 204, **bearer(self.access))
        if answer is None:
            self.perhaps_deleted = True
        else:
            self.dead.append((time.monotonic(), self.access))
            self.is_deleted()

    async def find_out(self) -> None:
        answer = await self.asking.ask(
            "deleted?", "GET", f"/api/v1/users/{self.user_id}", 200, 404, **as_admin()
        )
        if answer is not None:
            self.perhaps_deleted = False
            if answer.status_code == 404:
                self.is_deleted()

    def is_deleted(self) -> None:
        now = time.monotonic()
        self.deleted.append(self.user_id)
        self.dead_keys += [(now, key) for key in (*self.keys.values(), *self.unclear_keys.values())]
        self.dead_refresh_tokens += [*self.spent, self.refresh_token] if self.refresh_token else self.spent
        self.orphans |= self.sessions
        self.spent, self.keys, self.unclear_keys, self.sessions = [], {}, {}, {}
        self.user_id = self.access = self.refresh_token = ""
        self.roles = {"user"}

    # --- afterwards ---

    async def check(self) -> None:
        """Everything that was acknowledged is so. Nothing is killed any more."""
        asking = self.asking
        for session_id, statuses in (self.sessions | self.orphans).items():
            answer = await asking.surely(
                "session", "GET", f"/api/v1/sessions/{session_id}", 200, **as_admin()
            )
            assert answer.json()["status"] in statuses, (answer.json(), statuses)
        for key in self.keys.values():
            await asking.surely("key", "GET", "/api/v1/auth/status", 200, **{"X-API-Key": key})
        for _, key in self.dead_keys:
            await asking.surely("dead key", "GET", "/api/v1/auth/status", 401, **{"X-API-Key": key})
        for _, token in self.dead:
            await asking.surely("dead token", "GET", "/api/v1/auth/status", 401, **bearer(token))
        if self.perhaps_deleted:
            await self.find_out()
        for user_id in self.deleted:
            await asking.surely("deleted", "GET", f"/api/v1/users/{user_id}", 404, **as_admin())
        if self.user_id:
            answer = await asking.surely("user", "GET", f"/api/v1/users/{self.user_id}", 200, **as_admin())
            assert answer.json()["role"] in self.roles
            assert answer.json()["tron_address"] == self.wallet.address
        if self.refresh_token:
            # The last one that was acknowledged, and then once more with what came back.
            await self.refresh()
            assert self.access, "the last refresh token does not work"
            await asking.surely("fresh token", "GET", "/api/v1/auth/status", 200, **bearer(self.access))
        for token in self.dead_refresh_tokens:
            await asking.surely(
                "dead refresh token", "POST", "/api/v1/auth/refresh", 401, json={"refresh_token": token}
            )
        for token in self.spent[-5:]:
            # Unclear: spent or not, its login is whole, so it is one of two answers, and then dead.
            body = {"refresh_token": token}
            await asking.surely("spent refresh token", "POST", "/api/v1/auth/refresh", 200, 401, json=body)
            await asking.surely("spent refresh token", "POST", "/api/v1/auth/refresh", 401, json=body)
        self.access = self.refresh_token = ""
        await self.log_in()
        assert self.access, "there is no way to log in"


@dataclass
class Registered:
    """An email whose registration was acknowledged, or may have happened."""

    email: str
    sure: bool
    passwords: list[str] = field(default_factory=list)


async def register_people(asking: Asker, rng: random.Random) -> list[Registered]:
    """Emails one after the other, each three times at once; some change their password then."""
    known = []
    for number in range(REGISTRATIONS):
        each = Registered(f"person-{number}@example.org", sure=False, passwords=[f"the secret of {number}"])
        known.append(each)
        body = {"email": each.email, "password": each.passwords[0]}
        answers = await asyncio.gather(
            *(asking.ask("registration", "POST", "/api/v1/users", 201, 409, json=body) for _ in range(3))
        )
        statuses = [answer.status_code for answer in answers if answer is not None]
        each.sure = bool(statuses)  # a conflict is with one of the other two
        if statuses.count(201) > 1 or statuses == [409] * 3:
            asking.wrong.append(f"three registrations at once: {statuses}")
        if not each.sure:
            continue
        answer = await asking.ask("login with password", "POST", "/api/v1/auth/login", 200, json=body)
        if answer is None or rng.random() < 0.5:
            continue
        token = answer.json()["access_token"]
        change = {"password": f"the new secret of {number}", "current_password": each.passwords[0]}
        answer = await asking.ask("password", "PATCH", "/api/v1/users/me", 200, json=change, **bearer(token))
        each.passwords = [change["password"]] if answer is not None else [*each.passwords, change["password"]]
    return known


async def check_registered(asking: Asker, known: list[Registered]) -> None:
    async def check(each: Registered) -> None:
        found = await users_of(asking, email=each.email)
        assert len(found) == 1 if each.sure else len(found) <= 1, each
        statuses = []
        for password in each.passwords if found else []:
            login = {"email": each.email, "password": password}
            answer = await asking.surely("password", "POST", "/api/v1/auth/login", 200, 401, json=login)
            statuses.append(answer.status_code)
        assert statuses.count(200) == len(found), (each, statuses)

    await asyncio.gather(*(check(each) for each in known))


def kill_at_random(world: World, rng: random.Random) -> None:
    """The database and workers in turns."""
    for victim in ("database", "worker", "database", "worker", "database", "worker"):
        time.sleep(rng.uniform(0.3, 1.6))
        if victim == "worker":
            world.kill_a_worker(rng)
        else:
            world.mongo.kill()
            time.sleep(rng.uniform(0.1, 0.7))
            world.mongo.start()


def test_what_was_acknowledged_survives_kills_of_everything_but_redis(world: World, backend: Backend) -> None:
    world.wait_until_whole()
    over = threading.Event()

    async def live() -> tuple[Asker, list[Person], list[Registered]]:
        async with asker(world, random.Random(SEED), connections=PEOPLE + 3) as asking:
            people = [Person(asking, random.Random(SEED + number)) for number in range(PEOPLE)]
            lives = [asyncio.create_task(person.live(over.is_set)) for person in people]
            known = await register_people(asking, random.Random(SEED))
            await asyncio.gather(*lives)
            return asking, people, known

    with beside(live()) as running:
        try:
            time.sleep(1.0)
            kill_at_random(world, random.Random(SEED))
            time.sleep(1.5)
        finally:
            over.set()
        asking, people, known = running.result()
    print(f"seed {SEED}: {dict(asking.done)}, 503: {asking.away}, no answer: {asking.lost}")
    assert not asking.wrong, "\n".join(asking.wrong[:20])
    # Had the kills hit nothing, all of this would prove nothing.
    assert asking.lost
    assert asking.away + asking.lost >= 5
    assert all(asking.done[what] for what in NEEDED), asking.done
    world.wait_until_whole()

    async def look() -> None:
        async with asker(world, random.Random(SEED)) as asking:
            for person in people:
                person.asking = asking
            await asyncio.gather(check_registered(asking, known), *(person.check() for person in people))
            assert not asking.wrong, "\n".join(asking.wrong[:20])
            live = await users_of(asking)
            for name in ("email", "tron_address"):
                values = [user[name] for user in live if user[name]]
                assert len(values) == len(set(values)), f"two live users of one {name}"
            assert all(user["email"] or user["tron_address"] for user in live)
            let_claims_expire(world)
            await check_told(asking, people, backend)

    asyncio.run(look())


NEEDED = (
    "login",
    "refresh",
    "logout",
    "session",
    "session ACTIVE",
    "session TERMINATED",
    "key",
    "end of a key",
    "use of a key",
    "a dead credential",
    "role",
    "deletion",
    "registration",
)


def let_claims_expire(world: World) -> None:
    """A claim that died with its worker is taken up again after 30 seconds (session_outbox.py): let these be over."""
    moment = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    with pymongo.MongoClient[dict[str, Any]](world.mongo.in_database("lucid")) as client:
        client["lucid"]["sessions"].update_many(
            {"outbox_due_at": {"$gt": moment}}, {"$set": {"outbox_due_at": moment}}
        )


async def check_told(asking: Asker, people: list[Person], backend: Backend) -> None:
    """Session management was told of each acknowledged beginning and end, at least once and in their order."""
    begun = {session_id for person in people for session_id in person.begun}
    ended = {session_id for person in people for session_id in person.terminated}
    deadline = time.monotonic() + TOLD_SECONDS
    while True:
        told = told_of(backend.received)
        silent = [each for each in begun if "POST" not in told.get(each, {})]
        silent += [each for each in ended if "DELETE" not in told.get(each, {})]
        if not silent:
            break
        assert time.monotonic() < deadline, f"session management does not know of {silent}"
        await asyncio.sleep(0.2)
    for session_id, requests in told.items():
        assert next(iter(requests)) == "POST", f"{session_id} ended before it began"
        assert all(len(keys) == 1 for keys in requests.values()), "an entry has one key at every attempt"
        # Those too whose answer was lost: what was told is stored.
        await asking.surely("told", "GET", f"/api/v1/sessions/{session_id}", 200, **as_admin())


def told_of(received: list[Received]) -> dict[str, dict[str, set[str | None]]]:
    """By session: the methods in the order in which they first came, each with its idempotency keys."""
    told: dict[str, dict[str, set[str | None]]] = {}
    for request in list(received):
        if request.target == "/api/v1/sessions" and request.method == "POST":
            session_id = httpx.Response(200, content=request.body).json()["session_id"]
        elif request.target.startswith("/api/v1/sessions/") and request.method == "DELETE":
            session_id = request.target.rpartition("/")[2]
        else:
            continue
        told.setdefault(session_id, {}).setdefault(request.method, set()).add(
            request.field("idempotency-key")
        )
    return told
