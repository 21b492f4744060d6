"""The engine's backends on a CUDA device: the same checks as without one, and what graphs add."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llm4ehr.bundle import Network, load_bundle
from llm4ehr.episode import Episode
from service.engine.backends.base import Backend, OutOfMemory
from service.engine.backends.factory import make_backend
from service.engine.backends.onnx_runtime import OnnxBackend
from service.engine.backends.torch_cuda import TorchCudaBackend
from service.settings import Settings
from tests import backend_checks as checks
from tests.backend_checks import N_SLOTS, Case
from tests.backends import Make, Stay, features_of, same_bits, tuned
from tests.online import HEADS, ROWS
from tests.triton_kernel import check_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
NETWORKS = [(f, "plain") for f in ("bert", "gpt2", "llama", "opt", "roberta")]
NETWORKS += [("bert", "adapter"), ("opt", "prefix"), ("llama", "kv")]
CASES = [("torch", *pair) for pair in NETWORKS]
CASES += [("torch", "default", "bundle"), ("onnx", "default", "bundle")]


def on_torch(network: Network, n_slots: int = N_SLOTS) -> TorchCudaBackend:
    return TorchCudaBackend(network, n_slots=n_slots, max_rows=ROWS)


def on_onnx(network: Network, n_slots: int = N_SLOTS) -> OnnxBackend:
    graph = REPOSITORY / "llm4ehr" / "1" / "step.onnx"
    return OnnxBackend(network, graph, n_slots=n_slots, max_rows=ROWS, device="cuda")


@pytest.fixture(scope="session")
def case_of(tiny_network: Make) -> Callable[..., Case]:
    def make(kind: str, family: str, tuning: str) -> Case:
        if family != "default":
            network = tuned(tiny_network, family, tuning)
            return Case(network, lambda: on_torch(network))
        network = load_bundle(REPOSITORY, "llm4ehr", 1).network
        if kind == "torch":
            return Case(network, lambda: on_torch(network))
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("needs onnxruntime-gpu")
        return Case(network, lambda: on_onnx(network))

    return make


@pytest.fixture(params=CASES, ids=lambda names: "-".join(names))
def case(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    return case_of(*request.param)


@pytest.fixture(params=["torch", "onnx"])
def default(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """The default bundle in each runtime."""
    return case_of(request.param, "default", "bundle")


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, 40)


def test_the_triton_kernel_is_every_rows_own_attention() -> None:
    pytest.importorskip("triton")
    check_kernel("cuda")


def test_the_triton_kernel_serves(tiny_network: Make) -> None:
    pytest.importorskip("triton")
    assert on_torch(tiny_network())._attend.__module__.endswith("slot_attention_triton")


def test_answers_are_those_of_whole_stays(case: Case, stay: Episode) -> None:
    checks.check_like_offline(case, stay)


def test_the_last_hour_of_the_longest_stay_fits(default: Case, random_episode: Stay) -> None:
    checks.check_like_offline(default, random_episode(2, 200))


def test_slots_and_chunks_do_not_matter(case: Case, stay: Episode) -> None:
    checks.check_slots_and_chunks(case, stay)


def test_neighbours_do_not_matter(case: Case, random_episode: Stay) -> None:
    checks.check_company(case, [random_episode(seed, 14 + seed) for seed in range(N_SLOTS)])


def test_a_tail_computed_again_is_the_same(case: Case, stay: Episode) -> None:
    checks.check_tail_again(case, stay)


def test_sizes_and_lengths_do_not_matter(default: Case, random_episode: Stay) -> None:
    checks.check_sizes(default, random_episode(3, 90))


def test_nothing_else_is_read(case: Case, stay: Episode) -> None:
    checks.check_nothing_else_is_read(case, stay)


def test_a_broken_stay_leaves_nothing_behind(case: Case, stay: Episode) -> None:
    checks.check_a_broken_stay_leaves_nothing(case, stay)


def test_an_engine_runs_on_it(case_of: Callable[..., Case], random_episode: Stay) -> None:
    case = case_of("torch", "llama", "kv")
    checks.check_engine(case, [random_episode(seed, 10 + seed) for seed in range(N_SLOTS + 2)])


def test_attention_without_triton(
    case_of: Callable[..., Case], stay: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "service.engine.backends.slot_attention_triton", None)
    case = case_of("torch", "gpt2", "plain")
    checks.check_like_offline(case, stay)
    checks.check_nothing_else_is_read(case, stay)
    assert case.make()._attend.__name__ == "attend_by_gather"  # type: ignore[attr-defined]


def test_a_replay_is_what_was_captured(case_of: Callable[..., Case], stay: Episode) -> None:
    """The same kernels in the same order: not a bit differs from the pass without a graph."""
    case = case_of("torch", "default", "bundle")
    backend = case.make()
    assert isinstance(backend, TorchCudaBackend)
    case.hours(backend, stay, chunk=ROWS)
    with torch.inference_mode(), backend._on_stream():
        plain = backend._hours(ROWS).cpu().numpy()
        replayed = backend._steps["hours", ROWS]().cpu().numpy()
    assert plain.tobytes() == replayed.tobytes()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device(default: Case, stay: Episode) -> None:
    """Between writing the rows and waiting for the answers; torch refuses what would."""
    backend = default.make()
    default.hours(backend, stay, chunk=ROWS)  # so that all is captured and bound
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            if isinstance(backend, TorchCudaBackend):
                with backend._on_stream():
                    backend._launch("hours", ROWS)
            else:
                assert isinstance(backend, OnnxBackend)
                with torch.cuda.stream(backend._stream):
                    backend._launch(ROWS, backend.past_lengths[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_events_as_tokens(tiny_network: Make) -> None:
    """The event pass has slots and graphs of its own."""
    network = tiny_network("llama", heads=HEADS, events="stream", event_window=8, begin_token=True)
    with torch.no_grad():
        network.model.begin.normal_(std=0.3)
    ids = torch.randint(
        network.model.config.n_tokens, (1, 8), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = network.model.encode_events(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    backend, tokens = on_torch(network), ids[0].numpy()
    steps = [backend.tick_tokens(tokens[i : i + 1], [1], [i]) for i in range(8)]
    np.testing.assert_allclose(np.concatenate(steps), expected.numpy(), rtol=0, atol=1e-5)
    together = backend.tick_tokens(tokens, [3] * 8, range(8))
    assert together.tobytes() == np.concatenate(steps).tobytes()
    config = network.model.config
    rows = [np.ones((1, n), np.float32) for n in (config.n_series, config.n_event_channels)]
    result = backend.tick(rows[0], rows[1], [1], [0], steps[-1])
    assert result.hidden[0, network.model.backbone.hidden_size :].tobytes() == steps[-1].tobytes()


def test_half_of_the_slots_can_be_given_back(default: Case, stay: Episode) -> None:
    kind = on_torch if default.make().name == "torch-cuda" else on_onnx
    backend = kind(default.network, n_slots=400)
    before, held = default.hours(backend, stay), torch.cuda.memory_allocated()
    assert backend.shrink()
    assert backend.n_slots == 200
    assert torch.cuda.memory_allocated() < held - (100 << 20)
    assert same_bits(default.hours(backend, stay, slot=199, chunk=ROWS), before)


def test_too_many_slots_are_no_fault_of_the_device(default: Case, stay: Episode) -> None:
    kind = on_torch if default.make().name == "torch-cuda" else on_onnx
    with pytest.raises(OutOfMemory):
        kind(default.network, n_slots=1 << 22)
    torch.cuda.empty_cache()
    checks.check_like_offline(default, stay)


def test_one_engine_goes_on_while_another_is_made(
    case_of: Callable[..., Case], stay: Episode
) -> None:
    """Two versions of a model on one device: capturing one leaves the other its bits."""
    case = case_of("torch", "default", "bundle")
    serving = case.make()
    alone, over, wrong = case.hours(serving, stay), threading.Event(), []

    def serve() -> None:
        while not over.is_set():
            if not same_bits(case.hours(serving, stay), alone):
                wrong.append("other bits")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        others: list[Backend] = [case.make() for _ in range(3)]
    finally:
        over.set()
        thread.join()
    assert not wrong
    for other in others:
        assert same_bits(case.hours(other, stay, chunk=ROWS), alone)


@pytest.mark.parametrize("name", ["torch-cuda", "onnx-cuda"])
def test_the_service_makes_it(name: str, default: Case, stay: Episode) -> None:
    if default.make().name != name:
        pytest.skip("of the other runtime")
    settings = Settings(model_repository=REPOSITORY, backend=name, kv_memory_mib=256)
    backend = make_backend(load_bundle(REPOSITORY, "llm4ehr", 1), settings)
    assert backend.name == name
    assert backend.tick_sizes[-1] == settings.engine_rows
    features = features_of(default.network, stay)
    result = backend.tick(features.series[:1], features.events[:1], [0], [0])
    assert np.isfinite(result.hidden).all()


def test_a_fault_of_the_device_is_said(tmp_path: Path) -> None:
    """In a process of its own, which cannot use the device any more."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULT], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.stdout.strip().splitlines()[-1:] == ["DeviceFault"], done.stderr


_FAULT = """
from pathlib import Path
import numpy as np, torch
from llm4ehr.bundle import load_bundle
from service.engine.backends.base import DeviceFault
from service.engine.backends.torch_cuda import TorchCudaBackend

network = load_bundle(Path("model_repository"), "llm4ehr", 1).network
backend = TorchCudaBackend(network, n_slots=4, max_rows=4)
config = network.model.config
rows = [np.zeros((1, n), np.float32) for n in (config.n_series, config.n_event_channels)]
backend.tick(*rows, [0], [0])
torch.zeros(2, device="cuda")[torch.tensor([7], device="cuda")]
try:
    for _ in range(3):
        backend.tick(*rows, [0], [0])
except DeviceFault:
    print("DeviceFault", flush=True)
"""
