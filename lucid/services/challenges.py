"""The texts that wallets sign: made here, kept in Redis for five minutes, spent once.

The text is CAIP-122's. Its domain is that of PUBLIC_ORIGIN and never the Host field: a wallet shows it to
its owner, who must see where the signature will be good. Redis rather than this worker's memory, because
any worker of any pod may be asked to spend what another one gave out.

Anyone may ask for a challenge of any address. So what is outstanding is bounded for each asker by itself, and only the
asker's own challenges go for it: nobody can push out those that the wallet's owner is about to sign. It may be signed
and spent from another network address than it was asked from.
"""

import datetime as dt
import hmac
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from lucid.core.rules.addresses import identifier
from lucid.core.security import nonces
from lucid.core.security.tron import CHAIN_ID, SIGN_IN
from lucid.core.security.tron import verify as verify_wallet
from lucid.core.validation import Moment
from lucid.errors import ErrorCode, rfc3339
from lucid.services.callers import utc
from lucid.services.stores import redis_border

STATEMENT: Final = "Sign in to Lucid. This costs nothing and sends no transaction."
LIFETIME_SECONDS: Final = 300
MAX_OUTSTANDING: Final = 512
"""Per wallet and asker (an IPv4 address, an IPv6 /64), the oldest go first; a spent one counts until it would have
expired. More than the public limit of 100 requests a minute lets an address have in five minutes: of those who share
the owner's, only somebody with an account, whose own limit is higher, could push a challenge out.
"""

_NONCE_LINE: Final = re.compile(r"^Nonce: ([0-9a-f]{32})$", re.MULTILINE)


class Challenge(msgspec.Struct, frozen=True):
    """What the caller gets: sign `message` as it is."""

    message: str
    nonce: str
    expires_at: Moment


class Challenges:
    """Outstanding challenges. `redis` is a client of redis.asyncio, for one server or a cluster.

    All methods raise GatewayError DEPENDENCY_AWAY.
    """

    def __init__(self, redis: Any, public_origin: str, wall_clock: Callable[[], float]) -> None:
        self._redis = redis
        self._origin = public_origin.rstrip("/")
        self._domain = urlsplit(public_origin).netloc
        self._wall_clock = wall_clock

    async def make(self, address: str, requester: str) -> Challenge:
        """A new challenge for this wallet, kept for five minutes. `requester` is the asker's whole network address."""
        now = self._wall_clock()
        nonce = nonces.challenge_nonce()
        issued = utc(now)
        expires_at = rfc3339(issued + dt.timedelta(seconds=LIFETIME_SECONDS))
        message = (
            f"{SIGN_IN.format(domain=self._domain)}\n{address}\n\n{STATEMENT}\n\n"
            f"URI: {self._origin}\nVersion: 1\nChain ID: {CHAIN_ID}\nNonce: {nonce}\n"
            f"Issued At: {rfc3339(issued)}\nExpiration Time: {expires_at}"
        )
        outstanding = _outstanding_key(address, requester)
        with redis_border():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.set(_key(address, nonce), message, ex=LIFETIME_SECONDS)
            pipeline.zremrangebyscore(outstanding, "-inf", now - LIFETIME_SECONDS)
            pipeline.zadd(outstanding, {nonce: now})
            pipeline.expire(outstanding, LIFETIME_SECONDS)
            pipeline.zrange(outstanding, 0, -MAX_OUTSTANDING - 1)
            excess = [_text(member) for member in (await pipeline.execute())[-1]]
            if excess:
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.delete(*(_key(address, old) for old in excess))
                pipeline.zrem(outstanding, *excess)
                await pipeline.execute()
        return Challenge(message, nonce, expires_at)

    async def find(self, address: str, message: str) -> str | None:
        """The nonce of the outstanding challenge of this address whose whole text is `message`, else None."""
        line = _NONCE_LINE.search(message)
        if line is None:
            return None
        with redis_border():
            stored = await self._redis.get(_key(address, line[1]))
        if stored is None or not hmac.compare_digest(_text(stored).encode(), message.encode()):
            return None
        return line[1]

    async def signed(self, address: str, message: str, signature: str) -> str | ErrorCode:
        """The nonce of the outstanding challenge that this wallet has signed, to be spent next; UNKNOWN_CHALLENGE (not
        given out, spent or expired, or changed in any character), or BAD_SIGNATURE, which spends nothing.
        """
        nonce = await self.find(address, message)
        if nonce is None:
            return ErrorCode.UNKNOWN_CHALLENGE
        return nonce if verify_wallet(address, message.encode(), signature) else ErrorCode.BAD_SIGNATURE

    async def spend(self, address: str, nonce: str) -> bool:
        """Spend a challenge; False where another login was faster. DEL counts what it removed: one caller
        wins.
        """
        # Among the outstanding ones it stays until it would have expired: who asked for it is not known here.
        with redis_border():
            return bool(await self._redis.delete(_key(address, nonce)))


# The braces are part of the keys: Redis Cluster puts what stands inside them into one slot, so that one DEL
# may name several. No MULTI: nothing here must be atomic but the one DEL that spends, and redis-py's client
# for clusters starts a thread for each command of a transaction.
def _key(address: str, nonce: str) -> str:
    return f"lucid:challenge:{{{address}}}:{nonce}"


def _outstanding_key(address: str, requester: str) -> str:
    return f"lucid:challenges:{{{address}}}:{identifier(requester)}"


def _text(value: str | bytes) -> str:
    """What Redis answered, whether or not the client decodes answers."""
    return value.decode() if isinstance(value, bytes) else value
