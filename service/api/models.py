"""/models: the versions on disk and in memory, which one answers, and a trial beside it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import JSONResponse, Response

from service.api import examples, problems
from service.api.access import Admin, ReadOrAdmin
from service.api.body import read_json, validate
from service.api.deps import Context, ContextDep
from service.api.model_schemas import ModelsOut, PutShadow, ShadowOut, VersionOut
from service.api.openapi import example, request_body
from service.api.problems import Problem
from service.api.schemas import MODEL_NAME, MODEL_VERSION
from service.catch_up import CatchUp
from service.models.manager import Models
from service.models.shadow import Trial
from service.models.version import Name, Version
from service.times import format_time

router = APIRouter(prefix="/models", tags=["models"])

_Name = Annotated[
    str, Path(pattern=MODEL_NAME, description="Name of a model", examples=["llm4ehr"])
]
_Number = Annotated[str, Path(pattern=MODEL_VERSION, description="Its version", examples=["2"])]
_VERSION = "/{name}/versions/{version}"


@router.get(
    "",
    operation_id="listModels",
    summary="All versions, which one answers, and the trial",
    response_model=ModelsOut,
    responses={200: example(examples.MODELS), **problems.documented("invalid-request")},
)
async def list_models(context: ContextDep, visit: ReadOrAdmin) -> Response:
    """Versions on disk are `available`. A loaded one is `rebuilding` until every open stay has its
    scores, then `ready` to be activated. `failed` says why; what answered goes on answering.
    """
    models = context.models
    versions = [_version(v) for v in await models.versions()]  # a dead one ends its trial
    return JSONResponse(
        {
            "active": str(models.active.version.name),
            "shadow": None if models.trial is None else _trial(models.trial),
            "trials": [_trial(trial) for trial in models.trials],
            "versions": versions,
        }
    )


@router.get(
    _VERSION,
    operation_id="getModelState",
    summary="State of one version",
    response_model=VersionOut,
    responses={
        200: example(examples.MODEL_READY),
        **problems.documented("model-unknown", "invalid-request"),
    },
)
async def get_version(
    context: ContextDep, visit: ReadOrAdmin, name: _Name, version: _Number
) -> Response:
    return JSONResponse(_version(await context.models.version(Name(name, int(version)))))


@router.post(
    f"{_VERSION}/load",
    operation_id="loadModel",
    summary="Load a version beside the active one",
    status_code=202,
    response_model=VersionOut,
    responses={
        202: example(examples.MODEL_LOADING),
        **problems.documented(
            "model-control-disabled",
            "model-unknown",
            "model-not-ready",
            "too-many-models",
            "invalid-request",
        ),
    },
)
async def load(context: ContextDep, visit: Admin, name: _Name, version: _Number) -> Response:
    """Its files are verified, its engine is checked and warmed, and all open stays are scored, live
    hours of the active version first. `Location` says where to see how far it is.
    """
    return _begun(await _control(context).load(Name(name, int(version))))


@router.post(
    f"{_VERSION}/activate",
    operation_id="activateModel",
    summary="Have a version answer from now on",
    response_model=VersionOut,
    responses={
        200: example(examples.MODEL_ACTIVE),
        **problems.documented(
            "model-control-disabled", "model-not-loaded", "model-not-ready", "invalid-request"
        ),
    },
)
async def activate(context: ContextDep, visit: Admin, name: _Name, version: _Number) -> Response:
    """Requests that have begun are answered by the version they began with. That version stays
    loaded and keeps up: to roll back, activate it again. A trial ends.
    """
    return JSONResponse(_version(_control(context).activate(Name(name, int(version)))))


@router.post(
    f"{_VERSION}/unload",
    operation_id="unloadModel",
    summary="Let a version go",
    status_code=202,
    response_model=VersionOut,
    responses={
        202: example(examples.MODEL_READY | {"state": "unloading"}),
        **problems.documented(
            "model-control-disabled",
            "model-not-loaded",
            "model-active",
            "model-not-ready",
            "invalid-request",
        ),
    },
)
async def unload(context: ContextDep, visit: Admin, name: _Name, version: _Number) -> Response:
    """The answers that it has begun are finished first."""
    return _begun(_control(context).unload(Name(name, int(version))))


@router.put(
    "/shadow",
    operation_id="putShadow",
    summary="Compare a version with the active one",
    response_model=ShadowOut,
    openapi_extra=request_body(PutShadow, {"trial": examples.PUT_SHADOW}),
    responses={
        200: example(examples.SHADOW),
        **problems.documented(
            "malformed-json",
            "model-control-disabled",
            "model-not-loaded",
            "model-active",
            "model-not-ready",
            "body-timeout",
            "body-too-large",
            "unsupported-media-type",
            "invalid-request",
        ),
    },
)
async def put_shadow(request: Request, context: ContextDep, visit: Admin) -> Response:
    """From now on the newest hour of every new answer of both is compared, and counted anew. No
    answer shows anything of it.
    """
    models = _control(context)
    body = validate(PutShadow, await read_json(request, context.settings))
    name, _, version = body.model.partition("/")
    return JSONResponse(_trial(models.try_out(Name(name, int(version)))))


@router.delete(
    "/shadow",
    operation_id="deleteShadow",
    summary="Compare no more",
    status_code=204,
    responses=problems.documented("model-control-disabled"),
)
async def delete_shadow(context: ContextDep, visit: Admin) -> Response:
    """The version stays loaded, and what was found stands in `trials` of `GET /models`."""
    _control(context).end_trial()
    return Response(status_code=204)


def _control(context: Context) -> Models:
    """The models, if they may be changed here. Raises Problem."""
    if not context.settings.model_control:
        raise Problem(
            "model-control-disabled", "a setting of the service, LLM4EHR_MODEL_CONTROL, allows it"
        )
    return context.models


def _begun(version: Version) -> Response:
    name, number = version.name
    headers = {"Location": f"/models/{name}/versions/{number}"}
    return JSONResponse(_version(version), 202, headers)


def _version(version: Version) -> dict[str, Any]:
    model, live, failure = version.model, version.live, version.failure
    status = None if model is None else model.status()
    bundle = None if model is None else model.engine.bundle
    return {
        "name": version.name.name,
        "version": str(version.name.version),
        "state": version.condition,
        "since": None if version.condition == "available" else format_time(version.since),
        "digest": bundle and bundle.digest,
        "preprocessing_digest": bundle and bundle.preprocessing_digest,
        "slots": status
        and {"used": status.slots_used, "free": status.slots_free, "lost": status.slots_lost},
        "progress": live and _progress(live.catch_up),
        "failure": failure and {"type": failure.type, "detail": failure.detail},
    }


def _progress(catch_up: CatchUp) -> dict[str, int]:
    return {
        "scored": catch_up.n_scored,
        "total": catch_up.to_score,
        "behind": catch_up.n_behind,
        "failed": catch_up.n_failed + catch_up.n_unread,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    shadow = trial.shadow
    return {
        "model": str(trial.of.name),
        "against": str(trial.against),
        "since": format_time(trial.since),
        "until": None if trial.until is None else format_time(trial.until),
        "compared": shadow.compared,
        "dropped": shadow.dropped,
        "failed": shadow.failed,
        "changes": {
            task: {"n": change.n, "mean": change.mean, "max": change.largest}
            for task, change in shadow.changes.items()
        },
    }
