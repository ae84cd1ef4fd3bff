"""What this worker knows about credentials that others judge: answers of the look-up, remembered for some seconds.

API keys above all; of tokens that were looked up, the bad ones (good ones live with the other tokens).
"""

import math
from typing import Any

from lucid.core.exchange import Principal
from lucid.errors import ErrorCode

FAILURE_SECONDS = 60.0
ASK_SECONDS = 1.0
"""Between two look-ups for an address that has had too many in vain."""
STALE_SECONDS = 60.0
"""How long an answer that was not withdrawn may stand in where asking is not allowed."""


class KeyMemory:
    """Bounded memory of look-ups by digest.

    A key that was found is asked for again after `found_seconds`, so a withdrawn one stops within that time at the
    latest; one that was not, after `missed_seconds`, so that a flood of bad keys never becomes a flood on the
    database. The two kinds are kept apart: bad keys do not push good ones out.
    """

    def __init__(
        self, capacity: int = 10_000, *, found_seconds: float = 10.0, missed_seconds: float = 5.0
    ) -> None:
        """`capacity` is of each kind, 1 at least."""
        self._capacity = capacity
        self._found_seconds = found_seconds
        self._missed_seconds = missed_seconds
        self.generation = 0
        """Changes with each `forget…`. Take it before a look-up and hand it to `put`: an answer that was on its way
        while something was withdrawn is not remembered."""
        self._found: dict[bytes, tuple[float, Principal, float]] = {}
        """The last number: until when it may stand in."""
        self._missed: dict[bytes, tuple[float, ErrorCode]] = {}
        self._failures: dict[str, list[float]] = {}
        """Asker to (until, count, when it may ask again)."""

    def get(self, digest: bytes, now: float) -> Principal | ErrorCode | None:
        """The remembered answer, or None: it must be looked up and `put`."""
        entry = self._found.get(digest) or self._missed.get(digest)
        return None if entry is None or entry[0] <= now else entry[1]

    def put(
        self,
        digest: bytes,
        answer: Principal | ErrorCode,
        now: float,
        *,
        generation: int | None = None,
        seconds_left: float = math.inf,
    ) -> None:
        """Remember an answer; one that names a caller no longer than for its `seconds_left`."""
        if generation is not None and generation != self.generation:
            return
        self._found.pop(digest, None)
        self._missed.pop(digest, None)
        if isinstance(answer, Principal):
            _make_room(self._found, self._capacity)
            self._found[digest] = (
                now + min(self._found_seconds, seconds_left),
                answer,
                now + min(self._found_seconds + STALE_SECONDS, seconds_left),
            )
        else:
            _make_room(self._missed, self._capacity)
            self._missed[digest] = (now + self._missed_seconds, answer)

    def forget(self, digest: bytes) -> None:
        """This one was withdrawn: its next use asks again."""
        self.generation += 1
        self._found.pop(digest, None)

    def forget_user(self, user_id: str) -> None:
        """Something about this user has changed: the next use of each of their keys asks again."""
        self.generation += 1
        gone = [digest for digest, (_, principal, _) in self._found.items() if principal.user_id == user_id]
        for digest in gone:
            del self._found[digest]

    def stale(self, digest: bytes, now: float) -> Principal | None:
        """Who this was lately, for those who cannot be asked about at present."""
        entry = self._found.get(digest)
        return None if entry is None or entry[2] <= now else entry[1]

    def failed(self, asker: str, now: float) -> None:
        """A look-up for this address found nobody."""
        entry = self._failures.get(asker)
        if entry is None or entry[0] <= now:
            self._failures.pop(asker, None)
            _make_room(self._failures, self._capacity)
            entry = self._failures[asker] = [now + FAILURE_SECONDS, 0, 0.0]
        entry[1] += 1

    def may_ask(self, asker: str, most: float, now: float) -> bool:
        """Whether to look up another credential for this address: not, but once a second, when `most` look-ups were in
        vain within a minute.
        """
        entry = self._failures.get(asker)
        if entry is None or entry[1] < most or entry[0] <= now:
            return True
        if now < entry[2]:
            return False
        entry[2] = now + ASK_SECONDS
        return True

    def __len__(self) -> int:
        return len(self._found) + len(self._missed)


def _make_room(entries: dict[Any, Any], capacity: int) -> None:
    """The oldest goes."""
    if len(entries) >= capacity:
        del entries[next(iter(entries))]
