"""An application on a real Sanic server, without the gateway in front of it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sanic import Sanic


@asynccontextmanager
async def served(app: Sanic[Any, Any]) -> AsyncIterator[httpx.AsyncClient]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = await app.create_server(sock=listener, return_asyncio_server=True, access_log=False)
    assert server is not None
    await server.startup()
    await server.start_serving()
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=origin, trust_env=False) as client:
            yield client
    finally:
        server.close()
        await server.wait_closed()
        Sanic._app_registry.pop(app.name, None)
