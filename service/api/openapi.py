"""Descriptions of bodies that the routes read themselves, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.access.principal import Scope
from service.api.access import required_of
from service.api.model_schemas import PutShadow
from service.api.problems import MEDIA_TYPE, documented
from service.api.schemas import PatchEpisode, PostItemsDescribed, ProblemOut, PutEpisode

_BEARER = "bearer"
_REFUSALS = ("unauthenticated", "forbidden", "too-many-requests", "issuer-unavailable")

_REF = "#/components/schemas/{model}"
_READ_BY_HAND: tuple[type[BaseModel], ...] = (
    PostItemsDescribed,
    PutEpisode,
    PatchEpisode,
    PutShadow,
    ProblemOut,
)


def request_body(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is read as a stream."""
    content = {
        "schema": {"$ref": _REF.format(model=model.__name__)},
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def example(value: Any) -> dict[str, Any]:
    """The `content` of a JSON answer with one worked example."""
    return {"content": {"application/json": {"example": value}}}


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Complete the document: models that no signature mentions, examples as they are written."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            models = schema.setdefault("components", {}).setdefault("schemas", {})
            _drop_default_validation_answers(schema)
            _restore_examples(schema, routers)
            _tell_access(schema, routers)
            for model in _READ_BY_HAND:
                described = model.model_json_schema(ref_template=_REF)
                models.update(described.pop("$defs", {}))
                models[model.__name__] = described
            app.openapi_schema = schema
        return app.openapi_schema

    rendered: list[bytes] = []

    async def serve(request: Request) -> Response:
        # Anybody may ask for it, and it takes a while to make.
        if not rendered:
            rendered.append(bytes(JSONResponse(document()).body))
        return Response(rendered[0], media_type="application/json")

    app.openapi = document  # type: ignore[method-assign]
    app.add_route("/openapi.json", serve, include_in_schema=False)


def _tell_access(schema: dict[str, Any], routers: Sequence[APIRouter]) -> None:
    """Which scopes every operation requires, and how it answers who lacks them."""
    schema["components"]["securitySchemes"] = {
        _BEARER: {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key of this service, or a JWT of the issuer it trusts. A client "
            "whose certificate a trusted gateway has verified needs neither.",
        }
    }
    required = {
        route.operation_id: required_of(route)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            # In the order of the enumeration: the document is the same at every start.
            scopes = [s.value for s in Scope if s in required[operation["operationId"]]]
            if scopes:
                operation["security"] = [{_BEARER: [scope]} for scope in scopes]
                _add_refusals(operation["responses"], is_v2=path.startswith("/v2"))


def _add_refusals(responses: dict[str, Any], *, is_v2: bool) -> None:
    for status, response in documented(*_REFUSALS).items():
        if is_v2:
            error = {"content": {"application/json": {"example": {"error": "…"}}}}
            responses.setdefault(str(status), {"description": response["description"], **error})
            continue
        ours = response["content"][MEDIA_TYPE]
        there = responses.setdefault(str(status), response)["content"][MEDIA_TYPE]
        there["examples"] = {**there["examples"], **ours["examples"]}


def _drop_default_validation_answers(schema: dict[str, Any]) -> None:
    """FastAPI documents its own answer to bad parameters wherever we document none: never given."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(content.get("application/json")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _restore_examples(schema: dict[str, Any], routers: Sequence[APIRouter]) -> None:
    """FastAPI drops every null of the document, also those an example is there to show."""
    examples = {
        (route.operation_id, str(status)): response["content"]["application/json"]["example"]
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for status, response in route.responses.items()
        if "example" in response.get("content", {}).get("application/json", {})
    }
    for operations in schema["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                example = examples.get((operation["operationId"], status))
                if example is not None:
                    response["content"]["application/json"]["example"] = example
