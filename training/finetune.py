"""Heads on a pre-trained encoder: all tasks jointly, one encoder, hour by hour."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.calibration import OutputMap
from llm4ehr.model import LLM4EHR, Task
from training.config import FinetuneConfig
from training.data.phenotypes import PHENOTYPES
from training.dataset import LABEL_COLUMNS, Batch, FeatureSet, batches, build_features, subsample
from training.labels import certain
from training.loop import RunFolder, Trainer, autocast, device
from training.metrics import auroc, fit_platt, macro, mae, s1_threshold
from training.sources import LeakageError, Source, is_another, open_sources, origins

_NOTE_TASK = {"length_of_stay": "remaining_los"}  # what stores may call a task in label_notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What hours are to be compared with. N hours of S stays; NaN = unknown."""

    hourly: Tensor  # [N, 3], columns LABEL_COLUMNS
    valid: Tensor  # [N] hours at which tasks are asked
    stay: Tensor  # [N] row of `phenotypes`, rising
    phenotypes: Tensor  # [S, 25]

    @classmethod
    def of(cls, batch: Batch) -> Targets:
        """The hours inside the stays of a batch, stay by stay."""
        mask = batch.hour_mask
        return cls(
            hourly=batch.labels[mask],
            valid=batch.valid[mask],
            stay=mask.nonzero()[:, 0],
            phenotypes=batch.phenotypes,
        )

    @property
    def last(self) -> Tensor:
        """[S] the last hour of every stay."""
        return torch.bincount(self.stay, minlength=len(self.phenotypes)).cumsum(0) - 1


def task_losses(outputs: Mapping[Task, Tensor], targets: Targets) -> dict[str, Tensor]:
    """Mean loss of each task over what is known; 0 where nothing is.

    `outputs` are raw, [N, n]. Decompensation: binary cross-entropy of every hour, soft labels
    allowed. Remaining stay: squared error of log(1 + days), so that a day counts more near the end
    than far from it. Mortality and phenotypes have one label a stay: binary cross-entropy (mean
    over the phenotypes) of every hour, and every stay counts the same however long it is.
    """
    losses: dict[str, Tensor] = {}
    for task, raw in outputs.items():
        x = raw.float()
        if task == "phenotyping":
            y = targets.phenotypes[targets.stay]
            known = targets.valid & ~y.isnan().any(1)
            cost = F.binary_cross_entropy_with_logits(x[known], y[known], reduction="none").mean(1)
        else:
            y = targets.hourly[:, LABEL_COLUMNS.index(task)]
            known = ~y.isnan()
            x, y = x[known, 0], y[known]
            if task == "remaining_los":
                cost = F.mse_loss(x, torch.log1p(y / 24), reduction="none")
            else:
                cost = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        if task in ("mortality", "phenotyping"):
            hours = torch.bincount(targets.stay[known], minlength=len(targets.phenotypes))
            cost = cost / hours[targets.stay[known]]
            losses[task] = cost.sum() / (hours > 0).sum().clamp(min=1)
        else:
            losses[task] = cost.sum() / known.sum().clamp(min=1)
    return losses


def with_heads(network: Network, config: FinetuneConfig) -> Network:
    """The pre-trained network with fresh heads, frozen or not as the tuning strategy says."""
    old = network.model
    backbone = old.config.backbone
    if config.dropout is not None:
        # Attention keeps its own rate: the fused kernels are fast without dropout only.
        rates = {
            key: config.dropout
            for key in old.backbone.model.config.to_dict()
            if key.endswith(("pdrop", "dropout", "dropout_prob")) and not key.startswith("att")
        }
        backbone = replace(backbone, config=backbone.config | rates)
    # A backbone trained from random weights comes as not frozen; linear tuning freezes it too.
    backbone = replace(backbone, frozen=config.tuning == "linear")
    heads = {task: len(PHENOTYPES) if task == "phenotyping" else 1 for task in config.tasks}
    model = LLM4EHR(replace(old.config, backbone=backbone, heads=heads))
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("heads.") for name in missing)
    # Tokens and decoder belong to pre-training: nothing here gives them a gradient.
    model.tokens.requires_grad_(False)
    model.decoder.requires_grad_(False)
    model.event_patch.requires_grad_(False)
    model.series_encoder.requires_grad_(config.tuning == "end_to_end")
    return replace(network, model=model)


@torch.no_grad()
def predict(
    model: LLM4EHR, features: FeatureSet, index: NDArray[np.int64], max_hours: int, precision: str
) -> tuple[dict[Task, Tensor], Targets]:
    """Raw outputs [N, n] of each task at every hour, stays in the order of `index`, and targets."""
    was_training = model.training
    model.eval()
    on = next(model.parameters()).device
    rows: dict[Task, list[Tensor]] = {}
    targets: list[Targets] = []
    for start in range(0, len(index), 128):
        batch = features.batch(index[start : start + 128], max_hours=max_hours)
        there = batch.to(on)
        with autocast(precision, on):
            v = model.encode_hours(there.series, there.events, there.hour_mask)
            outputs = model.predict(v[there.hour_mask])
        for task, out in outputs.items():
            rows.setdefault(task, []).append(out.float().cpu())
        made = Targets.of(batch)
        targets.append(replace(made, stay=made.stay + start))
    model.train(was_training)
    return {task: torch.cat(parts) for task, parts in rows.items()}, Targets(
        **{f.name: torch.cat([getattr(t, f.name) for t in targets]) for f in fields(Targets)}
    )


def selection_score(
    by: Task | Literal["loss"],
    outputs: dict[Task, Tensor],
    targets: Targets,
    weights: Mapping[Task, float],
) -> float:
    """Higher is better: minus the weighted loss, or how well one task is answered.

    A task is judged by the AUROC over all certain hours, by minus the error in log days, or by the
    mean AUROC of the phenotypes at the last hour of the stays.
    """
    if by == "loss":
        losses = task_losses(outputs, targets)
        return -float(sum(weights[task] * losses[task] for task in weights))
    if by == "phenotyping":
        known = ~targets.phenotypes.isnan().any(1)
        scores = outputs[by][targets.last][known].numpy()
        return macro(auroc, targets.phenotypes[known].numpy(), scores)
    x, y = outputs[by][:, 0].numpy(), targets.hourly[:, LABEL_COLUMNS.index(by)].numpy()
    if by == "remaining_los":
        known = ~np.isnan(y)
        return -mae(np.log1p(y[known] / 24), x[known])
    sure = certain(y)
    return auroc(y[sure], x[sure])


def finetune(config: FinetuneConfig) -> Network:
    """Run, resume or, if it is finished, load a fine-tuning.

    The best epoch on the validation fold is kept. Raises ValueError where a store has the name of
    other data that the encoder was pre-trained on.
    """
    sources = open_sources(config.data.sources, training=True)
    pretrained = load_network(config.pretrained)
    run = RunFolder(config.run, "finetune", config)
    if run.finished:
        return load_network(config.run)
    pretraining = {
        "config": json.loads((config.pretrained / "pretrain.json").read_text()),
        "result": json.loads((config.pretrained / "result.json").read_text()),
    }
    for source in sources:
        if is_another(source.store.info, pretraining["result"]["stores"]):
            raise ValueError(
                f"{source.store.path}: called {source.name!r} like another store, which the "
                "encoder was pre-trained on; name it with `prepare --name`"
            )
    torch.manual_seed(config.seed)
    network = with_heads(pretrained, config)
    model = network.model.to(device())
    features = build_features(
        sources, network.preprocessing, network.vocabulary, config.data.cache, config.label_options
    )
    fold = features.fold(config.data.n_folds)
    train = subsample(
        np.flatnonzero(fold != config.data.validation_fold), config.data.max_episodes, config.seed
    )
    held_out = np.flatnonzero(fold == config.data.validation_fold)
    check_apart([features.subjects[i] for i in train], [features.subjects[i] for i in held_out])
    best_file = config.run / "best.safetensors"

    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        made = batches(features.lengths[train], config.optim.batch_size, config.seed, epoch)
        return [train[index] for index in made]

    def step(index: NDArray[np.int64]) -> dict[str, Tensor]:
        if config.tuning == "linear":
            model.series_encoder.eval()  # batch norm would move its running statistics
        batch = features.batch(index, max_hours=config.max_hours).to(device())
        hide = (torch.rand(len(index)) < config.modality_dropout).to(device())
        v = model.encode_hours(batch.series, batch.events * ~hide[:, None, None], batch.hour_mask)
        losses = task_losses(model.predict(v[batch.hour_mask]), Targets.of(batch))
        total = torch.stack([config.tasks[t] * losses[t] for t in config.tasks]).sum()
        return {"loss": total} | losses

    def validate() -> tuple[dict[Task, Tensor], Targets]:
        return predict(model, features, held_out, config.max_hours, config.optim.precision)

    def after_epoch(epoch: int) -> bool:
        score = selection_score(config.select_by, *validate(), config.tasks)
        history: list[float] = trainer.extra.setdefault("scores", [])
        if not history or score > max(history):
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, best_file)
        history.append(score)
        return epoch - int(np.argmax(history)) < config.patience

    heads: list[nn.Parameter] = []
    encoder: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if name.startswith("heads.") else encoder).append(parameter)
    groups: list[dict[str, Any]] = [{"params": heads}]
    if encoder:
        rate = config.encoder_learning_rate or config.optim.learning_rate
        groups.append({"params": encoder, "lr": rate})
    trainer = Trainer(model, groups, config.optim, run, epoch_batches)
    trainer.fit(step, after_epoch if len(held_out) else None)
    if len(held_out):
        model.load_state_dict(load_file(best_file))
    save_network(config.run, network)
    (config.run / "pretrained.json").write_text(json.dumps(pretraining, indent=2))
    (config.run / "subjects.json").write_text(
        json.dumps(sorted({features.subjects[i] for i in (*train, *held_out)}))
    )
    run.finish(
        {
            **origins(sources),
            "label_notes": label_notes(sources, list(config.tasks)),
            "preprocessing_digest": network.preprocessing_digest,
            "vocabulary_digest": network.vocabulary.digest,
            "episodes": len(train),
            "validation_episodes": len(held_out),
            "labelled": labelled(features, train, list(config.tasks)),
            "steps": trainer.step,
            "validation_scores": [
                s if np.isfinite(s) else None for s in trainer.extra.get("scores", [])
            ],
            "platt": {},
            "thresholds": {},
            **(_fitted_on(*validate()) if len(held_out) else {}),
        }
    )
    return network


def check_apart(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Raise LeakageError if a patient is on both sides: epochs and calibration would be chosen on
    patients that were trained on."""
    if both := set(train) & set(held_out):
        raise LeakageError(f"{len(both)} patients are both trained on and held out")


def label_notes(sources: Sequence[Source], tasks: Sequence[Task]) -> dict[str, str]:
    """How each data set labels each task that it labels here: "data set: task" -> note."""
    notes: dict[str, str] = {}
    for source in sources:
        of = {_NOTE_TASK.get(key, key): note for key, note in source.store.info.label_notes.items()}
        taken = (task for task in tasks if source.labels_taken(task) and task in of)
        notes |= {f"{source.name}: {task}": of[task] for task in taken}
    return notes


def labelled(
    features: FeatureSet, index: NDArray[np.int64], tasks: Sequence[Task]
) -> dict[str, dict[str, int]]:
    """Number of the given stays with a label: task -> data set -> stays."""
    counts: dict[str, dict[str, int]] = {}
    for task in tasks:
        known = [
            not np.isnan(
                features.phenotypes[i]
                if task == "phenotyping"
                else features.labels[features.hours(i), LABEL_COLUMNS.index(task)]
            ).all()
            for i in index
        ]
        names = np.array([features.sources[i] for i in index])[known]
        counts[task] = dict(sorted(Counter(names.tolist()).items()))
    return counts


def _fitted_on(outputs: dict[Task, Tensor], targets: Targets) -> dict[str, dict[str, Any]]:
    """Platt parameters and decision thresholds of the probability heads, from held-out stays.

    All phenotypes share one line, fitted on the last hour of the stays. A task without a rising
    line stays uncalibrated. The threshold is the one with the best Event 1 score over the held-out
    hours.
    """
    platt: dict[str, tuple[float, float]] = {}
    thresholds: dict[str, float] = {}
    for task, raw in outputs.items():
        if task == "remaining_los":
            continue
        if task == "phenotyping":
            x, y = raw[targets.last].numpy().ravel(), targets.phenotypes.numpy().ravel()
        else:
            x, y = raw[:, 0].numpy(), targets.hourly[:, LABEL_COLUMNS.index(task)].numpy()
        known = ~np.isnan(y)
        if not known.any():
            continue
        a, b = fit_platt(x[known], y[known])
        if a > 0:
            platt[task] = a, b
        else:  # worse than chance on the few held-out stays: a falling line would turn risks round
            a, b = 1.0, 0.0
        sure = certain(y)
        if task != "phenotyping" and sure.any():
            risk = OutputMap(kind="platt", a=a, b=b)(x[sure])
            thresholds[task] = s1_threshold(y[sure], risk)
    return {"platt": platt, "thresholds": thresholds}
