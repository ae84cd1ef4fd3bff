"""What a worker does about revocations that the control channel does not bring: it asks MongoDB.

Every revocation stands in MongoDB before it is told (revocations.py), so a worker that Redis does not reach asks there,
often enough that none is unknown for longer than a second: the channel proves itself each `BLOCK_SECONDS` (0.3 s),
after `SILENT_SECONDS` it counts as silent, and from then on MongoDB is asked each `POLL_SECONDS`. While the channel
speaks, only whether somebody has revoked whom Redis does not reach: one look at one row.

Cut off from both, the worker goes on accepting what it cannot know to be revoked, until it expires, and says so
(`blind`).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import GatewayError
from lucid.services.callers import utc
from lucid.services.revocations import USER_SECONDS, Revocation, Revocations, of_user

TICK_SECONDS: Final = 0.1
SILENT_SECONDS: Final = 0.6
POLL_SECONDS: Final = 0.7
CONNECTED_POLL_SECONDS: Final = 30.0
"""Between two questions that nothing gave cause for: what a worker could not count as untold before it died."""
ANSWER_SECONDS: Final = 0.7
"""Longer than that no poll is waited for: the next may find another server."""
FIRST_ANSWER_SECONDS: Final = 5.0
"""A worker's first question is for all that is revoked, not for what is new."""
OVERLAP_SECONDS: Final = 30.0
"""What is asked for again each time: the writers' clocks differ, and a write may take its time to be seen."""

_log = logging.getLogger(__name__)


class RevocationWatch:
    """Run `watch` as a task, in every worker.

    `silent_seconds` says for how long it has not been known that every message came; `token_seconds` is the longest
    life of a token from a login.
    """

    def __init__(
        self,
        *,
        revocations: Revocations,
        refresh_tokens: RefreshTokenRepository,
        users: UserRepository,
        api_keys: ApiKeyRepository,
        silent_seconds: Callable[[], float],
        token_seconds: float,
        wall_clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._revocations = revocations
        self._refresh_tokens = refresh_tokens
        self._users = users
        self._api_keys = api_keys
        self._silent_seconds = silent_seconds
        self._token_seconds = token_seconds
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._asked_until: float | None = None
        """Seconds since the epoch: what was revoked before is known. None: nothing was ever asked."""
        self._next = 0.0
        """When it is time to ask, on the monotonic scale."""
        self._full = 0.0
        """When it is time to ask for everything."""
        self._untold: int | None = None
        self._known: set[Revocation] = set()
        """What the last answer told: the next one overlaps with it."""
        self._silent = False
        self.blind = False
        """Whether neither Redis nor MongoDB tells of revocations at present."""
        self.blind_seconds = 0.0
        """For how long in all, to be counted."""

    async def watch(self) -> None:
        while True:
            begun = self._monotonic()
            await self.look()
            await asyncio.sleep(TICK_SECONDS)
            if self.blind:
                self.blind_seconds += self._monotonic() - begun

    async def look(self) -> None:
        """One tick: ask MongoDB if it is time to."""
        now = self._monotonic()
        silent = self._silent_seconds() > SILENT_SECONDS
        if silent and not self._silent:
            self._next = now
        self._silent = silent
        if not silent:
            self._see(True)
        if now < self._next:
            return
        self._next = now + POLL_SECONDS
        try:
            first = self._asked_until is None
            async with asyncio.timeout(FIRST_ANSWER_SECONDS if first else ANSWER_SECONDS):
                # Read before the rest, and taken for known only after it: what is counted meanwhile is seen next time.
                untold = self._untold if silent else await self._refresh_tokens.untold()
                if silent or now >= self._full or untold != self._untold:
                    await self.poll()
                    self._full = now + CONNECTED_POLL_SECONDS
                    self._untold = untold
        except (GatewayError, TimeoutError):
            if silent:
                self._see(False)
        else:
            self._see(True)

    async def poll(self) -> None:
        """Apply what MongoDB knows and this worker may not. Raises DEPENDENCY_AWAY, and then asks for it again."""
        begun = self._wall_clock()
        since = self._asked_until
        first = since is None
        logins = begun - self._token_seconds if since is None else since
        users = begun - USER_SECONDS if since is None else since
        revoked, changed, keys = await asyncio.gather(
            self._refresh_tokens.revoked_since(utc(logins), lasting=first),
            self._users.revoked_since(utc(users)),
            self._api_keys.revoked_since(utc(logins)),
        )
        told = {
            *(
                Revocation(
                    family=family,
                    until=(revoked_at.timestamp() + self._token_seconds)
                    if until is None
                    else until.timestamp(),
                )
                for family, revoked_at, until in revoked.families
            ),
            *(of_user(user_id, before.timestamp()) for user_id, before in (*revoked.users, *changed)),
            *(Revocation(key=digest.hex(), until=0.0) for digest in keys),
        }
        for revocation in told - self._known:
            self._revocations.apply(revocation)
        self._known = told
        self._asked_until = begun - OVERLAP_SECONDS

    def _see(self, seeing: bool) -> None:
        if self.blind is seeing:
            self.blind = not seeing
            if seeing:
                _log.info("revocations are known again")
            else:
                _log.error(
                    "neither Redis nor MongoDB tells of revocations: tokens are accepted until they expire"
                )
