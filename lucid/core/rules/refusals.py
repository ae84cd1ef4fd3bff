"""What a caller is told who is over a limit: the same words whoever found it out, policy or service."""

import math
from typing import Protocol

from lucid.core.exchange import Refusal
from lucid.core.rules.claims import Claim
from lucid.errors import ErrorCode


class ClaimHolder(Protocol):
    """What an answer's RateLimit fields are taken from: the exchange. `started` is monotonic seconds."""

    claim: Claim | None
    started: float


def over_limit(claim: Claim, now: float, jitter: float) -> Refusal:
    """The 429 for a claim that was refused at `now`.

    `jitter`, in [0, 1), is added to the wait before it is rounded up: callers that were refused together come
    back spread over some two seconds, never early. The RateLimit fields are not here: they are `claim.fields`.
    """
    limit = claim.tightest(now)
    seconds = max(1, math.ceil(claim.retry_after(now) + jitter))
    return Refusal(
        ErrorCode.RATE_LIMITED,
        details={"limit": limit.requests, "window_seconds": limit.window_seconds, "name": limit.name},
        fields=(("Retry-After", str(seconds)),),
    )
