"""Heads on a pre-trained encoder: all tasks jointly, one encoder, hour by hour."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

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
from training.dataset import (
    LABEL_COLUMNS,
    Batch,
    FeatureSet,
    batches,
    build_features,
    open_sources,
    subsample,
)
from training.loop import RunFolder, Trainer, autocast, device
from training.metrics import auroc, fit_platt, mae, s1_threshold


def task_losses(outputs: dict[Task, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Mean loss of each task over its known hours; 0 where none is known.

    Decompensation and mortality: binary cross-entropy at every hour, soft labels allowed. Remaining
    stay: squared error of log(1 + days), so that a day counts more near the end than far from it.
    """
    losses: dict[str, Tensor] = {}
    for task, out in outputs.items():
        target = labels[..., LABEL_COLUMNS.index(task)]
        known = ~target.isnan()
        x, y = out[..., 0].float()[known], target[known]
        if task == "remaining_los":
            loss = F.mse_loss(x, torch.log1p(y / 24), reduction="sum")
        else:
            loss = F.binary_cross_entropy_with_logits(x, y, reduction="sum")
        losses[task] = loss / known.sum().clamp(min=1)
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
    model = LLM4EHR(replace(old.config, backbone=backbone, heads=dict.fromkeys(config.tasks, 1)))
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
) -> dict[str, NDArray[np.float32]]:
    """Raw outputs of each task, one row an hour, episodes in the order of `index`; and "labels"."""
    was_training = model.training
    model.eval()
    on = next(model.parameters()).device
    rows: dict[str, list[NDArray[np.float32]]] = {"labels": []}
    for start in range(0, len(index), 128):
        batch = _truncated(features.batch(index[start : start + 128]), max_hours).to(on)
        with autocast(precision, on):
            outputs = model.predict(model.encode_hours(batch.series, batch.events, batch.hour_mask))
        mask = batch.hour_mask.cpu()
        for task, out in outputs.items():
            rows.setdefault(task, []).append(out[..., 0].float().cpu()[mask].numpy())
        rows["labels"].append(batch.labels.cpu()[mask].numpy())
    model.train(was_training)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def selection_score(task: Task, outputs: dict[str, NDArray[np.float32]]) -> float:
    """Higher is better: AUROC over all certain hours, or minus the error in log days."""
    target = outputs["labels"][:, LABEL_COLUMNS.index(task)]
    if task == "remaining_los":
        known = ~np.isnan(target)
        return -mae(np.log1p(target[known] / 24), outputs[task][known])
    sure = (target == 0) | (target == 1)
    return auroc(target[sure], outputs[task][sure])


def finetune(config: FinetuneConfig) -> Network:
    """Run, resume or, if it is finished, load a fine-tuning.

    The best epoch on the validation fold is kept.
    """
    sources = open_sources(config.data.sources, training=True)
    pretrained = load_network(config.pretrained)
    run = RunFolder(config.run, "finetune", config)
    if run.finished:
        return load_network(config.run)
    torch.manual_seed(config.seed)
    network = with_heads(pretrained, config)
    model = network.model.to(device())
    features = build_features(
        sources, network.preprocessing, network.vocabulary, config.data.cache, config.label_align
    )
    fold = features.fold(config.data.n_folds)
    train = subsample(
        np.flatnonzero(fold != config.data.validation_fold), config.data.max_episodes, config.seed
    )
    held_out = np.flatnonzero(fold == config.data.validation_fold)
    best_file = config.run / "best.safetensors"

    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        made = batches(features.lengths[train], config.optim.batch_size, config.seed, epoch)
        return [train[index] for index in made]

    def step(index: NDArray[np.int64]) -> dict[str, Tensor]:
        if config.tuning == "linear":
            model.series_encoder.eval()  # batch norm would move its running statistics
        batch = _truncated(features.batch(index), config.max_hours).to(device())
        hide = (torch.rand(len(index)) < config.modality_dropout).to(device())
        v = model.encode_hours(batch.series, batch.events * ~hide[:, None, None], batch.hour_mask)
        losses = task_losses(model.predict(v), batch.labels)
        total = torch.stack([config.tasks[t] * losses[t] for t in config.tasks]).sum()
        return {"loss": total} | losses

    def validate() -> dict[str, NDArray[np.float32]]:
        return predict(model, features, held_out, config.max_hours, config.optim.precision)

    def after_epoch(epoch: int) -> bool:
        score = selection_score(config.select_by, validate())
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
    (config.run / "pretrained.json").write_text(
        json.dumps(
            {
                "config": json.loads((config.pretrained / "pretrain.json").read_text()),
                "result": json.loads((config.pretrained / "result.json").read_text()),
            },
            indent=2,
        )
    )
    run.finish(
        {
            "licences": {store.info.source: store.info.licence for store, _ in sources},
            "label_notes": {
                k: v for store, _ in sources for k, v in store.info.label_notes.items()
            },
            "episodes": len(train),
            "validation_episodes": len(held_out),
            "steps": trainer.step,
            "validation_scores": [
                s if np.isfinite(s) else None for s in trainer.extra.get("scores", [])
            ],
            "platt": {},
            "thresholds": {},
            **(_fitted_on(validate(), config) if len(held_out) else {}),
        }
    )
    return network


def _fitted_on(
    outputs: dict[str, NDArray[np.float32]], config: FinetuneConfig
) -> dict[str, dict[str, Any]]:
    """Platt parameters and decision threshold of the probability heads, from held-out hours.

    The threshold is the one with the best Event 1 score over the held-out hours.
    """
    platt: dict[str, tuple[float, float]] = {}
    thresholds: dict[str, float] = {}
    for task in config.tasks:
        target = outputs["labels"][:, LABEL_COLUMNS.index(task)]
        known = ~np.isnan(target)
        if task == "remaining_los" or not known.any():
            continue
        platt[task] = fit_platt(outputs[task][known], target[known])
        sure = (target == 0) | (target == 1)
        a, b = platt[task]
        risk = OutputMap(kind="platt", a=a, b=b)(outputs[task][sure])
        thresholds[task] = s1_threshold(target[sure], risk)
    return {"platt": platt, "thresholds": thresholds}


def _truncated(batch: Batch, max_hours: int) -> Batch:
    hourly = ("series", "events", "hour_mask", "labels")
    return replace(batch, **{name: getattr(batch, name)[:, :max_hours] for name in hourly})
