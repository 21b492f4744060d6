"""Heads in training: what hours are compared with, the loss of each task, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from llm4ehr.model import LLM4EHR, Task
from training.dataset import LABEL_COLUMNS, Batch, FeatureSet
from training.labels import certain
from training.loop import autocast
from training.metrics import auroc, macro, mae


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
    by: Task | Literal["loss", "last"],
    outputs: dict[Task, Tensor],
    targets: Targets,
    weights: Mapping[Task, float],
) -> float:
    """Higher is better: minus the weighted loss, or how well one task is answered.

    A task is judged by the AUROC over all certain hours, by minus the error in log days, or by the
    mean AUROC of the phenotypes at the last hour of the stays.
    """
    if by == "loss" or by == "last":
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
