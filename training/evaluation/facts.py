"""What a reader must know of a result before comparing it with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm4ehr.backbone import Backbone
from training.evaluation.scorer import Scorer


def facts(model: Path, scorer: Scorer, episodes: Iterable[str]) -> dict[str, Any]:
    """Choices, origin and hashes behind a result on the stays `episodes`.

    `backbone` and `seeds` are null for a bundle, whose metrics.json holds them.
    `uses_later_observations` says that hourly answers depend on what came after their hour, so that
    they could not have been given at the bedside.
    """
    network = scorer.network
    made: dict[str, Any] = {"backbone": None, "seeds": None}
    if (model / "pretrained.json").exists():
        pretraining = json.loads((model / "pretrained.json").read_text())["config"]
        finetuning = json.loads((model / "finetune.json").read_text())
        made = {
            "backbone": pretraining["model"]["backbone"]["source"],
            "seeds": {"pretraining": pretraining["seed"], "finetuning": finetuning["seed"]},
        }
    return made | {
        "attention_mode": network.model.config.backbone.attention_mode,
        "imputation": network.preprocessing.imputation,
        "uses_later_observations": not network.causal,
        **asdict(scorer.label_options),
        "hourly_unit": "patch" if scorer.readout.by_patch else "hour",
        "readout": {
            task: scorer.readout.per_stay.get(task, "hourly") for task in network.model.config.heads
        },
        "max_hours": scorer.readout.max_hours,
        "backbone_family": network.model.config.backbone.model_type,
        "backbone_sha256": weights_sha256(network.model.backbone),
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
