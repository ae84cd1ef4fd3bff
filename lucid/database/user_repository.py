"""Users as they are stored. Every method is one atomic operation on one document, or a read."""

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from pymongo import ReturnDocument

from lucid.core.validation import email_key
from lucid.database.connection import Connection, Document
from lucid.database.documents import HardwareWallet, UserDocument, milliseconds, read, row, stored, utc_now
from lucid.database.indexes import Indexes
from lucid.errors import ErrorCode, GatewayError

_UPSERT_ATTEMPTS: Final = 5
_API_NAMES: Final = {"_id": "user_id", "email_key": "email"}
_NOBODY: Final[frozenset[str]] = frozenset()


class UserRepository:
    """Collection `users`. Reads see live users only. All methods raise GatewayError DEPENDENCY_AWAY.

    CONFLICT has `fields` in its details: what another live user has already, as the API names it.
    `clock` gives `updated_at` and `last_login_at`.
    """

    def __init__(
        self, connection: Connection, indexes: Indexes, clock: Callable[[], dt.datetime] = utc_now
    ) -> None:
        self._connection = connection
        self._indexes = indexes
        self._clock = clock
        self._users = connection.database["users"]

    async def find_by_id(self, user_id: str) -> UserDocument | None:
        """The live user of this id."""
        return await self._find_one({"_id": user_id, "live": True})

    async def find_by_email(self, email: str) -> UserDocument | None:
        """The live user of this email, however its letters are cased."""
        return await self._find_one({"email_key": email_key(email), "live": True})

    async def find_by_tron_address(self, tron_address: str) -> UserDocument | None:
        """The live user of this address."""
        return await self._find_one({"tron_address": tron_address, "live": True})

    async def create(self, user: UserDocument) -> UserDocument:
        """Store a new user, `email_key` computed; returned as it is stored.

        Raises CONFLICT where a live user has the address or the email, or any user, deleted ones too, the id.
        """
        await self._indexes.ensure()
        key = None if user.email is None else email_key(user.email)
        document = row(msgspec.structs.replace(user, email_key=key))
        with self._connection.border(_API_NAMES):
            await self._users.insert_one(document)
        return read(document, UserDocument)

    async def upsert_by_tron_address(
        self, tron_address: str, new_user_id: str, hardware_wallet: HardwareWallet | None = None
    ) -> UserDocument:
        """The live user of this address, made with `new_user_id` and role `user` where there is none.

        The login is recorded. However many first logins run at once, they make one user: the unique index
        lets one insert win and the others find what it made, for which the server may ask to repeat the
        call. Raises CONFLICT where that was needed too often.
        """
        now = milliseconds(self._clock())
        changed: Document = {"updated_at": now, "last_login_at": now}
        if hardware_wallet is not None:
            changed["hardware_wallet"] = row(hardware_wallet)
        change = {"$setOnInsert": {"_id": new_user_id, "role": "user", "created_at": now}, "$set": changed}
        return await self._upsert({"tron_address": tron_address, "live": True}, change, own="tron_address")

    async def upsert_from_cluster(
        self, user_id: str, tron_address: str, role: str, hardware_wallet: HardwareWallet | None = None
    ) -> UserDocument:
        """The authentication cluster's user of this id as that cluster knows it now, made where there is none.

        The login is recorded. The cluster is the authority: a user who was deleted here lives again, without the
        email and password of before (the email may be somebody else's by now); what was revoked stays so.
        Raises CONFLICT where another live user has the address.
        """
        now = milliseconds(self._clock())
        # A pipeline, since what happens to the email depends on what is stored. Its strings would be
        # expressions if they began with `$`, so what comes from outside is literal.
        changed: Document = {
            "live": True,
            "tron_address": {"$literal": tron_address},
            "role": {"$literal": role},
            "created_at": {"$ifNull": ["$created_at", now]},
            "updated_at": now,
            "last_login_at": now,
            "deleted_at": "$$REMOVE",
        }
        for name in ("email", "email_key", "password"):
            changed[name] = {"$cond": [{"$eq": ["$live", True]}, f"${name}", "$$REMOVE"]}
        if hardware_wallet is not None:
            changed["hardware_wallet"] = {"$literal": row(hardware_wallet)}
        return await self._upsert({"_id": user_id}, [{"$set": changed}], own="user_id")

    async def update(
        self,
        user_id: str,
        update_data: Mapping[str, Any],
        *,
        expected: Mapping[str, Any] | None = None,
        revoke_tokens_at: dt.datetime | None = None,
    ) -> UserDocument | None:
        """Set these fields of a live user; a value of None removes the field. `email_key` follows `email`.

        `expected`: only if these fields have these values now (None: are absent). `revoke_tokens_at` is written
        to `tokens_revoked_at` by the same operation unless a later moment stands there. None: there is no such
        user, or one that is not as expected. Raises CONFLICT.
        """
        await self._indexes.ensure()
        changed = dict(update_data)
        if "email" in changed:
            changed["email_key"] = None if changed["email"] is None else email_key(changed["email"])
        kept = {name: stored(value) for name, value in changed.items() if value is not None}
        gone = {name: "" for name, value in changed.items() if value is None}
        change: Document = {"$set": {**kept, "updated_at": milliseconds(self._clock())}}
        if gone:
            change["$unset"] = gone
        if revoke_tokens_at is not None:
            change["$max"] = {"tokens_revoked_at": milliseconds(revoke_tokens_at)}
        query = _as_expected(expected)
        with self._connection.border(_API_NAMES):
            document: Document | None = await self._users.find_one_and_update(
                {**query, "_id": user_id, "live": True}, change, return_document=ReturnDocument.AFTER
            )
        return None if document is None else read(document, UserDocument)

    async def delete(
        self,
        user_id: str,
        *,
        expected: Mapping[str, Any] | None = None,
        revoke_tokens_at: dt.datetime,
    ) -> bool:
        """Mark a live user as deleted and the access tokens as dead; whether there was one, as `expected` (see
        `update`).

        Its address and email are free at once. The row stays for the record, without the password.
        """
        now = milliseconds(self._clock())
        change = {
            "$set": {"live": False, "deleted_at": now, "updated_at": now},
            "$unset": {"password": ""},
            "$max": {"tokens_revoked_at": milliseconds(revoke_tokens_at)},
        }
        with self._connection.border():
            result = await self._users.update_one(
                {**_as_expected(expected), "_id": user_id, "live": True}, change
            )
        return bool(result.modified_count)

    async def list_users(
        self,
        skip: int,
        limit: int,
        *,
        email: str | None = None,
        tron_address: str | None = None,
        role: str | None = None,
        super_admin_addresses: frozenset[str] = _NOBODY,
    ) -> tuple[list[UserDocument], int]:
        """`limit` live users from `skip` on, newest first, and how many there are.

        The filters hold together. `role` is the role that counts: whoever's address is among
        `super_admin_addresses` is a `super_admin`, whatever role is stored.
        """
        query: Document = {"live": True}
        if email is not None:
            query["email_key"] = email_key(email)
        if tron_address is not None:
            query["tron_address"] = tron_address
        if role is not None:
            listed = sorted(super_admin_addresses)
            if role == "super_admin":
                query["$or"] = [{"role": role}, {"tron_address": {"$in": listed}}]
            else:
                query["$and"] = [{"role": role}, {"tron_address": {"$nin": listed}}]
        with self._connection.border():
            cursor = self._users.find(query).sort([("created_at", -1), ("_id", 1)])
            documents = await cursor.skip(skip).limit(limit).to_list(limit)
            total = await self._users.count_documents(query)
        return [read(document, UserDocument) for document in documents], total

    async def revoked_since(self, moment: dt.datetime) -> list[tuple[str, dt.datetime]]:
        """(user id, tokens_revoked_at) where that is `moment` or later, of live and deleted users."""
        with self._connection.border():
            found = await self._users.find(
                {"tokens_revoked_at": {"$gte": milliseconds(moment)}}, {"tokens_revoked_at": 1}
            ).to_list(None)
        return [(each["_id"], each["tokens_revoked_at"]) for each in found]

    async def _upsert(self, query: Document, change: Document | list[Document], own: str) -> UserDocument:
        """Find and change, or make. A lost race is tried again: the duplicate was of the field `own`."""
        await self._indexes.ensure()
        for _ in range(_UPSERT_ATTEMPTS):
            try:
                with self._connection.border(_API_NAMES):
                    document: Document | None = await self._users.find_one_and_update(
                        query, change, upsert=True, return_document=ReturnDocument.AFTER
                    )
            except GatewayError as error:
                if error.code is not ErrorCode.CONFLICT or error.details["fields"] != [own]:
                    raise
            else:
                # SecantusDB 0.7 answers nothing where MongoDB reports the duplicate: 286 of 2,000 in a race.
                if document is not None:
                    return read(document, UserDocument)
        raise GatewayError(ErrorCode.CONFLICT, details={"fields": [own]})

    async def _find_one(self, query: Document) -> UserDocument | None:
        with self._connection.border():
            document = await self._users.find_one(query)
        return None if document is None else read(document, UserDocument)


def _as_expected(expected: Mapping[str, Any] | None) -> Document:
    return {name: {"$eq": stored(value)} for name, value in (expected or {}).items()}
