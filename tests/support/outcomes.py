"""How a call ends: with its answer, or with the code of an error."""

from collections.abc import Awaitable
from typing import Any

import pytest

from lucid.errors import ErrorCode, GatewayError


async def refused(code: ErrorCode, call: Awaitable[Any]) -> GatewayError:
    """The error that the call raises, which must have this code."""
    with pytest.raises(GatewayError) as caught:
        await call
    assert caught.value.code is code
    return caught.value


async def outcome(call: Awaitable[Any]) -> Any:
    """The answer, or the code of the error."""
    try:
        return await call
    except GatewayError as error:
        return error.code
