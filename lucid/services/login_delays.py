"""Guessing passwords gets slower with every failure: per account and per address, in Redis, so for all workers.

    of an account      5 failures are free, each further one brings a wait of 1, 2, 4 ... at most 60 seconds
    of an address     20 failures are free, each further one brings a wait of 1, 2, 4 ... at most 300 seconds

A count is forgotten 15 minutes after its last failure. The rules:

1. An attempt is counted as a failure *before* the password is looked at, in the same atomic step that looks at the
   wait, and taken back when it succeeds. Were failures counted afterwards, a hundred guesses at once would all find
   the count at zero.
2. An attempt that comes during a wait is refused and changes nothing: it does not lengthen the wait. So the waits
   of one key never overlap, and guesses beyond the free ones come one at a time.
3. A success clears the account's count; the address gets its own attempt back and no more: else whoever has one
   account could clear the count of an address between the guesses at others.
4. An account that does not exist is counted as one that does, so a wait tells nothing.
5. Who goes on guessing from many addresses keeps an account waiting for as long as they like, since each end of a wait
   may be theirs; nothing that counts by the account alone could tell its owner from them. So an address from which the
   right password came within 30 days has a count of its own for that account, with the same waits: guesses from
   elsewhere do not keep it out. Whoever comes from a new address meanwhile has to wait with the others. Logins with a
   wallet, and logins that are there already, are kept out by nothing here.
6. Without Redis nobody can say whether there is a wait: DEPENDENCY_AWAY, not a free guess.

The time is Redis' own, one clock for all workers. An email is in no key, only its SHA-256.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from lucid.core.rules.addresses import identifier
from lucid.core.validation import email_key
from lucid.errors import ErrorCode, GatewayError
from lucid.services.stores import redis_border

FREE_ACCOUNT_FAILURES: Final = 5
MOST_ACCOUNT_SECONDS: Final = 60
FREE_ADDRESS_FAILURES: Final = 20
MOST_ADDRESS_SECONDS: Final = 300
FORGOTTEN_SECONDS: Final = 900
KNOWN_SECONDS: Final = 30 * 86_400
"""How long an account knows an address again."""

# Each script has one key, so that Redis Cluster knows where to run it. ARGV: a moment in milliseconds or nothing,
# after how many a count is forgotten, and then the wait after the first failure, after the second ... The answer:
# how long to wait; 0, when this attempt was counted, with its moment and that of the failure before it.
_COUNT: Final = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local kept = redis.call('HMGET', KEYS[1], 'failures', 'at')
local failures, at = tonumber(kept[1]) or 0, tonumber(kept[2]) or 0
if now - at >= tonumber(ARGV[2]) then failures = 0 end
if failures > 0 then
  local wait = tonumber(ARGV[2 + math.min(failures, #ARGV - 2)])
  if at > now then
    -- The clock was set back. The wait begins anew instead of lasting as long as that.
    at = now
    redis.call('HSET', KEYS[1], 'at', at)
  end
  if now - at < wait then return {wait - (now - at), 0, 0} end
end
redis.call('HSET', KEYS[1], 'failures', failures + 1, 'at', now)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {0, now, at}
"""

# ARGV: the two moments that counting answered. The wait is that of before, unless another attempt came since.
_TAKE_BACK: Final = """
local kept = redis.call('HMGET', KEYS[1], 'failures', 'at')
local failures = tonumber(kept[1]) or 0
if failures <= 1 then return redis.call('DEL', KEYS[1]) end
redis.call('HSET', KEYS[1], 'failures', failures - 1)
if tonumber(kept[2]) == tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'at', ARGV[2]) end
return 1
"""


def waits_seconds(free: int, most_seconds: int) -> tuple[int, ...]:
    """The wait after the first failure, after the second ...; the last one stands for all that follow."""
    waits = [0] * free
    while not waits or waits[-1] < most_seconds:
        waits.append(min(2 ** (len(waits) - free), most_seconds))
    return tuple(waits)


class _Counted(msgspec.Struct, frozen=True):
    key: str
    moment: int
    earlier: int


class Attempt(msgspec.Struct, frozen=True):
    """One login under way, counted as failed until `LoginDelays` is told otherwise."""

    account: _Counted
    address: _Counted
    known_key: str
    """Is there once the password was right from this address."""


class LoginDelays:
    """One per worker. `redis` is a client of redis.asyncio, for one server or a cluster.

    `wall_clock`, seconds since the epoch, is for tests; without it the time is Redis' own.
    """

    def __init__(self, redis: Any, wall_clock: Callable[[], float] | None = None) -> None:
        self._redis = redis
        self._wall_clock = wall_clock
        self._account_waits = _arguments(waits_seconds(FREE_ACCOUNT_FAILURES, MOST_ACCOUNT_SECONDS))
        self._address_waits = _arguments(waits_seconds(FREE_ADDRESS_FAILURES, MOST_ADDRESS_SECONDS))

    async def admit(self, email: str, address: str) -> Attempt:
        """Count an attempt as failed. `address` is the caller's whole one.

        Call `succeeded` when the password was right, `withdrawn` when it was never looked at, nothing when it was
        wrong or the caller left meanwhile. Raises RATE_LIMITED with `{"retry_after_seconds"}` and Retry-After while
        there is a wait, DEPENDENCY_AWAY.
        """
        asker = identifier(address)
        counted = await self._count(f"address:{asker}", self._address_waits)
        whose = f"account:{hashlib.sha256(email_key(email).encode()).hexdigest()}"
        own = f"{whose}:{asker}"
        known_key = f"lucid:login_known:{{{own}}}"
        try:
            with redis_border():
                is_known = await self._redis.exists(known_key)
            account = await self._count(own if is_known else whose, self._account_waits)
        except GatewayError:
            await self._take_back(counted)
            raise
        return Attempt(account, counted, known_key)

    async def succeeded(self, attempt: Attempt) -> None:
        """Forget the account's failures and this attempt of the address, and know the address again. Raises nothing:
        where Redis went away meanwhile, a login that is good remains so, and its counts are forgotten by themselves.
        """
        try:
            with redis_border():
                await self._redis.delete(attempt.account.key)
                await self._redis.set(attempt.known_key, 1, ex=KNOWN_SECONDS)
        except GatewayError:
            pass
        await self._take_back(attempt.address)

    async def withdrawn(self, attempt: Attempt) -> None:
        """Take the attempt back, on both sides. Raises nothing."""
        await self._take_back(attempt.account)
        await self._take_back(attempt.address)

    async def _count(self, whose: str, waits: tuple[int, ...]) -> _Counted:
        key = f"lucid:login_failures:{{{whose}}}"
        now = "" if self._wall_clock is None else str(int(self._wall_clock() * 1_000))
        with redis_border():
            # The text each time and no EVALSHA: a kilobyte beside a PBKDF2, and no script to load again.
            wait_ms, moment, earlier = await self._redis.eval(
                _COUNT, 1, key, now, FORGOTTEN_SECONDS * 1_000, *waits
            )
        if wait_ms:
            seconds = math.ceil(wait_ms / 1_000)
            raise GatewayError(
                ErrorCode.RATE_LIMITED,
                "Too many failed logins; wait before the next",
                details={"retry_after_seconds": seconds},
                fields=(("Retry-After", str(seconds)),),
            )
        return _Counted(key, moment, earlier)

    async def _take_back(self, counted: _Counted) -> None:
        try:
            with redis_border():
                await self._redis.eval(_TAKE_BACK, 1, counted.key, counted.moment, counted.earlier)
        except GatewayError:
            pass  # It is logged, and the count is forgotten by itself.


def _arguments(waits: tuple[int, ...]) -> tuple[int, ...]:
    """In milliseconds, Redis' scale."""
    return tuple(seconds * 1_000 for seconds in waits)
