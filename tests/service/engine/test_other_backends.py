"""Backends beside the default one, as far as they can be tried without a device.

`torch-cuda` runs on the CPU here, without graphs and with torch's own attention over its slots;
`tests/gpu/test_engine.py` runs the same checks on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm4ehr.bundle import Network, load_bundle
from llm4ehr.episode import Episode
from service.engine.backends.base import DeviceFault, OutOfMemory
from service.engine.backends.onnx_runtime import OnnxBackend
from service.engine.backends.torch_cuda import TorchCudaBackend
from tests import backend_checks as checks
from tests.backend_checks import N_SLOTS, Case
from tests.backends import NETWORKS, Make, Stay, tuned
from tests.online import HEADS, ROWS, until

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
REPOSITORY = Path(__file__).parents[3] / "model_repository"
# A graph takes seconds to make, so there is one beside that of the default bundle.
GRAPHS = [("llama", "kv")]


@pytest.fixture(scope="session")
def graph_of(
    tiny_network: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Network, Path]]:
    """A tiny network and its step graph, made once."""
    from training.export.graphs import graphs_of
    from training.export.onnx import write_graphs

    made: dict[tuple[str, str], tuple[Network, Path]] = {}

    def make(family: str, tuning: str) -> tuple[Network, Path]:
        if (family, tuning) not in made:
            network, folder = tuned(tiny_network, family, tuning), tmp_path_factory.mktemp("graph")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("training.export.onnx.graphs_of", lambda n: graphs_of(n)[1:])
                write_graphs(network, folder)
            made[family, tuning] = network, folder / "step.onnx"
        return made[family, tuning]

    return make


def on_torch(network: Network, n_slots: int = N_SLOTS) -> TorchCudaBackend:
    return TorchCudaBackend(network, n_slots=n_slots, max_rows=ROWS, device="cpu")


def on_onnx(network: Network, graph: Path, n_slots: int = N_SLOTS) -> OnnxBackend:
    return OnnxBackend(network, graph, n_slots=n_slots, max_rows=ROWS)


CASES = [("torch", *pair) for pair in NETWORKS] + [("onnx", *pair) for pair in GRAPHS]
CASES += [("onnx", "default", "bundle")]


@pytest.fixture(scope="session")
def case_of(
    tiny_network: Make, graph_of: Callable[..., tuple[Network, Path]]
) -> Callable[..., Case]:
    def make(kind: str, family: str, tuning: str) -> Case:
        if kind == "torch":
            network = tuned(tiny_network, family, tuning)
            return Case(network, lambda: on_torch(network))
        if family == "default":
            network = load_bundle(REPOSITORY, "llm4ehr", 1).network
            graph = REPOSITORY / "llm4ehr" / "1" / "step.onnx"
        else:
            network, graph = graph_of(family, tuning)
        return Case(network, lambda: on_onnx(network, graph))

    return make


@pytest.fixture(params=CASES, ids=lambda names: "-".join(names))
def case(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    return case_of(*request.param)


@pytest.fixture(params=["torch-gpt2-plain", "onnx-llama-kv"])
def plain(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """One network in each runtime."""
    return case_of(*request.param.split("-"))


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, 40)


def test_answers_are_those_of_whole_stays(case: Case, stay: Episode) -> None:
    checks.check_like_offline(case, stay)


def test_the_last_hour_of_the_longest_stay_fits(plain: Case, random_episode: Stay) -> None:
    checks.check_like_offline(plain, random_episode(2, 200))


def test_slots_and_chunks_do_not_matter(case: Case, stay: Episode) -> None:
    checks.check_slots_and_chunks(case, stay)


def test_neighbours_do_not_matter(case: Case, random_episode: Stay) -> None:
    checks.check_company(case, [random_episode(seed, 14 + seed) for seed in range(N_SLOTS)])


def test_a_tail_computed_again_is_the_same(case: Case, stay: Episode) -> None:
    checks.check_tail_again(case, stay)


def test_sizes_and_lengths_do_not_matter(plain: Case, random_episode: Stay) -> None:
    checks.check_sizes(plain, random_episode(3, 90))


def test_nothing_else_is_read(case: Case, stay: Episode) -> None:
    checks.check_nothing_else_is_read(case, stay)


def test_a_broken_stay_leaves_nothing_behind(case: Case, stay: Episode) -> None:
    checks.check_a_broken_stay_leaves_nothing(case, stay)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_engine_runs_on_it(
    case_of: Callable[..., Case], random_episode: Stay, kind: str
) -> None:
    case = case_of(kind, "llama", "kv")
    checks.check_engine(case, [random_episode(seed, 10 + seed) for seed in range(N_SLOTS + 2)])


def test_half_of_the_slots_can_be_given_back(plain: Case, stay: Episode) -> None:
    backend = plain.make()
    before = plain.hours(backend, stay)
    assert (backend.n_slots, backend.shrink(), backend.n_slots) == (5, True, 2)
    for slot in (0, 1):
        after = plain.hours(backend, stay, slot=slot)
        assert {k: v.tobytes() for k, v in after.items()} == {
            k: v.tobytes() for k, v in before.items()
        }
    assert (backend.shrink(), backend.n_slots, backend.shrink(), backend.n_slots) == (
        True, 1, False, 1,
    )  # fmt: skip


def test_rows_outside_the_slots_are_refused(plain: Case, stay: Episode) -> None:
    """On a device such a row would end the process or read another stay."""
    backend = plain.make()
    widths = (plain.network.model.config.n_series, plain.network.model.config.n_event_channels)
    rows = [np.zeros((1, width), np.float32) for width in widths]
    for slot, hour in ((-1, 0), (N_SLOTS, 0), (0, -1), (0, 200)):
        with pytest.raises(ValueError, match="outside"):
            backend.tick(rows[0], rows[1], [slot], [hour])


def test_events_as_tokens_agree_with_whole_stays(tiny_network: Make, random_episode: Stay) -> None:
    """The event pass in slots of its own, and heads that read its latest state."""
    options = {"events": "stream", "event_window": 8, "begin_token": True}
    network = tiny_network("llama", heads=HEADS, **options)
    with torch.no_grad():
        network.model.begin.normal_(std=0.3)
    backend, model = on_torch(network), network.model
    ids = torch.randint(model.config.n_tokens, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.encode_events(ids, torch.ones_like(ids, dtype=torch.bool))[0].numpy()
    tokens = ids[0].numpy()
    steps = np.concatenate(
        [backend.tick_tokens(tokens[i : i + 1], [1], [i]) for i in range(len(tokens))]
    )
    np.testing.assert_allclose(steps, expected, rtol=0, atol=1e-5)
    assert backend.tick_tokens(tokens, [3] * 8, range(8)).tobytes() == steps.tobytes()
    series = np.random.default_rng(0).normal(size=(1, model.config.n_series)).astype(np.float32)
    events = np.zeros((1, model.config.n_event_channels), np.float32)
    result = backend.tick(series, events, [1], [0], steps[-1:])
    hidden = model.backbone.hidden_size
    assert result.hidden[0, hidden:].tobytes() == steps[-1].tobytes()
    with torch.inference_mode():
        heads = model.predict(torch.from_numpy(result.hidden))
    for task, out in heads.items():
        np.testing.assert_allclose(result.raw[task], out.numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="latest"):
        backend.tick(series, events, [1], [0])


class _OnMeta(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or make a tensor beside it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                raise AssertionError(f"{func} makes a tensor on the host")
        return out


@pytest.mark.parametrize(("family", "tuning"), NETWORKS)
def test_a_tick_can_be_captured(tiny_network: Make, family: str, tuning: str) -> None:
    """On the device `meta` nothing has a value: whoever needs one, or another device, fails."""
    backend = on_torch(tuned(tiny_network, family, tuning))
    backend._model.to("meta")
    cache = backend._caches["hours"]
    cache.keys, cache.values = (
        [p.to("meta") for p in pools] for pools in (cache.keys, cache.values)
    )
    for mirror in (backend._inputs, backend._places):
        mirror.device = mirror.device.to("meta")
    with torch.inference_mode(), _OnMeta():
        out = backend._hours(4)
    assert out.shape == (4, sum(HEADS.values()) + backend._model.state_size)
    with torch.inference_mode(), _OnMeta(), pytest.raises(AssertionError, match="on the host"):
        torch.arange(3)


# The checks notice what they are for.


def _attends(change: Callable[..., tuple[Any, ...]]) -> Callable[[Any], None]:
    def apply(backend: TorchCudaBackend) -> None:
        cache = backend._caches["hours"]
        right = cache._attend
        cache._attend = lambda q, k, v, slots, at, scale: right(q, k, v, *change(slots, at), scale)

    return apply


def _writes_another_column(backend: OnnxBackend) -> None:
    launch = backend._launch

    def wrong(size: int, length: int) -> None:
        kept = backend._pool.clone()
        launch(size, length)
        backend._pool.copy_(kept.roll(1, 4))

    backend._launch = wrong


def _rounds_by_company(backend: Any) -> None:
    tick = backend.tick

    def wrong(series: np.ndarray, *rest: Any) -> Any:
        result = tick(series, *rest)
        if len(series) > 1:
            result.hidden[0, 0] = np.nextafter(result.hidden[0, 0], np.float32(np.inf))
        return result

    backend.tick = wrong


@pytest.mark.parametrize(
    ("kind", "mistake", "check"),
    [
        ("torch", _attends(lambda s, at: (s, at + 1)), checks.check_like_offline),
        ("torch", _attends(lambda s, at: (s, (at - 1).clamp(0))), checks.check_like_offline),
        ("torch", _attends(lambda s, at: (s.clamp(1), at)), checks.check_like_offline),
        ("torch", _attends(lambda s, at: (s, at + 1)), checks.check_nothing_else_is_read),
        ("torch", _attends(lambda s, at: (s.clamp(1), at)), checks.check_slots_and_chunks),
        ("torch", _rounds_by_company, checks.check_company),
        ("onnx", _writes_another_column, checks.check_like_offline),
        ("onnx", _rounds_by_company, checks.check_company),
    ],
)
def test_checks_notice(
    case_of: Callable[..., Case], random_episode: Stay, kind: str, mistake: Any, check: Any
) -> None:
    right = case_of(kind, "llama", "kv")

    def make() -> Any:
        backend = right.make()
        mistake(backend)
        return backend

    stays = [random_episode(seed, 12 + seed) for seed in range(3)]
    given: Any = stays if check is checks.check_company else stays[0]
    check(right, given)
    with pytest.raises(AssertionError):
        check(Case(right.network, make), given)


# What goes wrong.


def _failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access", 700), DeviceFault),
        (torch.AcceleratorError("CUDA error: out of memory", 2), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), DeviceFault),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
    ids=str,
)
def test_errors_of_torch(
    tiny_network: Make, stay: Episode, error: Exception, meaning: type[Exception]
) -> None:
    network = tiny_network()
    case, backend = Case(network, lambda: on_torch(network)), on_torch(network)
    backend._steps["hours", ROWS] = _failing(error)
    with pytest.raises(meaning) as raised:
        case.hours(backend, stay)
    assert raised.type is meaning


def test_errors_of_the_runtime(case_of: Callable[..., Case], stay: Episode) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    case = case_of("onnx", "llama", "kv")
    for error, meaning in (
        (errors.Fail("CUDA failure 700: an illegal memory access was encountered"), DeviceFault),
        (errors.RuntimeException("Failed to allocate memory for requested buffer"), OutOfMemory),
        (errors.EPFail("CUBLAS failure"), DeviceFault),
        (errors.InvalidArgument("unexpected shape"), errors.InvalidArgument),
    ):
        backend = case.make()
        case.hours(backend, until(stay, 1))
        backend._session = SimpleNamespace(run_with_iobinding=_failing(error))
        with pytest.raises(meaning):
            case.hours(backend, until(stay, 1))


def test_what_is_missing_is_said(
    tiny_network: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, nowhere = tiny_network(), tmp_path / "step.onnx"
    with pytest.raises(ValueError, match=r"no step\.onnx: export it again with --onnx"):
        on_onnx(network, nowhere)
    with pytest.raises(ValueError, match="events: stream"):
        on_onnx(tiny_network(events="stream", event_window=8), nowhere)
    with pytest.raises(ValueError, match="later hours"):
        on_torch(tiny_network("bert", attention_mode="native"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            TorchCudaBackend(network, n_slots=1, max_rows=4)
        nowhere.touch()
        with pytest.raises(ValueError, match=r"llm4ehr\[gpu\]"):
            OnnxBackend(network, nowhere, n_slots=1, max_rows=4, device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    nowhere.touch()
    with pytest.raises(ValueError, match=r"not installed: pip install 'llm4ehr\[onnx\]'"):
        on_onnx(network, nowhere)


def test_a_graph_of_another_network_is_refused(
    tiny_network: Make, graph_of: Callable[..., tuple[Network, Path]]
) -> None:
    _, graph = graph_of("llama", "kv")
    for other in (
        tiny_network("llama", events="none", heads=HEADS),
        tiny_network("gpt2", heads=HEADS),
    ):
        with pytest.raises(ValueError, match="does not belong"):
            on_onnx(other, graph)
