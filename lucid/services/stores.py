"""The border to Redis, as services cross it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from lucid.errors import away

_log = logging.getLogger(__name__)


@contextmanager
def redis_border() -> Iterator[None]:
    """Around calls to Redis: whatever goes wrong there leaves as GatewayError DEPENDENCY_AWAY."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        _log.warning("redis is away: %s", type(error).__name__)
        raise away("redis") from error
