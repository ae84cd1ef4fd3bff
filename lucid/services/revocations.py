"""Which access tokens are dead before their time, told to every worker.

A revocation is applied to this worker's memory, kept in Redis for workers that start later, and published
over the control channel to those that run. It lives until the tokens that it names would have expired
anyway.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from lucid.core.rules.tokens import TokenMemory
from lucid.services.stores import redis_border

KEY: Final = "lucid:revocations"
"""A sorted set: the message as JSON, its `until` as the score."""

Publish = Callable[[dict[str, Any]], Awaitable[None]]

_log = logging.getLogger(__name__)


class Revocation(msgspec.Struct, frozen=True, omit_defaults=True):
    """The message: one of `family`, `token`, `user` (with `issued_before`). Times are seconds since the
    epoch.
    """

    until: float
    family: str = ""
    token: str = ""
    user: str = ""
    issued_before: float = 0.0


class Revocations:
    """Applies, keeps and publishes revocations.

    `publish` sends a message to all workers; each of them, this one included, hands it to `on_revocation`.
    A new worker, and one that has missed messages, calls `load_revocations`. Applying one twice changes
    nothing.
    """

    def __init__(
        self, redis: Any, memory: TokenMemory, publish: Publish, wall_clock: Callable[[], float]
    ) -> None:
        self._redis = redis
        self._memory = memory
        self._publish = publish
        self._wall_clock = wall_clock

    async def revoke(self, *revocations: Revocation) -> None:
        """Make these known to all workers. Raises DEPENDENCY_AWAY, with this worker's own memory changed
        already.
        """
        for revocation in revocations:
            self._apply(revocation)
        with redis_border():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zremrangebyscore(KEY, "-inf", self._wall_clock())
            pipeline.zadd(
                KEY, {msgspec.json.encode(revocation): revocation.until for revocation in revocations}
            )
            await pipeline.execute()
        for revocation in revocations:
            body = msgspec.to_builtins(revocation)
            with redis_border():
                await self._publish(body)

    def on_revocation(self, body: Mapping[str, Any]) -> None:
        """A message from the control channel."""
        try:
            revocation = msgspec.convert(body, Revocation)
        except msgspec.ValidationError as error:
            _log.warning("a revocation was not understood: %s", error)
            return
        self._apply(revocation)

    async def load_revocations(self) -> None:
        """Take all active revocations from Redis. Raises DEPENDENCY_AWAY."""
        with redis_border():
            kept = await self._redis.zrangebyscore(KEY, self._wall_clock(), "+inf")
        for text in kept:
            try:
                body = msgspec.json.decode(text)
            except msgspec.DecodeError:
                _log.warning("a stored revocation was not understood")
                continue
            self.on_revocation(body)

    def _apply(self, revocation: Revocation) -> None:
        if revocation.family:
            self._memory.revoke_family(revocation.family, revocation.until)
        if revocation.token:
            self._memory.revoke_token(revocation.token, revocation.until)
        if revocation.user:
            self._memory.revoke_user(revocation.user, revocation.issued_before, revocation.until)
