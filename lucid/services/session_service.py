"""Recorded sessions, as callers may see and move them.

    INITIALIZING ──▶ ACTIVE ──▶ COMPLETED
          │            ├──────▶ FAILED
          └────────────┴──────▶ FAILED, TERMINATED

A move is one atomic operation that names the states from which it is legal, so of two moves at once one sees the
other's result. What session management (Cluster 03) has to know of it is written by the same operation, into the
session's own row; `SessionOutbox` tells it afterwards, and no caller waits for that.
"""

import datetime as dt
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol, cast

import msgspec

from lucid.core.exchange import Principal, Role
from lucid.core.security import nonces
from lucid.core.validation import Moment, SessionStatus, bad_field, checked_metadata, is_session_id
from lucid.database.documents import OutboxEntry, SessionDocument
from lucid.database.session_repository import SessionRepository
from lucid.errors import ErrorCode, GatewayError, rfc3339
from lucid.services.callers import Caller, record, utc
from lucid.services.pages import Page

MOVES: Final[Mapping[str, frozenset[str]]] = {
    "INITIALIZING": frozenset({"ACTIVE", "FAILED", "TERMINATED"}),
    "ACTIVE": frozenset({"COMPLETED", "FAILED", "TERMINATED"}),
    "COMPLETED": frozenset(),
    "FAILED": frozenset(),
    "TERMINATED": frozenset(),
}
"""Each state with those that may follow it. They lead forward only; a state without any is an end."""

ENDS: Final = frozenset(status for status, following in MOVES.items() if not following)
ORIGINS: Final[Mapping[str, frozenset[str]]] = {
    status: frozenset(origin for origin, following in MOVES.items() if status in following)
    for status in MOVES
}
"""Each state with those that it may follow."""

_FIRST: Final = "INITIALIZING"
_TERMINATED: Final = "TERMINATED"


class SessionView(msgspec.Struct, frozen=True):
    """A session as the API shows it. `ended_at` is null while it has not ended."""

    session_id: str
    user_id: str
    status: SessionStatus
    metadata: dict[str, Any]
    created_at: Moment
    updated_at: Moment
    ended_at: Moment | None


class SessionPage(Page[SessionView], frozen=True):
    """Sessions, newest first. `total` counts those of all pages."""


class Outbox(Protocol):
    """What tells session management: `SessionOutbox`."""

    def wake(self, session_id: str) -> None:
        """This session has something to be told. Neither waits nor raises."""


class SessionService:
    """One per worker. A session is its owner's, whose API keys act as the owner, and the admins'; to everybody else
    it is NOT_FOUND, like one that is not there. All methods raise DEPENDENCY_AWAY where MongoDB is away.
    """

    def __init__(
        self, sessions: SessionRepository, outbox: Outbox, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._sessions = sessions
        self._outbox = outbox
        self._wall_clock = wall_clock

    async def create(self, metadata: dict[str, Any], principal: Principal) -> SessionView:
        """A new session of the caller, INITIALIZING. Raises BAD_FIELD for metadata that cannot be stored."""
        now = self._now()
        session = await self._sessions.create(
            SessionDocument(
                session_id=nonces.new_id(),
                user_id=principal.user_id,
                status=_FIRST,
                metadata=checked_metadata(metadata),
                created_at=now,
                updated_at=now,
                outbox=(OutboxEntry(nonces.new_id(), "create", now),),
                outbox_due_at=now,
            )
        )
        self._outbox.wake(session.session_id)
        return _view(session)

    async def get(self, session_id: str, principal: Principal) -> SessionView:
        """The session of this id."""
        return _view(await self._find(session_id, principal))

    async def list_sessions(
        self, page: int, limit: int, status: str | None, user_id: str | None, principal: Principal
    ) -> SessionPage:
        """The caller's own sessions; for admins those of `user_id`, or of all users where it is None. `status`
        None: of any. Raises ROLE_TOO_LOW for a caller who asks for somebody else's.
        """
        if principal.role < Role.ADMIN:
            if user_id not in (None, principal.user_id):
                raise GatewayError(ErrorCode.ROLE_TOO_LOW, "Only admins may list the sessions of others")
            user_id = principal.user_id
        skip = (page - 1) * limit
        if user_id is None:
            found, total = await self._sessions.list_sessions(skip, limit, status=status)
        else:
            found, total = await self._sessions.find_by_user(user_id, skip, limit, status=status)
        return SessionPage([_view(session) for session in found], page, limit, total)

    async def update(
        self,
        session_id: str,
        status: str | None,
        metadata: dict[str, Any] | None,
        principal: Principal,
        caller: Caller,
    ) -> SessionView:
        """Move a session, replace its metadata whole, or both in one step; None: not that.

        Metadata may be replaced in every state. Raises ILLEGAL_MOVE with `from` and `to`, and then nothing has
        changed; BAD_FIELD where there is nothing to change, or metadata that cannot be stored.
        """
        if status is None and metadata is None:
            raise bad_field("body", "must hold status, metadata or both")
        if metadata is not None:
            checked_metadata(metadata)
        _require_id(session_id)
        owner = _only_of(principal)
        if status is None:
            changed = await self._sessions.update(session_id, metadata=metadata or {}, user_id=owner)
            if changed is None:
                raise _not_found()
        else:
            entry = self._terminated() if status == _TERMINATED else None
            changed, moved = await self._move(
                session_id,
                status,
                principal,
                lambda: self._sessions.update_status(
                    session_id,
                    status,
                    allowed_from=ORIGINS[status],
                    user_id=owner,
                    metadata=metadata,
                    ended=status in ENDS,
                    entry=entry,
                ),
            )
            if not moved:
                raise _illegal_move(changed.status, status)
        _record_if_others("session_update", changed, principal, caller)
        return _view(changed)

    async def terminate(self, session_id: str, principal: Principal, caller: Caller) -> None:
        """Move a session to TERMINATED; one that is there already stays as it is. Raises ILLEGAL_MOVE for a session
        that has come to another end.
        """
        _require_id(session_id)
        owner, entry = _only_of(principal), self._terminated()
        session, moved = await self._move(
            session_id,
            _TERMINATED,
            principal,
            lambda: self._sessions.delete(
                session_id, allowed_from=ORIGINS[_TERMINATED], user_id=owner, entry=entry
            ),
        )
        if moved:
            _record_if_others("session_termination", session, principal, caller)
        elif session.status != _TERMINATED:
            raise _illegal_move(session.status, _TERMINATED)

    async def _move(
        self,
        session_id: str,
        status: str,
        principal: Principal,
        attempt: Callable[[], Awaitable[SessionDocument | None]],
    ) -> tuple[SessionDocument, bool]:
        """The session as it is then, and whether it has moved by this `attempt`."""
        while True:
            moved = await attempt()
            if moved is not None:
                if status == _TERMINATED:
                    self._outbox.wake(session_id)
                return moved, True
            session = await self._find(session_id, principal)
            # Where another's move has made this one legal in between, once more: to refuse it in the name of a
            # state from which it is legal would be wrong. Moves lead forward only, so this ends.
            if session.status not in ORIGINS[status]:
                return session, False

    async def _find(self, session_id: str, principal: Principal) -> SessionDocument:
        _require_id(session_id)
        session = await self._sessions.find_by_id(session_id)
        if session is None or _only_of(principal) not in (None, session.user_id):
            raise _not_found()
        return session

    def _terminated(self) -> OutboxEntry:
        return OutboxEntry(nonces.new_id(), "terminate", self._now())

    def _now(self) -> dt.datetime:
        return utc(self._wall_clock())


def _only_of(principal: Principal) -> str | None:
    """The one user whose sessions this caller may touch; None: everybody's."""
    return None if principal.role >= Role.ADMIN else principal.user_id


def _require_id(session_id: str) -> None:
    if not is_session_id(session_id):
        raise _not_found()


def _not_found() -> GatewayError:
    return GatewayError(ErrorCode.NOT_FOUND, "No such session")


def _illegal_move(origin: str, status: str) -> GatewayError:
    return GatewayError(
        ErrorCode.ILLEGAL_MOVE,
        f"A session cannot go from {origin} to {status}",
        details={"from": origin, "to": status},
    )


def _record_if_others(event: str, session: SessionDocument, principal: Principal, caller: Caller) -> None:
    """A line in the audit log where an admin has changed somebody else's session."""
    if session.user_id != principal.user_id:
        record(
            event,
            caller,
            user_id=principal.user_id,
            role=principal.role.label,
            session_id=session.session_id,
            owner=session.user_id,
            status=session.status,
        )


def _view(session: SessionDocument) -> SessionView:
    return SessionView(
        session_id=session.session_id,
        user_id=session.user_id,
        status=cast(SessionStatus, session.status),
        metadata=session.metadata,
        created_at=rfc3339(session.created_at),
        updated_at=rfc3339(session.updated_at),
        ended_at=None if session.ended_at is None else rfc3339(session.ended_at),
    )
