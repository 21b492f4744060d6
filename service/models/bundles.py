"""Models made of the bundles in the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from llm4ehr.bundle import Bundle, BundleError, bundle_versions, load_bundle
from service.engine.backends.base import DeviceFault, RowDependenceError
from service.engine.backends.factory import make_backend
from service.engine.backends.verify import NotFinite
from service.engine.engine import OnlineEngine
from service.engine.metrics import EngineMetrics
from service.engine.turns import Turns
from service.models.version import LoadError, Model, Name
from service.precision import NotGated, let_through, numerics
from service.settings import Settings
from service.tracing import OFF, Tracing


def load_allowed(settings: Settings, name: Name, repository: Path | None = None) -> Bundle:
    """Verify and load a bundle that the settings allow; from another repository if one is given.

    Where digests are pinned, none but a pinned version is loaded. Raises BundleError.
    """
    repository = repository or settings.model_repository
    pins = settings.bundle_digests
    if pins is not None and str(name) not in pins:
        manifest = repository / name.name / str(name.version) / "manifest.json"
        raise BundleError(f"{manifest}: no digest of this version is pinned")
    return load_bundle(repository, *name, digest=None if pins is None else pins[str(name)])


class Bundles:
    """Implements `service.models.version.Loader`. Its engines share the processor in turns."""

    def __init__(
        self,
        settings: Settings,
        metrics: EngineMetrics,
        on_fatal: Callable[[BaseException], None],
        tracing: Tracing = OFF,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._tracing = tracing
        self._turns = Turns()

    def on_disk(self) -> list[Name]:
        """All versions whose manifest names them: a folder for other servers may hold others."""
        repository = self._settings.model_repository
        try:
            names = sorted(folder.name for folder in repository.iterdir() if folder.is_dir())
            found = [Name(n, version) for n in names for version in bundle_versions(repository, n)]
        except OSError:  # the repository is gone; what is loaded answers all the same
            return []
        return [name for name in found if _is_named(repository, name)]

    def open(self, name: Name) -> Model:
        """Verify a bundle and make its engine, not started.

        Raises BundleError, RowDependenceError, and ValueError (NotOnline, NotGated, NotFinite) for
        a network or a backend that does not do.
        """
        bundle = load_allowed(self._settings, name)
        if (reason := bundle.network.not_online) is not None:
            raise NotOnline(reason)
        gate = let_through(bundle, self._settings)
        backend = make_backend(bundle, self._settings)
        metrics = self._metrics.of(str(name))
        me = object()

        def fatal(error: BaseException) -> None:
            # The engine of a version that does not answer may fail alone; a broken device may not.
            if isinstance(error, DeviceFault) or self._turns.is_in_front(me):
                self._on_fatal(error)

        engine = OnlineEngine(
            bundle,
            backend,
            metrics,
            max_pending=self._settings.max_pending,
            max_state_bytes=self._settings.state_memory_mib << 20,
            numerics=numerics(backend, self._settings, gate),
            turn=lambda: self._turns.turn(me),
            on_fatal=fatal,
            tracing=self._tracing,
        )

        def close() -> None:
            engine.close()
            metrics.backlog(stays=0, rows=0, ticks={})
            metrics.memory(used=0, free=0)

        return Model(
            engine=engine,
            vocabulary=bundle.network.vocabulary,
            start=engine.start,
            close=close,
            go_first=lambda: self._turns.put_in_front(me, lambda: not engine.idle()),
            status=engine.status,
            retry_after_s=metrics.retry_after_s,
        )

    def load(self, name: Name) -> Model:
        """The same, with reasons that a client can read. Raises LoadError."""
        try:
            return self.open(name)
        except BundleError as error:
            # The message begins with a path, of which the client knows the end.
            root = f"{self._settings.model_repository}/"
            raise LoadError("bundle-invalid", str(error).replace(root, "")) from error
        except NotOnline as error:
            raise LoadError("not-streamable", str(error)) from error
        except NotGated as error:
            raise LoadError("not-gated", str(error)) from error
        except NotFinite as error:
            raise LoadError("model-fault", str(error)) from error
        except (RowDependenceError, ValueError) as error:
            raise LoadError("backend-failed", str(error)) from error


def _is_named(repository: Path, name: Name) -> bool:
    """Whether a client can ask for it, and the manifest is made for that very name."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name.name) or not 0 < name.version < 10**9:
        return False
    try:
        text = (repository / name.name / str(name.version) / "manifest.json").read_text()
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return True  # damaged: loading it says how
    return not isinstance(manifest, dict) or manifest.get("name", name.name) == name.name


class NotOnline(ValueError):
    """The network of the bundle cannot be streamed; the message says why."""
