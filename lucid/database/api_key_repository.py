"""API keys as they are stored: digests, never keys."""

import datetime as dt

from lucid.database.connection import Connection
from lucid.database.documents import ApiKeyDocument, milliseconds, read
from lucid.database.indexes import Indexes


class ApiKeyRepository:
    """Collection `api_keys`. All methods raise GatewayError DEPENDENCY_AWAY."""

    def __init__(self, connection: Connection, indexes: Indexes) -> None:
        self._connection = connection
        self._indexes = indexes
        self._keys = connection.database["api_keys"]

    async def create(self, key: ApiKeyDocument) -> None:
        """Store a new key. Raises CONFLICT where its id or digest is known."""
        await self._indexes.ensure()
        row = {
            "_id": key.key_id,
            "digest": key.digest,
            "user_id": key.user_id,
            "name": key.name,
            "role": key.role,
            "created_at": milliseconds(key.created_at),
        }
        if key.expires_at is not None:
            row["expires_at"] = milliseconds(key.expires_at)
        with self._connection.border():
            await self._keys.insert_one(row)

    async def find_by_digest(self, digest: bytes, now: dt.datetime) -> ApiKeyDocument | None:
        """The key with this digest unless it has expired by `now`; the TTL index may lag a minute."""
        with self._connection.border():
            row = await self._keys.find_one({"digest": digest})
        if row is None:
            return None
        key = read(row, ApiKeyDocument)
        return None if key.expires_at is not None and key.expires_at <= now else key
