"""The identity part of several workers over one MongoDB and one Redis, put together as in the app."""

import datetime as dt
import hashlib
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import redis.asyncio

from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.refusals import ClaimHolder
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.transport import PoolTransport
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from lucid.services.auth_cluster import AuthCluster
from lucid.services.auth_service import AuthService
from lucid.services.callers import Caller
from lucid.services.challenges import Challenges
from lucid.services.cluster_logins import ClusterLogins
from lucid.services.credentials import Credentials
from lucid.services.login_delays import LoginDelays
from lucid.services.login_types import TokenPair
from lucid.services.password_hashing import PasswordHashing
from lucid.services.revocations import Publish, Revocations
from lucid.services.unbroken import Unbroken
from lucid.services.user_proofs import UserProofs
from lucid.services.user_service import UserService
from lucid.settings import TokenSettings
from tests.support.auth_cluster import ISSUER, AuthClusterServer
from tests.support.wallet import Wallet

EPOCH = 1_893_456_000.5
ORIGIN = "https://gateway.lucid.example"
SETTINGS = TokenSettings(secret_key="k" * 32)
CALLER = Caller("192.0.2.7", "request-1")

_numbers = itertools.count()


class Fleet:
    """What the workers share: the clock, the control channel (`cut` loses its messages), the limits."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.workers: list[Worker] = []
        self.published: list[dict[str, Any]] = []
        self.cut = False
        self.charged: list[tuple[str, str]] = []
        self.used_up: set[str] = set()

    def wall_clock(self) -> float:
        return self.now

    async def publish(self, body: dict[str, Any]) -> bool:
        body = msgspec.json.decode(msgspec.json.encode(body))
        self.published.append(body)
        for worker in () if self.cut else self.workers:
            worker.revocations.on_revocation(body)
        return not self.cut

    async def charge(self, limit_name: str, identifier: str, _exchange: ClaimHolder | None) -> None:
        self.charged.append((limit_name, identifier))
        if limit_name in self.used_up:
            raise GatewayError(ErrorCode.RATE_LIMITED)


class QuickHasher:
    """What stands for PBKDF2: as strict, at no cost, and it remembers what it was asked.

    A text that begins with `old` is due to be hashed anew.
    """

    def __init__(self) -> None:
        self.verified: list[str] = []
        """The stored texts that passwords were held against."""
        self.hashed = 0

    def hash_password(self, password: str, cost: str = "new") -> str:
        self.hashed += 1
        return f"{cost}${hashlib.sha256(password.encode()).hexdigest()}"

    def verify_password(self, password: str, stored: str) -> bool:
        self.verified.append(stored)
        return stored.partition("$")[2] == hashlib.sha256(password.encode()).hexdigest()

    def needs_rehash(self, stored: str) -> bool:
        return stored.startswith("old$")


class Worker:
    """One worker. With `cluster` that service issues the tokens."""

    def __init__(
        self,
        fleet: Fleet,
        mongodb_uri: str,
        redis_uri: str,
        settings: TokenSettings = SETTINGS,
        admins: frozenset[str] = frozenset(),
        publish: Publish | None = None,
        cluster: AuthClusterServer | None = None,
    ) -> None:
        self.fleet = fleet
        self.connection = Connection(mongodb_uri)
        self.redis = redis.asyncio.Redis.from_url(redis_uri, socket_timeout=2, socket_connect_timeout=2)
        indexes = Indexes(self.connection)
        issuers = () if cluster is None else (ISSUER,)
        verifier = TokenVerifier(settings, fleet.wall_clock, foreign_issuers=issuers)
        self.memory = TokenMemory(
            verifier.verify,
            fleet.wall_clock,
            1_000,
            settings.leeway_seconds,
        )
        self.keys = KeyMemory()
        self.users = UserRepository(self.connection, indexes, self._utc_now)
        self.refresh_tokens = RefreshTokenRepository(self.connection)
        self.api_keys = ApiKeyRepository(self.connection, indexes)
        self.challenges = Challenges(self.redis, ORIGIN, fleet.wall_clock)
        self.revocations = Revocations(
            self.redis, self.memory, publish or fleet.publish, fleet.wall_clock, self.keys
        )
        self.unbroken = Unbroken()
        self.hasher = QuickHasher()
        self.hashing = PasswordHashing(self.hasher)
        self.delays = LoginDelays(self.redis, fleet.wall_clock)
        self.pool: Pool | None = None
        self.cluster: AuthCluster | None = None
        if cluster is not None:
            self.pool = Pool(
                scheme="http",
                host="127.0.0.1",
                port=cluster.backend.port,
                max_connections=8,
                monotonic=time.monotonic,
            )
            transport = PoolTransport(
                Balancer("auth-service", [self.pool], time.monotonic), None, time.monotonic
            )
            self.cluster = AuthCluster(
                httpx.AsyncClient(transport=transport, base_url=cluster.url, trust_env=False),
                issuers=issuers,
                wall_clock=fleet.wall_clock,
            )
        self.credentials = Credentials(
            users=self.users,
            api_keys=self.api_keys,
            memory=self.memory,
            settings=settings,
            remembered=self.keys,
            admin_addresses=admins,
            cluster=self.cluster,
            wall_clock=fleet.wall_clock,
            monotonic=fleet.wall_clock,
        )
        self.cluster_logins: ClusterLogins | None = None
        if self.cluster is not None:
            self.cluster_logins = ClusterLogins(
                self.cluster,
                users=self.users,
                refresh_tokens=self.refresh_tokens,
                challenges=self.challenges,
                revocations=self.revocations,
                charge=fleet.charge,
                wall_clock=fleet.wall_clock,
            )
        self.auth = AuthService(
            users=self.users,
            refresh_tokens=self.refresh_tokens,
            challenges=self.challenges,
            revocations=self.revocations,
            hashing=self.hashing,
            delays=self.delays,
            issuer=TokenIssuer(settings),
            settings=settings,
            admin_addresses=admins,
            charge=fleet.charge,
            cluster=self.cluster_logins,
            unbroken=self.unbroken,
            wall_clock=fleet.wall_clock,
        )
        hashing_anew = PasswordHashing(self.hasher, most_at_once=1, most_waiting=16)
        self.user_service = UserService(
            users=self.users,
            refresh_tokens=self.refresh_tokens,
            api_keys=self.api_keys,
            revocations=self.revocations,
            proofs=UserProofs(
                users=self.users,
                challenges=self.challenges,
                passwords=hashing_anew,
                delays=self.delays,
                unbroken=self.unbroken,
            ),
            passwords=hashing_anew,
            unbroken=self.unbroken,
            admin_addresses=admins,
            wall_clock=fleet.wall_clock,
            registration=cluster is None,
        )

    async def login(self, wallet: Wallet) -> TokenPair:
        challenge = await self.auth.challenge(wallet.address, CALLER)
        return await self.auth.login_with_wallet(
            wallet.address, wallet.sign(challenge.message), challenge.message, None, CALLER
        )

    def judge(self, token: str) -> Any:
        return self.memory.principal(token, self.fleet.now)

    def caller(self, pair: TokenPair) -> Caller:
        """Who comes with this access token."""
        return Caller(CALLER.address, CALLER.request_id, token=pair.access_token)

    def _utc_now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.fleet.now, dt.UTC)

    async def close(self) -> None:
        if self.cluster is not None and self.pool is not None:
            await self.cluster.aclose()
            self.pool.close()
        self.connection.close()
        await self.redis.aclose()


@asynccontextmanager
async def fleet_of(
    count: int, mongodb_uri: str, redis_uri: str, **options: Any
) -> AsyncIterator[tuple[Fleet, list[Worker]]]:
    """`count` workers with an empty Redis."""
    fleet = Fleet()
    workers = [Worker(fleet, mongodb_uri, redis_uri, **options) for _ in range(count)]
    fleet.workers = workers
    try:
        await workers[0].redis.flushall()
        yield fleet, workers
    finally:
        for worker in workers:
            await worker.close()


def database_name() -> str:
    """A name that no other test has."""
    return f"identity_{next(_numbers)}"
