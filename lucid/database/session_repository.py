"""Recorded sessions as they are stored, and what session management has yet to be told of them.

What is to be told stands in the session's own row (`outbox`), so that a move and the message about it are one
atomic operation. A worker *claims* a row by moving its `outbox_due_at` beyond the time that telling takes; if it
dies, the row comes due again. So each entry is told at least once.
"""

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo import ReturnDocument

from lucid.database.connection import Connection, Document
from lucid.database.documents import OutboxEntry, SessionDocument, milliseconds, read, row, utc_now

TERMINATED: Final = "TERMINATED"
_NEWEST_FIRST: Final = [("created_at", -1), ("_id", 1)]
_API_NAMES: Final = {"_id": "session_id"}


class SessionRepository:
    """Collection `sessions`. Every method is one atomic operation on one document, or a read. All raise
    GatewayError DEPENDENCY_AWAY, and BAD_FIELD where `metadata` holds what cannot be stored.

    `clock` gives `updated_at` and `ended_at`. `user_id` given to an operation on one session: only if that user
    owns it; another's session is like one that is not there.
    """

    def __init__(self, connection: Connection, clock: Callable[[], dt.datetime] = utc_now) -> None:
        self._connection = connection
        self._clock = clock
        self._sessions = connection.database["sessions"]

    async def find_by_id(self, session_id: str) -> SessionDocument | None:
        """The session of this id, ended ones too."""
        with self._connection.border():
            document = await self._sessions.find_one({"_id": session_id})
        return None if document is None else read(document, SessionDocument)

    async def find_by_user(
        self, user_id: str, skip: int, limit: int, status: str | None = None
    ) -> tuple[list[SessionDocument], int]:
        """`limit` sessions of this user from `skip` on, newest first, and how many there are."""
        return await self.list_sessions(skip, limit, user_id=user_id, status=status)

    async def list_sessions(
        self, skip: int, limit: int, *, user_id: str | None = None, status: str | None = None
    ) -> tuple[list[SessionDocument], int]:
        """`limit` sessions from `skip` on, newest first, and how many there are; None: of any user or status."""
        query: Document = {}
        if user_id is not None:
            query["user_id"] = user_id
        if status is not None:
            query["status"] = status
        with self._connection.border():
            documents = (
                await self._sessions.find(query).sort(_NEWEST_FIRST).skip(skip).limit(limit).to_list(limit)
            )
            total = await self._sessions.count_documents(query)
        return [read(document, SessionDocument) for document in documents], total

    async def create(self, session: SessionDocument) -> SessionDocument:
        """Store a new session with its `outbox` and `outbox_due_at` as given; returned as it is stored.

        Raises CONFLICT with `fields` ["session_id"] where the id is known.
        """
        with self._connection.border(_API_NAMES):
            document = row(session)
            document["outbox"] = [row(entry) for entry in session.outbox]
            await self._sessions.insert_one(document)
        return read(document, SessionDocument)

    async def update(
        self, session_id: str, *, metadata: Mapping[str, Any], user_id: str | None = None
    ) -> SessionDocument | None:
        """Replace the metadata, whatever the status; None where there is no such session."""
        change = {"$set": {"metadata": dict(metadata), "updated_at": self._now()}}
        return await self._change(_one(session_id, user_id), change)

    async def update_status(
        self,
        session_id: str,
        status: str,
        *,
        allowed_from: frozenset[str],
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        ended: bool,
        entry: OutboxEntry | None,
    ) -> SessionDocument | None:
        """Move a session to `status` if its present one is in `allowed_from`; with `metadata`, replace that too.

        `ended` sets `ended_at`; `entry` joins the outbox, which is due at once if it was empty: one that was not is
        being told by somebody, or was put off. None: no such session, or the move is not allowed from where it
        stands; `find_by_id` tells which. Of two moves at once one sees the other's result.
        """
        now = self._now()
        changed: Document = {"status": status, "updated_at": now}
        if metadata is not None:
            changed["metadata"] = {"$literal": dict(metadata)}
        if ended:
            changed["ended_at"] = now
        if entry is not None:
            changed["outbox_due_at"] = {"$ifNull": ["$outbox_due_at", now]}
            changed["outbox"] = {"$concatArrays": [{"$ifNull": ["$outbox", []]}, [{"$literal": row(entry)}]]}
        query = _one(session_id, user_id) | {"status": {"$in": sorted(allowed_from)}}
        return await self._change(query, [{"$set": changed}])

    async def delete(
        self,
        session_id: str,
        *,
        allowed_from: frozenset[str],
        user_id: str | None = None,
        entry: OutboxEntry | None,
    ) -> SessionDocument | None:
        """`update_status` to TERMINATED. The row stays."""
        return await self.update_status(
            session_id, TERMINATED, allowed_from=allowed_from, user_id=user_id, ended=True, entry=entry
        )

    async def take_due(self, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        """Claim the session whose outbox has been due longest; None where none is due.

        It comes due again after `lease`. For each entry that has been told call `delivered`; for one that
        could not be, `put_off`.
        """
        return await self._claim({}, now, lease)

    async def claim(self, session_id: str, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        """As `take_due`, for this session; None where its outbox is empty, claimed or put off."""
        return await self._claim({"_id": session_id}, now, lease)

    async def _claim(self, which: Document, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        # Without the look at the outbox a row of somebody else's hand, due with nothing to tell, would come up
        # for ever.
        query = which | {"outbox_due_at": {"$lte": milliseconds(now)}, "outbox.0": {"$exists": True}}
        change = {"$set": {"outbox_due_at": milliseconds(now + lease)}}
        return await self._change(query, change, sort=[("outbox_due_at", 1)])

    async def delivered(self, session_id: str, entry_id: str) -> SessionDocument | None:
        """Strike out an entry that has been told; with the last one the outbox is due no more.

        The session as it is then, None where it is not there. An entry that is not there is struck out already.
        """
        left = {
            "$filter": {
                "input": {"$ifNull": ["$outbox", []]},
                "cond": {"$ne": ["$$this.entry_id", {"$literal": entry_id}]},
            }
        }
        due = {"$cond": [{"$eq": ["$outbox", []]}, "$$REMOVE", "$outbox_due_at"]}
        # Two stages: the second sees what the first has left.
        return await self._change(
            {"_id": session_id}, [{"$set": {"outbox": left}}, {"$set": {"outbox_due_at": due}}]
        )

    async def put_off(self, session_id: str, until: dt.datetime) -> None:
        """Let nobody claim this session's outbox before `until`; nothing where there is nothing to tell."""
        await self._change(
            {"_id": session_id, "outbox.0": {"$exists": True}},
            {"$set": {"outbox_due_at": milliseconds(until)}},
        )

    async def _change(
        self, query: Document, change: Document | list[Document], sort: list[tuple[str, int]] | None = None
    ) -> SessionDocument | None:
        with self._connection.border(_API_NAMES):
            document: Document | None = await self._sessions.find_one_and_update(
                query, change, sort=sort, return_document=ReturnDocument.AFTER
            )
        return None if document is None else read(document, SessionDocument)

    def _now(self) -> dt.datetime:
        return milliseconds(self._clock())


def _one(session_id: str, user_id: str | None) -> Document:
    return {"_id": session_id} if user_id is None else {"_id": session_id, "user_id": user_id}
