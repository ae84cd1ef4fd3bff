"""What a caller is judged by: its leases for the limits that apply, one token from each in one step or none (rule 11).

A decision with tokens at hand is a look-up and a subtraction: `Claim.take`. Everything here is memory.
"""

import enum

import msgspec

from lucid.core.exchange import Limit
from lucid.core.rules.key_lease import KeyLease


class Take(enum.Enum):
    ADMITTED = enum.auto()
    DENIED = enum.auto()
    WANTING = enum.auto()
    """No token at hand: the store must be asked (`LeaseStore.admit`)."""


# Members of an enum cost a look-up by its metaclass each time, a third of the hot path.
_ADMITTED, _DENIED, _WANTING = Take.ADMITTED, Take.DENIED, Take.WANTING


class Standing(msgspec.Struct, frozen=True):
    """Where a caller stands with one limit. `remaining` holds if nobody else spends."""

    limit: Limit
    remaining: int
    reset_seconds: int


class LimitSet:
    """Limits that are judged together. Made once per route table; equal only to itself."""

    __slots__ = ("by_address", "by_user", "limits")

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        if any(limit.requests < 1 or limit.window_seconds < 1 for limit in limits):
            raise ValueError("a limit and its window must be at least 1; leave out a limit that is off")
        if len({limit.name for limit in limits}) != len(limits):
            raise ValueError("a limit must not stand twice in a set")
        self.limits = limits
        self.by_user = any(limit.per == "user" for limit in limits)
        self.by_address = any(limit.per == "address" for limit in limits)


class Claim:
    """One caller's leases for one `LimitSet`. Get it from `Leases.claim`; it may be kept for one exchange."""

    __slots__ = ("_one", "_pattern", "_policies", "all", "limits")

    def __init__(self, limits: LimitSet, every: tuple[KeyLease, ...]) -> None:
        self.limits = limits
        self.all = every
        self._one = every[0] if len(every) == 1 else None
        self._pattern = b""
        self._policies = tuple(lease.policy for lease in every)

    def take(self, now: float) -> Take:
        """One token from each lease, or none. WANTING: await `LeaseStore.admit`, which settles it."""
        lease = self._one
        if lease is not None:
            has = lease.has
            if has > 0 and now < lease.until:
                lease.has = has - 1
                if has <= lease.low:
                    lease.nudge(now)
                return _ADMITTED
            return self._take_slowly(now)
        for lease in self.all:
            if lease.has <= 0 or now >= lease.until:
                return self._take_slowly(now)
        for lease in self.all:
            lease.has -= 1
            if lease.has < lease.low:
                lease.nudge(now)
        return _ADMITTED

    def _take_slowly(self, now: float) -> Take:
        wanting = False
        alone: list[KeyLease] = []
        for lease in self.all:
            if lease.ready(now):
                continue
            if lease.local(now):
                if not lease.room(now):
                    lease.counters.degraded += 1
                    return _DENIED
                alone.append(lease)
            elif now < lease.deny_until:
                lease.counters.refused_from_memory += 1
                return _DENIED
            else:
                wanting = True
        if wanting:
            return _WANTING
        for lease in self.all:
            if lease in alone:
                lease.counters.degraded += 1
                lease.spend_local(now)
            else:
                lease.has -= 1
                if lease.has < lease.low:
                    lease.nudge(now)
        return _ADMITTED

    def fields(self, now: float) -> bytes:
        """The answer's fields, spelt as in draft-ietf-httpapi-ratelimit-headers-11; b"" without limits."""
        lease = self._one
        if lease is not None:
            remaining = lease.remaining(now)
            reset = lease.reset_seconds(now)
            return lease.fields_pattern % (remaining, reset, remaining, reset)
        if not self.all:
            return b""
        numbers: list[int] = []
        tightest = self.all[0]
        least = least_reset = -1
        stale = self._pattern == b""
        for lease, policy in zip(self.all, self._policies, strict=True):
            remaining = lease.remaining(now)
            reset = lease.reset_seconds(now)
            numbers += (remaining, reset)
            if least < 0 or remaining < least:
                tightest, least, least_reset = lease, remaining, reset
            stale = stale or lease.policy is not policy
        if stale:
            self._policies = tuple(lease.policy for lease in self.all)
            states = b", ".join(lease.state_pattern for lease in self.all)
            self._pattern = b"RateLimit-Policy: %b\r\nRateLimit: %b\r\n" % (
                b", ".join(policy.replace(b"%", b"%%") for policy in self._policies),
                states,
            )
        return self._pattern % tuple(numbers) + tightest.x_pattern % (least, least_reset)

    def standings(self, now: float) -> tuple[Standing, ...]:
        return tuple(
            Standing(lease.limit, lease.remaining(now), lease.reset_seconds(now)) for lease in self.all
        )

    def retry_after(self, now: float) -> float:
        """Seconds after which a refused caller has quota again, if nobody else spends; not rounded."""
        return max((lease.blocked_seconds(now) for lease in self.all), default=0.0)

    def tightest(self, now: float) -> Limit:
        """The limit that a 429 names: the one that blocks longest, or else with the least remaining.

        Raises ValueError on a claim without limits: nothing can refuse there.
        """
        return max(self.all, key=lambda lease: (lease.blocked_seconds(now), -lease.remaining(now))).limit
