"""Challenges and revocations on Redis Cluster, where the keys of one command lie in one slot."""

import asyncio

import pytest

from lucid.core.rules.tokens import TokenMemory
from lucid.core.wire.redis_link import RedisLink
from lucid.errors import ErrorCode
from lucid.services import challenges as module
from lucid.services.challenges import Challenges
from lucid.services.revocations import Revocation, Revocations
from tests.support.stores import ClusterOfChildren
from tests.support.wallet import Wallet
from tests.support.workers import ORIGIN, Fleet


def test_challenges_and_revocations_on_a_cluster(
    cluster: ClusterOfChildren, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OUTSTANDING", 3)
    fleet = Fleet()

    async def main() -> None:
        link = RedisLink(cluster.uri)
        client = link.commands
        challenges = Challenges(client, ORIGIN, fleet.wall_clock)
        address = Wallet.generate().address
        first = await challenges.make(address, "192.0.2.1")
        made = []
        for _ in range(5):
            fleet.now += 0.01
            made.append(await challenges.make(address, "2001:db8::1"))
        found = [await challenges.find(address, challenge.message) for challenge in made]
        assert found == [None, None] + [challenge.nonce for challenge in made[2:]]
        assert await challenges.spend(address, made[4].nonce)
        assert not await challenges.spend(address, made[4].nonce)
        assert await challenges.spend(address, first.nonce)

        memory = TokenMemory(lambda _: ErrorCode.BAD_CREDENTIAL, fleet.wall_clock, 10)
        revocations = Revocations(client, memory, fleet.publish, fleet.wall_clock)
        await revocations.revoke(Revocation(family="f", until=fleet.now + 10))
        other = TokenMemory(lambda _: ErrorCode.BAD_CREDENTIAL, fleet.wall_clock, 10)
        await Revocations(client, other, fleet.publish, fleet.wall_clock).load_revocations()
        assert other.revocations == 1
        await link.close()

    asyncio.run(main())
