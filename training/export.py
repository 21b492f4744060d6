"""Turn a fine-tuning run into a bundle with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llm4ehr.bundle import Network, save_bundle
from training.evaluate import load_scorer

_TASK_TITLES = {
    "mortality_at_48h": "In-hospital mortality, read at hour 48",
    "decompensation": "Decompensation (death within 24 hours), every hour",
    "decompensation_at_48h": "Decompensation, at hour 48 only",
    "remaining_los_days": "Remaining length of hospital stay in days, every hour",
}

_SOURCE_LIMITS = {
    "physionet2012": (
        "2012: stays of one hospital before 2009, each of at least 48 hours. Expect other "
        "calibration elsewhere: check and recalibrate on your own data before you look at a risk.",
        "2012: labels cover the first 48 hours only. Answers for later hours are extrapolation.",
        "2012: times of death are known to the day. Nearly all certain decompensation labels "
        "stand at hour 48, so over all hours the metrics reward knowing which hour it is; trust "
        "the figures at hour 48.",
        "2012: no drugs are recorded. Their effect is seen only through vital signs and "
        "laboratory values.",
    ),
    "physionet2019": (
        "2019: used without labels. Its records end soon after the onset of sepsis and have no "
        "GCS.",
    ),
}


def export(
    run: Path, repository: Path, name: str, version: int, metrics_file: Path | None = None
) -> Path:
    """Write `<repository>/<name>/<version>/` from a fine-tuning run; returns the folder.

    The weights of the backbone are stored as bfloat16 where that loses nothing, which is so when a
    frozen pre-trained backbone was rounded before training. Raises BundleError if the version is
    there already.
    """
    scorer = load_scorer(run)
    network = scorer.network
    config = json.loads((run / "finetune.json").read_text())
    result = json.loads((run / "result.json").read_text())
    pretraining = json.loads((run / "pretrained.json").read_text())
    metrics = json.loads(metrics_file.read_text()) if metrics_file else {}
    labels = {
        "tasks": list(network.model.config.heads),
        "phenotypes": [],
        "thresholds": scorer.thresholds,
        "label_align": scorer.label_align,
        "label_notes": result["label_notes"],
    }
    provenance = {
        "finetuning": {"config": config, "result": result},
        "pretraining": pretraining,
        "environment": json.loads((run / "environment.json").read_text()),
    }
    return save_bundle(
        repository,
        name,
        version,
        network,
        calibration=scorer.calibration,
        labels=labels,
        metrics={"evaluation": metrics, "provenance": provenance},
        card=model_card(name, version, network, config, result, pretraining, metrics),
        half=_rounded(network),
    )


def _rounded(network: Network) -> bool:
    weights = network.model.backbone.parameters()
    return all(torch.equal(w.detach().bfloat16().float(), w.detach()) for w in weights)


def model_card(
    name: str,
    version: int,
    network: Network,
    config: dict[str, Any],
    result: dict[str, Any],
    pretraining: dict[str, Any],
    metrics: dict[str, Any],
) -> str:
    """The model card as Markdown. Every number in it comes from `metrics` or the runs' results."""
    backbone = network.model.config.backbone
    licences = {**pretraining["result"]["licences"], **result["licences"]}
    lines = [
        f"# {name}, version {version}",
        "",
        "For research only. This is not a certified medical device; do not base care on it.",
        "",
        "## What it is",
        "",
        f"An LLM4EHR network: backbone `{backbone.model_type}` with "
        f"{sum(p.numel() for p in network.model.backbone.parameters()):,} parameters, hidden size "
        f"{network.model.backbone.hidden_size}, run causally; events: "
        f"{network.model.config.events}; {len(network.vocabulary)} event codes.",
        "It reads the 11 variables, events and static facts of a stay hour by hour, up to hour "
        f"{network.preprocessing.max_hours}, and answers at the end of every hour: "
        f"{', '.join(config['tasks'])}.",
        "",
        "## Data",
        "",
        f"- Pre-trained without labels on {pretraining['result']['episodes']:,} stays "
        f"({pretraining['result']['hours']:,} hours): {_sources(pretraining['config'])}.",
        f"- Fine-tuned on {result['episodes']:,} stays, calibrated and selected on "
        f"{result['validation_episodes']:,} held-out ones: {_sources(config)}.",
        *(f"- {source}: {licence}" for source, licence in sorted(licences.items())),
        "",
        "## Labels",
        "",
        *(f"- {task}: {note}" for task, note in sorted(result["label_notes"].items())),
        "",
        *_metrics_section(metrics),
        "## Limits",
        "",
        *(f"- {limit}" for source in sorted(licences) for limit in _SOURCE_LIMITS.get(source, ())),
        "- The labels are not independent of care: treated patients look safer than they are.",
        "",
    ]
    return "\n".join(lines)


def _sources(config: dict[str, Any]) -> str:
    parts = [
        f"{Path(s['store']).name} (splits {', '.join(s['splits'])})"
        for s in config["data"]["sources"]
    ]
    return "; ".join(parts)


def _metrics_section(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return []
    lines = [
        "## Metrics",
        "",
        f"On {metrics['store']}, split {metrics['split']} ({metrics['episodes']:,} stays, not used "
        "in training). In brackets the 95 % interval, bootstrap over patients, seed "
        f"{metrics['seed_of_bootstrap']}. Measured by `{metrics['command']}`.",
        "",
    ]
    for task, values in metrics["tasks"].items():
        lines += [f"**{_TASK_TITLES[task]}**", "", "| metric | value |", "|---|---|"]
        for metric, value in values.items():
            if isinstance(value, dict):
                shown = [
                    "not defined" if value[k] is None else f"{value[k]:.3f}"
                    for k in ("value", "ci95_low", "ci95_high")
                ]
                lines.append(f"| {metric} | {shown[0]} ({shown[1]} to {shown[2]}) |")
            elif isinstance(value, float):
                lines.append(f"| {metric} | {value:.3f} |")
            else:
                lines.append(f"| {metric} | {value} |")
        lines.append("")
    return lines
