"""The model card of a bundle: every number in it comes from an evaluation or a run's result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm4ehr.bundle import Network
from llm4ehr.calibration import Calibration

_TASK_TITLES = {
    "mortality_at_48h": "In-hospital mortality, read at hour 48",
    "decompensation": "Decompensation (death within 24 hours), every hour",
    "decompensation_at_48h": "Decompensation, at hour 48 only",
    "remaining_los_days": "Remaining length of stay in days, every hour",
    "phenotyping": "Phenotypes, read at the last hour of the stay",
    "phenotyping_at_24h": "Phenotypes, at hour 24 (diagnostic)",
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
# Said of these data sets where they are the open demos, which the licence tells.
_DEMO_LIMITS = {
    "eicu": "eICU demo: some 2,000 stays in many hospitals of the United States in 2014 and 2015. "
    "No time of death is recorded; the end of the unit or hospital stay stands for it.",
    "mimic3": "MIMIC-III demo: 100 patients of one hospital, chosen because they have died since. "
    "Far more of them died in hospital than on a ward.",
    "mimic4": "MIMIC-IV demo: 100 patients of one hospital.",
}
_SHARE_ALIKE = re.compile("ODbL|Open Database Licen[cs]e", re.IGNORECASE)
_LICENCE_TEXTS = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "ODC-By-1.0": "https://opendatacommons.org/licenses/by/1-0/",
    "ODbL-1.0": "https://opendatacommons.org/licenses/odbl/1-0/",
}
_SHARED_PATIENTS = (
    "MIMIC-III and MIMIC-IV come from one hospital (2001 to 2012, 2008 to 2019) under unrelated "
    "ids. A patient could be in both and so on both sides of a split; this cannot be checked."
)


@dataclass(frozen=True, slots=True, order=True)
class DataSet:
    """What the licence of a data set that was trained on asks to pass on.

    `citation` is empty where none is known.
    """

    name: str
    licence: str
    citation: str

    @property
    def share_alike(self) -> bool:
        """Whether it is under the Open Database License."""
        return _SHARE_ALIKE.search(self.licence) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a network came to be: configuration and result of its runs, hardware, command."""

    config: dict[str, Any]
    result: dict[str, Any]
    pretraining: dict[str, Any]
    environment: dict[str, Any]
    command: str | None

    @property
    def data_sets(self) -> list[DataSet]:
        """Everything that was trained on, in order. A name comes twice where pre-training and
        fine-tuning read it under different terms."""
        found = set()
        for result in (self.pretraining["result"], self.result):
            for name, licence in result["licences"].items():
                found.add(DataSet(name, licence, result["citations"][name]))
        return sorted(found)


def model_card(
    name: str,
    version: int,
    network: Network,
    made: Provenance,
    evaluations: Sequence[dict[str, Any]],
    calibration: Calibration,
    onnx: dict[str, Any] | None,
) -> str:
    """The model card as Markdown. Every number in it comes from an evaluation or a run's result.

    `onnx`: what the export found out of the ONNX graphs, if there are any.
    """
    backbone = network.model.config.backbone
    pretraining, result = made.pretraining, made.result
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
        f"{', '.join(made.config['tasks'])}.",
        "",
        "## Data",
        "",
        f"- Pre-trained without labels on {pretraining['result']['episodes']:,} stays "
        f"({pretraining['result']['hours']:,} hours): {_sources(pretraining['config'])}.",
        f"- Fine-tuned on {result['episodes']:,} stays, calibrated and selected on "
        f"{result['validation_episodes']:,} held-out ones: {_sources(made.config)}.",
        *(
            f"- Stays with a label for {task}: "
            + (", ".join(f"{n:,} of {source}" for source, n in of.items()) or "none")
            + "."
            for task, of in result["labelled"].items()
        ),
        *_licence_section(made.data_sets),
        "## Labels",
        "",
        "Decompensation, remaining stay and phenotypes are asked at times after "
        f"{made.config['min_history_hours']:g} hours, after the first observation, and inside the "
        "stay.",
        "",
        *(f"- {task}: {note}" for task, note in sorted(result["label_notes"].items())),
        "",
        "## How it was made",
        "",
        *([f"- Command: `{made.command}`"] if made.command else []),
        f"- Tuning: {_tuning(made.config['tuning'])}",
        f"- Calibration of raw outputs: {_calibration(calibration)}",
        f"- Seeds: {pretraining['config']['seed']} (pre-training), {made.config['seed']} "
        "(fine-tuning)",
        f"- Hardware: {made.environment['gpu'] or 'no GPU'}, {made.environment['processor']}, "
        f"{made.environment['cores']} cores",
        "- Software: "
        + ", ".join(f"{package} {v}" for package, v in made.environment["packages"].items()),
        f"- Preprocessing and vocabulary, SHA-256: `{result['preprocessing_digest']}`",
        "",
        *(line for evaluation in evaluations for line in _metrics_section(evaluation)),
        *(_onnx_section(onnx) if onnx else []),
        "## Limits",
        "",
        *(f"- {limit}" for limit in _limits(made)),
        "- The labels are not independent of care: treated patients look safer than they are.",
        "",
    ]
    return "\n".join(lines)


def _sources(config: dict[str, Any]) -> str:
    parts = []
    for source in config["data"]["sources"]:
        part = f"{Path(source['store']).name} (splits {', '.join(source['splits'])}"
        if source.get("labels") is not None:
            part += f"; labels: {', '.join(source['labels']) or 'none'}"
        parts.append(part + ")")
    return "; ".join(parts)


def _tuning(tuning: dict[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in tuning.items() if key != "strategy"]
    strategy = tuning["strategy"].replace("_", " ")
    return strategy + (f" ({', '.join(options)})" if options else "")


def _calibration(calibration: Calibration) -> str:
    parts = []
    for task, output_map in calibration.items():
        part = f"{task} {output_map.kind}"
        if output_map.interval is not None:
            interval = output_map.interval
            part += (
                f" with intervals for {interval.coverage:.0%} of stays, fitted on "
                f"{sum(interval.stays):,} stays"
            )
        parts.append(part)
    return "; ".join(parts)


def _onnx_section(onnx: dict[str, Any]) -> list[str]:
    lines = [
        "## ONNX",
        "",
        "Raw outputs and states in fp32, for other runtimes. Largest absolute differences from "
        f"torch, uncalibrated; stays: {onnx['stays']} whole stays of the training data.",
        "",
        "| file | on | probability | hidden state | hours of remaining stay |",
        "|---|---|---|---|---|",
    ]
    for file, of in onnx["max_difference"].items():
        for inputs, largest in of.items():
            values = (f"{largest[what]:.1e}" for what in ("probability", "hidden", "hours"))
            lines.append(f"| {file} | {inputs} | {' | '.join(values)} |")
    return [*lines, ""]


def _licence_section(data_sets: Sequence[DataSet]) -> list[str]:
    lines = ["", "## Licences of the data", ""]
    for of in data_sets:
        text = _LICENCE_TEXTS.get(of.licence)
        line = f"- {of.name}: {of.licence}" + (f" (<{text}>)" if text else "")
        lines.append(f"{line}. {of.citation or 'No citation is recorded.'}")
    lines += [
        "",
        "Pass this list on with every copy of the bundle. The records were changed into hourly "
        "input and used to train the weights; the bundle holds none of them.",
        "",
    ]
    if shared := sorted({of.name for of in data_sets if of.share_alike}):
        lines += [
            f"Contains information from {', '.join(shared)}, which is made available under the "
            "Open Database License (ODbL), a share-alike licence. Keep this notice with every copy "
            "of the bundle. A database derived from the data, or from this bundle as far as it is "
            "one, may be passed on under the same licence only.",
            "",
        ]
    return lines


def _limits(made: Provenance) -> list[str]:
    names = {of.name for of in made.data_sets}
    demos = {of.name for of in made.data_sets if of.share_alike} & _DEMO_LIMITS.keys()
    limits = [limit for source in sorted(names) for limit in _SOURCE_LIMITS.get(source, ())]
    limits += [_DEMO_LIMITS[source] for source in sorted(demos)]
    if {"mimic3", "mimic4"} <= names:
        limits.append(_SHARED_PATIENTS)
    for task, of in made.result["labelled"].items():
        if of and set(of) <= demos:
            limits.append(
                f"{task} was learnt from {sum(of.values()):,} stays of the demo data sets alone. "
                "This shows that the head works, not how well it can work."
            )
    return limits


def _metrics_section(report: dict[str, Any]) -> list[str]:
    known = [of["patients_trained_on"] for of in report["sources"]]
    used = (
        "no patient of them used in fine-tuning"
        if known == [0] * len(known)
        else "SOME PATIENTS OF THEM WERE TRAINED ON"
        if any(known)
        else "not known whether used in training"
    )
    where = ", ".join(f"{of['source']} ({of['episodes']:,} stays)" for of in report["sources"])
    lines = [
        f"## Metrics on {' + '.join(of['source'] for of in report['sources'])}",
        "",
        f"On split {' and '.join(report['splits'])} of {where}; {used}. In brackets the 95 % "
        f"interval, bootstrap over patients, seed {report['seed_of_bootstrap']}. "
        f"Measured by `{report['command']}`.",
        "",
    ]
    for task, values in report["tasks"].items():
        lines += [f"**{_TASK_TITLES[task]}**", "", "| metric | value |", "|---|---|"]
        lines += [
            f"| {metric} | {_shown(value)} |"
            for metric, value in values.items()
            if metric != "per_label"
        ]
        lines.append("")
        if task == "phenotyping":
            lines += ["| phenotype | positives | AUROC |", "|---|---|---|"]
            lines += [
                f"| {name} | {of['positives']} | {_shown(of['auroc'])} |"
                for name, of in values["per_label"].items()
            ]
            lines.append("")
    if "by_source" in report:
        lines += ["| data set | task | metric | value |", "|---|---|---|---|"]
        lines += [
            f"| {source} | {task} | {metric} | {_shown(value)} |"
            for source, tasks in report["by_source"].items()
            for task, values in tasks.items()
            for metric, value in values.items()
            if metric in _HEADLINES
        ]
        lines.append("")
    return lines


# What is shown of each data set of a pooled evaluation.
_HEADLINES = ("rows", "positives", "hours", "stays", "auroc", "mae", "auroc_macro")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        low, high = _shown(value["ci95_low"]), _shown(value["ci95_high"])
        return f"{_shown(value['value'])} ({low} to {high})"
    if value is None:
        return "not defined"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
