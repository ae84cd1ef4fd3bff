"""The indexes that the repositories rely on, made once MongoDB is there."""

import asyncio
import logging
from typing import Any, Final

from lucid.database.connection import Connection
from lucid.errors import GatewayError

RETRY_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)

# Unique among *live* users only, and only where the field is there: two partial indexes. `live: true`
# rather than `deleted_at: null`, since a partial filter may ask for $exists: true but not for false.
_INDEXES: Final[tuple[tuple[str, list[tuple[str, int]], dict[str, Any]], ...]] = (
    (
        "users",
        [("tron_address", 1)],
        {
            "name": "live_tron_address",
            "unique": True,
            "partialFilterExpression": {"live": True, "tron_address": {"$exists": True}},
        },
    ),
    (
        "users",
        [("email", 1)],
        {
            "name": "live_email",
            "unique": True,
            "partialFilterExpression": {"live": True, "email": {"$exists": True}},
        },
    ),
    ("users", [("created_at", -1), ("_id", 1)], {"name": "newest_first"}),
    ("refresh_tokens", [("user_id", 1)], {"name": "of_user"}),
    ("refresh_tokens", [("expires_at", 1)], {"name": "expiry", "expireAfterSeconds": 0}),
    ("api_keys", [("digest", 1)], {"name": "digest", "unique": True}),
    ("api_keys", [("user_id", 1)], {"name": "of_user"}),
)


class Indexes:
    """Makes the indexes, once per worker; creating one that exists does nothing.

    Operations whose correctness rests on a unique index call `ensure` first. `keep_trying` is the
    background task that makes them at start, so that usually nobody waits.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()
        self._made = False

    @property
    def made(self) -> bool:
        return self._made

    async def ensure(self) -> None:
        """Return once all indexes exist. Raises GatewayError DEPENDENCY_AWAY or CONFLICT (duplicates
        stored).
        """
        if not self._made:
            async with self._lock:
                await self._make()

    async def _make(self) -> None:
        if self._made:
            return  # by whoever held the lock before
        for collection, keys, options in _INDEXES:
            with self._connection.border():
                await self._connection.database[collection].create_index(keys, **options)
        self._made = True

    async def keep_trying(self) -> None:
        """Run as a task: try until they are made, then end."""
        while not self.made:
            try:
                await self.ensure()
            except GatewayError as error:
                _log.warning("indexes are not made yet (%s)", error.code.value)
                await asyncio.sleep(RETRY_SECONDS)
        _log.info("indexes are made")
