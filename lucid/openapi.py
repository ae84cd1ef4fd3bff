"""The OpenAPI document: made from what routes declare, so that it says what they do.

    what is sent and answered     the operations of the resources (blueprints/resource.py): the very types that decode
                                  and encode
    who may, limits, sizes        the rows of the gateway's own table (blueprints/access.py)
    what is refused, and how      both together, and the registry of codes (errors.py)

Each operation lists the refusals that belong to it. What a caller provokes on every path alike, by a head that cannot
be read or a method that a path lacks, is the answer `default`.
"""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
from msgspec import NODEFAULT

from lucid import SERVICE_NAME, __version__
from lucid.blueprints.resource import Operation
from lucid.core.exchange import Role
from lucid.core.rules.routes import Route
from lucid.errors import ErrorCode
from lucid.openapi_schemas import Schemas

JSON: Final = "application/json"

DESCRIPTION: Final = """\
The only door to the Lucid platform. Every path that answers GET answers HEAD as well.

A credential is `Authorization: Bearer …` with an access token, or `X-API-Key`; both at once are refused. Where none is
required, a missing, expired or bad one makes the caller public.

Every answer carries `X-Request-ID`: a caller's own, if it is 1 to 64 of `A-Z a-z 0-9 . _ -`, else a new one. Every
error is one envelope, whose `code` says what happened. Times are RFC 3339, in UTC.
"""

EVERYWHERE: Final = (
    ErrorCode.MALFORMED_HEAD,
    ErrorCode.MALFORMED_BODY,
    ErrorCode.TWO_CREDENTIALS,
    ErrorCode.BODY_TOO_LARGE,
    # Also without a store behind the operation: an API key is looked up, and a handler has only so much time.
    ErrorCode.DEPENDENCY_AWAY,
)
"""What each operation refuses, with statuses that others of its refusals share."""

DEFAULT: Final = (
    ErrorCode.MALFORMED_HEAD,
    ErrorCode.METHOD_NOT_ALLOWED,
    ErrorCode.HEAD_TOO_LARGE,
    ErrorCode.TOO_SLOW,
    ErrorCode.INTERNAL,
    ErrorCode.NOT_IMPLEMENTED,
)
"""What no operation has to itself: 405, 408, 414, 417, 431, 500, 501, 505."""

DEFAULT_STATUSES: Final = (405, 408, 414, 417, 431, 500, 501, 505)

LIMIT_FIELDS: Final = (
    "RateLimit-Policy",
    "RateLimit",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
)

_HEADERS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "X-Request-ID": (
        "The id of this exchange, in logs and at backends too",
        {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    ),
    "RateLimit-Policy": ("All limits that this request was counted by", {"type": "string"}),
    "RateLimit": ("Where the caller stands with each of them", {"type": "string"}),
    "X-RateLimit-Limit": ("Requests in a window, of the tightest limit", {"type": "integer", "minimum": 1}),
    "X-RateLimit-Remaining": ("What is left of it", {"type": "integer", "minimum": 0}),
    "X-RateLimit-Reset": ("Seconds from now until it is whole again", {"type": "integer", "minimum": 0}),
    "Retry-After": ("Seconds to wait", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("How to show who one is (RFC 6750)", {"type": "string", "pattern": "^Bearer "}),
    "Allow": ("The methods of this path", {"type": "string"}),
    "Location": ("Where the new resource is", {"type": "string", "format": "uri-reference"}),
}

_ALWAYS: Final = frozenset({"X-Request-ID", "Location"})
"""Fields that are required wherever they are named."""

_PARAMETER: Final = re.compile(r"\{([a-z_]+)\}")
# What the head check leaves of a segment (core/rules/targets.py): no slash, backslash or NUL however spelled, and no
# dot segment.
_SEGMENT: Final = {"minLength": 1, "pattern": r"^(?!\.{1,2}(?:;.*)?$)[^/\\\u0000]+$"}


def document(operations: Iterable[Operation], rows: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1 for these operations, under the rules of these rows.

    Raises ValueError for an operation that no row permits, to which the gateway would answer 404 or 405, and TypeError
    for a type that JSON Schema cannot tell.
    """
    every = tuple(operations)
    table = {(row.pattern, method): row for row in rows for method in row.methods or ()}
    schemas = Schemas(every)
    errors = _Errors()
    paths: dict[str, dict[str, Any]] = {}
    for operation in every:
        row = table.get((_PARAMETER.sub("*", operation.path), operation.method))
        if row is None:
            raise ValueError(f"{operation.method} {operation.path}: no row of the table permits it")
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _operation(operation, row, schemas, errors)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lucid API Gateway",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "The gateway that gave this document"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in every)],
        "paths": paths,
        "components": {
            "schemas": dict(sorted({**schemas.components, "Error": _envelope()}.items())),
            "responses": dict(sorted(errors.components.items())),
            "headers": {name: _field(name, required=name in _ALWAYS) for name in _HEADERS},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "An access token from a login",
                },
                "apiKey": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-API-Key",
                    "description": "An API key; it acts as its owner",
                },
            },
        },
    }


def refusals(operation: Operation, row: Route) -> frozenset[ErrorCode]:
    """The codes that the operation may be refused with, besides DEFAULT."""
    codes = {*EVERYWHERE, *operation.errors}
    if operation.bodies:
        codes |= {ErrorCode.BAD_JSON, ErrorCode.BAD_FIELD}
    if operation.query is not None or any(kind is not str for kind in operation.parameters.values()):
        codes.add(ErrorCode.BAD_FIELD)
    if row.access > Role.PUBLIC:
        codes |= {ErrorCode.NO_CREDENTIAL, ErrorCode.CREDENTIAL_EXPIRED, ErrorCode.BAD_CREDENTIAL}
    if row.access > Role.USER:
        codes.add(ErrorCode.ROLE_TOO_LOW)
    if row.networks is not None:
        codes.add(ErrorCode.ADDRESS_NOT_ALLOWED)
    if row.counted:
        codes.add(ErrorCode.RATE_LIMITED)
    return frozenset(codes)


def _operation(operation: Operation, row: Route, schemas: Schemas, errors: "_Errors") -> dict[str, Any]:
    told: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
    }
    if operation.description:
        told["description"] = operation.description
    parameters = [*_path_parameters(operation, schemas), *_query_parameters(operation, schemas)]
    if parameters:
        told["parameters"] = parameters
    if operation.bodies:
        told["requestBody"] = {
            "required": not operation.body_optional,
            "description": f"At most {row.max_body:,} bytes",
            "content": {JSON: {"schema": _body(operation, schemas)}},
        }
    by_status: dict[int, list[ErrorCode]] = {}
    for code in sorted(refusals(operation, row), key=lambda code: code.value):
        by_status.setdefault(code.status, []).append(code)
    responses = {str(operation.status): _success(operation, row, schemas)}
    for status, codes in sorted(by_status.items()):
        # A service says 401 of what a body holds, and 429 where all limits may be off: what the gateway says with them
        # is sure only where no service does.
        exact = not any(code.status == status for code in operation.errors)
        exact = exact and (status != 401 or row.access > Role.PUBLIC)
        responses[str(status)] = errors.of(status, codes, counted=row.counted, exact=exact)
    responses["default"] = errors.default()
    told["responses"] = responses
    credentials: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    told["security"] = credentials if row.access > Role.PUBLIC else [{}, *credentials]
    told["x-lucid-access"] = row.access.label
    if row.limits:
        told["x-lucid-limits"] = [
            f"{limit.name}: {limit.requests:,} in {limit.window_seconds} s per {limit.per}"
            for limit in row.limits
        ]
    return told


def _body(operation: Operation, schemas: Schemas) -> dict[str, Any]:
    schema = _any_of([schemas.of(body) for body in operation.bodies])
    # What is to be changed may be left out, each but not all: a PATCH that names nothing is refused.
    return {**schema, "minProperties": 1} if operation.method == "PATCH" else schema


def _path_parameters(operation: Operation, schemas: Schemas) -> list[dict[str, Any]]:
    parameters = []
    for name, kind in operation.parameters.items():
        schema = schemas.of(kind)
        description = schema.pop("description", None)
        if schema.get("type") == "string" and "pattern" not in schema:
            schema = {**schema, **_SEGMENT}
        parameters.append(_parameter(name, "path", True, schema, description))
    return parameters


def _query_parameters(operation: Operation, schemas: Schemas) -> list[dict[str, Any]]:
    parameters = []
    for field in msgspec.structs.fields(operation.query) if operation.query is not None else ():
        schema = schemas.of(field.type)
        # A parameter is absent or text: null, the default of those that may be absent, cannot be sent.
        options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
        if options:
            schema = {key: value for key, value in schema.items() if key != "anyOf"} | _any_of(options)
        description = schema.pop("description", None)
        if field.default is not NODEFAULT and field.default not in (None, msgspec.UNSET):
            schema["default"] = msgspec.to_builtins(field.default)
        parameters.append(_parameter(field.encode_name, "query", False, schema, description))
    return parameters


def _parameter(
    name: str, place: str, required: bool, schema: dict[str, Any], description: str | None
) -> dict[str, Any]:
    parameter: dict[str, Any] = {"name": name, "in": place, "required": required, "schema": schema}
    return {**parameter, "description": description} if description else parameter


def _success(operation: Operation, row: Route, schemas: Schemas) -> dict[str, Any]:
    headers = _headers(counted=row.counted)
    if operation.has_location:
        headers["Location"] = _header("Location")
    told: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase, "headers": headers}
    if operation.answer is not None:
        schema = schemas.of(operation.answer)
        told["content"] = {schema.get("contentMediaType", JSON): {"schema": schema}}
    return told


class _Errors:
    """The answers that refuse, one for each set of codes; `components` are those that were asked for."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {}

    def of(self, status: int, codes: Iterable[ErrorCode], *, counted: bool, exact: bool) -> dict[str, Any]:
        """A reference. `exact`: a 429 always says where the caller stands."""
        headers = _headers(counted=counted, limited=exact and status == 429)
        if status == 401:
            headers["WWW-Authenticate"] = _header("WWW-Authenticate", required=True)
        if status in (429, 503):
            headers["Retry-After"] = _header("Retry-After", required=status == 429)
        words = [] if counted else ["uncounted"]
        words += ["service"] if status == 429 and not exact else []
        return self._put(str(status), codes, headers, words)

    def default(self) -> dict[str, Any]:
        """A reference to the answer that no operation has to itself."""
        return self._put("default", DEFAULT, {**_headers(counted=True), "Allow": _header("Allow")}, [])

    def _put(
        self, status: str, codes: Iterable[ErrorCode], headers: dict[str, Any], words: list[str]
    ) -> dict[str, Any]:
        every = tuple(codes)
        numbers = [code.value.rpartition("_")[2] for code in every]
        name = ".".join([status, *([] if status == "default" else numbers), *words])
        code = {"enum": [code.value for code in every]}
        error = {"properties": {"error": {"properties": {"code": code}}}}
        self.components[name] = {
            "description": "\n".join(f"- `{code.value}` {code.message}" for code in every),
            "headers": headers,
            "content": {JSON: {"schema": {"allOf": [{"$ref": "#/components/schemas/Error"}, error]}}},
        }
        return {"$ref": f"#/components/responses/{name}"}


def _header(name: str, *, required: bool = False) -> dict[str, Any]:
    """A reference; where the field is required and elsewhere is not, itself."""
    return _field(name, required=True) if required else {"$ref": f"#/components/headers/{name}"}


def _field(name: str, *, required: bool) -> dict[str, Any]:
    description, schema = _HEADERS[name]
    return {"description": description, "required": required, "schema": schema}


def _headers(*, counted: bool, limited: bool = False) -> dict[str, Any]:
    """The fields of any answer. `limited`: it is the limits' own, which has theirs; another one has none where all
    limits are off.
    """
    headers = {"X-Request-ID": _header("X-Request-ID")}
    return headers | {name: _header(name, required=limited) for name in LIMIT_FIELDS if counted}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _envelope() -> dict[str, Any]:
    """What `errors.envelope` spells."""
    error = {
        "code": {"type": "string", "pattern": "^LUCID_ERR_[1-5][0-9]{3}$"},
        "message": {"type": "string", "description": "For people; it may change"},
        "details": {
            "type": "object",
            "description": "More about it, by code: `field` and `reason` of a bad field, `limit_bytes` of a body that"
            " is too large, `required` of a role that is too low, `limit`, `window_seconds` and `name` of a limit,"
            " `dependency` of what is away",
        },
        "request_id": {"type": "string"},
        "timestamp": {"type": "string", "format": "date-time"},
        "service": {"const": SERVICE_NAME},
        "version": {"const": "v1"},
    }
    return {
        "title": "Error",
        "description": "The platform's error envelope",
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": error,
                "required": list(error),
                "additionalProperties": False,
            }
        },
        "required": ["error"],
        "additionalProperties": False,
    }
