"""Traces by a switch: what the service says while it works, and nothing of it unless asked to.

The SDK of OpenTelemetry is imported only if it is used: see `service.tracing_otel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastapi import FastAPI

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Tracing:
    """Switched off. A span never names an episode, an item or a value."""

    on = False

    def install(self, app: FastAPI) -> None:
        """Trace the requests of an app."""

    def here(self) -> Any:
        """Where the current task stands in a trace, to be handed to another thread; or None."""
        return None

    def committed(self, seconds: float) -> None:
        """The current request's append to the log is durable; it took so long, until now."""

    def waited(self, where: Any, seconds: float) -> None:
        """The engine began to compute what was submitted at `where`, so long ago."""

    def ticked(self, kind: str, seconds: float, rows: int, wheres: Sequence[Any]) -> None:
        """The engine computed a tick, until now, with rows of what was submitted at `wheres`."""

    def close(self) -> None:
        """Send what is left."""


OFF = Tracing()


def labels_of(scope: Mapping[str, Any]) -> tuple[str, str]:
    """Method and route template of an ASGI request.

    Paths carry ids of episodes, and the method is the client's word too: taken as they are, they
    would also make labels without end.
    """
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return method, getattr(scope.get("route"), "path", "unmatched")


def open_tracing(to: Literal["none", "console", "otlp"]) -> Tracing:
    """What the setting says. Raises ValueError if the packages it needs are missing."""
    if to == "none":
        return OFF
    try:
        from service.tracing_otel import exporting
    except ImportError as error:
        raise ValueError("tracing needs the extra `otel`: pip install 'llm4ehr[otel]'") from error
    return exporting(to)
