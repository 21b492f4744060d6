"""Engines of bundles: whose failure ends the process, and what a client may read of one."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode
from service.__main__ import main
from service.core import EngineStopped
from service.engine.backends.base import DeviceFault, RowDependenceError
from service.engine.backends.factory import make_backend
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.metrics import EngineMetrics
from service.models.bundles import Bundles
from service.models.version import LoadError, Model, Name
from service.settings import Settings
from tests.online import ROWS, Gate, view_of
from tests.service.models.house import save_broken

pytestmark = pytest.mark.anyio


@dataclass
class Pair:
    """Two loaded versions, the first in front, and what was reported as fatal."""

    bundles: Bundles
    fatal: list[BaseException]
    gates: list[Gate]
    models: list[Model] = field(default_factory=list)


@pytest.fixture
def pair(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    gates: list[Gate] = []

    def gated(bundle: Bundle, settings: Settings) -> Gate:
        gates.append(Gate(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS)))
        return gates[-1]

    monkeypatch.setattr("service.models.bundles.make_backend", gated)
    fatal: list[BaseException] = []
    settings = Settings(model_repository=repository)
    bundles = Bundles(settings, EngineMetrics(CollectorRegistry(), "tiny/1"), fatal.append)
    pair = Pair(bundles, fatal, gates)
    for version in (1, 2):
        model = bundles.load(Name("tiny", version))
        model.start()
        pair.models.append(model)
    pair.models[0].go_first()
    return pair


@pytest.mark.parametrize(
    ("which", "fault", "ends"),
    [
        (0, RuntimeError("patient 0815"), True),
        (1, RuntimeError("patient 0815"), False),
        (0, DeviceFault("gone"), True),
        (1, DeviceFault("gone"), True),
    ],
)
async def test_whose_failure_ends_the_process(
    pair: Pair,
    random_episode: Callable[..., Episode],
    which: int,
    fault: Exception,
    ends: bool,
) -> None:
    pair.gates[which].fault = fault
    view = view_of(random_episode(1, 3))
    with pytest.raises(EngineStopped):
        await pair.models[which].engine.submit(view)
    pair.models[which].close()  # when its thread has ended, all of it was said
    assert pair.fatal == ([fault] if ends else [])
    other = pair.models[1 - which]
    assert len((await other.engine.submit(view)).hours) == 3
    other.close()


async def test_the_engine_in_front_goes_first(
    pair: Pair, random_episode: Callable[..., Episode]
) -> None:
    """Both have work before either may compute; those of the other come behind."""
    order: list[int] = []
    for i, gate in enumerate(pair.gates):
        tick = gate.tick

        def noted(*args: object, i: int = i, tick: Callable[..., object] = tick) -> object:
            order.append(i)
            return tick(*args)

        gate.tick = noted  # type: ignore[method-assign, assignment]
    turns = pair.bundles._turns
    with turns.turn(turns._front):
        futures = [
            model.engine.submit(view_of(random_episode(seed, 60)))
            for model in reversed(pair.models)
            for seed in range(2)
        ]
        for _ in range(10_000):
            if len(turns._waiting) == 2:
                break
            await asyncio.sleep(0.001)
    await asyncio.gather(*futures)
    assert order == sorted(order)
    assert set(order) == {0, 1}
    for model in pair.models:
        model.close()


@pytest.mark.parametrize(
    ("fault", "type_"),
    [
        (RowDependenceError("a row depends on others"), "backend-failed"),
        (ValueError("no memory"), "backend-failed"),
    ],
)
def test_why_a_backend_cannot_be_made(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: Exception, type_: str
) -> None:
    def broken(bundle: Bundle, settings: Settings) -> Gate:
        raise fault

    monkeypatch.setattr("service.models.bundles.make_backend", broken)
    with pytest.raises(LoadError) as caught:
        pair.bundles.load(Name("tiny", 3))
    assert (caught.value.type, str(caught.value)) == (type_, str(fault))
    with pytest.raises(LoadError, match="missing") as caught:
        pair.bundles.load(Name("tiny", 9))
    assert caught.value.type == "bundle-invalid"
    assert str(caught.value).startswith("tiny/9/")
    for model in pair.models:
        model.close()


def test_weights_that_are_none_are_refused(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_network: Callable[..., Network],
) -> None:
    monkeypatch.setattr("service.models.bundles.make_backend", make_backend)
    save_broken(tiny_network, tmp_path, 1)
    bundles = Bundles(
        Settings(model_repository=tmp_path, kv_memory_mib=1, engine_rows=ROWS),
        EngineMetrics(CollectorRegistry(), "tiny/1"),
        pair.fatal.append,
    )
    with pytest.raises(LoadError, match="not finite") as caught:
        bundles.load(Name("tiny", 1))
    assert caught.value.type == "model-fault"
    for model in pair.models:
        model.close()


def test_only_what_its_manifest_names_is_on_disk(
    pair: Pair, repository: Path, tmp_path: Path
) -> None:
    def on_disk(folder: Path) -> list[Name]:
        settings = Settings(model_repository=folder)
        metrics = EngineMetrics(CollectorRegistry(), "tiny/1")
        return Bundles(settings, metrics, pair.fatal.append).on_disk()

    shutil.copytree(repository / "tiny" / "1", tmp_path / "tiny" / "1")
    for other in ("tiny_step/1", "tiny/0", "a b/1", "broken/7"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).symlink_to(tmp_path / "tiny" / "1")
    (tmp_path / "broken" / "7").unlink()
    (tmp_path / "broken" / "7").mkdir()
    (tmp_path / "broken" / "7" / "manifest.json").write_text("{")
    assert on_disk(tmp_path) == [Name("broken", 7), Name("tiny", 1)]
    assert on_disk(tmp_path / "gone") == []
    for model in pair.models:
        model.close()


def test_what_is_on_disk(pair: Pair) -> None:
    assert pair.bundles.on_disk() == [Name("tiny", version) for version in (1, 2, 3)]
    for model in pair.models:
        model.close()


def test_with_pinned_digests_nothing_else_is_loaded(
    pair: Pair, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["digest", "--bundle", "tiny/1", "--repository", str(repository)]) == 0
    right = json.loads(capsys.readouterr().out)
    assert right == {"tiny/1": pair.models[0].engine.bundle.digest}
    for model in pair.models:
        model.close()

    def pinned(pins: dict[str, str]) -> Bundles:
        settings = Settings(
            model_repository=repository, kv_memory_mib=1, engine_rows=ROWS, bundle_digests=pins
        )
        return Bundles(settings, EngineMetrics(CollectorRegistry(), "tiny/1"), pair.fatal.append)

    pinned(right).load(Name("tiny", 1)).close()
    for pins, why in (
        ({"tiny/1": "0" * 64}, "tiny/1/manifest.json: its digest is not the one that is expected"),
        (right, "tiny/2/manifest.json: no digest of this version is pinned"),
        ({}, "tiny/2/manifest.json: no digest of this version is pinned"),
    ):
        version = 1 if pins != right and pins else 2
        with pytest.raises(LoadError) as caught:
            pinned(pins).load(Name("tiny", version))
        assert (caught.value.type, str(caught.value)) == ("bundle-invalid", why)


@pytest.mark.parametrize("command", ["score", "gate", "calibrate"])
def test_commands_keep_to_pinned_digests(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setenv("LLM4EHR_MODEL_REPOSITORY", str(repository))
    monkeypatch.setenv("LLM4EHR_BUNDLE", "tiny/1")
    monkeypatch.setenv("LLM4EHR_BUNDLE_DIGESTS", json.dumps({"tiny/1": "0" * 64}))
    arguments = {
        "score": ["--data", str(tmp_path), "--out", str(tmp_path / "out")],
        "gate": ["--precision", "bf16", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        "calibrate": [],
    }
    assert main([command, *arguments[command]]) == 1
    assert "its digest is not the one that is expected" in capsys.readouterr().err
