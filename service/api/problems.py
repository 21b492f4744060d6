"""Errors as RFC 9457 problem details. The types are part of the API; nothing repeats a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from service.access.authenticator import IssuerUnavailable, Unauthenticated
from service.access.principal import Forbidden
from service.answers import HourError
from service.api.schemas import ItemResultOut
from service.core import EngineStopped, ModelFault, Overloaded
from service.decisions import DeletedEpisode, NothingAccepted, Refused, UnknownEpisode
from service.episodes import NotConfirmed, SeqNotReached, TooManyWrites
from service.log.base import LogCorrupt, LogUnavailable, Unconfirmed
from service.models.version import ModelRefused

MEDIA_TYPE = "application/problem+json"

# name: (status, title)
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed-json": (400, "The body is not JSON"),
    "unauthenticated": (401, "The client was not recognised"),
    "forbidden": (403, "The client is not allowed this"),
    "model-control-disabled": (403, "Models cannot be changed over HTTP here"),
    "not-found": (404, "There is nothing here"),
    "episode-unknown": (404, "No such episode"),
    "model-unknown": (404, "No such model or version"),
    "model-not-loaded": (404, "That version of the model is not loaded"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "body-timeout": (408, "The body did not come in time"),
    "seq-not-reached": (409, "The log does not hold that entry yet"),
    "model-not-ready": (409, "That version of the model is not ready"),
    "model-active": (409, "That version of the model answers"),
    "too-many-models": (409, "As many versions as may be are loaded"),
    "episode-deleted": (410, "The episode was deleted"),
    "body-too-large": (413, "The body is too large"),
    "too-many-items": (413, "Too many items in one request"),
    "unsupported-media-type": (415, "The body must be application/json"),
    "misdirected": (421, "The service is not known by this name"),
    "invalid-request": (422, "The request is not valid"),
    "episode-id-invalid": (422, "The episode id is not valid"),
    "admission-missing": (422, "The admission time is missing"),
    "all-items-rejected": (422, "Every item was refused; nothing was recorded"),
    "hour-out-of-range": (422, "The episode has no such hour"),
    "hour-in-the-future": (422, "The hour has not begun"),
    "too-many-requests": (429, "Too many requests of one client"),
    "internal-error": (500, "The service failed"),
    "log-corrupt": (500, "The log of this episode is damaged; nothing was recorded"),
    "model-fault": (500, "The model gave no valid score for this episode"),
    "issuer-unavailable": (503, "The keys of the issuer of tokens are not to be had"),
    "log-unavailable": (503, "The log is unavailable; nothing was recorded"),
    "log-busy": (503, "Too many writes wait for the log; nothing was recorded"),
    "too-many-connections": (503, "There are as many connections as may be"),
    "overloaded": (503, "The engine is overloaded"),
    "log-slow": (503, "The log did not confirm in time; the write may be recorded all the same"),
    "deadline-exceeded": (503, "The answer was not ready in time"),
    "engine-unavailable": (503, "The engine is not running"),
}

KEEPS_LOAD_OFF = (429, 503)
"""Statuses that ask the client to come back later."""

CLIENT_GONE = 499
"""Status of an answer that nobody reads, as in the metrics; never sent."""

MAX_ERRORS = 100
"""Most wrong fields, or parameters, that one answer names; nothing has as many."""

_UNKNOWN_FIELD = "there is a field the API does not know"

ISSUER_RETRY_AFTER_S = 10
LOG_RETRY_AFTER_S = 5
BUSY_RETRY_AFTER_S = 1
ENGINE_RETRY_AFTER_S = 10


@dataclass(slots=True)
class Problem(Exception):
    """An answer that is a problem."""

    name: str
    detail: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def response(self, path: str) -> Response:
        """As problem details; below /v2 in the form of the Open Inference Protocol."""
        status, title = PROBLEMS[self.name]
        headers = dict(self.headers)
        if path == "/v2" or path.startswith("/v2/"):
            return JSONResponse({"error": self.detail or title}, status, headers)
        body = {
            "type": f"/problems/{self.name}",
            "title": title,
            "status": status,
            "detail": self.detail or title,
            # Names this occurrence; the path would carry the episode's id.
            "instance": uuid4().urn,
            **self.extra,
        }
        return JSONResponse(body, status, headers, media_type=MEDIA_TYPE)


class ClientGone(Exception):
    """The client closed its connection before the answer: nobody is left to read one."""


def as_problem(error: Exception) -> Problem:
    """The one table from errors to problems."""
    match error:
        case Problem():
            return error
        case UnknownEpisode():
            return Problem("episode-unknown", "no such episode, or not at the time asked about")
        case DeletedEpisode():
            return Problem("episode-deleted", "read it as of an earlier time with as_of")
        case SeqNotReached():
            return Problem("seq-not-reached")
        case ModelRefused():
            return Problem(error.problem, str(error))
        case HourError():
            return Problem(error.problem, str(error))
        case Refused():
            item = {"path": error.path, "type": error.type, "detail": error.detail}
            return Problem("invalid-request", error.detail, extra={"errors": [item]})
        case NothingAccepted():
            items = [ItemResultOut.of(result, None) for result in error.results]
            return Problem("all-items-rejected", extra={"items": items})
        case TooManyWrites():
            return Problem("log-busy", headers={"Retry-After": str(BUSY_RETRY_AFTER_S)})
        case NotConfirmed():
            return Problem("log-slow", headers={"Retry-After": str(LOG_RETRY_AFTER_S)})
        case Unauthenticated():
            return Problem("unauthenticated", str(error), {"WWW-Authenticate": "Bearer"})
        case IssuerUnavailable():
            headers = {"Retry-After": str(ISSUER_RETRY_AFTER_S)}
            return Problem("issuer-unavailable", headers=headers)
        case Forbidden():
            return Problem("forbidden")
        case LogCorrupt():
            return Problem("log-corrupt", "quote the instance when reporting this")
        case Unconfirmed():
            return Problem("log-slow", headers={"Retry-After": str(LOG_RETRY_AFTER_S)})
        case LogUnavailable():
            return Problem("log-unavailable", headers={"Retry-After": str(LOG_RETRY_AFTER_S)})
        case Overloaded():
            return Problem("overloaded", headers={"Retry-After": str(error.retry_after_s)})
        case EngineStopped():
            return Problem("engine-unavailable", headers={"Retry-After": str(ENGINE_RETRY_AFTER_S)})
        case ModelFault():
            return Problem("model-fault")
        case RequestValidationError():
            return _invalid_parameters(error)
        case HTTPException(status_code=404):
            return Problem("not-found")
        case HTTPException(status_code=405):
            return Problem("method-not-allowed", headers=error.headers or {})
        case _:
            return Problem("internal-error", "quote the instance when reporting this")


def invalid(errors: Sequence[ErrorDetails], *, where: str = "") -> Problem:
    """A problem that lists what is wrong, field by field, without repeating what was sent."""
    items = [
        {"path": where + _path(error), "type": _type(error), "detail": _detail(error)}
        for error in errors[:MAX_ERRORS]
    ]
    more = {"more": True} if len(errors) > MAX_ERRORS else {}
    return Problem("invalid-request", "see `errors`", extra={"errors": items} | more)


def too_wide(where: str) -> Problem:
    """A problem of more fields, or parameters, than there are names: they are not looked at."""
    item = {"path": where, "type": "unknown-field", "detail": _UNKNOWN_FIELD}
    return Problem("invalid-request", "see `errors`", extra={"errors": [item], "more": True})


def install(app: FastAPI, refused: Callable[[str], None]) -> None:
    """Answer every foreseen error as a problem. The unforeseen ones are the middleware's.

    `refused` hears the name of every problem by which the service keeps load off.
    """

    async def handle(request: Request, error: Exception) -> Response:
        problem = as_problem(error)
        if problem.name == "method-not-allowed":
            problem.headers = {"Allow": ", ".join(_methods(request))}
        if PROBLEMS[problem.name][0] in KEEPS_LOAD_OFF:
            refused(problem.name)
        return problem.response(request.url.path)

    async def nobody_reads(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (
        Problem,
        UnknownEpisode,
        DeletedEpisode,
        SeqNotReached,
        ModelRefused,
        HourError,
        Refused,
        NothingAccepted,
        Unauthenticated,
        IssuerUnavailable,
        Forbidden,
        LogCorrupt,
        LogUnavailable,
        TooManyWrites,
        NotConfirmed,
        Overloaded,
        EngineStopped,
        ModelFault,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientGone, nobody_reads)


def _methods(request: Request) -> list[str]:
    """What may be asked of a path, whichever of its routes was looked at first."""
    path = request.url.path
    routes = iter_route_contexts(request.app.routes)
    return sorted(
        {
            method
            for route in routes
            if compile_path(str(route.path))[0].match(path)
            for method in route.methods or ()
        }
    )


def documented(*names: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route in OpenAPI, with an example of each problem."""
    responses: dict[int | str, dict[str, Any]] = {}
    for name in names:
        status, title = PROBLEMS[name]
        response = responses.setdefault(
            status,
            {
                "description": title,
                "content": {
                    MEDIA_TYPE: {
                        "schema": {"$ref": "#/components/schemas/ProblemOut"},
                        "examples": {},
                    }
                },
            },
        )
        response["content"][MEDIA_TYPE]["examples"][name] = {
            "summary": title,
            "value": {
                "type": f"/problems/{name}",
                "title": title,
                "status": status,
                "detail": title,
                "instance": "urn:uuid:5f0c7c1e-8d0e-4f44-9d0a-0e6a2b8f6a51",
            },
        }
    return responses


def _invalid_parameters(error: RequestValidationError) -> Problem:
    errors: list[ErrorDetails] = list(error.errors())
    if any(e["loc"][:2] == ("path", "episode_id") for e in errors):
        return Problem(
            "episode-id-invalid", "1 to 128 letters, digits and . _ : - are an episode id"
        )
    return invalid(errors)


def _path(error: ErrorDetails) -> str:
    """JSON pointer to the field; to its parent if the client invented the name."""
    loc = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    return "".join(f"/{part}" for part in loc)


def _type(error: ErrorDetails) -> str:
    return (
        "unknown-field" if error["type"] == "extra_forbidden" else error["type"].replace("_", "-")
    )


def _detail(error: ErrorDetails) -> str:
    return _UNKNOWN_FIELD if _type(error) == "unknown-field" else error["msg"]
