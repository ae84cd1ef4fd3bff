"""What this worker knows about API keys: answers of the look-up, remembered for some seconds."""

from lucid.core.exchange import Principal
from lucid.errors import ErrorCode


class KeyMemory:
    """Bounded memory of look-ups by digest. A key that was found is asked for again after `found_seconds`, so a
    withdrawn one stops within that time at the latest; one that was not, after `missed_seconds`, so that a flood
    of bad keys never becomes a flood on the database."""

    def __init__(
        self, capacity: int = 10_000, *, found_seconds: float = 10.0, missed_seconds: float = 5.0
    ) -> None:
        self._capacity = capacity
        self._found_seconds = found_seconds
        self._missed_seconds = missed_seconds
        self._known: dict[bytes, tuple[float, Principal | ErrorCode]] = {}

    def get(self, digest: bytes, now: float) -> Principal | ErrorCode | None:
        """The remembered answer, or None: it must be looked up and `put`."""
        entry = self._known.get(digest)
        if entry is None or entry[0] <= now:
            return None
        return entry[1]

    def put(self, digest: bytes, answer: Principal | ErrorCode, now: float) -> None:
        seconds = self._found_seconds if isinstance(answer, Principal) else self._missed_seconds
        self._known.pop(digest, None)
        if len(self._known) >= self._capacity:
            del self._known[next(iter(self._known))]
        self._known[digest] = (now + seconds, answer)

    def forget_all(self) -> None:
        """Called when anything about keys was withdrawn: the next use of each asks again."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)
