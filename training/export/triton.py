"""The model repository as Triton Inference Server reads it.

    <repository>/<name>/config.pbtxt             whole stays: <name>/<version>/model.onnx
    <repository>/<name>/<version>/               the bundle, with all graphs and their weights
    <repository>/<name>_step/config.pbtxt        one hour: <name>_step/<version>/step.onnx
    <repository>/<name>_step/<version>           link to the bundle, so that weights are there once

Beside each configuration, phenotypes.txt labels the output `phenotyping`.

A configuration belongs to all versions of a model: a version with other inputs or outputs needs
another name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from training.export.graphs import Graph

_LABELS_FILE = "phenotypes.txt"
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}
# Lines of a configuration that say what a client sends and gets. Anything else may be edited.
_INTERFACE = ("input ", "output ", "max_batch_size:", "default_model_filename:")
# Requests of one shape that wait are answered together, at most so many stays at a time.
_MAX_BATCH = 64


class LayoutError(ValueError):
    """The repository holds something that a new version does not go with."""


def check_layout(
    repository: Path, name: str, version: int, graphs: Sequence[Graph], phenotypes: Sequence[str]
) -> None:
    """Raise LayoutError if `write_layout` could not add this version."""
    for graph in graphs:
        folder = repository / _model_name(name, graph)
        _merged(folder, graph, phenotypes, {})
        if graph.kind == "step" and os.path.lexists(folder / str(version)):
            raise LayoutError(f"{folder / str(version)} exists; choose another version or name")
        labels = folder / _LABELS_FILE
        if labels.exists() and labels.read_text() != _lines(phenotypes):
            raise LayoutError(
                f"{labels}: earlier versions have other phenotypes; choose another name"
            )


def write_layout(
    repository: Path,
    name: str,
    version: int,
    graphs: Sequence[Graph],
    phenotypes: Sequence[str],
    digests: dict[str, str],
) -> None:
    """Make the graphs of a bundle that is in place known to Triton.

    `digests` (what it is of -> SHA-256) become parameters `<what>_<version>` of the models.
    Raises LayoutError where earlier versions do not allow it.
    """
    check_layout(repository, name, version, graphs, phenotypes)
    parameters = {f"{what}_{version}": digest for what, digest in digests.items()}
    for graph in graphs:
        folder = repository / _model_name(name, graph)
        folder.mkdir(exist_ok=True)
        if phenotypes:
            _write(folder / _LABELS_FILE, _lines(phenotypes))
        _write(folder / "config.pbtxt", _merged(folder, graph, phenotypes, parameters))
        if graph.kind == "step":
            (folder / str(version)).symlink_to(Path("..", name, str(version)))


def _model_name(name: str, graph: Graph) -> str:
    return f"{name}_step" if graph.kind == "step" else name


def _merged(
    folder: Path, graph: Graph, phenotypes: Sequence[str], parameters: dict[str, str]
) -> str:
    """The configuration of a model, or the one that is there, with more parameters."""
    lines = _config_lines(folder.name, graph, phenotypes)
    file = folder / "config.pbtxt"
    if file.exists():
        there = file.read_text().splitlines()
        if _interface(there) != _interface(lines):
            raise LayoutError(
                f"{file}: earlier versions have other inputs or outputs; choose another name"
            )
        lines = there
    lines = lines + [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in parameters.items()
    ]
    return _lines(lines)


def _interface(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith(_INTERFACE)]


def _config_lines(name: str, graph: Graph, phenotypes: Sequence[str]) -> list[str]:
    """One line a field; the first dimension, the batch, is Triton's."""
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(graph.file)}",
        f"max_batch_size: {_MAX_BATCH}",
        "dynamic_batching { }",
        # Not all: older versions of a bundle may have no graphs.
        "version_policy { latest { num_versions: 1 } }",
    ]
    for kind, ports in (("input", graph.inputs), ("output", graph.outputs)):
        for port in ports:
            dims = ", ".join("-1" if isinstance(d, str) else str(d) for d in port.shape[1:])
            labels = ""
            if port.name == "phenotyping" and phenotypes:
                labels = f" label_filename: {_quoted(_LABELS_FILE)}"
            lines.append(
                f"{kind} {{ name: {_quoted(port.name)} data_type: {_TYPES[port.dtype]} "
                f"dims: [ {dims} ]{labels} }}"
            )
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _write(file: Path, text: str) -> None:
    """Whole or not at all: a server may be reading."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(file)
