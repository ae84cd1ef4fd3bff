"""An app whose slow request lasts as long as the test wants: until there is a file `go` in the working folder.

The first of such requests says with a file `begun` that it has reached its handler.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from sanic import Request, Sanic, response

from lucid.server import serve
from lucid.settings import Settings, load_settings
from tests.support.standin import PROTOCOL

BEGUN, GO = "begun", "go"


def create_app(_: Settings) -> Sanic[Any, Any]:
    app = Sanic("patient", configure_logging=False)
    app.config.AUTO_EXTEND = False
    say_begun, may_go = Path(BEGUN).touch, Path(GO).exists

    @app.get("/health")
    async def health(request: Request) -> response.HTTPResponse:
        return response.json({"pid": os.getpid()})

    @app.get("/slow")
    async def slow(request: Request) -> response.HTTPResponse:
        say_begun()
        while not may_go():
            await asyncio.sleep(0.02)
        return response.text("done")

    return app


if __name__ == "__main__":
    sys.exit(
        serve(
            load_settings(os.environ),
            factory="tests.server.patient:create_app",
            protocol=PROTOCOL,
            on_ready=lambda: print("ready", flush=True),
        )
    )
