"""How this gateway reaches the clusters of the platform: pools, breakers, clients and checks, as the settings say."""

import logging
import random
import ssl
import time

import httpx

from lucid.core.rules.breaker import BreakerState, CircuitBreaker, Transition
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.transport import PoolTransport
from lucid.settings import BackendSettings, Settings

NO_TIMEOUT_SECONDS = 300.0
"""What a breaker allows a trial besides the route's timeouts, which begin behind a body that may take long. Every
exchange settles its permit; this is for the day on which one does not."""
MOST_FETCHED_BYTES = 1_048_576

_log = logging.getLogger("lucid.app")


def balancer_of(backend: BackendSettings) -> Balancer:
    tls = ssl.create_default_context() if any(e.scheme == "https" for e in backend.endpoints) else None
    pools = [
        Pool(
            scheme=endpoint.scheme,
            host=endpoint.host,
            port=endpoint.port,
            max_connections=backend.max_connections,
            monotonic=time.monotonic,
            tls=tls,
        )
        for endpoint in backend.endpoints
    ]
    return Balancer(backend.name, pools, time.monotonic)


def breaker_of(name: str, settings: Settings) -> CircuitBreaker:
    circuit = settings.circuit
    # A trial must have the time that the slowest of the backend's routes gives a request.
    patience = [
        route.timeouts.connect + route.timeouts.head for route in settings.routes if route.backend == name
    ]
    breaker = CircuitBreaker(
        name,
        failure_threshold=circuit.failure_threshold,
        recovery_timeout=circuit.recovery_seconds,
        success_threshold=circuit.success_threshold,
        trial_timeout=max(patience, default=0.0) + NO_TIMEOUT_SECONDS,
        jitter=random.random,
    )
    breaker.subscribe(_say_transition)
    return breaker


def client_of(balancer: Balancer, breaker: CircuitBreaker | None) -> httpx.AsyncClient:
    """How services talk to a cluster: over its pool, under its breaker. No redirects, nothing of the environment."""
    return httpx.AsyncClient(
        transport=PoolTransport(balancer, breaker, time.monotonic),
        base_url=f"http://{balancer.name}",
        trust_env=False,
    )


def _say_transition(transition: Transition) -> None:
    _log.warning(
        "the breaker of %s went from %s to %s: %s (mode %s)",
        transition.name,
        transition.old.value,
        transition.new.value,
        transition.reason.value,
        transition.mode.value,
    )


async def backend_answers(backend: BackendSettings, balancer: Balancer, breaker: CircuitBreaker) -> bool:
    """An active check where the backend has a path for it, over the same pool; else what its breaker has seen."""
    if not backend.health_path:
        return breaker.snapshot(time.monotonic()).state is BreakerState.CLOSED
    # No breaker here: a check that it refuses would keep a backend that has recovered away for longer.
    async with client_of(balancer, None) as client:
        return (await client.get(backend.health_path, timeout=2.0)).is_success


async def fetch(url: str) -> bytes:
    """The body of a 200 answer, for keys that are kept elsewhere. No proxies of the environment, no redirects, no more
    than `MOST_FETCHED_BYTES`.
    """
    async with (
        httpx.AsyncClient(trust_env=False, timeout=5.0) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MOST_FETCHED_BYTES:
                raise httpx.HTTPError("the answer is too long")
        return body
