"""The stack that this project grew out of: FastAPI, uvicorn, one aiohttp session; no auth, no limiter."""

from benchmarks.peers.base import Peer, Running, arguments, end_to_end, start_python
from benchmarks.stage import Stage


def _start(stage: Stage, port: int) -> Running:
    return start_python(stage, port, "benchmarks.peers.fastapi_aiohttp", "fastapi_aiohttp")


PEER = Peer(
    name="fastapi_aiohttp",
    title="FastAPI + uvicorn + aiohttp, no auth, no limiter",
    start=_start,
    packages=("fastapi", "uvicorn", "uvloop", "httptools", "aiohttp"),
)


def serve() -> None:
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager

    import aiohttp
    import uvicorn
    from fastapi import FastAPI, Request, Response

    port, backend = arguments()
    held: list[aiohttp.ClientSession] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=1024)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            held.append(session)
            yield

    app = FastAPI(lifespan=lifespan)

    async def forward(request: Request) -> Response:
        headers = end_to_end(request.headers.items())
        url = backend + request.url.path
        async with held[0].request(request.method, url, headers=headers, data=await request.body()) as answer:
            return Response(await answer.read(), answer.status, dict(end_to_end(answer.headers.items())))

    app.add_api_route("/{path:path}", forward, methods=["GET", "POST"])
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    serve()
