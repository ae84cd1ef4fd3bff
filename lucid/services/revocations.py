"""Which access tokens and API keys are dead before their time, told to every worker.

A revocation is applied to this worker's memory, kept in Redis for workers that start later, and published
over the control channel to those that run. It lives until the tokens that it names would have expired
anyway.

*While Redis is away* nothing of it is lost but with this process: the channel keeps the message, and what could
not be stored is stored with the next revocation, with the next message that comes (Redis is back then), or when
everything is loaded anew. So `revoke` succeeds without Redis.

*In MongoDB first*: whoever revokes has written it there, in the login's row, the key's or the user's. That is what a
worker reads which Redis does not reach (revocation_watch.py), and what is left should Redis lose everything.

*Stored first, then published*: a worker that starts takes its place in the channel, then loads what is stored.
What it does not find was stored later, so its message comes later still. What was stored late is published
again for the same reason; applying one twice changes nothing.
"""

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

import msgspec

from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import LONGEST_LIFE_MINUTES, REVOCATION_AHEAD_SECONDS
from lucid.database.documents import UserDocument, milliseconds
from lucid.errors import GatewayError
from lucid.services.callers import utc
from lucid.services.stores import redis_border

KEY: Final = "lucid:revocations"
"""A sorted set: the message as JSON, its `until` as the score."""
USERS_KEY: Final = "lucid:revoked_users"
"""A sorted set: user id, `issued_before` as the score. One entry a user: these stay for a year, and a user may
end all logins as often as they like.
"""
USER_SECONDS: Final = LONGEST_LIFE_MINUTES * 60.0 + 3_600.0
"""How long all tokens of a user stay revoked: the longest life, and an hour for leeway and clocks."""
KEY_SECONDS: Final = 60.0
MOST_UNKEPT: Final = 1_000
_BEHIND: Final = dt.timedelta(milliseconds=2)
"""A token of whoever has read `tokens_revoked_at` is issued one millisecond behind it, or later."""

Publish = Callable[[dict[str, Any]], Awaitable[bool]]
CountUntold = Callable[[], Awaitable[None]]

_log = logging.getLogger(__name__)


class Revocation(msgspec.Struct, frozen=True, omit_defaults=True):
    """The message: one of `family`, `token`, `user` (with `issued_before`), `key` (the digest in hex). Times are
    seconds since the epoch.
    """

    until: float
    family: str = ""
    token: str = ""
    key: str = ""
    user: str = ""
    issued_before: float = 0.0


def of_user(user_id: str, issued_before: float) -> Revocation:
    """All tokens of a user that were issued at `issued_before` or earlier, those minted by hand too."""
    return Revocation(user=user_id, issued_before=issued_before, until=issued_before + USER_SECONDS)


def of_key(digest: bytes, now: float) -> Revocation:
    """An API key that was withdrawn. Workers remember an answer about a key for seconds, so it need not last."""
    return Revocation(key=digest.hex(), until=now + KEY_SECONDS)


def user_moment(now: float) -> float:
    """Up to when a user's tokens are dead, if something about the user changes at `now`."""
    return now + REVOCATION_AHEAD_SECONDS


def dead_until(user: UserDocument | None, now: float) -> dt.datetime:
    """Up to when the user's tokens die by a change at `now`, as it is stored. None: nobody is stored.

    Beyond the moment of the change before, although that may lie ahead of this worker's clock: a token of the time
    between the two was issued just behind it.
    """
    moment = milliseconds(utc(user_moment(now)))
    if user is None or user.tokens_revoked_at is None:
        return moment
    return max(moment, user.tokens_revoked_at + _BEHIND)


class Revocations:
    """Applies, keeps and publishes revocations.

    `publish` sends a message to all workers, or keeps it until it can and says False; it does not raise. Each worker,
    this one included, hands it to `on_revocation`. A new worker, and one that has missed messages, calls
    `load_revocations`.
    """

    def __init__(
        self,
        redis: Any,
        memory: TokenMemory,
        publish: Publish,
        wall_clock: Callable[[], float],
        keys: KeyMemory | None = None,
        count_untold: CountUntold | None = None,
    ) -> None:
        """`count_untold` is called where `publish` says False, for those whom Redis reaches while it does not reach
        us; it may raise GatewayError.
        """
        self._redis = redis
        self._memory = memory
        self._count_untold = count_untold
        self._keys = keys if keys is not None else KeyMemory()
        self._publish = publish
        self._wall_clock = wall_clock
        self._unkept: dict[Revocation, None] = {}
        """Not known to be stored; the oldest first."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: asyncio.Task[None] | None = None

    async def revoke(self, *revocations: Revocation) -> None:
        """Refuse these here at once, and on all workers as soon as Redis answers. Raises nothing."""
        for revocation in revocations:
            self.apply(revocation)
            self._unkept[revocation] = None
        while len(self._unkept) > MOST_UNKEPT:
            _log.error("too many revocations wait for Redis, the oldest reaches no worker that starts later")
            del self._unkept[next(iter(self._unkept))]
        # It is spread although its caller may leave meanwhile.
        await asyncio.shield(self._start(self._spread(revocations)))

    def on_revocation(self, body: Mapping[str, Any]) -> None:
        """A message from the control channel."""
        try:
            revocation = msgspec.convert(body, Revocation)
        except msgspec.ValidationError as error:
            _log.warning("a revocation was not understood: %s", error)
            return
        self.apply(revocation)
        if self._unkept and (self._again is None or self._again.done()):
            self._again = self._start(self._spread(()))

    async def load_revocations(self) -> None:
        """Store what waits, then take all active revocations from Redis. Raises DEPENDENCY_AWAY."""
        for late in await self._keep():
            await self._publish(msgspec.to_builtins(late))
        now = self._wall_clock()
        with redis_border():
            kept = await self._redis.zrangebyscore(KEY, now, "+inf")
            users = await self._redis.zrangebyscore(USERS_KEY, now - USER_SECONDS, "+inf", withscores=True)
        for text in kept:
            try:
                body = msgspec.json.decode(text)
            except msgspec.DecodeError:
                _log.warning("a stored revocation was not understood")
                continue
            self.on_revocation(body)
        for user_id, issued_before in users:
            self.apply(of_user(user_id if isinstance(user_id, str) else user_id.decode(), issued_before))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name="lucid revocations")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _spread(self, revocations: tuple[Revocation, ...]) -> None:
        """Store all that waits, then publish it; where Redis is away, publish `revocations` at least."""
        try:
            late = await self._keep()
        except GatewayError:
            late = []
        told = [
            await self._publish(msgspec.to_builtins(revocation))
            for revocation in dict.fromkeys([*late, *revocations])
        ]
        if not all(told) and self._count_untold is not None:
            with contextlib.suppress(GatewayError):
                await self._count_untold()

    async def _keep(self) -> list[Revocation]:
        """Store what waits, and say what that was. Raises DEPENDENCY_AWAY, and all of it waits on."""
        waiting = list(self._unkept)
        if not waiting:
            return []
        by_moment = sorted(waiting, key=lambda each: each.issued_before)
        users = {each.user: each.issued_before for each in by_moment if each.user}
        others = {msgspec.json.encode(each): each.until for each in waiting if not each.user}
        now = self._wall_clock()
        with redis_border():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zremrangebyscore(KEY, "-inf", now)
            pipeline.zremrangebyscore(USERS_KEY, "-inf", now - USER_SECONDS)
            if others:
                pipeline.zadd(KEY, others)
            if users:
                # GT: of two workers that revoke at once, the later moment stays.
                pipeline.zadd(USERS_KEY, users, gt=True)
            await pipeline.execute()
        for each in waiting:
            self._unkept.pop(each, None)
        return waiting

    def apply(self, revocation: Revocation) -> None:
        """Refuse this here, at once."""
        if revocation.family:
            self._memory.revoke_family(revocation.family, revocation.until)
        if revocation.token:
            self._memory.revoke_token(revocation.token, revocation.until)
        if revocation.user:
            self._memory.revoke_user(revocation.user, revocation.issued_before, revocation.until)
            # Their role may have changed, or they are gone: their keys act as them.
            self._keys.forget_user(revocation.user)
        if revocation.key:
            with contextlib.suppress(ValueError):
                self._keys.forget(bytes.fromhex(revocation.key))
