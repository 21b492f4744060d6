"""ONNX graphs: they answer as the network whatever it is made of, and a wrong one is found out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm4ehr.bundle import Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode
from llm4ehr.model import LLM4EHR
from llm4ehr.prompts import PromptSpec
from training.export.graphs import WEIGHTS_FILE, graphs_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from training.export.check import GraphError, check_graphs  # noqa: E402
from training.export.onnx import require_onnx, write_graphs  # noqa: E402

Make = Callable[..., Network]
PREFIX = PromptSpec(position="prefix", length=5)
KEY_VALUES = PromptSpec(position="kv", length=5)
# What networks are made of, and whether their hours can be stepped.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gpt2": ("gpt2", {}, True),
    "opt, no events, batch norm": ("opt", {"events": "none", "ts_norm": "batch"}, True),
    "llama, adapters, prefix": ("llama", {"adapter": 4, "prompt": PREFIX}, True),
    "bert, key-value prompt": ("bert", {"prompt": KEY_VALUES}, True),
    "roberta, other heads": ("roberta", {"head": "mlp", "ts_norm": "none"}, True),
    "longformer": ("longformer", {}, True),
    "bert both ways": ("bert", {"attention_mode": "native"}, False),
    "gpt2, event stream": ("gpt2", {"events": "stream", "event_window": 8}, False),
}


def checked(network: Network, folder: Path, episodes: list[Episode]) -> dict[str, Any]:
    calibration = default_calibration(list(network.model.config.heads))
    return check_graphs(network, graphs_of(network), folder, episodes, calibration)


@pytest.fixture(scope="module")
def stays(random_episode: Callable[..., Episode]) -> list[Episode]:
    """Of lengths that are all different, one a single hour, one longer than is read."""
    return [random_episode(seed, hours) for seed, hours in enumerate((17, 1, 30, 203))]


@pytest.fixture(scope="module")
def written(tiny_network: Make, tmp_path_factory: Any) -> tuple[Network, Path]:
    """A network and the folder of its graphs."""
    network, folder = tiny_network(), tmp_path_factory.mktemp("graphs")
    write_graphs(network, folder)
    return network, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_graphs_answer_as_the_network(
    case: str, tiny_network: Make, stays: list[Episode], tmp_path: Path
) -> None:
    family, options, steps = CASES[case]
    network = tiny_network(family, heads={"mortality": 1, "remaining_los": 1}, **options)
    graphs = write_graphs(network, tmp_path)
    files = ["model.onnx", "step.onnx"] if steps else ["model.onnx"]
    assert [graph.file for graph in graphs] == files
    differences = checked(network, tmp_path, stays)
    assert set(differences) == set(files)
    for of in differences.values():
        assert set(of) == {"random inputs", "stays"}
        # Not equal to the last bit, or nothing was compared.
        assert all(0 < largest["hidden"] < 2e-5 for largest in of.values())
        assert all(largest["probability"] < 2e-6 for largest in of.values())


@pytest.mark.slow
def test_a_window_shorter_than_a_stay_is_in_the_graph(
    tiny_network: Make, stays: list[Episode], tmp_path: Path
) -> None:
    made = tiny_network("longformer")
    config = made.model.config
    narrow = replace(config, backbone=replace(config.backbone, window=10))
    network = replace(made, model=LLM4EHR(narrow).eval())
    network.model.load_state_dict(made.model.state_dict())
    assert [graph.file for graph in write_graphs(network, tmp_path)] == ["model.onnx"]
    checked(network, tmp_path, stays)
    wide = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    series = np.random.default_rng(0).normal(size=(1, 40, config.n_series)).astype(np.float32)
    feeds = {
        "series": series,
        "events": np.zeros((1, 40, config.n_event_channels), np.float32),
        "hour_mask": np.ones((1, 40), bool),
    }
    before = wide.run(["state"], feeds)[0]
    # Two layers reach 20 hours back and no further.
    series[0, 0] += 1
    after = wide.run(["state"], feeds)[0]
    assert not np.array_equal(before[0, 20], after[0, 20])
    np.testing.assert_array_equal(before[0, 21:], after[0, 21:])


def test_weights_are_stored_once_and_no_paths_are(written: tuple[Network, Path]) -> None:
    network, folder = written
    n_bytes = 4 * sum(p.numel() for p in network.model.parameters() if p.numel() >= 1024)
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert n_bytes * 0.5 < size < n_bytes * 1.5 + 20 * 4096
    for file in ("model.onnx", "step.onnx"):
        graph = onnx.load(folder / file, load_external_data=False).graph
        outside = [i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        assert outside
        for initializer in outside:
            entries = {entry.key: entry.value for entry in initializer.external_data}
            assert entries["location"] == WEIGHTS_FILE
            assert int(entries["offset"]) % 4096 == 0
        content = (folder / file).read_bytes()
        for path in (str(Path(sys.prefix)), str(Path(__file__).parents[3])):
            assert path.encode() not in content


def test_the_names_and_shapes_are_those_announced(written: tuple[Network, Path]) -> None:
    network, folder = written
    types = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}
    for graph in graphs_of(network):
        session = onnxruntime.InferenceSession(folder / graph.file)
        for ports, there in (
            (graph.inputs, session.get_inputs()),
            (graph.outputs, session.get_outputs()),
        ):
            announced = [(p.name, types[p.dtype], list(p.shape)) for p in ports]
            assert announced == [(t.name, t.type, t.shape) for t in there]


def test_stays_of_one_call_do_not_change_each_other(written: tuple[Network, Path]) -> None:
    network, folder = written
    session = onnxruntime.InferenceSession(folder / "step.onnx")
    config, rng = network.model.config, np.random.default_rng(0)
    *_, past = session.get_inputs()
    layers, two, heads, _, size = past.shape[1:]
    hours = np.array([[4], [0], [7]])
    feeds = {
        "series": rng.normal(size=(3, config.n_series)).astype(np.float32),
        "events": rng.normal(size=(3, config.n_event_channels)).astype(np.float32),
        "hour": hours,
        "past_kv": rng.normal(size=(3, layers, two, heads, 9, size)).astype(np.float32),
    }
    together = session.run(["state", "new_kv"], feeds)
    for row, hour in enumerate(hours[:, 0]):
        alone = {name: array[row : row + 1] for name, array in feeds.items()}
        alone["past_kv"] = alone["past_kv"][..., :hour, :]
        for one, of_all in zip(session.run(["state", "new_kv"], alone), together, strict=True):
            np.testing.assert_allclose(one[0], of_all[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["model.onnx", "step.onnx"])
def test_a_graph_with_other_weights_is_refused(
    file: str, written: tuple[Network, Path], stays: list[Episode], tmp_path: Path
) -> None:
    network, folder = written
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / file)
    bias = next(i for i in model.graph.initializer if i.name == "model.heads.mortality.bias")
    values = onnx.numpy_helper.to_array(bias) + np.float32(1e-3)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / file)
    with pytest.raises(GraphError, match=rf"{file}: differs from torch on random inputs"):
        checked(network, tmp_path, stays)


def test_not_a_number_is_a_difference(
    written: tuple[Network, Path], stays: list[Episode], tmp_path: Path
) -> None:
    network, folder = written
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = np.fromfile(tmp_path / WEIGHTS_FILE, np.float32)
    weights[:] = np.nan
    weights.tofile(tmp_path / WEIGHTS_FILE)
    with pytest.raises(GraphError, match="nan"):
        checked(network, tmp_path, stays)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_onnx()
    monkeypatch.setattr(
        "training.export.onnx.importlib.util.find_spec",
        lambda name: None if name == "onnxscript" else object(),
    )
    with pytest.raises(ValueError, match=r"onnxscript not installed.*llm4ehr\[onnx\].*--no-onnx"):
        require_onnx()
