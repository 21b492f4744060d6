"""Turn a fine-tuning run into a bundle with a model card and, if asked, ONNX graphs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version as version_of
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llm4ehr.bundle import free_folder, save_bundle
from llm4ehr.calibration import HoursKind, default_calibration
from llm4ehr.episode import Episode
from training.config import FinetuneConfig, PromptTuning, SourceConfig
from training.evaluation.evaluate import load_scorer
from training.evaluation.scorer import Scorer
from training.export.card import Provenance, model_card
from training.export.graphs import graphs_of, no_step
from training.export.triton import check_layout, write_layout
from training.sources import open_sources

# Of each store that a run names and that is still there, so many stays are put through the graphs.
_STAYS_OF_A_STORE = 4


class NotDeployableError(ValueError):
    """A run answers in a way that no bundle can."""


def export(
    run: Path,
    repository: Path,
    name: str,
    version: int,
    metrics_files: Sequence[Path] = (),
    command: str | None = None,
    *,
    onnx: bool = False,
) -> Path:
    """Write `<repository>/<name>/<version>/` from a fine-tuning run; returns the folder.

    `metrics_files` are those of `evaluate`; `command` is the one that made the run, for the card.
    The weights of the backbone are stored as bfloat16 where that loses nothing, which is so when a
    frozen pre-trained backbone was rounded before training. `onnx` adds the graphs of
    `training.export.graphs`, checked against torch, and the layout of `training.export.triton`. The
    folder appears when everything is in it.

    Raises BundleError if the version is there already, NotDeployableError for a run that is read
    out in a way of the paper's tables only, and with `onnx` GraphError where a graph differs from
    torch, LayoutError where earlier versions stand in the way, and ValueError where a package is
    missing.
    """
    folder = free_folder(repository, name, version)
    scorer = load_scorer(run)
    network = scorer.network
    config = FinetuneConfig.model_validate_json((run / "finetune.json").read_text())
    refuse_undeployable(config)
    made = Provenance(
        config=config.model_dump(mode="json"),
        result=json.loads((run / "result.json").read_text()),
        pretraining=json.loads((run / "pretrained.json").read_text()),
        environment=json.loads((run / "environment.json").read_text()),
        command=command,
    )
    evaluations = [json.loads(file.read_text()) for file in metrics_files]
    labels = {
        "tasks": list(network.model.config.heads),
        "phenotypes": list(scorer.phenotypes),
        "thresholds": scorer.thresholds,
        "label_align": scorer.label_options.align,
        "min_history_hours": scorer.label_options.min_history_hours,
        "label_notes": made.result["label_notes"],
    }
    provenance = {
        "command": command,
        "finetuning": {"config": made.config, "result": made.result},
        "pretraining": made.pretraining,
        "environment": made.environment,
        "data_sets": [asdict(data_set) for data_set in made.data_sets],
        "preprocessing_digest": network.preprocessing_digest,
        "vocabulary_digest": network.vocabulary.digest,
    }
    layout = (repository, name, version, graphs_of(network), scorer.phenotypes)
    onnx_report = None
    with TemporaryDirectory() as scratch:
        if onnx:
            check_layout(*layout)
            onnx_report = _write_onnx(scorer, config.data.sources, Path(scratch))
        save_bundle(
            repository,
            name,
            version,
            network,
            calibration=scorer.calibration,
            labels=labels,
            metrics={"evaluations": evaluations, "provenance": provenance | {"onnx": onnx_report}},
            card=model_card(
                name, version, network, made, evaluations, scorer.calibration, onnx_report
            ),
            graphs=sorted(Path(scratch).iterdir()),
        )
    if onnx:
        try:
            digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
            preprocessing = network.preprocessing_digest
            write_layout(*layout, {"bundle_digest": digest, "preprocessing_digest": preprocessing})
        except BaseException:
            shutil.rmtree(folder)
            raise
    return folder


def refuse_undeployable(config: FinetuneConfig) -> None:
    """Raise NotDeployableError for a fine-tuning that does not answer hour by hour."""
    tuning = config.tuning
    reasons = [
        f"readout of {task}: {how}"
        for task, how in config.readout.items()
        if how != "hourly" and task in config.tasks
    ]
    if config.hourly_unit != "hour":
        reasons.append(f"hourly_unit: {config.hourly_unit}")
    if isinstance(tuning, PromptTuning) and tuning.position == "suffix":
        reasons.append("tuning: a suffix prompt")
    if reasons:
        raise NotDeployableError(
            f"this run cannot be exported ({'; '.join(reasons)}): a bundle answers at the end of "
            "every hour from the hours so far; fine-tune with readout hourly, hourly_unit hour and "
            "no suffix prompt"
        )


def _write_onnx(scorer: Scorer, sources: Sequence[SourceConfig], folder: Path) -> dict[str, Any]:
    """Write and check the graphs; returns what is to be known of them, and prints differences."""
    from training.export.onnx import require_onnx

    require_onnx()
    from training.export.check import check_graphs
    from training.export.onnx import write_graphs

    network = scorer.network
    graphs = write_graphs(network, folder)
    stays = _some_stays(sources)
    los = scorer.calibration.get("remaining_los")
    scale: HoursKind = "days" if los is not None and los.kind == "days" else "log_days"
    uncalibrated = default_calibration(list(network.model.config.heads), scale)
    differences = check_graphs(network, graphs, folder, stays, uncalibrated)
    for file, of in differences.items():
        for inputs, largest in of.items():
            shown = ", ".join(f"{what} {value:.1e}" for what, value in largest.items())
            print(f"{file}: largest difference from torch on {inputs}: {shown}")
    if reason := no_step(network):
        print(f"step.onnx: not made, {reason}")
    return {
        "max_difference": differences,
        "stays": len(stays),
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "packages": {package: version_of(package) for package in ("onnx", "onnxruntime", "torch")},
    }


def _some_stays(sources: Sequence[SourceConfig]) -> list[Episode]:
    """A few stays of each store that a run read, as far as the stores are still there."""
    chosen: list[Episode] = []
    for source in sources:
        if source.store.exists():
            (opened,) = open_sources([source], training=True)
            episodes = (record.episode for record in opened.store)
            read = (e for e in episodes if e.episode_id in opened.episode_ids and e.n_hours)
            chosen += islice(read, _STAYS_OF_A_STORE)
    return chosen
