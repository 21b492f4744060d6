"""A reduced precision answers only where it was measured and let through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm4ehr.bundle import Network, load_bundle, save_bundle
from llm4ehr.offline import score_episodes
from llm4ehr.store import EpisodeStore
from service import precision as module
from service.__main__ import main
from service.engine.backends.linear import PackedLinear, pack_linears
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.verify import agreeing_sizes
from service.precision import Gate, NotGated, let_through, measure, read_gate
from service.runtime import build_app
from service.settings import Settings
from tests.backends import NETWORKS, STEPS, Stay, computed, features_of, same_bits, tuned
from tests.online import CALIBRATION, HEADS, LABELS, ROWS, save_tiny, tiny_bundle

Make = Callable[..., Network]


@pytest.fixture
def repository(tiny_network: Make, tmp_path: Path) -> Path:
    save_tiny(tiny_network, tmp_path)
    return tmp_path


def settings_of(repository: Path, **changes: object) -> Settings:
    return Settings(
        model_repository=repository,
        bundle="tiny/1",
        log_path=repository / "log.sqlite",
        engine_rows=8,
        kv_memory_mib=1,
        authentication="open",
        **changes,
    )


def run_gate(repository: Path, store: Path, *options: str) -> Path:
    out = repository / "gate.json"
    command = ["gate", "--precision", "bf16", "--data", str(store), "--out", str(out)]
    where = ["--repository", str(repository), "--bundle", "tiny/1"]
    assert main([*command, *where, *options]) == 0
    return out


# What is computed.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)], ids=str
)
def test_a_packed_layer_is_the_layer(layer: nn.Module, precision: str) -> None:
    x = torch.randn(5, 1, 24, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    packed = PackedLinear(weight, layer.bias, precision)  # type: ignore[arg-type]
    with torch.no_grad():
        got, expected = packed(x), layer(x)
    assert got.dtype is torch.float32
    atol = 1e-5 if precision == "fp32" else 0.05
    assert_allclose(got, expected, rtol=0, atol=atol)
    assert precision == "fp32" or not torch.equal(got, expected)


def test_all_linear_layers_of_the_backbone_are_reduced_and_nothing_else(tiny_network: Make) -> None:
    network = tiny_network("llama")
    backend = TorchCpuBackend(network, n_slots=1, max_rows=ROWS, precision="bf16")
    parts = dict(backend._model.named_modules())
    linear = {n for n, m in network.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    of_backbone = {n for n in linear if n.startswith("backbone.")}
    assert {n for n, m in parts.items() if isinstance(m.forward, PackedLinear)} == of_backbone
    assert len(of_backbone) == 2 * 7
    assert {p.dtype for p in backend._model.parameters()} == {torch.float32}
    assert {pool.dtype for pool in backend._caches[0].keys} == {torch.float32}


def test_only_large_layers_are_laid_out_in_full_precision() -> None:
    body = nn.Sequential(nn.Linear(256, 511), nn.Linear(511, 8), nn.Linear(256, 512))
    pack_linears(body, "fp32")
    assert [isinstance(layer.forward, PackedLinear) for layer in body] == [False, False, True]


def test_without_onednn_there_is_no_reduced_precision(
    monkeypatch: pytest.MonkeyPatch, tiny_network: Make
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    TorchCpuBackend(tiny_network(), n_slots=1, max_rows=ROWS)
    with pytest.raises(ValueError, match="oneDNN"):
        TorchCpuBackend(tiny_network(), n_slots=1, max_rows=ROWS, precision="bf16")


@pytest.mark.parametrize("pair", NETWORKS, ids="-".join)
def test_rows_stay_independent(
    tiny_network: Make, random_episode: Stay, pair: tuple[str, str]
) -> None:
    network = tuned(tiny_network, *pair)

    def backend() -> TorchCpuBackend:
        return TorchCpuBackend(network, n_slots=5, max_rows=ROWS, precision="bf16")

    sizes = agreeing_sizes(backend(), network, ROWS)
    features = features_of(network, random_episode(1, 40))
    alone = computed(backend(), features, STEPS)
    for size in sizes:
        other = backend()
        other.tick_sizes = (size, ROWS)
        assert same_bits(computed(other, features, [3] * 13 + [1], slot=4), alone)
    full = computed(TorchCpuBackend(network, n_slots=1, max_rows=ROWS), features, STEPS)
    assert 0 < np.abs(alone["hidden"] - full["hidden"]).max() < 1


# The gate.


def test_what_is_measured_is_what_changes(
    tiny_network: Make, store_2012: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full precision, worked out by the other road, against answers that are off by a known bit."""
    bundle = tiny_bundle(tiny_network)
    gate = measure(bundle, store_2012, "bf16")
    episodes = [record.episode for record in EpisodeStore.open(store_2012)]
    assert gate.stays == len(episodes)
    assert gate.hours == sum(min(e.n_hours, 200) for e in episodes)
    assert set(gate.changes) == set(HEADS)
    for task, change in gate.changes.items():
        assert 0 < change.mean <= change.p999 <= change.max
        assert change.unit == ("hours" if task == "remaining_los" else "probability")
    answers = module._answers

    def shifted(bundle: object, backend: TorchCpuBackend, group: list) -> list:
        made = [
            {task: a * 0 + 0.25 * (backend is not shifted.first) for task, a in stay.items()}
            for stay in answers(bundle, backend, group)  # type: ignore[arg-type]
        ]
        return made

    shifted.first = None  # type: ignore[attr-defined]

    def remember(*args: object) -> list:
        shifted.first = shifted.first or args[1]  # type: ignore[attr-defined]
        return shifted(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_answers", remember)
    gate = measure(bundle, store_2012, "bf16", limit=0.2)
    assert not gate.passed
    assert {(c.max, c.p999, c.mean) for c in gate.changes.values()} == {(0.25, 0.25, 0.25)}
    assert measure(bundle, store_2012, "bf16", limit=0.25).passed


@pytest.mark.parametrize("events", ["fused", "stream"])
def test_answers_are_those_of_whole_stays(
    tiny_network: Make, store_2012: Path, events: str
) -> None:
    options = {"event_window": 8, "begin_token": True} if events == "stream" else {}
    bundle = tiny_bundle(tiny_network, events=events, **options)
    episodes = [record.episode for record in EpisodeStore.open(store_2012)]
    backend = TorchCpuBackend(bundle.network, n_slots=len(episodes), max_rows=ROWS)
    got = module._answers(bundle, backend, episodes)
    for answers, scores in zip(got, score_episodes(bundle.network, episodes), strict=True):
        for task, expected in scores.answers(bundle.calibration).items():
            atol = 1e-2 if task == "remaining_los" else 1e-5
            assert_allclose(answers[task], expected, rtol=0, atol=atol)


def test_an_answer_that_is_no_number_is_no_small_change(
    tiny_network: Make, store_2012: Path
) -> None:
    bundle = tiny_bundle(tiny_network)
    bundle.network.model.heads["mortality"].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="mortality is not finite"):
        measure(bundle, store_2012, "bf16")


# The service.


def test_it_answers_with_what_was_measured(
    repository: Path, store_2012: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_gate(repository, store_2012, "--limit", "0.5")
    gate = read_gate(file)
    assert gate.passed
    assert f"15 stays, {gate.hours} hours: passed" in capsys.readouterr().out
    settings = settings_of(repository, precision="bf16", precision_gate=file)
    app = build_app(settings)

    async def asked() -> dict:
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            return dict((await http.get("/episodes")).json()["provenance"]["numerics"])

    figures = json.loads(file.read_text())
    said = asyncio.run(asked())
    assert (said.pop("rows"), said.pop("threads") >= 1) == (8, True)
    assert said.pop("kernel") in ("compiled", "reference")
    assert said == {
        "precision": "bf16",
        "backend": "torch-cpu",
        "gate": {name: figures[name] for name in ("limit", "stays", "hours", "changes")},
    }


def test_without_a_gate_it_does_not_start(repository: Path) -> None:
    with pytest.raises(ValueError, match="needs LLM4EHR_PRECISION_GATE"):
        build_app(settings_of(repository, precision="bf16"))
    with pytest.raises(NotGated, match="none: No such file"):
        build_app(settings_of(repository, precision="bf16", precision_gate=repository / "none"))


def test_a_gate_that_did_not_pass_is_none(
    repository: Path, store_2012: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_gate(repository, store_2012, "--limit", "1e-9")
    assert "NOT passed" in capsys.readouterr().out
    with pytest.raises(NotGated, match="changes answers of tiny/1 by more than 1e-09"):
        build_app(settings_of(repository, precision="bf16", precision_gate=file))


def test_the_gate_of_another_bundle_is_none(
    repository: Path, store_2012: Path, tiny_network: Make
) -> None:
    file = run_gate(repository, store_2012, "--limit", "0.5")
    other = tiny_network(seed=1, heads=HEADS)
    save_bundle(
        repository, "tiny", 2, other,
        calibration=CALIBRATION, labels=LABELS, metrics={}, card="# Tiny\n",
    )  # fmt: skip
    settings = settings_of(repository, precision="bf16", precision_gate=file)
    assert let_through(load_bundle(repository, "tiny", 1), settings) is not None
    with pytest.raises(NotGated, match="measured on tiny/1"):
        let_through(load_bundle(repository, "tiny", 2), settings)


def test_a_folder_of_gates_serves_several_versions(
    repository: Path, tiny_network: Make, tmp_path: Path
) -> None:
    save_bundle(
        repository, "tiny", 2, tiny_network(seed=1, heads=HEADS),
        calibration=CALIBRATION, labels=LABELS, metrics={}, card="# Tiny\n",
    )  # fmt: skip
    bundles = [load_bundle(repository, "tiny", version) for version in (1, 2)]
    folder = tmp_path / "gates"
    folder.mkdir()
    settings = settings_of(repository, precision="bf16", precision_gate=folder)
    with pytest.raises(NotGated, match="measured on nothing"):
        let_through(bundles[0], settings)
    for stays, bundle in enumerate(bundles):
        gate = Gate(
            bundle=f"tiny/{bundle.version}", digest=bundle.digest, precision="bf16", limit=0.1,
            stays=stays, hours=9, changes={}, passed=True,
        )  # fmt: skip
        (folder / f"{bundle.version}.json").write_text(gate.model_dump_json())
    said = [let_through(bundle, settings) for bundle in bundles]
    assert [gate and gate["stays"] for gate in said] == [0, 1]
    (folder / "3.json").write_text("{}")
    with pytest.raises(NotGated) as caught:
        let_through(bundles[0], settings)
    assert str(caught.value) == "LLM4EHR_PRECISION_GATE: 3.json is no gate"


def test_only_the_torch_backend_on_the_cpu_reduces(repository: Path) -> None:
    with pytest.raises(ValueError, match="needs LLM4EHR_BACKEND=torch-cpu"):
        build_app(settings_of(repository, precision="bf16", backend="onnx-cpu"))


def test_full_precision_needs_no_gate(repository: Path) -> None:
    assert let_through(load_bundle(repository, "tiny", 1), settings_of(repository)) is None


@pytest.mark.parametrize("body", ["", "{}", '{"passed": true}', "[1]"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "gate.json").write_text(body)
    with pytest.raises(ValueError, match="no file of"):
        read_gate(tmp_path / "gate.json")


def test_a_gate_survives_its_file(tiny_network: Make, store_2012: Path, tmp_path: Path) -> None:
    gate = measure(tiny_bundle(tiny_network), store_2012, "bf16")
    (tmp_path / "gate.json").write_text(gate.model_dump_json())
    assert read_gate(tmp_path / "gate.json") == gate == Gate(**gate.model_dump())
