"""Refresh tokens: one row per login that names its one good token, and one row per token ever given out.

A login is a *family*; its row is the authority. A refresh replaces the digest in it by compare-and-set, so
of two refreshes with one token one wins, and a revoked family can never be advanced: the new token exists
only in that row. Were validity kept in the tokens' own rows, a revocation that runs while a refresh inserts
its new token would miss that token. The tokens' rows never change; they say to which family a token
belongs, so that a spent one is told from an invented one. Both kinds vanish by a TTL index when the login
would have expired anyway.
"""

import datetime as dt
from typing import Final

from lucid.database.connection import Connection
from lucid.database.documents import FamilyDocument, milliseconds, read

_FAMILY: Final = "family"
_TOKEN: Final = "token"  # noqa: S105


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

    async def revoke_family(self, family: str, now: dt.datetime) -> bool:
        """End a login; whether it was still alive."""
        with self._connection.border():
            result = await self._rows.update_one(
                {"_id": family, "kind": _FAMILY, "revoked_at": None},
                {"$set": {"revoked_at": milliseconds(now)}},
            )
        return bool(result.modified_count)

    async def revoke_user(self, user_id: str, now: dt.datetime) -> int:
        """End every login of a user; how many were still alive."""
        with self._connection.border():
            result = await self._rows.update_many(
                {"user_id": user_id, "kind": _FAMILY, "revoked_at": None},
                {"$set": {"revoked_at": milliseconds(now)}},
            )
        return int(result.modified_count)
