"""Model bundles: everything a model needs to run, in one verified folder.

`<repository>/<name>/<version>/` holds

    manifest.json          schema version, name, SHA-256 of every other file
    config.json            architecture
    model.safetensors      weights
    preprocessing.json     normalisation and imputation
    vocabulary.json        event codes
    labels.json            tasks, phenotype names, how labels were made
    calibration.json       raw output -> answer, for each head
    metrics.json           how well it does, and the commands that measured it
    MODEL_CARD.md
    model.onnx, step.onnx, weights.onnx.data    optional: the network for other runtimes

The digest of a bundle is the SHA-256 of its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from llm4ehr.calibration import Calibration, calibration_from_json, calibration_json
from llm4ehr.episode import MAX_HOURS, Preprocessing, preprocessing_digest
from llm4ehr.model import LLM4EHR, ModelConfig
from llm4ehr.vocabulary import Vocabulary

BUNDLE_SCHEMA_VERSION = 1
_NETWORK_FILES = ("config.json", "model.safetensors", "preprocessing.json", "vocabulary.json")
_BUNDLE_FILES = (
    *_NETWORK_FILES, "labels.json", "calibration.json", "metrics.json", "MODEL_CARD.md",
)  # fmt: skip
_GRAPH_FILES = ("model.onnx", "step.onnx", "weights.onnx.data")

# What reading a file may raise whose contents are damaged or make no sense.
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class BundleError(ValueError):
    """The bundle cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model with the preprocessing it was trained with. Neither is usable without the other."""

    model: LLM4EHR
    preprocessing: Preprocessing
    vocabulary: Vocabulary

    @property
    def causal(self) -> bool:
        """Whether no hour depends on a later one."""
        config = self.model.config
        # Whether a code occurs again later decides which of its tokens are kept.
        foreseeing = config.events == "stream" and self.preprocessing.dedupe == "episode_last"
        return self.preprocessing.causal and config.backbone.causal and not foreseeing

    @property
    def not_online(self) -> str | None:
        """Why the online engine cannot serve this network; None if it can."""
        if not self.causal:
            return "this network reads later hours and cannot be streamed"
        prompt = self.model.config.prompt
        if prompt is not None and prompt.position == "suffix":
            return "this network reads a stay out after its end (suffix prompt), cannot be streamed"
        if self.preprocessing.bin_edge != "left":
            return "streaming needs hours closed on the left, as the log has them"
        if self.preprocessing.max_hours < MAX_HOURS:
            return f"this network reads fewer than the {MAX_HOURS} hours that a stay may have"
        if self.preprocessing.max_hours > self.model.max_hours:
            return "the backbone has fewer positions than a stay may have hours"
        window = self.model.config.backbone.window
        longest = self.preprocessing.max_hours + (prompt.length if prompt else 0)
        if window is not None and longest > window + 1:
            return "the backbone attends to fewer hours than a stay may have"
        if window is not None and self._longest_event_pass > window + 1:
            return "the backbone attends to fewer event tokens than are read at once"
        return None

    @property
    def _longest_event_pass(self) -> int:
        """Tokens that the event pass reads at once, the begin token included."""
        model = self.model
        if model.config.events != "stream":
            return 0
        return len(model.begin) + (model.config.event_window or model.max_tokens)

    @property
    def preprocessing_digest(self) -> str:
        """SHA-256 of everything that turns an episode into numbers."""
        return preprocessing_digest(self.preprocessing, self.vocabulary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A loaded, verified bundle."""

    name: str
    version: int
    digest: str
    network: Network
    calibration: Calibration
    phenotypes: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""


def save_network(folder: Path, network: Network) -> None:
    """Write the network files into an existing folder.

    Backbone weights that bfloat16 can hold exactly are stored in it, which halves a frozen backbone
    (`training.pretrain` has rounded it before anything was trained on top) and loses nothing.
    """
    config = network.model.config
    _write_json(folder / "config.json", config.to_json())
    _write_json(folder / "preprocessing.json", network.preprocessing.to_json())
    _write_json(folder / "vocabulary.json", network.vocabulary.to_json())
    state = {}
    for name, tensor in network.model.state_dict().items():
        kept = tensor.detach().cpu().contiguous().clone()
        exact = name.startswith("backbone.") and torch.equal(kept.bfloat16().float(), kept)
        state[name] = kept.bfloat16() if exact else kept
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private to the user


def load_network(folder: Path) -> Network:
    """Read what `save_network` wrote; fp32 on the CPU, in eval mode. Raises BundleError."""
    config = _parse(folder, "config.json", ModelConfig.from_json)
    preprocessing = _parse(folder, "preprocessing.json", Preprocessing.from_json)
    vocabulary = _parse(folder, "vocabulary.json", Vocabulary.from_json)
    try:
        model = LLM4EHR(config)
    except Exception as error:  # the library that builds it raises whatever it meets
        raise BundleError(f"{folder / 'config.json'}: {error}") from error
    try:
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: t.float() for name, t in weights.items()})
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(f"{folder / 'model.safetensors'}: {error}") from error
    return Network(model=model.eval(), preprocessing=preprocessing, vocabulary=vocabulary)


def free_folder(repository: Path, name: str, version: int) -> Path:
    """Where a new version belongs. Raises BundleError if there is one."""
    folder = repository / name / str(version)
    if folder.exists():
        raise BundleError(f"{folder} exists; versions are immutable, choose the next number")
    return folder


def save_bundle(
    repository: Path,
    name: str,
    version: int,
    network: Network,
    *,
    calibration: Calibration,
    labels: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
    graphs: Sequence[Path] = (),
) -> Path:
    """Write a complete bundle and return its folder. A version that exists is never overwritten.

    The files `graphs` (ONNX and weights, by their names in the bundle) are moved into it.
    """
    folder = free_folder(repository, name, version)
    if unknown := sorted({file.name for file in graphs} - set(_GRAPH_FILES)):
        raise BundleError(f"{unknown[0]} is not the name of a graph file of a bundle")
    partial = folder.with_name(f"{version}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        save_network(partial, network)
        _write_json(partial / "labels.json", labels)
        _write_json(partial / "calibration.json", calibration_json(calibration))
        _write_json(partial / "metrics.json", metrics)
        (partial / "MODEL_CARD.md").write_text(card)
        for file in graphs:
            shutil.move(file, partial / file.name)
        manifest = {
            "schema_version": BUNDLE_SCHEMA_VERSION,
            "name": name,
            "version": version,
            "files": {
                file: _sha256(partial / file)
                for file in (*_BUNDLE_FILES, *(file.name for file in graphs))
            },
        }
        _write_json(partial / "manifest.json", manifest)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def load_bundle(repository: Path, name: str, version: int, digest: str | None = None) -> Bundle:
    """Verify and load a bundle, of that digest if one is given.

    Raises BundleError naming the file on: a missing folder or file, an unknown schema version, a
    file that is not in the manifest, a wrong hash, another digest, contents that cannot be read.
    """
    folder = repository / name / str(version)
    if not (folder / "manifest.json").is_file():
        raise BundleError(f"{folder / 'manifest.json'}: missing")
    found = _sha256(folder / "manifest.json")
    if digest not in (None, found):
        raise BundleError(f"{folder / 'manifest.json'}: its digest is not the one that is expected")
    manifest = _parse(folder, "manifest.json", dict)
    if manifest.get("schema_version") != BUNDLE_SCHEMA_VERSION:
        raise BundleError(
            f"{folder / 'manifest.json'}: schema version {manifest.get('schema_version')!r} "
            f"is unknown, this code reads {BUNDLE_SCHEMA_VERSION}"
        )
    if (manifest.get("name"), manifest.get("version")) != (name, version):
        raise BundleError(f"{folder / 'manifest.json'}: made for another name or version")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise BundleError(f"{folder / 'manifest.json'}: `files` is not a mapping")
    if unknown := sorted(files.keys() - {*_BUNDLE_FILES, *_GRAPH_FILES}):
        raise BundleError(f"{folder / 'manifest.json'}: hash for the unknown file {unknown[0]}")
    for file in _BUNDLE_FILES:
        if file not in files:
            raise BundleError(f"{folder / 'manifest.json'}: no hash for {file}")
    for file in files:
        if not (folder / file).is_file():
            raise BundleError(f"{folder / file}: missing")
        if _sha256(folder / file) != files[file]:
            raise BundleError(f"{folder / file}: SHA-256 differs from the manifest")
    network = load_network(folder)
    labels = _parse(folder, "labels.json", dict)
    phenotypes = labels.get("phenotypes", [])
    heads = network.model.config.heads
    if not _are_texts(phenotypes) or heads.get("phenotyping", 0) != len(phenotypes):
        raise BundleError(f"{folder / 'labels.json'}: phenotype names do not match the head")
    calibration = _parse(folder, "calibration.json", calibration_from_json)
    if set(calibration) != set(heads):
        raise BundleError(f"{folder / 'calibration.json'}: tasks differ from the heads")
    return Bundle(
        name=name,
        version=version,
        digest=found,
        network=network,
        calibration=calibration,
        phenotypes=tuple(phenotypes),
        labels=labels,
        metrics=_parse(folder, "metrics.json", dict),
        card=_read(folder, "MODEL_CARD.md", str),
    )


def bundle_versions(repository: Path, name: str) -> list[int]:
    """Versions of a bundle, oldest first."""
    folders = (repository / name).glob("*/manifest.json")
    return sorted(int(f.parent.name) for f in folders if f.parent.name.isdigit())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse(folder: Path, file: str, build: Any) -> Any:
    return _read(folder, file, lambda text: build(json.loads(text)))


def _read(folder: Path, file: str, build: Any) -> Any:
    path = folder / file
    try:
        return build(path.read_text())
    except _UNREADABLE as error:
        raise BundleError(f"{path}: {error}") from error
