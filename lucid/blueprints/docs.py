"""`/docs` and `/openapi.json`: the document for people and for programs. Needs no internet.

The page is one file without a reference to anything outside: its style and its script stand in it, and its policy
names both by their hashes, so that nothing else runs even if something else ever stood there. What it shows it reads
from `/openapi.json`.
"""

import base64
import hashlib
from importlib import resources
from typing import Annotated, Any, Final

from msgspec import Meta
from sanic import Blueprint, HTTPResponse, Request
from sanic.response import raw

from lucid.blueprints.resource import Operation

Page = Annotated[str, Meta(extra_json_schema={"contentMediaType": "text/html"})]


def _operation(path: str, name: str, summary: str, answer: Any) -> Operation:
    return Operation(
        method="GET",
        path=path,
        name=f"docs.{name}",
        summary=summary,
        description="",
        tag="docs",
        bodies=(),
        body_optional=False,
        query=None,
        parameters={},
        answer=answer,
        status=200,
        has_location=False,
        errors=(),
    )


OPERATIONS: Final = (
    _operation("/docs", "page", "These pages.", Page),
    _operation(
        "/openapi.json", "document", "The OpenAPI document of the gateway's own routes.", dict[str, Any]
    ),
)
"""What the blueprint answers, for the document."""


def blueprint(document: bytes) -> Blueprint:
    """The two routes. `document` is the OpenAPI document as JSON; it lives as long as the blueprint."""
    page, policy = _page()
    # Kept by nobody unasked: a new release of the gateway has another page and another document.
    page_fields = {"cache-control": "no-cache", "content-security-policy": policy}
    document_fields = {"cache-control": "no-cache"}
    routes = Blueprint("docs")

    async def show(_request: Request) -> HTTPResponse:
        return raw(page, headers=page_fields, content_type="text/html; charset=utf-8")

    async def tell(_request: Request) -> HTTPResponse:
        return raw(document, headers=document_fields, content_type="application/json")

    routes.add_route(show, "/docs", methods=["GET", "HEAD"], name="page")
    routes.add_route(tell, "/openapi.json", methods=["GET", "HEAD"], name="document")
    return routes


def _page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy (level 3: a hash permits the inline element that it is of)."""
    style, script = _asset("docs.css"), _asset("docs.js")
    page = _asset("docs.html").replace("@style@", style).replace("@script@", script)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
