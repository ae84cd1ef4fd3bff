"""The JSON Schemas of the types that operations decode and encode, for the OpenAPI document."""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import NODEFAULT, inspect

from lucid.blueprints.resource import Operation


class Schemas:
    """The schemas of all types that operations name; `components` are the structs among them and within them.

    msgspec describes what a struct decodes: a field with a default need not come. What is encoded has all its fields,
    unless its struct omits defaults; structs that are only answered are described so.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        decoded: list[Any] = []
        encoded: list[Any] = []
        for operation in operations:
            decoded += [*operation.bodies, *operation.parameters.values()]
            if operation.query is not None:
                decoded += [field.type for field in msgspec.structs.fields(operation.query)]
            if operation.answer is not None:
                encoded.append(operation.answer)
        read, written = _structs(decoded), _structs(encoded)
        self._types = [*decoded, *encoded, *written]
        self._schemas, components = msgspec.json.schema_components(
            self._types, ref_template="#/components/schemas/{name}"
        )
        self.components: dict[str, Any] = dict(components)
        for kind in written.keys() - read.keys():
            name = self.of(kind)["$ref"].rpartition("/")[2]
            self.components[name] = _as_encoded(self.components[name], written[kind])

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema, the caller's own copy."""
        # By equality: annotations are made anew each time that they are asked for, and some cannot be hashed.
        return dict(self._schemas[self._types.index(kind)])


def _as_encoded(schema: dict[str, Any], struct: inspect.StructType) -> dict[str, Any]:
    config = struct.cls.__struct_config__
    properties = {
        name: {key: value for key, value in told.items() if key != "default"}
        for name, told in schema["properties"].items()
    }
    required = [
        field.encode_name
        for field in struct.fields
        # Neither required nor with a default: UNSET, which is left out.
        if field.required
        or (not config.omit_defaults and (field.default, field.default_factory) != (NODEFAULT, NODEFAULT))
    ]
    return {**schema, "properties": properties, "required": required}


def _structs(kinds: Iterable[Any]) -> dict[type, inspect.StructType]:
    """The structs among these types and within them."""
    found: dict[type, inspect.StructType] = {}

    def look(kind: Any) -> None:
        if isinstance(kind, inspect.StructType):
            if kind.cls in found:
                return
            found[kind.cls] = kind
            for field in kind.fields:
                look(field.type)
        elif isinstance(kind, inspect.Type):
            for name in ("type", "types", "item_type", "item_types", "key_type", "value_type"):
                within = getattr(kind, name, ())
                for each in within if isinstance(within, tuple) else (within,):
                    look(each)

    for kind in inspect.multi_type_info(kinds):
        look(kind)
    return found
