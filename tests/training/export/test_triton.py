"""The configuration that Triton reads, parsed by protobuf's own parser for its text format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm4ehr.bundle import Network
from training.data.phenotypes import PHENOTYPES
from training.export.graphs import Graph, graphs_of
from training.export.triton import LayoutError, check_layout, write_layout

pytest.importorskip("google.protobuf")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

Make = Callable[..., Network]
DIGESTS = {"bundle_digest": "0" * 64, "preprocessing_digest": "f" * 64}
HEADS = {"mortality": 1, "phenotyping": len(PHENOTYPES)}

# What is used here of Triton's message ModelConfig: message -> field -> type.
_FIELDS = {
    "Latest": {"num_versions": "int32"},
    "VersionPolicy": {"latest": "Latest"},
    "Batching": {},
    "Input": {"name": "string", "data_type": "DataType", "dims": "repeated int64"},
    "Output": {
        "name": "string", "data_type": "DataType", "dims": "repeated int64",
        "label_filename": "string",
    },
    "Parameter": {"string_value": "string"},
    "Entry": {"key": "string", "value": "Parameter"},
    "ModelConfig": {
        "name": "string", "backend": "string", "default_model_filename": "string",
        "max_batch_size": "int32", "version_policy": "VersionPolicy",
        "dynamic_batching": "Batching", "input": "repeated Input", "output": "repeated Output",
        "parameters": "repeated Entry",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def parse() -> Callable[[Path], Any]:
    """`parse(file)`: a config.pbtxt as a message; anything that is unknown raises."""
    field = descriptor_pb2.FieldDescriptorProto
    types = {"string": field.TYPE_STRING, "int32": field.TYPE_INT32, "int64": field.TYPE_INT64}
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="triton")
    kinds = file.enum_type.add(name="DataType")
    for number, kind in (
        (0, "TYPE_INVALID"),
        (1, "TYPE_BOOL"),
        (9, "TYPE_INT64"),
        (11, "TYPE_FP32"),
    ):
        kinds.value.add(name=kind, number=number)
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (key, text) in enumerate(fields.items(), 1):
            kind = text.removeprefix("repeated ")
            label = field.LABEL_REPEATED if kind != text else field.LABEL_OPTIONAL
            made = message.field.add(name=key, number=number, label=label)
            if kind in types:
                made.type = types[kind]
            else:
                made.type = field.TYPE_ENUM if kind == "DataType" else field.TYPE_MESSAGE
                made.type_name = f".triton.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))
    return lambda path: text_format.Parse(path.read_text(), config())


def laid_out(repository: Path, network: Network, version: int = 1, name: str = "tiny") -> None:
    """The layout around a bundle folder that is there."""
    (repository / name / str(version)).mkdir(parents=True)
    graphs, phenotypes = graphs_of(network), PHENOTYPES
    check_layout(repository, name, version, graphs, phenotypes)
    write_layout(repository, name, version, graphs, phenotypes, DIGESTS)


def ports(fields: Any) -> dict[str, tuple[int, list[int]]]:
    return {field.name: (field.data_type, list(field.dims)) for field in fields}


def test_a_client_is_told_names_types_and_dimensions(
    tiny_network: Make, parse: Callable[[Path], Any], tmp_path: Path
) -> None:
    network = tiny_network("llama", heads=HEADS)
    n_series, n_events = network.model.config.n_series, network.model.config.n_event_channels
    laid_out(tmp_path, network)

    stays = parse(tmp_path / "tiny" / "config.pbtxt")
    assert (stays.name, stays.backend) == ("tiny", "onnxruntime")
    assert stays.default_model_filename == "model.onnx"
    boolean, integer, real = 1, 9, 11
    assert ports(stays.input) == {
        "series": (real, [-1, n_series]),
        "events": (real, [-1, n_events]),
        "hour_mask": (boolean, [-1]),
    }
    assert ports(stays.output) == {
        "mortality": (real, [-1, 1]),
        "phenotyping": (real, [-1, 25]),
        "state": (real, [-1, 16]),
    }

    hour = parse(tmp_path / "tiny_step" / "config.pbtxt")
    assert (hour.name, hour.default_model_filename) == ("tiny_step", "step.onnx")
    # Two layers; keys and values; two key-value heads of four channels.
    assert ports(hour.input) == {
        "series": (real, [n_series]),
        "events": (real, [n_events]),
        "hour": (integer, [1]),
        "past_kv": (real, [2, 2, 2, -1, 4]),
    }
    assert ports(hour.output) == {
        "mortality": (real, [1]),
        "phenotyping": (real, [25]),
        "state": (real, [16]),
        "new_kv": (real, [2, 2, 2, 1, 4]),
    }
    for config in (stays, hour):
        assert config.max_batch_size > 1
        assert config.HasField("dynamic_batching")
        assert config.version_policy.latest.num_versions == 1
        parameters = {entry.key: entry.value.string_value for entry in config.parameters}
        assert parameters == {f"{what}_1": digest for what, digest in DIGESTS.items()}


def test_both_models_find_labels_and_files(tiny_network: Make, tmp_path: Path) -> None:
    laid_out(tmp_path, tiny_network(heads=HEADS))
    (tmp_path / "tiny" / "1" / "step.onnx").write_bytes(b"graph")
    for model in ("tiny", "tiny_step"):
        text = (tmp_path / model / "config.pbtxt").read_text()
        (labels,) = re.findall(r'label_filename: "(.*?)"', text)
        assert (tmp_path / model / labels).read_text().splitlines() == list(PHENOTYPES)
    assert (tmp_path / "tiny_step" / "1" / "step.onnx").read_bytes() == b"graph"
    link = os.readlink(tmp_path / "tiny_step" / "1")
    assert not os.path.isabs(link)  # the repository may be moved


def test_without_events_or_steps_there_is_less(
    tiny_network: Make, parse: Callable[[Path], Any], tmp_path: Path
) -> None:
    laid_out(tmp_path, tiny_network("bert", events="none", attention_mode="native", heads=HEADS))
    inputs = ports(parse(tmp_path / "tiny" / "config.pbtxt").input)
    assert set(inputs) == {"series", "hour_mask"}
    assert not (tmp_path / "tiny_step").exists()
    stream = tiny_network(events="stream", event_window=8, heads=HEADS)
    laid_out(tmp_path, stream, name="stream")
    inputs = ports(parse(tmp_path / "stream" / "config.pbtxt").input)
    assert set(inputs) == {"series", "hour_mask", "token_ids", "token_hours"}
    assert not (tmp_path / "stream_step").exists()


def test_a_second_version_keeps_what_was_edited(
    tiny_network: Make, parse: Callable[[Path], Any], tmp_path: Path
) -> None:
    laid_out(tmp_path, tiny_network(heads=HEADS))
    file = tmp_path / "tiny" / "config.pbtxt"
    edited = file.read_text().replace("num_versions: 1", "num_versions: 2")
    file.write_text(edited)
    laid_out(tmp_path, tiny_network(heads=HEADS, seed=1), version=2)
    assert file.read_text().startswith(edited)
    keys = {entry.key for entry in parse(file).parameters}
    assert keys == {f"{what}_{version}" for what in DIGESTS for version in (1, 2)}
    assert sorted(p.name for p in (tmp_path / "tiny_step").iterdir()) == [
        "1", "2", "config.pbtxt", "phenotypes.txt",
    ]  # fmt: skip


def test_another_interface_needs_another_name(tiny_network: Make, tmp_path: Path) -> None:
    laid_out(tmp_path, tiny_network(heads=HEADS))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    others: list[list[Graph]] = [
        graphs_of(tiny_network(heads={"mortality": 1})),
        graphs_of(tiny_network("llama", heads=HEADS)),  # differs in the step alone
        graphs_of(tiny_network(events="none", heads=HEADS)),
    ]
    for graphs in others:
        for act in (check_layout, lambda *a: write_layout(*a, DIGESTS)):
            with pytest.raises(LayoutError, match=r"config\.pbtxt.*choose another name"):
                act(tmp_path, "tiny", 2, graphs, PHENOTYPES)
    with pytest.raises(LayoutError, match=r"phenotypes\.txt.*choose another name"):
        check_layout(tmp_path, "tiny", 2, graphs_of(tiny_network(heads=HEADS)), PHENOTYPES[::-1])
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_folder_of_another_model_is_left_alone(tiny_network: Make, tmp_path: Path) -> None:
    (tmp_path / "tiny_step" / "1").mkdir(parents=True)
    with pytest.raises(LayoutError, match=r"tiny_step/1 exists"):
        check_layout(tmp_path, "tiny", 1, graphs_of(tiny_network()), ())


def test_names_that_need_quoting(
    tiny_network: Make, parse: Callable[[Path], Any], tmp_path: Path
) -> None:
    name = 'Städtisch "Nord"'
    laid_out(tmp_path, tiny_network(heads=HEADS), name=name)
    assert parse(tmp_path / name / "config.pbtxt").name == name
