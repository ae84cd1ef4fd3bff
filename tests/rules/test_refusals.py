"""What the refused are told."""

from typing import Any, cast

import pytest

from lucid.core.exchange import Limit
from lucid.core.rules.refusals import over_limit
from lucid.errors import ErrorCode


class Blocked:
    """A claim, as far as a refusal looks at it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def retry_after(self, now: float) -> float:
        return self.seconds - now

    def tightest(self, now: float) -> Limit:
        return Limit("chain", 20, 30)


@pytest.mark.parametrize(
    "seconds,jitter,told",
    [
        (0.0, 0.0, "1"),
        (0.2, 0.0, "1"),
        (2.0, 0.0, "2"),
        (2.1, 0.0, "3"),
        (2.1, 0.95, "4"),
        (59.5, 0.999, "61"),
    ],
)
def test_the_wait_is_rounded_up_after_the_jitter(seconds: float, jitter: float, told: str) -> None:
    refusal = over_limit(cast(Any, Blocked(100.0 + seconds)), 100.0, jitter)
    assert refusal.code is ErrorCode.RATE_LIMITED
    assert refusal.fields == (("Retry-After", told),)
    assert refusal.details == {"limit": 20, "window_seconds": 30, "name": "chain"}
