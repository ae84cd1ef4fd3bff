"""The plain way in Sanic: a route and one `httpx.AsyncClient` as it comes; no auth, no limiter."""

from benchmarks.peers.base import Peer, Running, arguments, end_to_end, start_python
from benchmarks.stage import Stage


def _start(stage: Stage, port: int) -> Running:
    return start_python(stage, port, "benchmarks.peers.sanic_httpx", "sanic_httpx")


PEER = Peer(
    name="sanic_httpx",
    title="Sanic route + `httpx.AsyncClient`, no auth, no limiter",
    start=_start,
    packages=("sanic", "uvloop", "httpx"),
)


def serve() -> None:
    import httpx
    from sanic import HTTPResponse, Request, Sanic

    port, backend = arguments()
    app = Sanic("bench_httpx")

    async def open_client(app: Sanic) -> None:  # type: ignore[type-arg]
        app.ctx.client = httpx.AsyncClient(base_url=backend, trust_env=False)

    async def forward(request: Request, path: str) -> HTTPResponse:
        headers = end_to_end(request.headers.items())
        client: httpx.AsyncClient = request.app.ctx.client
        answer = await client.request(request.method, "/" + path, headers=headers, content=request.body)
        kept = dict(end_to_end(answer.headers.items()))
        return HTTPResponse(answer.content, answer.status_code, kept, kept.get("content-type"))

    app.register_listener(open_client, "before_server_start")
    app.add_route(forward, "/<path:path>", methods=["GET", "POST"])
    app.run(host="127.0.0.1", port=port, single_process=True, access_log=False, motd=False)


if __name__ == "__main__":
    serve()
