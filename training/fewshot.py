"""Few-shot: a small labelled part of the stays that would be trained on (paper, Tables 15 and 16).

How the paper draws it is not said. Here the seed of the run draws it, so that every model of one
seed learns from the same stays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def few_shot(
    index: NDArray[np.int64],
    fraction: float,
    seed: int,
    deaths: NDArray[np.floating] | None = None,
    phenotypes: NDArray[np.floating] | None = None,
) -> NDArray[np.int64]:
    """That share of `index`, at least one stay, in the order of `index`.

    `deaths` [stays] and `phenotypes` [stays, labels] are of all stays that `index` counts, 1, 0 or
    NaN where unknown. With `deaths`, given for mortality and decompensation, the share of deaths is
    kept, and a death is among the drawn wherever more than one stay is drawn. With `phenotypes`
    every label that has a positive keeps one, as far as so few stays can.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}: it must be above 0 and at most 1")
    size = max(round(fraction * len(index)), 1)
    if size >= len(index):
        return index
    rng = np.random.default_rng(seed)
    strata = np.zeros(len(index)) if deaths is None else np.nan_to_num(deaths[index], nan=-1.0)
    drawn = _stratified(strata, size, rng)
    if phenotypes is not None:
        drawn = _with_positives(drawn, phenotypes[index] == 1, strata, rng)
    return index[drawn]


def _stratified(
    strata: NDArray[np.floating], size: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which rows are drawn [n]: of each stratum its share, by the largest remainders."""
    names, of, counts = np.unique(strata, return_inverse=True, return_counts=True)
    share = counts * size / len(strata)
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: size - quota.sum()]] += 1
    # The stratum of deaths is the last one and may be too small for a whole stay.
    if names[-1] == 1 and quota[-1] == 0 and size > 1:
        quota[-1] = 1
        quota[np.argmax(quota)] -= 1
    drawn = np.zeros(len(strata), bool)
    for stratum, n in enumerate(quota):
        drawn[rng.permutation(np.flatnonzero(of == stratum))[:n]] = True
    return drawn


def _with_positives(
    drawn: NDArray[np.bool_],
    positive: NDArray[np.bool_],
    strata: NDArray[np.floating],
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """`drawn` [n], with stays exchanged so that no label of `positive` [n, labels] lacks one.

    Rare labels come first. A stay makes room only for one of its own stratum, and only if no other
    label loses its last positive.
    """
    drawn = drawn.copy()
    for label in np.argsort(positive.sum(0), kind="stable"):
        if positive[drawn, label].any():
            continue
        candidates = rng.permutation(np.flatnonzero(positive[:, label] & ~drawn))
        lone = positive & (positive[drawn].sum(0) == 1)
        free = drawn & ~lone.any(1)
        for new in candidates:
            if (leaving := np.flatnonzero(free & (strata == strata[new]))).size:
                drawn[new], drawn[rng.choice(leaving)] = True, False
                break
    return drawn
