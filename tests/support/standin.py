"""A small app in the place of `lucid.app`, for tests of the serving itself.

Environment variables choose how it misbehaves, as it runs in a process of its own.
"""

import asyncio
import os
from typing import Any

from sanic import Request, Sanic, response

from lucid.settings import Settings

FACTORY = "tests.support.standin:create_app"
PROTOCOL = "sanic.server.protocols.http_protocol:HttpProtocol"


def create_app(settings: Settings) -> Sanic[Any, Any]:
    if os.environ.get("STANDIN_FAILS") == "factory":
        raise RuntimeError("the table\nhas no legs")
    app = Sanic("standin", configure_logging=False)
    app.config.AUTO_EXTEND = False

    @app.get("/health")
    async def health(request: Request) -> response.HTTPResponse:
        return response.json({"pid": os.getpid(), "workers": settings.server.workers})

    @app.get("/slow")
    async def slow(request: Request) -> response.HTTPResponse:
        await asyncio.sleep(1.0)
        return response.text("done")

    if os.environ.get("STANDIN_FAILS") == "start":

        @app.before_server_start
        async def fail(_: Sanic[Any, Any]) -> None:
            raise ConnectionRefusedError("the store is away")

    return app


def main() -> None:
    import sys

    from lucid.server import StartError, serve
    from lucid.settings import load_settings

    try:
        sys.exit(
            serve(
                load_settings(os.environ),
                factory=FACTORY,
                protocol=os.environ.get("STANDIN_PROTOCOL", PROTOCOL),
                on_ready=lambda: print("ready", flush=True),
            )
        )
    except StartError as error:
        print(f"lucid: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
