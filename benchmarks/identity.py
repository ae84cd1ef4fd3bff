"""What identity costs on one core: a wallet's login with stores that cost nothing, and a token that is known.

`python -m benchmarks.identity`: the service alone, without HTTP. The stores are the fakes of the tests, so that what is
measured is ours: the challenge's text, the signature (TRON, secp256k1), the tokens.
"""

import argparse
import asyncio
import time
from typing import Any, cast

from benchmarks.micro import best
from lucid.core.exchange import Principal, Role
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.services.auth_service import AuthService
from lucid.services.callers import Caller
from lucid.services.challenges import Challenges
from lucid.services.revocations import Revocations
from lucid.services.unbroken import Unbroken
from lucid.settings import TokenSettings
from tests.support.fake_repositories import (
    FakeRefreshTokenRepository,
    FakeUserRepository,
)
from tests.support.wallet import Wallet

SETTINGS = TokenSettings(secret_key="k" * 32)
CALLER = Caller("192.0.2.1", "request")
WALLETS = 50


class FakeRedis:
    """The few commands that challenges need, over a dict."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._answers: list[Any] = []

    def pipeline(self, transaction: bool) -> "FakeRedis":
        self._answers = []
        return self

    def set(self, key: str, text: str, ex: int) -> None:
        self._texts[key] = text
        self._answers.append(True)

    async def delete(self, key: str) -> int:
        return int(self._texts.pop(key, None) is not None)

    def zrange(self, *_: object) -> None:
        self._answers.append([])

    def _nothing(self, *_: object, **__: object) -> None:
        self._answers.append(0)

    zremrangebyscore = zadd = expire = _nothing

    async def execute(self) -> list[Any]:
        return self._answers

    async def get(self, key: str) -> str | None:
        return self._texts.get(key)


async def wallet_logins(count: int) -> tuple[float, float]:
    """Microseconds of the process's time per challenge and per login."""
    redis = FakeRedis()
    memory = TokenMemory(TokenVerifier(SETTINGS).verify, time.time, 100_000)

    async def publish(_: dict[str, Any]) -> bool:
        return True

    async def charge(*_: object) -> None: ...

    service = AuthService(
        users=cast("Any", FakeUserRepository()),
        refresh_tokens=cast("Any", FakeRefreshTokenRepository()),
        challenges=Challenges(redis, "https://gateway.example", time.time),
        revocations=Revocations(redis, memory, publish, time.time),
        hashing=cast("Any", None),
        delays=cast("Any", None),
        issuer=TokenIssuer(SETTINGS),
        settings=SETTINGS,
        admin_addresses=frozenset(),
        charge=charge,
        unbroken=Unbroken(),
    )
    wallets = [Wallet.generate() for _ in range(WALLETS)]
    began = time.process_time()
    given = [await service.challenge(wallets[n % WALLETS].address, CALLER) for n in range(count)]
    challenged = time.process_time() - began
    signed = [wallets[n % WALLETS].sign(challenge.message) for n, challenge in enumerate(given)]
    began = time.process_time()
    for n, (challenge, signature) in enumerate(zip(given, signed, strict=True)):
        await service.login_with_wallet(
            wallets[n % WALLETS].address, signature, challenge.message, None, CALLER
        )
    return challenged / count * 1e6, (time.process_time() - began) / count * 1e6


def known_token(repeats: int) -> float:
    """Microseconds for a token that was verified before."""
    memory = TokenMemory(TokenVerifier(SETTINGS).verify, time.time, 100_000)
    token = TokenIssuer(SETTINGS).issue(user_id="u", role=Role.USER, family="f", now=time.time()).token
    now = time.monotonic()
    assert isinstance(memory.principal(token, now), Principal)
    return best(lambda: memory.principal(token, now), 100_000, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logins", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rounds = [asyncio.run(wallet_logins(options.logins)) for _ in range(options.repeats)]
    challenge, login = (min(times) for times in zip(*rounds, strict=True))
    print(f"challenge                   {challenge:8.1f} µs")
    print(f"login with a wallet         {login:8.1f} µs   {1e6 / login:8.0f} logins/s")
    print(
        f"both                        {challenge + login:8.1f} µs   {1e6 / (challenge + login):8.0f} logins/s"
    )
    print(f"a known token               {known_token(options.repeats):8.2f} µs")


if __name__ == "__main__":
    main()
