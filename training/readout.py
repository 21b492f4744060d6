"""From the states of the hours to what each head reads (M14, M16).

A deployed network answers every task at every hour from the state of that hour. The paper's tables
read a stay out once, and its published code asks the hourly tasks once a patch: both are here, in
the form of one state an hour so that everything downstream stays the same. What is read out once
stands at every hour and counts at the last hour of the stay alone.

Shape legend: B stays, T hours, S width of a state, N hours of all stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm4ehr.model import LLM4EHR, Task
from llm4ehr.prompts import SuffixPrompt
from training.config import FinetuneConfig, Readout
from training.dataset import Batch, token_groups

_ONCE_A_STAY: tuple[Task, ...] = ("mortality", "phenotyping")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadoutOptions:
    """How hours become answers; `per_stay` has the tasks that are answered once."""

    per_stay: Mapping[Task, Readout] = field(default_factory=dict)
    by_patch: bool = False
    patch_hours: int = 5
    max_hours: int = 200

    @classmethod
    def of(cls, config: FinetuneConfig, patch_hours: int) -> ReadoutOptions:
        """As a run is configured. A suffix prompt is a read-out by itself: see `task_states`."""
        chosen: dict[Task, Readout] = {
            task: how
            for task, how in config.readout.items()
            if how != "hourly" and task in config.tasks
        }
        if config.tuning.strategy == "prompt" and config.tuning.position == "suffix":
            chosen |= {t: chosen.get(t, "last_valid") for t in _ONCE_A_STAY if t in config.tasks}
        return cls(
            per_stay=chosen,
            by_patch=config.hourly_unit == "patch",
            patch_hours=patch_hours,
            max_hours=config.max_hours,
        )

    @property
    def deployable(self) -> bool:
        """Whether answers are hourly, as the service gives them."""
        return not self.per_stay and not self.by_patch


HOURLY = ReadoutOptions()


def stay_state(states: Tensor, hour_mask: Tensor, how: Readout) -> Tensor:
    """One state a stay [B, S] from its hours [B, T, S].

    "last_valid" is the last hour inside the stay, "last_row" the last of the T, "mean" and "max"
    are taken over the hours inside, channel by channel.
    """
    inside = hour_mask[..., None]
    if how == "mean":
        return (states * inside).sum(1) / inside.sum(1).clamp(min=1)
    if how == "max":
        return states.masked_fill(~inside, -torch.inf).amax(1)
    if how == "last_row":
        return states[:, -1]
    last = hour_mask.sum(1).clamp(min=1) - 1
    return states[torch.arange(len(states), device=states.device), last]


def patch_states(states: Tensor, patch_hours: int) -> Tensor:
    """The mean over the hours so far of the patch that an hour lies in: [B, T, S] -> [B, T, S]."""
    total = states.cumsum(1)
    hour = torch.arange(states.shape[1], device=states.device)
    before = hour - hour % patch_hours  # hours before the patch began
    base = torch.where((before > 0)[:, None], total[:, (before - 1).clamp(min=0)], 0.0)
    return (total - base) / (hour - before + 1)[:, None]


def patch_labels(labels: Tensor, hour_mask: Tensor, patch_hours: int, how: str) -> Tensor:
    """Labels [B, T] asked once a patch: the "max" or "min" of its known hours, at its last hour.

    Everywhere else, and in patches without a known hour, NaN.
    """
    n = -(-labels.shape[1] // patch_hours)
    fill = -torch.inf if how == "max" else torch.inf
    padded = labels.new_full((len(labels), n * patch_hours), fill)
    padded[:, : labels.shape[1]] = labels.masked_fill(labels.isnan() | ~hour_mask, fill)
    by_patch = padded.view(len(labels), n, patch_hours)
    extreme = by_patch.amax(2) if how == "max" else by_patch.amin(2)
    hour = torch.arange(labels.shape[1], device=labels.device)
    is_last = hour_mask & (
        (hour % patch_hours == patch_hours - 1) | (hour == hour_mask.sum(1, keepdim=True) - 1)
    )
    value = extreme[:, hour // patch_hours]
    return value.masked_fill(~is_last | value.isinf(), torch.nan)


def task_states(model: LLM4EHR, batch: Batch, options: ReadoutOptions) -> dict[Task, Tensor]:
    """What the head of each task reads at every hour: task -> [B, T, S].

    A stay with a suffix prompt is read out from the mean state over the prompt.
    """
    shown = batch.token_mask & ~batch.hide_events[:, None]
    events = batch.events
    if events is not None:
        events = events * ~batch.hide_events[:, None, None]
    if isinstance(model.prompt, SuffixPrompt):
        states, summary = model.encode_with_suffix(batch.series, events, batch.hour_mask)
        by_stay = dict.fromkeys(options.per_stay, summary)
    else:
        states = _states(model, batch, events, shown)
        by_stay = {
            task: stay_state(states, batch.hour_mask, how)
            if how != "last_row"
            else _after_padding(model, batch, events, shown, options.max_hours)
            for task, how in options.per_stay.items()
        }
    hourly = patch_states(states, options.patch_hours) if options.by_patch else states
    chosen = {}
    for task in model.config.heads:
        once = by_stay.get(task)
        if once is not None:
            chosen[task] = once[:, None].expand(-1, states.shape[1], -1)
        else:
            chosen[task] = states if task in _ONCE_A_STAY else hourly
    return chosen


def _states(model: LLM4EHR, batch: Batch, events: Tensor | None, shown: Tensor) -> Tensor:
    """`LLM4EHR.encode_stay` of a batch, stays with few tokens apart from those with many."""
    if model.config.events != "stream":
        return model.encode_stay(
            batch.series, events, batch.hour_mask, batch.token_ids, batch.token_hours, shown
        )
    parts, order = [], []
    for rows, width in token_groups(batch.token_mask):
        parts.append(
            model.encode_stay(
                batch.series[rows],
                None,
                batch.hour_mask[rows],
                batch.token_ids[rows, :width],
                batch.token_hours[rows, :width],
                shown[rows, :width],
            )
        )
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _after_padding(
    model: LLM4EHR, batch: Batch, events: Tensor | None, shown: Tensor, max_hours: int
) -> Tensor:
    """The state of the last of `max_hours` rows, those after the stay counted as hours."""
    pad = max_hours - batch.series.shape[1]
    series = nn.functional.pad(batch.series, (0, 0, 0, pad))
    padded = None if events is None else nn.functional.pad(events, (0, 0, 0, pad))
    everywhere = torch.ones(series.shape[:2], dtype=torch.bool, device=series.device)
    states = model.encode_stay(
        series, padded, everywhere, batch.token_ids, batch.token_hours, shown
    )
    return states[:, -1]


class TaskModule(nn.Module):
    """What fine-tuning trains and what is wrapped for several processes: raw outputs of a batch."""

    def __init__(self, model: LLM4EHR, options: ReadoutOptions) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, batch: Batch) -> dict[Task, Tensor]:
        """task -> raw outputs [N, n] of the hours inside the stays, stay by stay."""
        states = task_states(self.model, batch, self.options)
        return {
            task: self.model.heads[task](state[batch.hour_mask]) for task, state in states.items()
        }
