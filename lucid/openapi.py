"""The OpenAPI document, as far as the router knows it: paths, methods, path parameters, summaries.

Bodies and answers are not described here. A handler's summary is the first line of its docstring.
"""

import inspect
import re
from typing import Any

from sanic import Sanic

from lucid import __version__

_PARAMETER = re.compile(r"<([a-z_]+)(?::([^>]+))?>")
_TYPES = {"int": "integer", "float": "number", "uuid": "string"}


def document(app: Sanic[Any, Any]) -> dict[str, Any]:
    """OpenAPI 3.1 for the routes that `app` answers itself, by path."""
    paths: dict[str, dict[str, Any]] = {}
    for route in app.router.routes:
        template = "/" + route.path.lstrip("/")
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": _TYPES.get(kind, "string")}}
            for name, kind in _PARAMETER.findall(template)
        ]
        operations = paths.setdefault(_PARAMETER.sub(r"{\1}", template), {})
        for method in sorted(route.methods - {"HEAD", "OPTIONS"}):
            summary = (inspect.getdoc(route.handler) or "").partition("\n")[0]
            operations[method.lower()] = {
                "operationId": route.name.rpartition(f"{app.name}.")[2],
                **({"summary": summary} if summary else {}),
                **({"parameters": parameters} if parameters else {}),
                "responses": {
                    "default": {"description": "See the platform's error envelope for what is not a success."}
                },
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lucid API Gateway", "version": __version__},
        "paths": dict(sorted(paths.items())),
    }
