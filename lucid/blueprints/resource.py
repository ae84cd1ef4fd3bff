"""A blueprint's routes, each declared once: the type that decodes a request is the one that the OpenAPI document
shows, and so is the type that an answer is encoded from.

    users = Resource("users", "/api/v1/users")

    @users.post("", body=Registration, answer=UserView, location=lambda user: f"/api/v1/users/{user.user_id}")
    async def register(request: Request, body: Registration) -> UserView:
        \"\"\"Register with email and password.\"\"\"

A handler gets the request, its path's parameters, and `body` and `query` where it declares them; it returns a value of
`answer`, or None where there is none. Who may call it the gateway's table says (access.py).
"""

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from sanic import Blueprint, HTTPResponse, Request

from lucid.blueprints.coding import Body, Query, answer_json, no_content
from lucid.errors import ErrorCode

Handler = Callable[..., Awaitable[Any]]

_PARAMETER: Final = re.compile(r"\{([a-z_]+)\}")


class Operation(msgspec.Struct, frozen=True):
    """One method of one path, as the OpenAPI document tells it. `path` is whole, with `{parameters}`."""

    method: str
    path: str
    name: str
    summary: str
    description: str
    tag: str
    bodies: tuple[type[msgspec.Struct], ...]
    """The shapes that the body may have; none: there is no body."""
    body_optional: bool
    query: type[msgspec.Struct] | None
    parameters: Mapping[str, Any]
    """Each parameter of the path with its annotated type."""
    answer: Any
    """The type of a success; None: it has no body."""
    status: int
    has_location: bool
    errors: tuple[ErrorCode, ...]
    """What its service may answer, beyond what the gateway refuses by the table and the decoder by the types."""


class Resource:
    """Operations under one prefix. Hand `blueprint` to the app and `operations` to the OpenAPI document."""

    def __init__(self, name: str, prefix: str) -> None:
        self.name = name
        self.prefix = prefix
        self.blueprint = Blueprint(name, url_prefix=prefix)
        self.operations: list[Operation] = []

    def get(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        return self._route("GET", path, **declared)

    def post(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        return self._route("POST", path, **declared)

    def put(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        return self._route("PUT", path, **declared)

    def patch(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        return self._route("PATCH", path, **declared)

    def delete(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        return self._route("DELETE", path, **declared)

    def _route(
        self,
        method: str,
        path: str,
        *,
        answer: Any = None,
        body: type[msgspec.Struct] | tuple[type[msgspec.Struct], ...] = (),
        body_optional: bool = False,
        query: type[msgspec.Struct] | None = None,
        parameters: Mapping[str, Any] | None = None,
        location: Callable[[Any], str] | None = None,
        errors: tuple[ErrorCode, ...] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare a route. `body`: one struct, or several of which the body's names choose one; `body_optional`: an
        absent one is the struct with its defaults. With `location`, which spells it from the answer, it is 201.
        """
        bodies = body if isinstance(body, tuple) else (body,)
        status = 201 if location is not None else 200 if answer is not None else 204

        def declare(handler: Handler) -> Handler:
            summary, _, description = (inspect.getdoc(handler) or "").partition("\n")
            template = self.prefix + path
            self.operations.append(
                Operation(
                    method=method,
                    path=template,
                    name=f"{self.name}.{handler.__name__}",
                    summary=summary,
                    description=description.strip(),
                    tag=self.name,
                    bodies=bodies,
                    body_optional=body_optional,
                    query=query,
                    parameters={
                        name: (parameters or {}).get(name, str) for name in _PARAMETER.findall(template)
                    },
                    answer=answer,
                    status=status,
                    has_location=location is not None,
                    errors=errors,
                )
            )
            read_body = Body(*bodies, optional=body_optional).read if bodies else None
            read_query = Query(query).read if query is not None else None

            @functools.wraps(handler)
            async def handle(request: Request, **path_values: str) -> HTTPResponse:
                # Sanic hands the path on as it was sent; clients encode what an address or an id has (`%3A`).
                arguments: dict[str, Any] = {name: unquote(value) for name, value in path_values.items()}
                if read_body is not None:
                    arguments["body"] = read_body(request.body)
                if read_query is not None:
                    arguments["query"] = read_query(request.query_string)
                value = await handler(request, **arguments)
                if value is None:
                    return no_content()
                fields = {"location": location(value)} if location is not None else {}
                return answer_json(value, status, fields)

            methods = [method, "HEAD"] if method == "GET" else [method]
            self.blueprint.add_route(
                handle,
                _PARAMETER.sub(r"<\1:str>", path) or "/",
                methods=methods,
                name=handler.__name__,
            )
            return handler

        return declare
