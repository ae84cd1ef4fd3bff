"""The OpenAPI document: what it makes of declarations and rows, and that the gateway's own is whole."""

import datetime as dt
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType
from sanic import Request

from lucid.blueprints.access import own_routes
from lucid.blueprints.resource import Resource
from lucid.core.exchange import Limit, Role
from lucid.core.rules.routes import Route
from lucid.errors import ErrorCode, envelope
from lucid.openapi import DEFAULT_STATUSES, LIMIT_FIELDS, document
from lucid.settings import load_settings
from lucid.settings.limits import named_limits
from tests.support.servers import clean_environment

Count = Annotated[int, Meta(ge=1, le=9, description="How many")]


class Part(msgspec.Struct):
    note: str = ""


class Making(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=8, pattern="^[a-z]+$")]
    kind: Literal["a", "b"] = "a"
    part: Part | None = None


class Taking(msgspec.Struct, forbid_unknown_fields=True):
    token: str


class Search(msgspec.Struct, forbid_unknown_fields=True):
    page: Count = 1
    kind: Literal["a", "b"] | None = None
    status: str | UnsetType = UNSET


class Inner(msgspec.Struct):
    number: int = 0
    left_out: str | UnsetType = UNSET


class Thing(msgspec.Struct):
    thing_id: str
    inner: list[Inner] = []
    part: Part | None = None


class Report(msgspec.Struct, omit_defaults=True):
    active: bool
    until: str = ""


def things() -> Resource:
    routes = Resource("things", "/things")

    @routes.post(
        "",
        body=(Making, Taking),
        answer=Thing,
        location=lambda thing: thing.thing_id,
        errors=(ErrorCode.CONFLICT,),
    )
    async def make(_request: Request, body: Making | Taking) -> Thing:
        """Make a thing.

        Out of nothing.
        """
        raise NotImplementedError

    @routes.get("", query=Search, answer=list[Thing])
    async def search(_request: Request, query: Search) -> list[Thing]:
        """Search."""
        raise NotImplementedError

    @routes.get(
        "/{thing_id}/{count}", parameters={"count": Count}, answer=Report, errors=(ErrorCode.NOT_FOUND,)
    )
    async def get(_request: Request, thing_id: str, count: str) -> Report:
        """Get."""
        raise NotImplementedError

    @routes.patch("/{thing_id}", body=Making, body_optional=True, errors=(ErrorCode.BAD_CREDENTIAL,))
    async def change(_request: Request, thing_id: str, body: Making) -> None:
        """Change."""

    return routes


def rows() -> list[Route]:
    def row(pattern: str, methods: str, access: Role, **rest: Any) -> Route:
        return Route(pattern, access=access, methods=frozenset(methods.split()), **rest)

    return [
        row("/things", "POST", Role.USER, limits=(Limit("making", 5, per="address"),), max_body=70),
        row("/things", "GET", Role.PUBLIC),
        row("/things/*/*", "GET", Role.PUBLIC, counted=False),
        row("/things/*", "PATCH", Role.ADMIN),
    ]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    # As a reader gets it.
    whole: dict[str, Any] = json.loads(msgspec.json.encode(document(things().operations, rows())))
    return whole


def answer(told: dict[str, Any], operation: dict[str, Any], status: str) -> dict[str, Any]:
    found: dict[str, Any] = operation["responses"][status]
    if "$ref" in found:
        found = told["components"]["responses"][found["$ref"].rpartition("/")[2]]
    return found


def codes(told: dict[str, Any], operation: dict[str, Any], status: str) -> set[str]:
    schema = answer(told, operation, status)["content"]["application/json"]["schema"]
    assert schema["allOf"][0] == {"$ref": "#/components/schemas/Error"}
    enum = schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"]
    return {code.rpartition("_")[2] for code in enum}


# --- bodies, parameters, answers ----------------------------------------------------------------------------


def test_a_body_is_any_of_its_shapes_with_all_that_their_types_say(told: dict[str, Any]) -> None:
    make = told["paths"]["/things"]["post"]
    assert make["requestBody"]["required"] is True
    assert make["requestBody"]["description"] == "At most 70 bytes"
    assert make["requestBody"]["content"]["application/json"]["schema"] == {
        "anyOf": [{"$ref": "#/components/schemas/Making"}, {"$ref": "#/components/schemas/Taking"}]
    }
    making = told["components"]["schemas"]["Making"]
    assert making["required"] == ["name"]
    assert making["additionalProperties"] is False
    assert making["properties"]["name"] == {
        "type": "string",
        "minLength": 1,
        "maxLength": 8,
        "pattern": "^[a-z]+$",
    }
    assert making["properties"]["kind"] == {"enum": ["a", "b"], "default": "a"}


def test_what_changes_something_names_something(told: dict[str, Any]) -> None:
    body = told["paths"]["/things/{thing_id}"]["patch"]["requestBody"]
    assert body["required"] is False
    assert body["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Making",
        "minProperties": 1,
    }


def test_query_parameters_are_the_fields_of_their_struct(told: dict[str, Any]) -> None:
    assert told["paths"]["/things"]["get"]["parameters"] == [
        {
            "name": "page",
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1},
            "description": "How many",
        },
        # What is left out is null; nobody can send it.
        {"name": "kind", "in": "query", "required": False, "schema": {"enum": ["a", "b"]}},
        {"name": "status", "in": "query", "required": False, "schema": {"type": "string"}},
    ]


def test_path_parameters_are_what_a_segment_can_be(told: dict[str, Any]) -> None:
    thing_id, count = told["paths"]["/things/{thing_id}/{count}"]["get"]["parameters"]
    assert (thing_id["name"], thing_id["in"], thing_id["required"]) == ("thing_id", "path", True)
    assert count["schema"] == {"type": "integer", "minimum": 1, "maximum": 9}
    pattern = re.compile(thing_id["schema"]["pattern"])
    for text in ("a", "a.b", "...", "a b", "ü", ".a"):
        assert pattern.search(text), text
    for text in ("", ".", "..", "..;a", "a/b", "a\\b", "\0"):
        assert not pattern.search(text), text


def test_an_answer_has_all_its_fields_unless_its_struct_leaves_defaults_out(told: dict[str, Any]) -> None:
    schemas = told["components"]["schemas"]
    assert schemas["Thing"]["required"] == ["thing_id", "inner", "part"]
    assert schemas["Inner"]["required"] == ["number"]
    assert schemas["Report"]["required"] == ["active"]
    assert "default" not in schemas["Inner"]["properties"]["number"]
    # What is decoded as well need not come whole.
    assert schemas["Part"]["required"] == []
    for value in (Thing("x"), Thing("x", [Inner(), Inner(3, "b")], Part("n"))):
        encoded = msgspec.to_builtins(value)
        assert set(encoded) == set(schemas["Thing"]["required"])
        assert all(set(schemas["Inner"]["required"]) <= set(inner) for inner in encoded["inner"])


def test_a_creation_says_where(told: dict[str, Any]) -> None:
    created = told["paths"]["/things"]["post"]["responses"]["201"]
    assert created["description"] == "Created"
    assert created["headers"]["Location"] == {"$ref": "#/components/headers/Location"}
    assert told["components"]["headers"]["Location"]["required"] is True
    nothing = told["paths"]["/things/{thing_id}"]["patch"]["responses"]["204"]
    assert "content" not in nothing
    assert "Location" not in nothing["headers"]


def test_texts_come_from_the_handler(told: dict[str, Any]) -> None:
    make = told["paths"]["/things"]["post"]
    assert (make["operationId"], make["tags"]) == ("things.make", ["things"])
    assert (make["summary"], make["description"]) == ("Make a thing.", "Out of nothing.")
    assert told["tags"] == [{"name": "things"}]


# --- who may, and what is refused --------------------------------------------------------------------------


def test_credentials_by_the_row(told: dict[str, Any]) -> None:
    needed = [{"bearer": []}, {"apiKey": []}]
    assert told["paths"]["/things"]["post"]["security"] == needed
    assert told["paths"]["/things"]["get"]["security"] == [{}, *needed]
    assert told["paths"]["/things/{thing_id}"]["patch"]["x-lucid-access"] == "admin"
    assert set(told["components"]["securitySchemes"]) == {"bearer", "apiKey"}


def test_refusals_come_from_the_types_the_row_and_the_declaration(told: dict[str, Any]) -> None:
    paths = told["paths"]
    make, search = paths["/things"]["post"], paths["/things"]["get"]
    get, change = paths["/things/{thing_id}/{count}"]["get"], paths["/things/{thing_id}"]["patch"]
    assert codes(told, make, "400") == {"1001", "1002", "1003", "1008", "2008"}
    assert codes(told, search, "400") == {"1001", "1003", "1008", "2008"}
    assert codes(told, make, "401") == {"2001", "2002", "2003"}
    assert codes(told, change, "403") == {"2004"}
    assert codes(told, make, "409") == {"4001"}
    assert codes(told, get, "404") == {"4003"}
    assert codes(told, make, "413") == {"1006"}
    assert codes(told, make, "429") == {"3001"}
    assert codes(told, make, "503") == {"5004"}
    statuses = {
        name: set(each["responses"]) for name, each in (("make", make), ("search", search), ("get", get))
    }
    assert statuses == {
        "make": {"201", "400", "401", "409", "413", "429", "503", "default"},
        "search": {"200", "400", "413", "429", "503", "default"},
        "get": {"200", "400", "404", "413", "503", "default"},
    }
    assert make["x-lucid-limits"] == ["making: 5 in 60 s per address"]


def test_fields_of_answers(told: dict[str, Any]) -> None:
    paths = told["paths"]
    make, get = paths["/things"]["post"], paths["/things/{thing_id}/{count}"]["get"]
    change = paths["/things/{thing_id}"]["patch"]
    for status in make["responses"]:
        assert "X-Request-ID" in answer(told, make, status)["headers"]
        assert set(LIMIT_FIELDS) <= set(answer(told, make, status)["headers"])
    assert told["components"]["headers"]["X-Request-ID"]["required"] is True
    # Limits may all be off, but not where one of them refuses.
    refused = answer(told, make, "429")["headers"]
    assert all(refused[name]["required"] for name in (*LIMIT_FIELDS, "Retry-After"))
    assert not told["components"]["headers"]["RateLimit"]["required"]
    for status in set(get["responses"]) - {"default"}:
        assert not set(LIMIT_FIELDS) & set(answer(told, get, status)["headers"])
    for operation in (make, change):
        assert answer(told, operation, "401")["headers"]["WWW-Authenticate"]["required"] is True


def test_what_no_row_permits_is_no_operation() -> None:
    with pytest.raises(ValueError, match=r"GET /things/\{thing_id\}/\{count\}: no row"):
        document(things().operations, [row for row in rows() if row.counted])


def test_a_type_without_a_schema_is_a_fault_of_the_declaration() -> None:
    class Odd(msgspec.Struct):
        value: complex

    routes = Resource("odd", "/things")

    @routes.get("", answer=Odd)
    async def get(_request: Request) -> Odd:
        raise NotImplementedError

    with pytest.raises(TypeError, match="complex"):
        document(routes.operations, rows())


# --- the gateway's own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `lucid openapi` prints."""
    result = subprocess.run(
        [sys.executable, "-m", "lucid", "openapi"],
        env=clean_environment(),
        cwd=tmp_path_factory.mktemp("openapi"),
        capture_output=True,
        check=True,
        timeout=60,
    )
    whole: dict[str, Any] = json.loads(result.stdout)
    return whole


def operations(told: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in told["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for each in value.values():
            yield from nodes(each)
    elif isinstance(value, list):
        for each in value:
            yield from nodes(each)


def test_the_table_and_the_document_have_the_same_routes(own: dict[str, Any]) -> None:
    limits = named_limits(load_settings({}, serve=False).rates)
    table = {
        (row.pattern, method)
        for row in own_routes(limits)
        for method in row.methods or ()
        if method != "HEAD"
    }
    documented = {(re.sub(r"\{[a-z_]+\}", "*", path), method) for path, method, _ in operations(own)}
    assert documented == table


def test_every_reference_leads_somewhere_and_every_component_is_used(own: dict[str, Any]) -> None:
    used = {each["$ref"] for each in nodes(own) if isinstance(each.get("$ref"), str)}
    there = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers")
        for name in own["components"][kind]
    }
    assert used <= there
    # Some fields stand whole wherever they occur.
    assert there - used <= {f"#/components/headers/{name}" for name in ("Retry-After", "WWW-Authenticate")}


def test_each_operation_is_told_whole(own: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(own)]
    assert len(set(names)) == len(names)
    tags = {tag["name"] for tag in own["tags"]}
    for path, _, operation in operations(own):
        assert operation["summary"], path
        assert set(operation["tags"]) <= tags
        declared = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"]
        assert declared == re.findall(r"\{([a-z_]+)\}", path)
        keys = [(each["in"], each["name"]) for each in operation.get("parameters", ())]
        assert len(set(keys)) == len(keys)
        for status in operation["responses"]:
            assert answer(own, operation, status)["description"]


def test_every_code_is_of_the_registry_and_stands_at_its_status(own: dict[str, Any]) -> None:
    registry = {code.value.rpartition("_")[2]: code for code in ErrorCode}
    for path, _, operation in operations(own):
        for status in operation["responses"]:
            if status.startswith("2"):
                continue
            for number in codes(own, operation, status):
                allowed = DEFAULT_STATUSES if status == "default" else (int(status),)
                # A malformed head is 400, and may be 417 or 505; one that is too large 431 or 414.
                assert registry[number].status in (*allowed, 400), (path, status, number)
                assert status in ("default", str(registry[number].status))


def test_examples_and_defaults_are_what_their_schemas_permit(own: dict[str, Any]) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    count = 0
    for schema in [
        each for each in nodes(own) if {"examples", "default"} & set(each) and "responses" not in each
    ]:
        validator = jsonschema_rs.Draft202012Validator({**schema, "components": own["components"]})
        for value in [*schema.get("examples", ()), *([schema["default"]] if "default" in schema else [])]:
            validator.validate(value)
            count += 1
    assert count > 5


def test_errors_are_what_the_document_says() -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    told = document(things().operations, rows())
    validator = jsonschema_rs.Draft202012Validator(
        told["components"]["schemas"]["Error"], validate_formats=True
    )
    moment = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    for code in ErrorCode:
        validator.validate(json.loads(envelope(code, "", {"field": "x"}, "r-1", moment)))
    assert not validator.is_valid({"error": {"code": "LUCID_ERR_1001"}})
