"""`/api/v1/sessions`: recorded sessions, their states and what is noted about them. Their data (chunks, manifest,
pipeline) lies with session management and goes through the data plane.
"""

import msgspec
from msgspec import UNSET, UnsetType
from sanic import Request

from lucid.blueprints.coding import caller_of, principal_of
from lucid.blueprints.resource import Resource
from lucid.core.validation import (
    DEFAULT_PAGE,
    DEFAULT_PAGE_LIMIT,
    Metadata,
    PageLimit,
    PageNumber,
    SessionId,
    SessionStatus,
    UserId,
)
from lucid.errors import ErrorCode
from lucid.services.session_service import SessionPage, SessionService, SessionView


class NewSession(msgspec.Struct, forbid_unknown_fields=True):
    metadata: Metadata = {}


class SessionChange(msgspec.Struct, forbid_unknown_fields=True):
    # UNSET instead of null: `null` is neither a status nor an object, and refused.
    status: SessionStatus | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET


class SessionQuery(msgspec.Struct, forbid_unknown_fields=True):
    # UNSET here too: from a query string msgspec reads the text `null` as a None that is allowed.
    page: PageNumber = DEFAULT_PAGE
    limit: PageLimit = DEFAULT_PAGE_LIMIT
    status: SessionStatus | UnsetType = UNSET
    user_id: UserId | UnsetType = UNSET


def resource(service: SessionService) -> Resource:
    """The routes, each calling `service` once."""
    routes = Resource("sessions", "/api/v1/sessions")
    parameters = {"session_id": SessionId}

    @routes.post(
        "",
        body=NewSession,
        body_optional=True,
        answer=SessionView,
        location=lambda session: f"/api/v1/sessions/{session.session_id}",
        errors=(ErrorCode.DEPENDENCY_AWAY,),
    )
    async def create(request: Request, body: NewSession) -> SessionView:
        """Begin a session: it belongs to the caller and is INITIALIZING.

        Session management is told of it in the background, shortly after this answer, or as soon as it is back.
        """
        return await service.create(body.metadata, principal_of(request))

    @routes.get(
        "",
        query=SessionQuery,
        answer=SessionPage,
        errors=(ErrorCode.ROLE_TOO_LOW, ErrorCode.DEPENDENCY_AWAY),
    )
    async def list_sessions(request: Request, query: SessionQuery) -> SessionPage:
        """A page of sessions, newest first, of one status or all.

        Callers see their own. Admins see everybody's, or those of `user_id`; others may name only themselves there.
        """
        return await service.list_sessions(
            query.page, query.limit, query.status or None, query.user_id or None, principal_of(request)
        )

    @routes.get(
        "/{session_id}",
        parameters=parameters,
        answer=SessionView,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.DEPENDENCY_AWAY),
    )
    async def get(request: Request, session_id: str) -> SessionView:
        """A session: one's own, for admins any."""
        return await service.get(session_id, principal_of(request))

    @routes.patch(
        "/{session_id}",
        parameters=parameters,
        body=SessionChange,
        answer=SessionView,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.ILLEGAL_MOVE, ErrorCode.DEPENDENCY_AWAY),
    )
    async def update(request: Request, session_id: str, body: SessionChange) -> SessionView:
        """Move a session to another status, replace its metadata, or both in one step.

        From INITIALIZING a session goes to ACTIVE, FAILED or TERMINATED, from ACTIVE to COMPLETED, FAILED or
        TERMINATED. Any other move is refused with 409, and then the metadata stays as well. `metadata` replaces the
        stored object whole: what is to stay must be sent again. It may be replaced after the end of a session, too.
        """
        return await service.update(
            session_id,
            None if body.status is UNSET else body.status,
            None if body.metadata is UNSET else body.metadata,
            principal_of(request),
            caller_of(request),
        )

    @routes.delete(
        "/{session_id}",
        parameters=parameters,
        errors=(ErrorCode.NOT_FOUND, ErrorCode.ILLEGAL_MOVE, ErrorCode.DEPENDENCY_AWAY),
    )
    async def terminate(request: Request, session_id: str) -> None:
        """Terminate a session. It stays visible, as TERMINATED.

        Once more does nothing and is answered alike. A session that is COMPLETED or FAILED cannot be terminated.
        """
        await service.terminate(session_id, principal_of(request), caller_of(request))

    return routes
