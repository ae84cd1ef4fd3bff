"""A yardstick, no gateway: what bare Sanic does when a handler answers the 65 bytes itself."""

from benchmarks.peers.base import Peer, Running, arguments, start_python
from benchmarks.stage import BODY_65, Stage


def _start(stage: Stage, port: int) -> Running:
    return start_python(stage, port, "benchmarks.peers.sanic_hello", "sanic_hello")


PEER = Peer(
    name="sanic_hello",
    title="Sanic handler alone, no proxying",
    start=_start,
    packages=("sanic", "uvloop"),
    proxies=False,
)


def serve() -> None:
    from sanic import HTTPResponse, Request, Sanic

    port, _backend = arguments()
    app = Sanic("bench_hello")

    async def hello(request: Request, path: str) -> HTTPResponse:
        return HTTPResponse(BODY_65, content_type="application/json")

    app.add_route(hello, "/<path:path>")
    app.run(host="127.0.0.1", port=port, single_process=True, access_log=False, motd=False)


if __name__ == "__main__":
    serve()
