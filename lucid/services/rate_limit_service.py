"""What people and operators do with limits: see where they stand, look at a key, reset one; and limits that only a
service knows to charge.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from lucid.core.exchange import Limit, Principal
from lucid.core.rules.addresses import identifier as address_identifier
from lucid.core.rules.claims import Claim, LimitSet, Standing
from lucid.core.rules.refusals import ClaimHolder, over_limit
from lucid.core.wire.lease_store import LeaseStore, StoreAwayError
from lucid.errors import ErrorCode, GatewayError, away
from lucid.services.callers import Caller, record


class StandingView(msgspec.Struct, frozen=True):
    """Where a caller stands with one limit; `remaining` holds if nobody else spends on it."""

    name: str
    limit: int
    window_seconds: int
    remaining: int
    reset_seconds: int


class StandingsView(msgspec.Struct, frozen=True):
    tier: Literal["public", "authenticated", "admin"]
    identifier: str
    limits: tuple[StandingView, ...]


class KeyView(msgspec.Struct, frozen=True):
    """A key as Redis has it, for all workers: what was spent in the window, and what workers hold ready."""

    name: str
    identifier: str
    limit: int
    window_seconds: int
    spent: int
    held: int
    remaining: int
    reset_seconds: int


class RateLimitService:
    """One per worker, over its lease store. `limits` are the platform's and the routes' by name."""

    def __init__(
        self,
        store: LeaseStore,
        limits: Mapping[str, Limit],
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`jitter` gives [0, 1): seconds on top of what a refused caller is told to wait."""
        self._store = store
        self._limits = limits
        self._monotonic = monotonic
        self._jitter = jitter
        self._sets = {name: LimitSet((limit,)) for name, limit in limits.items()}

    def standing(self, principal: Principal, claim: Claim | None) -> StandingsView:
        """Where the caller of this request stands, from this worker's memory."""
        standings = self._store.peek(claim) if claim is not None else ()
        return StandingsView(principal.tier, principal.identifier, tuple(_view(each) for each in standings))

    async def look(self, name: str, identifier: str) -> KeyView:
        """A key as Redis has it. Raises NOT_FOUND for an unknown limit, DEPENDENCY_AWAY."""
        limit = self._limit(name)
        identifier = _counted_by(limit, identifier)
        try:
            answer = await self._store.look(limit, identifier)
        except StoreAwayError as error:
            raise away("redis") from error
        return KeyView(
            name=name,
            identifier=identifier,
            limit=limit.requests,
            window_seconds=limit.window_seconds,
            spent=answer.spent,
            held=answer.elsewhere,
            remaining=answer.free,
            reset_seconds=math.ceil(answer.free_ms / 1_000),
        )

    async def reset(self, name: str, identifier: str, principal: Principal, caller: Caller) -> None:
        """Clear what was spent; every worker hears of it. Raises NOT_FOUND, DEPENDENCY_AWAY."""
        limit = self._limit(name)
        identifier = _counted_by(limit, identifier)
        try:
            await self._store.reset(limit, identifier)
        except StoreAwayError as error:
            raise away("redis") from error
        record("limit_reset", caller, user_id=principal.user_id, limit=name, identifier=identifier)

    async def charge(self, name: str, identifier: str, exchange: ClaimHolder | None = None) -> None:
        """Charge one request to a named limit; a limit that is off charges nothing. Raises RATE_LIMITED.

        The limit joins those that `exchange` was charged to already, so that the answer's fields list all; where it
        refuses, they are given back: what is refused counts nothing.
        """
        limits = self._sets.get(name)
        if limits is None:
            return
        identifier = _counted_by(limits.limits[0], identifier)
        claim = self._store.leases.claim(limits, identifier, identifier)
        admitted = await self._store.admit(claim)
        if exchange is not None:
            if exchange.claim is not None and not admitted:
                self._store.refund(exchange.claim, exchange.started)
            exchange.claim = claim if exchange.claim is None else self._joined(exchange.claim, claim)
        if not admitted:
            refusal = over_limit(claim, self._monotonic(), self._jitter())
            raise GatewayError(refusal.code, details=refusal.details, fields=refusal.fields)

    def _joined(self, first: Claim, second: Claim) -> Claim:
        """Both as one, to be shown. Not kept: it lives as long as the exchange."""
        limits = LimitSet((*first.limits.limits, *second.limits.limits))
        return Claim(limits, (*first.all, *second.all))

    def _limit(self, name: str) -> Limit:
        limit = self._limits.get(name)
        if limit is None:
            raise GatewayError(ErrorCode.NOT_FOUND, f"There is no limit named {name} here")
        return limit


def _counted_by(limit: Limit, text: str) -> str:
    """Addresses are counted by their network where they are IPv6, and are given whole."""
    return address_identifier(text) if limit.name == "public" or limit.per == "address" else text


def _view(standing: Standing) -> StandingView:
    limit = standing.limit
    return StandingView(
        limit.name, limit.requests, limit.window_seconds, standing.remaining, standing.reset_seconds
    )
