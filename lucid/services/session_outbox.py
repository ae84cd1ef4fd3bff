"""Tells session management (Cluster 03) which sessions were made and which were terminated.

What is to be told stands in the session's own row, written by the operation that made or ended it, so it is there
exactly if that operation was committed. A worker *claims* a row for `LEASE_SECONDS` before it tells; if it dies,
the row comes due again. So each entry is told **at least once**, the entries of one session in their order.

The requests, over the gateway's own pool to that cluster:

    POST /api/v1/sessions
    {"session_id": …, "user_id": …, "status": …, "metadata": {…}, "created_at": "2030-01-02T03:04:05Z"}

        The session exists; the body shows it as it stands while it is told. Any 2xx, or 409 (known already): done.

    DELETE /api/v1/sessions/{session_id}

        The session was terminated. Any 2xx, or 404, 409, 410 (not there, or ended already): done.

Both carry `Idempotency-Key` (the entry's id, the same at every attempt), `X-User-Id` (the session's owner, whoever
terminated it) and `X-Request-ID` (the entry's id). The cluster must take both more than once, and must not bring a
session back to life because its POST comes again after its DELETE.

What is not done is kept, however long. The wait of a session grows with the age of its oldest entry, from
`SHORTEST_WAIT_SECONDS` on: to wait as long again as one has waited so far is to double the wait each time, and
needs no counter. What else follows depends on why it is not done:

Away     No connection, no answer, 502, 503, 504, its breaker open. A worker tries one session per round, and all
         the others once that one went well. The wait grows to `LONGEST_WAIT_SECONDS`.
Failed   The cluster answers, but cannot just now: 500 and above, 408, 425, 429, and what is no answer to these
         requests (3xx). `MOST_FAILURES` end a round. The wait is the same.
Refused  Any other 4xx: the cluster works, and will not have this session. That says nothing of the others, so it
         is no failure; the wait grows to `LONGEST_REFUSED_SECONDS`, as it will hardly change by itself. From an age
         of `ALARM_AGE_SECONDS` on each attempt is an error in the log, since only a person can help.

Sessions are tried in the order in which they came due, so whatever the cluster refuses, one waits at most until those
due before it have been tried once; of refused ones these are `MOST_REFUSALS` per round and worker.

An entry that joins others is not due by itself: whoever tells of these goes on to it with what
`SessionRepository.delivered` gives back, and where these have been put off it must wait with them, for the order.
"""

import asyncio
import datetime as dt
import enum
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import httpx
import msgspec

from lucid.core.rules.breaker import FAILURE_STATUSES
from lucid.database.documents import OutboxEntry, SessionDocument
from lucid.database.session_repository import SessionRepository
from lucid.errors import GatewayError, rfc3339
from lucid.services.callers import utc

PATH: Final = "/api/v1/sessions"

LEASE_SECONDS: Final = 30.0
TELL_SECONDS: Final = 20.0
"""All that one claim is used for. Shorter than the lease by what MongoDB and two clocks may take."""
POLL_SECONDS: Final = 2.0
SHORTEST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 60.0
LONGEST_REFUSED_SECONDS: Final = 3_600.0
ALARM_AGE_SECONDS: Final = 86_400.0
WAIT_JITTER: Final = 0.25
"""The share of a wait that is left to chance, so that what failed together does not come back together."""
MOST_AT_ONCE: Final = 8
MOST_FAILURES: Final = 8
"""Sessions that may fail in one round: a cluster that fails at everything is asked four times a second by a worker."""
MOST_REFUSALS: Final = 200
"""Sessions that may be refused in one round, a hundred a second by a worker. Some hundreds hold up the others for
seconds, and a cluster that refuses all that a long outage has left is not asked without end."""
STOP_SECONDS: Final = 2.0

_TIMEOUT: Final = httpx.Timeout(8.0, connect=2.0, pool=2.0)
_MOST_ANSWER_BYTES: Final = 65_536
_ANSWER_SECONDS: Final = 1.0

_PASSING: Final = frozenset({408, 425, 429})
"""The 4xx that are about the moment, not about the request (RFC 9110, 15.5.9; RFC 8470, 5.2; RFC 6585, 4)."""

_log: Final = logging.getLogger(__name__)


class _Outcome(enum.Enum):
    """How an attempt ended."""

    NOTHING = "nothing is due, or nobody can say so"
    TOLD = "told"
    REFUSED = "the cluster will not have this session"
    FAILED = "the cluster is there, but it could not"
    AWAY = "the cluster is away"


def is_done(kind: Literal["create", "terminate"], status: int) -> bool:
    """Whether an answer of this status means that the cluster knows."""
    return 200 <= status < 300 or status in ((409,) if kind == "create" else (404, 409, 410))


def is_refused(status: int) -> bool:
    """Whether an answer of this status, which `is_done` denies, is about this session alone."""
    return 400 <= status < 500 and status not in _PASSING


def wait_seconds(age_seconds: float, jitter: float, longest_seconds: float = LONGEST_WAIT_SECONDS) -> float:
    """How long a session waits whose oldest entry has this age. `jitter` from 0 (the longest) to 1."""
    wait = min(longest_seconds, age_seconds) * (1.0 - WAIT_JITTER * jitter)
    return max(SHORTEST_WAIT_SECONDS, wait)


class SessionOutbox:
    """One per worker. `run` it as a task; `stop` it when the worker ends, before its pools are closed."""

    def __init__(
        self,
        sessions: SessionRepository,
        client: httpx.AsyncClient,
        wall_clock: Callable[[], float] = time.time,
        *,
        jitter: Callable[[], float] = random.random,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`client` reaches session management by the paths above, over a transport with a breaker."""
        self._sessions = sessions
        self._client = client
        self._wall_clock = wall_clock
        self._jitter = jitter
        self._poll_seconds = poll_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._more = asyncio.Event()
        self._taking = asyncio.Lock()
        self._failures_left = 0
        self._refusals_left = 0
        self._away = False
        self._stopped = False

    def wake(self, session_id: str) -> None:
        """Tell what this session has to say, in the background. Call it after the commit.

        Does nothing while the cluster is away, and leaves to `run` what is more than `MOST_AT_ONCE`.
        """
        if self._away or self._stopped:
            return
        if len(self._tasks) >= MOST_AT_ONCE:
            self._more.set()
            return
        task = asyncio.create_task(self._claim_and_tell(session_id), name="lucid session outbox")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self) -> None:
        """Tell what is due, for ever: what no `wake` came for, what failed, what dead workers have left."""
        while True:
            self._more.clear()
            await self.drain()
            pause = self._poll_seconds * (0.75 + 0.5 * self._jitter())
            if self._is_spent():
                await asyncio.sleep(pause)
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._more.wait()
            except TimeoutError:
                pass

    async def drain(self) -> None:
        """One round: until nothing is due, the cluster is away, or too much has failed or been refused."""
        self._failures_left = MOST_FAILURES
        self._refusals_left = MOST_REFUSALS
        first = await self._next()
        if first in (_Outcome.NOTHING, _Outcome.AWAY):
            return
        if self._away:
            self._away = False
            _log.info("session management can be told of sessions again")
        async with asyncio.TaskGroup() as takers:
            for _ in range(MOST_AT_ONCE):
                takers.create_task(self._take_on())

    async def stop(self) -> None:
        """Nothing new is begun. What is under way may end within `STOP_SECONDS`; the claims of the rest expire."""
        self._stopped = True
        if not self._tasks:
            return
        _, late = await asyncio.wait(set(self._tasks), timeout=STOP_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _take_on(self) -> None:
        while not self._is_spent() and await self._next() is not _Outcome.NOTHING:
            pass

    async def _next(self) -> _Outcome:
        outcome = await self._attempt(self._take_due())
        if outcome is _Outcome.REFUSED:
            # Here, so that those who are woken, as often as callers make sessions, do not use up the round.
            self._refusals_left -= 1
        return outcome

    async def _take_due(self) -> SessionDocument | None:
        # One after the other: at once, all would reach for the same row, and all but one in vain.
        async with self._taking:
            return None if self._is_spent() else await self._sessions.take_due(self._now(), _LEASE)

    def _is_spent(self) -> bool:
        return self._failures_left <= 0 or self._refusals_left <= 0

    async def _claim_and_tell(self, session_id: str) -> None:
        await self._attempt(self._sessions.claim(session_id, self._now(), _LEASE))

    async def _attempt(self, claim: Awaitable[SessionDocument | None]) -> _Outcome:
        """Whatever goes wrong here ends here: it must not hold up other sessions. The claim expires then."""
        session = None
        try:
            session = await claim
            return _Outcome.NOTHING if session is None else await self._tell(session)
        except GatewayError:
            return _Outcome.NOTHING  # MongoDB is away, as its border has logged
        except Exception:  # noqa: BLE001  see above
            _log.exception("session %s cannot be told of", "?" if session is None else session.session_id)
            self._failures_left -= 1
            return _Outcome.FAILED

    async def _tell(self, session: SessionDocument) -> _Outcome:
        """Tell all that a claimed session has to say, or put it off. Raises DEPENDENCY_AWAY."""
        left: SessionDocument | None = session
        last = session
        try:
            async with asyncio.timeout(TELL_SECONDS):
                while left is not None and left.outbox:
                    last, entry = left, left.outbox[0]
                    status = await self._send(left, entry)
                    if not is_done(entry.kind, status):
                        break
                    # What has come in meanwhile is in the row that this gives back.
                    left = await self._sessions.delivered(left.session_id, entry.entry_id)
                else:
                    return _Outcome.TOLD
        except (httpx.TransportError, TimeoutError) as error:
            return await self._is_away(last, str(error) or type(error).__name__)
        if status in FAILURE_STATUSES:
            return await self._is_away(last, f"it answered {status}")
        return await self._is_kept(last, status)

    async def _is_away(self, session: SessionDocument, reason: str) -> _Outcome:
        self._failures_left = 0
        if not self._away:
            self._away = True
            _log.warning("session management cannot be told of sessions: %s", reason)
        await self._put_off(session, self._age_seconds(session))
        return _Outcome.AWAY

    async def _is_kept(self, session: SessionDocument, status: int) -> _Outcome:
        """Put off what got an answer that is not the end of it, with one line in the log."""
        entry, age_seconds = session.outbox[0], self._age_seconds(session)
        if not is_refused(status):
            self._failures_left -= 1
            outcome, longest_seconds = _Outcome.FAILED, LONGEST_WAIT_SECONDS
        else:
            outcome, longest_seconds = _Outcome.REFUSED, LONGEST_REFUSED_SECONDS
        if outcome is _Outcome.REFUSED and age_seconds >= ALARM_AGE_SECONDS:
            _log.error(
                "session management answered %d to the %s of session %s, which it has not taken for %d hours; "
                "it is kept",
                status,
                entry.kind,
                session.session_id,
                age_seconds // 3_600,
            )
        else:
            _log.warning(
                "session management answered %d to the %s of session %s, which is kept",
                status,
                entry.kind,
                session.session_id,
            )
        await self._put_off(session, age_seconds, longest_seconds)
        return outcome

    async def _put_off(
        self, session: SessionDocument, age_seconds: float, longest_seconds: float = LONGEST_WAIT_SECONDS
    ) -> None:
        wait = dt.timedelta(seconds=wait_seconds(age_seconds, self._jitter(), longest_seconds))
        await self._sessions.put_off(session.session_id, self._now() + wait)

    async def _send(self, session: SessionDocument, entry: OutboxEntry) -> int:
        """The status of the answer. Raises httpx.TransportError."""
        fields = {
            "X-User-Id": session.user_id,
            "X-Request-ID": entry.entry_id,
            "Idempotency-Key": entry.entry_id,
        }
        method, path, content = "DELETE", f"{PATH}/{session.session_id}", None
        if entry.kind == "create":
            fields["Content-Type"] = "application/json"
            method, path, content = "POST", PATH, _body(session)
        async with self._client.stream(
            method, path, headers=fields, content=content, timeout=_TIMEOUT
        ) as response:
            await _read_off(response)
            return response.status_code

    def _age_seconds(self, session: SessionDocument) -> float:
        return self._wall_clock() - session.outbox[0].at.timestamp()

    def _now(self) -> dt.datetime:
        return utc(self._wall_clock())


_LEASE: Final = dt.timedelta(seconds=LEASE_SECONDS)


def _body(session: SessionDocument) -> bytes:
    return msgspec.json.encode(
        {
            "session_id": session.session_id,
            "user_id": session.user_id,
            "status": session.status,
            "metadata": session.metadata,
            "created_at": rfc3339(session.created_at),
        }
    )


async def _read_off(response: httpx.Response) -> None:
    """Read a short answer to its end, so that its connection can be used again. The head has said it all: what
    is long, slow or broken behind it changes nothing, and costs the connection.
    """
    size = 0
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            async for piece in response.aiter_raw():
                size += len(piece)
                if size > _MOST_ANSWER_BYTES:
                    return
    except (httpx.TransportError, TimeoutError):
        pass
