"""Users as they are stored. Every method is one atomic operation on one document, or a read."""

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo import ReturnDocument

from lucid.database.connection import Connection, Document
from lucid.database.documents import HardwareWallet, UserDocument, milliseconds, read
from lucid.database.indexes import Indexes
from lucid.errors import ErrorCode, GatewayError

_UPSERT_ATTEMPTS: Final = 5


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class UserRepository:
    """Collection `users`. Reads see live users only. All methods raise GatewayError DEPENDENCY_AWAY."""

    def __init__(
        self, connection: Connection, indexes: Indexes, clock: Callable[[], dt.datetime] = _utc_now
    ) -> None:
        self._connection = connection
        self._indexes = indexes
        self._clock = clock
        self._users = connection.database["users"]

    async def find_by_id(self, user_id: str) -> UserDocument | None:
        return await self._find_one({"_id": user_id, "live": True})

    async def find_by_email(self, email: str) -> UserDocument | None:
        return await self._find_one({"email": email, "live": True})

    async def find_by_tron_address(self, tron_address: str) -> UserDocument | None:
        return await self._find_one({"tron_address": tron_address, "live": True})

    async def create(self, user: UserDocument) -> UserDocument:
        """Store a new user. Raises CONFLICT where a live one has the address, the email or the id."""
        await self._indexes.ensure()
        document = {key: value for key, value in _row(user).items() if value is not None}
        with self._connection.border():
            await self._users.insert_one(document)
        return read(document, UserDocument)

    async def upsert_by_tron_address(
        self, tron_address: str, new_user_id: str, hardware_wallet: HardwareWallet | None = None
    ) -> UserDocument:
        """The live user of this address, made with `new_user_id` and role `user` where there is none.

        The login is recorded. However many first logins run at once, they make one user: the unique index
        lets one insert win and the others find what it made, for which the server may ask to repeat the
        call.
        """
        await self._indexes.ensure()
        now = milliseconds(self._clock())
        changed: Document = {"updated_at": now, "last_login_at": now}
        if hardware_wallet is not None:
            changed["hardware_wallet"] = {
                "type": hardware_wallet.type,
                "device_id": hardware_wallet.device_id,
            }
        change = {"$setOnInsert": {"_id": new_user_id, "role": "user", "created_at": now}, "$set": changed}
        for _ in range(_UPSERT_ATTEMPTS):
            try:
                with self._connection.border():
                    document: Document | None = await self._users.find_one_and_update(
                        {"tron_address": tron_address, "live": True},
                        change,
                        upsert=True,
                        return_document=ReturnDocument.AFTER,
                    )
            except GatewayError as error:
                if error.code is not ErrorCode.CONFLICT:
                    raise
            else:
                # SecantusDB 0.7 answers nothing where MongoDB reports the duplicate: 286 of 2,000 in a race.
                if document is not None:
                    return read(document, UserDocument)
        raise GatewayError(ErrorCode.CONFLICT, details={"fields": ["tron_address"]})

    async def update(self, user_id: str, update_data: Mapping[str, Any]) -> UserDocument | None:
        """Set these fields of a live user; None where there is none. A value of None removes the field."""
        await self._indexes.ensure()
        kept = {key: value for key, value in update_data.items() if value is not None}
        gone = {key: "" for key, value in update_data.items() if value is None}
        change: Document = {"$set": {**kept, "updated_at": milliseconds(self._clock())}}
        if gone:
            change["$unset"] = gone
        with self._connection.border():
            document: Document | None = await self._users.find_one_and_update(
                {"_id": user_id, "live": True}, change, return_document=ReturnDocument.AFTER
            )
        return None if document is None else read(document, UserDocument)

    async def delete(self, user_id: str) -> bool:
        """Mark a live user as deleted; whether there was one. Its address and email are free at once."""
        now = milliseconds(self._clock())
        with self._connection.border():
            result = await self._users.update_one(
                {"_id": user_id, "live": True},
                {"$set": {"live": False, "deleted_at": now, "updated_at": now}},
            )
        return bool(result.modified_count)

    async def list_users(self, skip: int, limit: int) -> tuple[list[UserDocument], int]:
        """`limit` live users from `skip` on, newest first, and how many there are."""
        with self._connection.border():
            cursor = self._users.find({"live": True}).sort([("created_at", -1), ("_id", 1)])
            documents = await cursor.skip(skip).limit(limit).to_list(limit)
            total = await self._users.count_documents({"live": True})
        return [read(document, UserDocument) for document in documents], total

    async def _find_one(self, query: Document) -> UserDocument | None:
        with self._connection.border():
            document = await self._users.find_one(query)
        return None if document is None else read(document, UserDocument)


def _row(user: UserDocument) -> Document:
    return {
        "_id": user.user_id,
        "live": user.live,
        "role": user.role,
        "created_at": milliseconds(user.created_at),
        "updated_at": milliseconds(user.updated_at),
        "tron_address": user.tron_address,
        "email": user.email,
    }
