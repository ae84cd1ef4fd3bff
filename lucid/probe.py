"""Whether the gateway's dependencies answer, for `lucid check`: one try each, all at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lucid.settings import EndpointSettings, Settings
from lucid.settings.checks import mask_uri

TRY_SECONDS = 3.0


async def probe(settings: Settings) -> list[tuple[str, str]]:
    """Every dependency with what is wrong with it; empty: it answers. No secret is in the texts."""
    stores = settings.stores
    tries: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        (f"MongoDB {mask_uri(stores.mongodb_uri)}", lambda: _mongodb(stores.mongodb_uri)),
        (f"Redis {mask_uri(stores.redis_uri)}", lambda: _redis(stores.redis_uri)),
    ]
    for backend in (*settings.backends, *([settings.auth_service] if settings.auth_service else [])):
        for endpoint in backend.endpoints:
            path = backend.health_path
            tries.append((f"backend {backend.name} {endpoint.label}{path}", _backend_try(endpoint, path)))
    if url := settings.tokens.jwks_url:
        tries.append((f"JWKS_URL {url}", _get_try(url)))
    faults = await asyncio.gather(*(_attempt(attempt) for _, attempt in tries))
    return [(label, fault) for (label, _), fault in zip(tries, faults, strict=True)]


async def _attempt(attempt: Callable[[], Awaitable[object]]) -> str:
    try:
        async with asyncio.timeout(TRY_SECONDS):
            await attempt()
    except TimeoutError:
        return f"no answer within {TRY_SECONDS:.0f} s"
    except Exception as error:  # noqa: BLE001  each driver has its own; all mean that it does not answer
        reason = " ".join(str(error).split())
        return mask_uri(reason)[:200] or type(error).__name__
    return ""


def _backend_try(endpoint: EndpointSettings, path: str) -> Callable[[], Awaitable[object]]:
    if path:
        return _get_try(endpoint.label + path)
    return lambda: _connect(endpoint.host, endpoint.port)


async def _connect(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    await writer.wait_closed()


def _get_try(url: str) -> Callable[[], Awaitable[object]]:
    async def get() -> None:
        import httpx

        # As the gateway itself will ask: not through a proxy that the environment names for others.
        async with httpx.AsyncClient(trust_env=False, timeout=TRY_SECONDS) as client:
            status = (await client.get(url)).status_code
        if status >= 300:
            raise ConnectionError(f"answers {status}")

    return get


async def _mongodb(uri: str) -> None:
    from lucid.database.connection import Connection

    connection = Connection(uri)
    try:
        if not await connection.ping():
            raise ConnectionError("does not answer")
    finally:
        connection.close()


async def _redis(uri: str) -> None:
    from lucid.core.exchange import Limit
    from lucid.core.wire.lease_store import LeaseStore
    from lucid.core.wire.redis_link import RedisLink, new_holder

    link = RedisLink(uri)
    # What it would log is what is raised here.
    logging.getLogger("lucid.limiter").setLevel(logging.CRITICAL)
    limiter = LeaseStore(link, new_holder(), fleet_told=0)
    try:
        await link.commands.ping()
        await limiter.start()
        await limiter.look(Limit("check", 1), "check")
    finally:
        await limiter.stop()
        await link.commands.aclose(close_connection_pool=True)
        await link.close()
