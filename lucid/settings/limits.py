"""The platform's named limits, made from the settings: for the app that counts by them and for the printed table."""

from collections.abc import Mapping
from typing import Any

from lucid.core.exchange import Limit
from lucid.settings import RateSettings


def named_limits(rates: RateSettings) -> Mapping[str, Limit]:
    """The limits that are on (above 0), by name."""

    def limit(name: str, requests: int, per: Any = "user") -> Limit:
        return Limit(name, requests, rates.window_seconds, rates.redis_down, per)

    every = (
        limit("public", rates.public),
        limit("authenticated", rates.authenticated),
        limit("admin", rates.admin),
        limit("login", rates.login, "address"),
        limit("refresh", rates.refresh),
        limit("chain", rates.chain),
    )
    return {each.name: each for each in every if each.requests}
