"""The document that describes the JSON API (OpenAPI 3.1): made from the routes and from the types of what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from continual.service.web.looking import LONGEST, MOST
from continual.service.web.view import Status
from continual.state.software import software

_REF = "#/components/schemas/{model}"
_PATHS = ("seq", "identity", "number")
PARAMETERS: dict[str, tuple[str, dict[str, object]]] = {
    "q": ("what the place or the key has in it, in any case", {"type": "string", "maxLength": LONGEST}),
    "limit": ("how many rows at most", {"type": "integer", "minimum": 1, "maximum": MOST}),
    "before": ("only records before this one", {"type": "integer", "minimum": 0}),
    "seq": ("the number of a record", {"type": "integer", "minimum": 0}),
    "part": ("which of the models that came in one record", {"type": "integer", "minimum": 0, "default": 0}),
    "number": ("the number of a command that was asked for", {"type": "integer", "minimum": 1}),
    "identity": ("the model_id of a fold, a refusal or a candidate that waits", {"type": "string"}),
}
"""What routes take: what it means, and its schema."""


@dataclass(frozen=True, slots=True)
class Described:
    """A route as the document has it: its address, the method, what it does, the type that it gives, what it takes, and
    the type of a body where there is one. `failures`: what other answers mean."""

    path: str
    says: str
    gives: object
    takes: Sequence[str] = ()
    method: str = "get"
    body: object = None
    failures: dict[int, str] = field(default_factory=dict)


def document(routes: Sequence[Described]) -> dict[str, object]:
    """The document."""
    schemas: dict[str, object] = {
        "Error": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    }
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "continual",
            "version": software()["continual"],
            "description": "What a running daemon tells of its state. Sizes in bytes, times as RFC 3339 (UTC).",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"admin": {"type": "http", "scheme": "bearer", "description": "the admin_token"}},
        },
    }


def _operation(route: Described, schemas: dict[str, object]) -> dict[str, object]:
    failures = {**({400: "asked wrongly"} if route.takes else {}), **route.failures}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, object] = {
        "summary": route.says,
        "operationId": "_".join([route.method, *(part.strip("{}") for part in route.path.split("/") if part)]),
        "parameters": [_parameter(name) for name in route.takes],
        "responses": {
            "200": {
                "description": route.says,
                "content": {"application/json": {"schema": _schema(route.gives, schemas, "serialization")}},
            },
            **{str(status): {"description": told, "content": error} for status, told in failures.items()},
        },
    }
    if route.body is not None:
        content = {"application/json": {"schema": _schema(route.body, schemas, "validation")}}
        found["requestBody"] = {"required": True, "content": content}
        found["security"] = [{"admin": []}]
    return found


def _parameter(name: str) -> dict[str, object]:
    means, schema = PARAMETERS[name]
    inside = name in _PATHS
    where = {"in": "path" if inside else "query", "required": inside}
    return {"name": name, **where, "description": means, "schema": schema}


def _schema(kind: object, schemas: dict[str, object], mode: str) -> dict[str, object]:
    """The schema of a type; those of the records in it go to `schemas`."""
    adapter: TypeAdapter[object] = TypeAdapter(kind)  # type: ignore[arg-type]
    found = adapter.json_schema(ref_template=_REF, mode="validation" if mode == "validation" else "serialization")
    schemas |= found.pop("$defs", {})
    if kind is Status:  # each kind of source has a key of its own name
        found["additionalProperties"] = found["properties"].pop("sources")["additionalProperties"]
        found["required"].remove("sources")
    return found
