"""Synthetic stays of realistic lengths, as batches of the two ways to train that are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from training.dataset import Batch, batches

N_SERIES, N_CODES, MAX_HOURS = 46, 400, 200
TOKENS_AN_HOUR = 2.6  # the open data: 113 tokens in a stay of 43 hours


def lengths(n: int, *, fixed: bool, seed: int = 0) -> NDArray[np.int64]:
    """Hours of `n` stays: all of 200, or log-normal with a median of two days, at most 200."""
    if fixed:
        return np.full(n, MAX_HOURS)
    drawn = np.random.default_rng(seed).lognormal(math.log(50), 0.9, n)
    return np.clip(drawn, 6, MAX_HOURS).astype(np.int64)


def stays(hours: NDArray[np.int64], max_tokens: int, seed: int = 0) -> Batch:
    """All stays as one padded batch; noise instead of clinical data."""
    rng = np.random.default_rng(seed)
    n = len(hours)
    tokens = np.minimum(rng.poisson(TOKENS_AN_HOUR * hours), max_tokens)
    token_hours = np.full((n, int(tokens.max())), -1)
    for i in range(n):
        token_hours[i, : tokens[i]] = np.sort(rng.integers(0, hours[i], tokens[i]))
    mask = torch.from_numpy(np.arange(MAX_HOURS) < hours[:, None])
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(n, MAX_HOURS, N_SERIES, generator=generator) * mask[..., None]
    return Batch(
        index=np.arange(n),
        series=series,
        events=None,
        hour_mask=mask,
        labels=torch.full((n, MAX_HOURS, 3), torch.nan),
        valid=mask,
        phenotypes=torch.full((n, 25), torch.nan),
        token_ids=torch.randint(0, N_CODES, token_hours.shape, generator=generator),
        token_hours=torch.from_numpy(token_hours),
        token_mask=torch.from_numpy(token_hours >= 0),
        hide_events=torch.zeros(n, dtype=torch.bool),
    )


def padded_batches(everything: Batch, size: int) -> Iterator[Batch]:
    """As the public recipe: shuffled, hours padded to 200, tokens to the longest of the batch."""
    order = np.random.default_rng(0).permutation(len(everything.index))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = everything.part(rows)
        pad = MAX_HOURS - batch.series.shape[1]
        mask = torch.nn.functional.pad(batch.hour_mask, (0, pad))
        series = torch.nn.functional.pad(batch.series, (0, 0, 0, pad))
        yield Batch(
            **{name: getattr(batch, name) for name in batch.__slots__}
            | {"hour_mask": mask, "series": series}
        )


def bucketed_batches(everything: Batch, size: int) -> Iterator[Batch]:
    """As training makes them: stays of similar length together, nothing padded beyond them."""
    hours = everything.hour_mask.sum(1).numpy()
    for rows in batches(hours, size, seed=0, epoch=0):
        yield everything.part(rows)
