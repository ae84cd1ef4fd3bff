"""Refresh tokens: one row per login that names its one good token, and one row per token ever given out.

A login is a *family*; its row is the authority. A refresh replaces the digest in it by compare-and-set, so
of two refreshes with one token one wins, and a revoked family can never be advanced: the new token exists
only in that row. Were validity kept in the tokens' own rows, a revocation that runs while a refresh inserts
its new token would miss that token. The tokens' rows never change; they say to which family a token
belongs, so that a spent one is told from an invented one. Both kinds vanish by a TTL index when the login
would have expired anyway.

Rows of the kind "user" say from which moment on a user's access tokens are dead. They and the revoked families
are what a worker that starts learns its revocations from (`revoked_since`).
"""

import datetime as dt
from typing import Final

from pymongo import ReturnDocument

from lucid.database.connection import Connection, Document
from lucid.database.documents import FamilyDocument, RevokedLogins, milliseconds, read
from lucid.errors import ErrorCode, GatewayError, away

_FAMILY: Final = "family"
_TOKEN: Final = "token"  # noqa: S105
_USER: Final = "user"
_UNTOLD: Final = "untold"
_UPSERT_ATTEMPTS: Final = 5


class RefreshTokenRepository:
    """Collection `refresh_tokens`. All methods raise GatewayError DEPENDENCY_AWAY."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows = connection.database["refresh_tokens"]

    async def start_family(
        self, family: str, user_id: str, digest: bytes, now: dt.datetime, expires_at: dt.datetime
    ) -> None:
        """Store a new login and its first token."""
        now, expires_at = milliseconds(now), milliseconds(expires_at)
        shared = {"user_id": user_id, "created_at": now, "expires_at": expires_at}
        with self._connection.border():
            await self._rows.insert_many(
                [
                    {"_id": digest, "kind": _TOKEN, "family": family, **shared},
                    {"_id": family, "kind": _FAMILY, "current": digest, **shared},
                ]
            )

    async def find_family(self, digest: bytes, now: dt.datetime) -> FamilyDocument | None:
        """The login to which this token belongs or belonged; None for an unknown token and an expired
        login.

        Compare `current` with the digest and look at `revoked_at`. The TTL index may lag a minute, so the
        expiry is looked at here too.
        """
        with self._connection.border():
            token = await self._rows.find_one({"_id": digest, "kind": _TOKEN})
            if token is None:
                return None
            row = await self._rows.find_one(
                {"_id": token["family"], "kind": _FAMILY, "expires_at": {"$gt": now}}
            )
        return None if row is None else read(row, FamilyDocument)

    async def rotate(self, family: FamilyDocument, spent: bytes, fresh: bytes, now: dt.datetime) -> bool:
        """Replace the good token by a new one; False where `spent` is not it any more, or the login is
        over.

        On False the login's token was used twice: call `revoke_family`. The new token's row comes first: if
        the second call is never made, a row is left that no family names, which opens nothing.
        """
        now = milliseconds(now)
        with self._connection.border():
            await self._rows.insert_one(
                {
                    "_id": fresh,
                    "kind": _TOKEN,
                    "family": family.family,
                    "user_id": family.user_id,
                    "created_at": now,
                    "expires_at": family.expires_at,
                }
            )
            result = await self._rows.update_one(
                {
                    "_id": family.family,
                    "kind": _FAMILY,
                    "current": spent,
                    "revoked_at": None,
                    "expires_at": {"$gt": now},
                },
                {"$set": {"current": fresh, "refreshed_at": now}},
            )
        return bool(result.modified_count)

    async def revoke_family(
        self, family: str, now: dt.datetime, *, user_id: str = "", expires_at: dt.datetime | None = None
    ) -> bool:
        """End a login; whether it had not been ended before.

        With `user_id` and `expires_at`, the end of the last access token of that login, `revoked_since` tells
        of it until then: the row of a login that would go before is kept, and a login that has no row (its token
        was minted by hand, or comes from another issuer) gets one.
        """
        now = milliseconds(now)
        change: Document = {"$set": {"revoked_at": now}}
        if expires_at is not None:
            change["$max"] = {"expires_at": milliseconds(expires_at)}
        with self._connection.border():
            result = await self._rows.update_one({"_id": family, "kind": _FAMILY, "revoked_at": None}, change)
        if result.modified_count or not user_id or expires_at is None:
            return bool(result.modified_count)
        tombstone = {
            "_id": family,
            "kind": _FAMILY,
            "user_id": user_id,
            "created_at": now,
            "revoked_at": now,
            "expires_at": milliseconds(expires_at),
            "lasting": True,
        }
        try:
            with self._connection.border():
                await self._rows.insert_one(tombstone)
        except GatewayError as error:
            if error.code is not ErrorCode.CONFLICT:
                raise
            return False  # It has a row, which was revoked before.
        return True

    async def revoke_user(
        self, user_id: str, now: dt.datetime, *, tokens_until: dt.datetime | None = None
    ) -> int:
        """End every login of a user; how many were still alive.

        With `tokens_until`, the end of the last access token, `revoked_since` tells until then that every access
        token of this user that was issued at `now` or earlier is dead, those too that belong to no login here.
        A refresh under way may have signed its token after `now`: it fails, or its login is among the ended ones.
        Where that is to count as well, end the logins first and call again with the moment after.
        """
        now = milliseconds(now)
        with self._connection.border():
            result = await self._rows.update_many(
                {"user_id": user_id, "kind": _FAMILY, "revoked_at": None}, {"$set": {"revoked_at": now}}
            )
        if tokens_until is not None:
            await self._leave_word(user_id, now, milliseconds(tokens_until))
        return int(result.modified_count)

    async def _leave_word(self, user_id: str, now: dt.datetime, until: dt.datetime) -> None:
        change = {
            "$set": {"kind": _USER, "user_id": user_id, "lasting": True},
            "$max": {"revoked_at": now, "expires_at": until},
            "$setOnInsert": {"created_at": now},
        }
        for _ in range(_UPSERT_ATTEMPTS):
            try:
                with self._connection.border():
                    written: Document | None = await self._rows.find_one_and_update(
                        {"_id": f"{_USER}:{user_id}"},
                        change,
                        upsert=True,
                        return_document=ReturnDocument.AFTER,
                    )
            except GatewayError as error:
                if error.code is not ErrorCode.CONFLICT:
                    raise
            else:
                # SecantusDB answers nothing to the loser of a race, and has written nothing.
                if written is not None:
                    return
        raise away("mongodb")

    async def count_untold(self) -> None:
        """Note that something was revoked of which Redis could not be told: see `untold`."""
        with self._connection.border():
            await self._rows.update_one({"_id": _UNTOLD}, {"$inc": {"count": 1}}, upsert=True)

    async def untold(self) -> int:
        """How often it was so: where this has changed, `revoked_since` has news that comes by no other way."""
        with self._connection.border():
            row = await self._rows.find_one({"_id": _UNTOLD}, {"count": 1})
        return 0 if row is None else int(row.get("count", 0))

    async def revoked_since(self, moment: dt.datetime, *, lasting: bool = False) -> RevokedLogins:
        """The logins and users whose revocation is of `moment` or later and whose row has not gone.

        `lasting`: earlier ones too, where they say more than that a login has ended. A login that ended more than a
        token's life ago concerns nobody, and there may be millions of those.
        """
        told: Document = {"revoked_at": {"$gte": milliseconds(moment)}}
        with self._connection.border():
            rows = await self._rows.find(
                {
                    **(
                        {"$or": [told, {"lasting": True, "revoked_at": {"$type": "date"}}]}
                        if lasting
                        else told
                    ),
                    "kind": {"$in": [_FAMILY, _USER]},
                    "expires_at": {"$type": "date"},
                },
                {"kind": 1, "user_id": 1, "revoked_at": 1, "expires_at": 1, "lasting": 1},
            ).to_list(None)
        return RevokedLogins(
            families=[
                (r["_id"], r["revoked_at"], r["expires_at"] if r.get("lasting") else None)
                for r in rows
                if r["kind"] == _FAMILY
            ],
            users=[(r["user_id"], r["revoked_at"]) for r in rows if r["kind"] == _USER],
        )
