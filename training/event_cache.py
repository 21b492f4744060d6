"""Pooled event patches of a frozen EHR pass, computed once and read from disk ever after.

The EHR pass reads up to a thousand tokens a stay where the series pass reads some fifty hours, so
it is most of the cost of a step. When neither the backbone nor the token rows nor the patch head
learn, its result never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llm4ehr.model import LLM4EHR
from training.contrast import pooled_events
from training.dataset import Batch, FeatureSet
from training.progress import track

_BATCH = 64


def event_pass_is_frozen(model: LLM4EHR) -> bool:
    """Whether no parameter that the event patches depend on will change."""
    parts = (model.backbone, model.tokens, model.event_patch)
    return not any(p.requires_grad for part in parts for p in part.parameters())


class EventPatches:
    """Event patches [patches of all stays, H] as a memory-mapped array."""

    def __init__(self, path: Path, features: FeatureSet, patch_hours: int) -> None:
        n_patches = -(-features.lengths // patch_hours)
        self._path = path
        self._offsets = np.concatenate([[0], np.cumsum(n_patches)])
        self._rows: NDArray[np.float32] = np.load(path, mmap_mode="r")

    def add_to(self, batch: Batch) -> Batch:
        """The batch with the event patches of its stays, zero after the end of a stay."""
        rows = [
            torch.from_numpy(np.array(self._rows[self._offsets[i] : self._offsets[i + 1]]))
            for i in batch.index
        ]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return replace(batch, event_patches=padded)


@torch.inference_mode()
def write_event_patches(
    path: Path,
    model: LLM4EHR,
    features: FeatureSet,
    index: NDArray[np.int64],
    load: Callable[[NDArray[np.int64]], Batch],
) -> None:
    """Compute the patches of the stays `index` into a new file, in eval mode; keep a file that is
    there. `load` makes a batch on the model's device."""
    if path.exists():
        return
    hours = model.config.patch_hours
    n_patches = -(-features.lengths // hours)
    offsets = np.concatenate([[0], np.cumsum(n_patches)])
    partial = path.with_suffix(".partial.npy")
    shape = (int(offsets[-1]), model.backbone.hidden_size)
    rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    was_training = model.training
    model.eval()
    by_length = index[np.argsort(features.lengths[index], kind="stable")]
    starts = range(0, len(by_length), _BATCH)
    for start in track(starts, "event pass, once", len(starts)):
        batch = load(by_length[start : start + _BATCH])
        n = int(n_patches[batch.index].max())
        pooled = pooled_events(model, batch, n).float().cpu().numpy()
        for row, i in enumerate(batch.index):
            rows[offsets[i] : offsets[i + 1]] = pooled[row, : n_patches[i]]
    rows.flush()
    model.train(was_training)
    partial.rename(path)
