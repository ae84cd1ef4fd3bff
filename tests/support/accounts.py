"""The services of users and API keys as one worker has them: over the stores in memory, or over real ones.

Challenges, revocations and delays are the real ones on a real Redis, and time is `now`; only hashing is quick.
"""

import asyncio
import datetime as dt
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio

from lucid.core.exchange import ROLES, Principal, Role
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security import api_keys, nonces
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.core.security.roles import TIERS
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.documents import UserDocument
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.services.api_key_service import ApiKeyService
from lucid.services.callers import Caller
from lucid.services.challenges import Challenges
from lucid.services.login_delays import LoginDelays
from lucid.services.password_hashing import PasswordHashing
from lucid.services.revocations import Revocations
from lucid.services.unbroken import Unbroken
from lucid.services.user_proofs import UserProofs
from lucid.services.user_rules import effective_role
from lucid.services.user_service import UserService
from lucid.settings import TokenSettings
from tests.support.fake_repositories import (
    FakeApiKeyRepository,
    FakeRefreshTokenRepository,
    FakeUserRepository,
)
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet

EPOCH = 1_893_456_000.5
ORIGIN = "https://gateway.lucid.example"
SETTINGS = TokenSettings(secret_key="k" * 32)
CALLER = Caller("192.0.2.7", "request-1")
PASSWORD = "the password of before"

_numbers = itertools.count()


class QuickHasher:
    """Costs nothing and hides nothing; counts."""

    def __init__(self) -> None:
        self.hashed: list[str] = []
        self.verified: list[str] = []

    def hash_password(self, password: str) -> str:
        self.hashed.append(password)
        return quick_hash(password)

    def verify_password(self, password: str, stored: str) -> bool:
        self.verified.append(password)
        return stored == quick_hash(password)

    def needs_rehash(self, stored: str) -> bool:
        return False


def quick_hash(password: str) -> str:
    return f"quick:{password[::-1]}"


class Accounts:
    """`mongodb_uri` empty: the stores are in memory. After use: `close`."""

    def __init__(
        self,
        redis_uri: str,
        mongodb_uri: str = "",
        admins: frozenset[str] = frozenset(),
        registration: bool = True,
    ) -> None:
        self.now = EPOCH
        self.published: list[dict[str, Any]] = []
        self.connection: Connection | None = None
        self.users: Any = FakeUserRepository(self.utc_now)
        self.refresh_tokens: Any = FakeRefreshTokenRepository()
        self.api_keys: Any = FakeApiKeyRepository()
        if mongodb_uri:
            self.connection = Connection(mongodb_uri)
            indexes = Indexes(self.connection)
            self.users = UserRepository(self.connection, indexes, self.utc_now)
            self.refresh_tokens = RefreshTokenRepository(self.connection)
            self.api_keys = ApiKeyRepository(self.connection, indexes)
        self.redis = redis.asyncio.Redis.from_url(redis_uri, socket_timeout=2, socket_connect_timeout=2)
        self.hasher = QuickHasher()
        self.admins = admins
        self.issuer = TokenIssuer(SETTINGS)
        self.memory = TokenMemory(TokenVerifier(SETTINGS, self.wall_clock).verify, self.wall_clock, 1_000)
        self.keys = KeyMemory()
        self.challenges = Challenges(self.redis, ORIGIN, self.wall_clock)
        self.revocations = Revocations(self.redis, self.memory, self._publish, self.wall_clock, self.keys)
        passwords, unbroken = PasswordHashing(self.hasher), Unbroken()
        self.proofs = UserProofs(
            users=self.users,
            challenges=self.challenges,
            passwords=passwords,
            delays=LoginDelays(self.redis, self.wall_clock),
            unbroken=unbroken,
        )
        self.service = UserService(
            users=self.users,
            refresh_tokens=self.refresh_tokens,
            api_keys=self.api_keys,
            revocations=self.revocations,
            proofs=self.proofs,
            passwords=passwords,
            unbroken=unbroken,
            admin_addresses=admins,
            wall_clock=self.wall_clock,
            registration=registration,
        )
        self.key_service = ApiKeyService(
            api_keys=self.api_keys,
            users=self.users,
            revocations=self.revocations,
            admin_addresses=admins,
            wall_clock=self.wall_clock,
            unbroken=unbroken,
        )

    def wall_clock(self) -> float:
        return self.now

    def utc_now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.now, dt.UTC)

    async def _publish(self, body: dict[str, Any]) -> bool:
        self.published.append(body)
        return True

    async def add(
        self, role: str = "user", *, email: str | None = "", password: str | None = PASSWORD, **more: Any
    ) -> UserDocument:
        """A stored user, by default with an email of its own and `PASSWORD`."""
        number = next(_numbers)
        return await self.users.create(  # type: ignore[no-any-return]
            UserDocument(
                user_id=f"{role}-{number}",
                live=True,
                role=role,
                created_at=self.utc_now(),
                updated_at=self.utc_now(),
                email=f"u{number}@example.org" if email == "" else email,
                password=None if password is None else quick_hash(password),
                **more,
            )
        )

    async def stored(self, user_id: str) -> UserDocument:
        user = await self.users.find_by_id(user_id)
        assert isinstance(user, UserDocument)
        return user

    def login(self, user: UserDocument) -> str:
        """An access token of this user, as the login issues it."""
        after = 0.0 if user.tokens_revoked_at is None else user.tokens_revoked_at.timestamp()
        role = effective_role(user, self.admins)
        family = nonces.new_id()
        return self.issuer.issue(
            user_id=user.user_id, role=role, family=family, now=self.now, after=after
        ).token

    async def family(self, user: UserDocument) -> bytes:
        """A login of this user: the digest of its refresh token."""
        digest = api_keys.digest(nonces.refresh_token())
        now = self.utc_now()
        await self.refresh_tokens.start_family(
            nonces.new_id(), user.user_id, digest, now, now + dt.timedelta(days=7)
        )
        return digest

    async def family_lives(self, digest: bytes) -> bool:
        family = await self.refresh_tokens.find_family(digest, self.utc_now())
        return family is not None and family.revoked_at is None

    def judge(self, token: str) -> Any:
        return self.memory.principal(token, self.now)

    def principal(self, user: UserDocument, via: str = "token", role: str = "") -> Principal:
        """`user` as caller."""
        acts_as = ROLES[role] if role else effective_role(user, self.admins)
        return principal_of(user.user_id, acts_as, via)

    async def wallet_proof(self, wallet: Wallet) -> dict[str, str]:
        """The fields that prove `wallet` to be one's own."""
        challenge = await self.challenges.make(wallet.address, CALLER.address)
        return {
            "tron_address": wallet.address,
            "signature": wallet.sign(challenge.message),
            "message": challenge.message,
        }

    async def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        await self.redis.aclose()


def principal_of(user_id: str, role: Role, via: str = "token") -> Principal:
    return Principal(role, TIERS[role], user_id, user_id, via=via)  # type: ignore[arg-type]


@asynccontextmanager
async def accounts(redis_uri: str, mongodb_uri: str = "", **options: Any) -> AsyncIterator[Accounts]:
    """With an empty Redis."""
    made = Accounts(redis_uri, mongodb_uri, **options)
    try:
        await made.redis.flushall()
        yield made
    finally:
        await made.close()


def database_name() -> str:
    """A name that no other test has."""
    return f"accounts_{next(_numbers)}"


Test = Callable[[Accounts], Awaitable[None]]
Run = Callable[..., None]


def runner(redis_server: RedisChild, mongo: MongoChild | None = None) -> Run:
    """Runs a test in a world of its own: over stores in memory, or over a database."""

    def run(test: Test, **options: Any) -> None:
        async def main() -> None:
            uri = "" if mongo is None else mongo.in_database(database_name())
            async with accounts(redis_server.uri, uri, **options) as world:
                await test(world)

        asyncio.run(main())

    return run
