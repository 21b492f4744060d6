"""What a reader must know of a result before comparing it with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm4ehr.backbone import Backbone
from llm4ehr.bundle import Network
from training.evaluation.scorer import Scorer


def facts(model: Path, scorer: Scorer, episodes: Iterable[str]) -> dict[str, Any]:
    """Choices, origin and hashes behind a result on the stays `episodes`.

    `backbone` and `seeds` are null for a bundle, whose metrics.json holds them.
    `uses_later_observations` says that hourly answers depend on what came after their hour, so that
    they could not have been given at the bedside.
    """
    made: dict[str, Any] = {"backbone": None, "seeds": None}
    if (model / "pretrained.json").exists():
        pretraining = json.loads((model / "pretrained.json").read_text())["config"]
        finetuning = json.loads((model / "finetune.json").read_text())
        made = {
            "backbone": pretraining["model"]["backbone"]["source"],
            "seeds": {"pretraining": pretraining["seed"], "finetuning": finetuning["seed"]},
        }
    readout = scorer.readout
    heads = scorer.network.model.config.heads
    labels = asdict(scorer.label_options)
    return (
        made
        | {
            "label_align": labels.pop("align"),
            **labels,
            "hourly_unit": "patch" if readout.by_patch else "hour",
            "readout": {task: readout.per_stay.get(task, "hourly") for task in heads},
            "max_hours": readout.max_hours,
        }
        | facts_of_network(scorer.network, episodes)
    )


def facts_of_network(network: Network, episodes: Iterable[str]) -> dict[str, Any]:
    """What holds of a network without heads too."""
    backbone = network.model.backbone
    return {
        "attention_mode": backbone.spec.attention_mode,
        "imputation": network.preprocessing.imputation,
        "uses_later_observations": not network.causal,
        "backbone_family": backbone.spec.model_type,
        "backbone_sha256": weights_sha256(backbone),
        "preprocessing_sha256": network.preprocessing_digest,
        "split_sha256": hashlib.sha256("\n".join(sorted(episodes)).encode()).hexdigest(),
    }


def weights_sha256(backbone: Backbone) -> str:
    """SHA-256 over names and weights of a backbone."""
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
