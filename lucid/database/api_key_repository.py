"""API keys as they are stored: digests, never keys."""

import datetime as dt
from collections.abc import Mapping
from typing import Final

from pymongo import ReturnDocument, UpdateOne

from lucid.database.connection import Connection, Document
from lucid.database.documents import ApiKeyDocument, milliseconds, read, row
from lucid.database.indexes import Indexes

_API_NAMES: Final = {"_id": "key_id"}


class ApiKeyRepository:
    """Collection `api_keys`. All methods raise GatewayError DEPENDENCY_AWAY.

    Revoked and expired keys open nothing at once, and their rows go by TTL some days later.
    """

    def __init__(self, connection: Connection, indexes: Indexes) -> None:
        self._connection = connection
        self._indexes = indexes
        self._keys = connection.database["api_keys"]

    async def create(self, key: ApiKeyDocument) -> None:
        """Store a new key. Raises CONFLICT where its id or digest is known."""
        await self._indexes.ensure()
        with self._connection.border(_API_NAMES):
            await self._keys.insert_one(row(key))

    async def find_by_digest(self, digest: bytes) -> ApiKeyDocument | None:
        """The key with this digest unless it is revoked. Look at its `expires_at`: the row outlives it."""
        with self._connection.border():
            document = await self._keys.find_one({"digest": digest, "revoked_at": None})
        return None if document is None else read(document, ApiKeyDocument)

    async def list_of_user(self, user_id: str, skip: int, limit: int) -> tuple[list[ApiKeyDocument], int]:
        """`limit` keys of this user from `skip` on, newest first, and how many there are. Without the revoked;
        expired ones are there until their rows go.
        """
        query = {"user_id": user_id, "revoked_at": None}
        with self._connection.border():
            cursor = self._keys.find(query).sort([("created_at", -1), ("_id", 1)])
            documents = await cursor.skip(skip).limit(limit).to_list(limit)
            total = await self._keys.count_documents(query)
        return [read(document, ApiKeyDocument) for document in documents], total

    async def count_live(self, user_id: str, now: dt.datetime | None = None) -> int:
        """How many keys of this user are not revoked; with `now`, and have not expired by then."""
        query: Document = {"user_id": user_id, "revoked_at": None}
        if now is not None:
            query["$or"] = [{"expires_at": None}, {"expires_at": {"$gt": now}}]
        with self._connection.border():
            return int(await self._keys.count_documents(query))

    async def revoke(self, user_id: str, key_id: str, now: dt.datetime) -> ApiKeyDocument | None:
        """End this key if it is this user's; as it is then. None: no such key, another's, or ended already."""
        with self._connection.border():
            document: Document | None = await self._keys.find_one_and_update(
                {"_id": key_id, "user_id": user_id, "revoked_at": None},
                {"$set": {"revoked_at": milliseconds(now)}},
                return_document=ReturnDocument.AFTER,
            )
        return None if document is None else read(document, ApiKeyDocument)

    async def revoke_all(self, user_id: str, now: dt.datetime) -> int:
        """End every key of this user; how many were not ended yet. `revoked_since` tells which."""
        with self._connection.border():
            result = await self._keys.update_many(
                {"user_id": user_id, "revoked_at": None}, {"$set": {"revoked_at": milliseconds(now)}}
            )
        return int(result.modified_count)

    async def revoked_since(self, moment: dt.datetime) -> list[bytes]:
        """The digests of keys revoked at `moment` or later. What was revoked a week ago may be gone."""
        with self._connection.border():
            found = await self._keys.find(
                {"revoked_at": {"$gte": milliseconds(moment)}}, {"digest": 1}
            ).to_list(None)
        return [each["digest"] for each in found]

    async def touch(self, uses: Mapping[str, dt.datetime]) -> None:
        """Record when keys were last used, by key id: the latest moment stays. Unknown ids are passed over."""
        if not uses:
            return
        changes = [
            UpdateOne({"_id": key_id}, {"$max": {"last_used_at": milliseconds(moment)}})
            for key_id, moment in uses.items()
        ]
        with self._connection.border():
            await self._keys.bulk_write(changes, ordered=False)
