"""Turn a fine-tuning run into a bundle with a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llm4ehr.bundle import Network, save_bundle
from training.card import Provenance, model_card
from training.evaluate import load_scorer


def export(
    run: Path,
    repository: Path,
    name: str,
    version: int,
    metrics_files: Sequence[Path] = (),
    command: str | None = None,
) -> Path:
    """Write `<repository>/<name>/<version>/` from a fine-tuning run; returns the folder.

    `metrics_files` are those of `evaluate`; `command` is the one that made the run, for the card.
    The weights of the backbone are stored as bfloat16 where that loses nothing, which is so when a
    frozen pre-trained backbone was rounded before training. Raises BundleError if the version is
    there already.
    """
    scorer = load_scorer(run)
    network = scorer.network
    made = Provenance(
        config=json.loads((run / "finetune.json").read_text()),
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
    return save_bundle(
        repository,
        name,
        version,
        network,
        calibration=scorer.calibration,
        labels=labels,
        metrics={"evaluations": evaluations, "provenance": provenance},
        card=model_card(name, version, network, made, evaluations),
        half=_rounded(network),
    )


def _rounded(network: Network) -> bool:
    weights = network.model.backbone.parameters()
    return all(torch.equal(w.detach().bfloat16().float(), w.detach()) for w in weights)
