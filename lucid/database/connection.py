"""The connection to MongoDB: one pooled client per worker, and the border at which its errors become ours."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from bson.errors import BSONError
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)

from lucid.errors import ErrorCode, GatewayError, away

Document: TypeAlias = dict[str, Any]

MAX_POOL_SIZE: Final = 100
MIN_POOL_SIZE: Final = 10
MAX_IDLE_MS: Final = 45_000
SERVER_SELECTION_MS: Final = 5_000
WAIT_QUEUE_MS: Final = 5_000
# Without a bound a server that accepts and never answers (a paused machine) would hold its callers for ever.
SOCKET_MS: Final = 10_000

FAIL_FAST_SECONDS: Final = 2.0
"""For so long after a failed server selection every call fails at once. Else each login during an outage
would hold its connection for the five seconds of a selection that is bound to fail.
"""

_AS_IT_IS: Final[Mapping[str, str]] = {}
_DUPLICATE: Final = 11_000
_TOO_MUCH: Final = frozenset({15, 10_334})
"""The server's codes for a document that is nested too deeply (Overflow) and one that is too large."""

_log = logging.getLogger(__name__)


class Connection:
    """A pool of connections to MongoDB for one worker.

    Make it in the worker, inside its event loop; it connects by itself in the background, so it can be made
    while MongoDB is down. Writes are acknowledged by a majority and by its journal: an answered login
    survives a crash. The database is the one that the URI names, else `lucid`; where the URI sets one of the
    sizes or times above, the value above holds. After use: `close`.
    """

    def __init__(self, uri: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._retry_at = 0.0
        self._client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
            uri,
            maxPoolSize=MAX_POOL_SIZE,
            minPoolSize=MIN_POOL_SIZE,
            maxIdleTimeMS=MAX_IDLE_MS,
            serverSelectionTimeoutMS=SERVER_SELECTION_MS,
            connectTimeoutMS=SERVER_SELECTION_MS,
            waitQueueTimeoutMS=WAIT_QUEUE_MS,
            socketTimeoutMS=SOCKET_MS,
            w="majority",
            journal=True,
            tz_aware=True,
            appname="lucid-api-gateway",
        )
        self.database: AsyncIOMotorDatabase[Document] = self._client.get_default_database("lucid")

    async def ping(self, timeout_seconds: float = 2.0) -> bool:
        """Whether MongoDB answers within `timeout_seconds`. Never raises; a yes ends a phase of failing
        fast.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._client.admin.command("ping")
        except (TimeoutError, PyMongoError):
            return False
        self._retry_at = 0.0
        return True

    def close(self) -> None:
        """Close the pool. Calls in flight fail."""
        self._client.close()

    @contextmanager
    def border(self, api_names: Mapping[str, str] = _AS_IT_IS) -> Iterator[None]:
        """Around every call to the driver: its errors leave as GatewayError.

        CONFLICT where a unique index says no, its `fields` named as `api_names` translates the index's;
        BAD_FIELD for values that MongoDB cannot store; DEPENDENCY_AWAY for the rest.
        """
        if self._monotonic() < self._retry_at:
            raise away("mongodb")
        try:
            yield
        except (BSONError, OverflowError, RecursionError, UnicodeError) as error:
            # Integers beyond 64 bits, lone surrogates, NUL in a name, and so on: JSON can say what BSON cannot.
            raise _unstorable() from error
        except WaitQueueTimeoutError as error:
            # The pool is full, the server is not away.
            _log.warning("mongodb: no free connection in the pool")
            raise away("mongodb") from error
        except ConnectionFailure as error:
            # One broken connection is no reason to fail others; that no server could be found is.
            if isinstance(error, ServerSelectionTimeoutError):
                self._retry_at = self._monotonic() + FAIL_FAST_SECONDS
            _log.warning("mongodb is away: %s", type(error).__name__)
            raise away("mongodb") from error
        except PyMongoError as error:
            key = _duplicated(error)
            if key is not None:
                fields = sorted(api_names.get(name, name) for name in key)
                raise GatewayError(ErrorCode.CONFLICT, details={"fields": fields}) from error
            if isinstance(error, OperationFailure) and error.code in _TOO_MUCH:
                raise _unstorable() from error
            # Not authorised, not enough members for a majority, a full disk: it is there and does not serve
            # us.
            _log.exception("mongodb refused an operation")
            raise away("mongodb") from error


def _duplicated(error: PyMongoError) -> Mapping[str, Any] | None:
    """The pattern of the unique index that says no; None: it is something else."""
    details: Any = error.details if isinstance(error, OperationFailure) else None
    if isinstance(error, BulkWriteError):
        details = (error.details.get("writeErrors") or [{}])[0]
        if details.get("code") != _DUPLICATE:
            return None
    elif not isinstance(error, DuplicateKeyError):
        return None
    return (details or {}).get("keyPattern") or {}


def _unstorable() -> GatewayError:
    return GatewayError(ErrorCode.BAD_FIELD, "A value is too large, too deep or not text that can be stored")
