"""Heads in training: what hours are compared with, the loss of each task, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from llm4ehr.model import Task
from training.dataset import LABEL_COLUMNS, Batch
from training.labels import certain
from training.loop import autocast
from training.metrics import auroc, macro, mae
from training.processes import total
from training.readout import HOURLY, ReadoutOptions, patch_labels

LosScale = Literal["log_days", "days"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What hours are to be compared with. N hours of S stays; NaN = unknown."""

    hourly: Tensor  # [N, 3], columns LABEL_COLUMNS
    valid: Tensor  # [N] hours at which the phenotypes are asked
    stay: Tensor  # [N] row of `phenotypes`, rising
    phenotypes: Tensor  # [S, 25]

    @classmethod
    def of(cls, batch: Batch, options: ReadoutOptions = HOURLY) -> Targets:
        """The hours inside the stays of a batch, stay by stay.

        What is answered once a stay is asked at its last hour, what is answered once a patch at the
        last hour of the patch.
        """
        mask, labels, valid = batch.hour_mask, batch.labels, batch.valid
        length = mask.sum(1, keepdim=True)
        last = torch.arange(mask.shape[1], device=mask.device) == length - 1
        if options.by_patch or "mortality" in options.per_stay:
            labels = labels.clone()
        if options.by_patch:
            for task, how in (("decompensation", "max"), ("remaining_los", "min")):
                column = LABEL_COLUMNS.index(task)
                labels[..., column] = patch_labels(
                    labels[..., column], mask, options.patch_hours, how
                )
        if "mortality" in options.per_stay:
            column = LABEL_COLUMNS.index("mortality")
            # The label is that of the stay; hours after the last labelled one leave it unknown.
            of_stay = labels[..., column].nan_to_num(nan=-1).amax(1, keepdim=True)
            of_stay = of_stay.masked_fill(of_stay < 0, torch.nan)
            labels[..., column] = of_stay.where(last, torch.nan)
        return cls(
            hourly=labels[mask],
            valid=(last if "phenotyping" in options.per_stay else valid)[mask],
            stay=mask.nonzero()[:, 0],
            phenotypes=batch.phenotypes,
        )

    @property
    def last(self) -> Tensor:
        """[S] the last hour of every stay."""
        return torch.bincount(self.stay, minlength=len(self.phenotypes)).cumsum(0) - 1


def task_costs(
    outputs: Mapping[Task, Tensor], targets: Targets, los_scale: LosScale = "log_days"
) -> dict[Task, tuple[Tensor, Tensor]]:
    """Cost of each task added up over what is known, and how many it is added up over.

    `outputs` are raw, [N, n]. Decompensation: binary cross-entropy of every hour, soft labels
    allowed. Remaining stay: squared error of log(1 + days), so that a day counts more near the end
    than far from it, or of days. Mortality and phenotypes have one label a stay: binary
    cross-entropy (mean over the phenotypes) of every hour, and every stay counts the same however
    long it is.
    """
    costs: dict[Task, tuple[Tensor, Tensor]] = {}
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
                days = y / 24
                cost = F.mse_loss(
                    x, torch.log1p(days) if los_scale == "log_days" else days, reduction="none"
                )
            else:
                cost = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        if task in ("mortality", "phenotyping"):
            hours = torch.bincount(targets.stay[known], minlength=len(targets.phenotypes))
            costs[task] = (cost / hours[targets.stay[known]]).sum(), (hours > 0).sum()
        else:
            costs[task] = cost.sum(), known.sum()
    return costs


def task_losses(
    outputs: Mapping[Task, Tensor], targets: Targets, los_scale: LosScale = "log_days"
) -> dict[Task, Tensor]:
    """Mean cost of each task over what is known in the batch of all processes, this one's share.

    0 where nothing is known.
    """
    costs = task_costs(outputs, targets, los_scale)
    return {task: cost / total(n).clamp(min=1) for task, (cost, n) in costs.items()}


@torch.no_grad()
def predict(
    module: nn.Module,
    options: ReadoutOptions,
    load: Callable[[NDArray[np.int64]], Batch],
    index: NDArray[np.int64],
    precision: str,
) -> tuple[dict[Task, Tensor], Targets]:
    """Raw outputs [N, n] of each task at every hour, stays in the order of `index`, and targets.

    `module` is a `TaskModule`, possibly wrapped; `load` makes a batch on its device.
    """
    was_training = module.training
    module.eval()
    rows: dict[Task, list[Tensor]] = {}
    targets: list[Targets] = []
    for start in range(0, len(index), 128):
        batch = load(index[start : start + 128])
        with autocast(precision, batch.series.device):
            outputs = module(batch)
        for task, out in outputs.items():
            rows.setdefault(task, []).append(out.float().cpu())
        made = Targets.of(batch.to(torch.device("cpu")), options)
        targets.append(replace(made, stay=made.stay + start))
    module.train(was_training)
    return {task: torch.cat(parts) for task, parts in rows.items()}, Targets(
        **{f.name: torch.cat([getattr(t, f.name) for t in targets]) for f in fields(Targets)}
    )


def selection_score(
    by: Task | Literal["loss", "last"],
    outputs: dict[Task, Tensor],
    targets: Targets,
    weights: Mapping[Task, float],
    los_scale: LosScale = "log_days",
) -> float:
    """Higher is better: minus the weighted loss, or how well one task is answered.

    A task is judged by the AUROC over all certain hours, by minus the error in log days, or by the
    mean AUROC of the phenotypes at the last hour of the stays.
    """
    if by == "loss" or by == "last":
        costs = task_costs(outputs, targets, los_scale)
        mean = {task: float(cost / n.clamp(min=1)) for task, (cost, n) in costs.items()}
        return -sum(weight * mean[task] for task, weight in weights.items())
    if by == "phenotyping":
        known = ~targets.phenotypes.isnan().any(1)
        scores = outputs[by][targets.last][known].numpy()
        return macro(auroc, targets.phenotypes[known].numpy(), scores)
    x, y = outputs[by][:, 0].numpy(), targets.hourly[:, LABEL_COLUMNS.index(by)].numpy()
    if by == "remaining_los":
        known = ~np.isnan(y)
        days = y[known] / 24
        return -mae(np.log1p(days) if los_scale == "log_days" else days, x[known])
    sure = certain(y)
    return auroc(y[sure], x[sure])
