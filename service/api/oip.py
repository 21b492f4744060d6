"""Health and metadata in the form of the Open Inference Protocol, for platforms that speak it.

There is no `infer`: its requests carry tensors, ours carry facts about a stay that must be logged.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from llm4ehr import __version__
from service.api.access import AnyClient
from service.api.deps import Context, ContextDep
from service.models.version import Serving

router = APIRouter(prefix="/v2", tags=["health"])

_ERROR = {"content": {"application/json": {"example": {"error": "not ready"}}}}
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready", **_ERROR}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": "No such model", **_ERROR}}


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


def _serving(context: Context, model: str, version: str | None) -> Serving | None:
    """The version of that name: the one that answers where none is named."""
    active = context.models.active
    if version is None:
        return active if active.version.name.name == model else None
    return next(
        (s for s in context.models.able(model) if s.model.engine.bundle.version == version), None
    )


@router.get("", operation_id="getServer", summary="Server metadata")
async def server(visit: AnyClient) -> dict[str, Any]:
    return {"name": "llm4ehr", "version": __version__, "extensions": []}


@router.get(
    "/health/live",
    operation_id="getLive",
    summary="Whether a restart would not help",
    responses=_NOT_READY,
)
async def live(context: ContextDep) -> Response:
    """Independent of load: false only if the engine cannot recover."""
    if not context.engine.alive():
        return _error(503, "the engine has died")
    return JSONResponse({"live": True})


@router.get(
    "/health/ready",
    operation_id="getReady",
    summary="Whether requests are answered",
    responses=_NOT_READY,
)
async def ready(context: ContextDep) -> Response:
    """The log can be written, the engine runs, and the service is not about to stop.

    Independent of load, too: who takes a full replica away moves its load to the others.
    """
    if context.lifecycle.draining:
        return _error(503, "draining")
    if not context.log.available():
        return _error(503, "the log is unavailable")
    if not context.engine.alive():
        return _error(503, "the engine has died")
    if context.service.live.catch_up.ended:
        return _error(503, "stays are not scored any more")
    return JSONResponse({"ready": True})


@router.get(
    "/models/{model}",
    operation_id="getModel",
    summary="Model metadata",
    responses=_UNKNOWN,
)
@router.get(
    "/models/{model}/versions/{version}",
    operation_id="getModelVersion",
    summary="Model version metadata",
    responses=_UNKNOWN,
)
async def metadata(
    context: ContextDep, visit: AnyClient, model: str, version: str | None = None
) -> Response:
    """Inputs and outputs are those of the model behind the episodes, one row an hour. `versions`
    are those that are loaded.
    """
    serving = _serving(context, model, version)
    if serving is None:
        return _error(404, "no such model or version")
    bundle = serving.model.engine.bundle
    outputs = [{"name": task, "datatype": "FP32", "shape": [-1]} for task in bundle.tasks]
    if bundle.phenotypes:
        shape = [-1, len(bundle.phenotypes)]
        outputs = [
            {**output, "shape": shape} if output["name"] == "phenotyping" else output
            for output in outputs
        ]
    return JSONResponse(
        {
            "name": bundle.name,
            "versions": [s.model.engine.bundle.version for s in context.models.able(model)],
            "platform": "llm4ehr_episodes",
            "inputs": [],
            "outputs": outputs,
            "parameters": {
                "digest": bundle.digest,
                "preprocessing_digest": bundle.preprocessing_digest,
                "phenotypes": list(bundle.phenotypes),
            },
        }
    )


@router.get(
    "/models/{model}/ready",
    operation_id="getModelReady",
    summary="Whether the model answers",
    responses=_UNKNOWN | _NOT_READY,
)
@router.get(
    "/models/{model}/versions/{version}/ready",
    operation_id="getModelVersionReady",
    summary="Whether the model version answers",
    responses=_UNKNOWN | _NOT_READY,
)
async def model_ready(
    context: ContextDep, visit: AnyClient, model: str, version: str | None = None
) -> Response:
    serving = _serving(context, model, version)
    if serving is None:
        return _error(404, "no such model or version")
    if serving.version.condition == "rebuilding" or not serving.model.engine.alive():
        return _error(503, "the model is not ready")
    return JSONResponse({"name": model, "ready": True})
